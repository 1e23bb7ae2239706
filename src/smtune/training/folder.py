"""The run folder: what stands where, who may start in it, and files that are there whole or not at all.

    config.yaml       the resolved configuration      metrics.jsonl   a line per log event
    environment.json  versions, commit, seed          checkpoints/    to resume from; a COMPLETE marker in each
    data.json         what became of the examples     adapter/        what was trained; or model/, the whole model
    scoring.json      what making the plan took       result.json     the final numbers; the run is finished
    plan.json         the selected blocks

After a dense warm-up, checkpoints/dense-warm-up is the model that it left, which the later checkpoints go with.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from smtune.errors import InputError
from smtune.files import not_writable, settle, sync, sync_folder, write_json, write_text
from smtune.training.config import TrainConfig, load_config

COMPLETE = "COMPLETE"
"""Stands in a checkpoint once every file of it is written, and holds their names and sizes."""

_MAY_CHANGE = ("output", "evaluation")
"""Keys that have no bearing on what is trained."""


class RunFolder:
    """Paths of a run, and the rules by which they are written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.scoring = self.path / "scoring.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.warmed = self.checkpoints / "dense-warm-up"
        self.result = self.path / "result.json"

    def trained(self, config: TrainConfig) -> Path:
        """Where the result stands: an adapter or a whole model."""
        return self.path / ("model" if config.saves_whole_model else "adapter")

    def has_plan(self, config: TrainConfig) -> bool:
        """Whether the blocks are chosen, and the model that they were chosen for can be had."""
        return self.plan.is_file() and (not config.has_dense_warmup or self.warmed.is_dir())

    @property
    def is_begun(self) -> bool:
        """Whether a run was begun here: the configuration is as a run writes it, or smtune's records are beside it.

        A recipe of the user's own, which may have any name, is no sign of that.
        """
        if not self.config.is_file():
            return False
        with suppress(OSError, ValueError, TypeError):
            if "smtune" in json.loads(self.environment.read_text(encoding="utf-8")):
                return True
        if any((checkpoint / COMPLETE).is_file() for checkpoint in list_checkpoints(self.checkpoints)):
            return True
        with suppress(OSError, ValueError, InputError):
            return load_config(self.config).resolved().to_yaml() == self.config.read_text(encoding="utf-8")
        return False

    @property
    def is_finished(self) -> bool:
        return self.result.is_file()

    @property
    def holds_work(self) -> bool:
        """Whether starting over would lose anything: a plan, a checkpoint, or what was trained."""
        made = [self.plan, self.path / "adapter", self.path / "model", self.result]
        made += [checkpoint / COMPLETE for checkpoint in list_checkpoints(self.checkpoints)]
        return any(path.exists() for path in made)

    def check_start(
        self, config: TrainConfig, resume: bool, processes: int, engine: str, is_autocast: bool = False
    ) -> None:
        """Raises InputError unless `config` (resolved) may start here: in a new or empty folder, or as the same run.

        Args:
            processes: that would train. A step takes rows for each, so another number is another run.
            engine: that would train. Another finds no state of the optimizer in the checkpoints.
            is_autocast: whether its products would be under autocast. Others give other bits.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"Expected output to be a folder. {self.path} is a file.")
        fault = None if self.is_finished else not_writable(self.config)
        if fault is not None:
            raise InputError(f"output: {fault}")
        if not self.path.exists():
            return
        if not self.is_begun:
            if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise InputError(
                    f"Expected a new or empty folder. {self.path} holds other files: choose another output."
                )
            return
        if not self.holds_work:
            return  # its start came to nothing: any configuration may have it
        if not resume:
            state = "a finished run" if self.is_finished else "a run that was stopped"
            raise InputError(
                f"Expected a new or empty folder. {self.path} holds {state}: continue it with --resume, or choose "
                "another output."
            )
        before, now = (_flat(one) for one in (load_config(self.config).resolved(), config))
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        if changed:
            lines = [f"{key}: {before.get(key)!r} before, {now.get(key)!r} now" for key in changed]
            raise InputError(
                f"Expected the configuration that {self.path} was started with. Got changes in:\n  "
                + "\n  ".join(lines)
                + "\nUndo them, or choose another output."
            )
        self._check_launch(config, processes, engine, is_autocast)
        for record in (self.data, self.environment, self.scoring):
            if record.is_file():
                read_record(record)

    def _check_launch(self, config: TrainConfig, processes: int, engine: str, is_autocast: bool) -> None:
        whole = [path for path in list_checkpoints(self.checkpoints) if (path / COMPLETE).is_file()]
        if self.is_finished or not whole or not self.environment.is_file():
            return
        started = read_record(self.environment)
        starts = [started, *started.get("resumed", [])]
        last = [start for start in starts if start.get("step", 0) < step_of(whole[-1])][-1]  # which made the checkpoint
        before = last.get("processes", processes)
        if before != processes:
            raise InputError(
                f"Expected the number of processes that made the checkpoints in {self.path}, {before}: a step takes "
                f"rows for each. Got {processes}: start {before}, or choose another output."
            )
        was_autocast = last.get("autocast", config.method == "full" and config.dtype == "bfloat16")  # as of old
        if was_autocast != is_autocast:
            raise InputError(
                f"Expected the products that made the checkpoints in {self.path}, {_products(was_autocast)}. Got "
                f"{_products(is_autocast)}, as smtune trains this method now: use the smtune that began it, or choose "
                "another output."
            )
        before = last.get("engine", engine)  # older records have none
        if before != engine:
            raise InputError(
                f"Expected the engine that made the checkpoints in {self.path}, {before}, which alone reads its "
                f"optimizer's state. Got {engine}: start it as before, or choose another output."
            )

    def last_checkpoint(self, tell: Callable[[str], object] = lambda text: None) -> Path | None:
        """The latest sound checkpoint. Those that a kill left incomplete are removed, and damaged ones behind it.

        Args:
            tell: called with a sentence for each damaged checkpoint that an older one stands in for.
        Raises:
            InputError: every complete checkpoint is damaged. Nothing of them is removed.
        """
        self.remove_incomplete()
        damaged: list[tuple[Path, str]] = []
        for path in reversed(list_checkpoints(self.checkpoints)):
            fault = _fault_of_checkpoint(path)
            if fault is None:
                for other, its_fault in damaged:
                    tell(f"{other.name} is damaged ({its_fault}) and left out; {path.name} is older and sound.")
                    shutil.rmtree(other)  # its steps will be trained again
                return path
            damaged.append((path, fault))
        if damaged:
            found = "\n  ".join(f"{path}: {fault}" for path, fault in damaged)
            raise InputError(
                f"Expected a checkpoint to resume from. Got damaged ones alone:\n  {found}\nRestore the files, or "
                "delete these folders to train again from the first step."
            )
        return None

    def remove_incomplete(self) -> None:
        """Remove the checkpoints that were not written to their end."""
        for path in list_checkpoints(self.checkpoints):
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path)

    @contextmanager
    def room_needed(self) -> Iterator[None]:
        """While a run writes: say that the disk is full in one way, and leave nothing half written on it.

        Raises:
            InputError: instead of what the system, safetensors or torch raises.
        """
        try:
            yield
        except Exception as error:
            if not _tells_of_full_disk(error):
                raise
            with suppress(OSError):  # another process of the run was faster
                self.remove_incomplete()
            place = getattr(error, "filename", None) or self.path
            free = shutil.disk_usage(self.path).free
            raise InputError(
                f"Expected room for {place}. The disk is full, with {free:,} bytes left: free space, then go on with "
                "--resume."
            ) from error

    def sync_metrics(self) -> None:
        """Have the disk hold the metrics, if there are any yet, before what is written next."""
        if self.metrics.is_file():
            sync(self.metrics)
            sync(self.path)

    def cut_metrics(self, step: int, tell: Callable[[str], object] = lambda text: None) -> None:
        """Drop the lines behind a step, and one that a kill cut short: the steps will be trained again.

        Args:
            tell: called with a sentence if lines up to the step are missing.
        """
        kept = []
        if self.metrics.is_file():
            kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        last = kept[-1]["step"] if kept else 0
        if last < step:
            tell(
                f"Warning: {self.metrics.name} ends at step {last}, and the checkpoint is of step {step}: the losses "
                f"and seconds between are lost, and {self.result.name} goes without them."
            )


def _flat(config: TrainConfig) -> dict[str, Any]:
    """{dotted key: value} of what decides the result."""
    flat = {}
    for key, value in yaml.safe_load(config.to_yaml()).items():
        if key not in _MAY_CHANGE:
            flat |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by their steps, whole or not. Folders with other names are somebody else's."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def _products(is_autocast: bool) -> str:
    return "in bf16 under autocast" if is_autocast else "without autocast"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path) -> None:
    """Put the marker into a checkpoint once all of it is on the disk."""
    files = _sizes(checkpoint)
    sync_folder(checkpoint)
    write_json(checkpoint / COMPLETE, {"files": files})
    sync(checkpoint.parent)


def _tells_of_full_disk(error: Exception) -> bool:
    """Safetensors' error holds no number, and torch's says no more than that a write came to another place."""
    text = str(error)
    if "/dev/shm" in text:  # shared memory, of which containers have little: the error itself says what to do
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    is_told = any(os.strerror(number) in text for number in (errno.ENOSPC, errno.EDQUOT))
    return is_told or (isinstance(error, RuntimeError) and "unexpected pos" in text)


def _sizes(checkpoint: Path) -> dict[str, int]:
    """{path within the checkpoint: bytes} of its files."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / COMPLETE)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def _fault_of_checkpoint(checkpoint: Path) -> str | None:
    """What of a complete checkpoint is not as it was written, or None."""
    text = (checkpoint / COMPLETE).read_text(encoding="utf-8", errors="replace")
    try:
        files: dict[str, int] = json.loads(text)["files"]
    except (ValueError, TypeError, KeyError):
        return f"{COMPLETE} cannot be read"
    present = _sizes(checkpoint)
    for name, size in files.items():
        if name not in present:
            return f"{name} is missing"
        if present[name] != size:
            return f"{name} has {present[name]:,} bytes, not {size:,}"
    return None


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a JSON file of a run folder.

    Raises:
        InputError: it cannot be read, or lacks one of the keys.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in values] if isinstance(values, dict) else []
        fault = f"an object without {', '.join(missing)}" if missing else "no JSON object"
    except ValueError as error:
        values, missing, fault = None, [], f"no JSON ({error})"
    if missing or not isinstance(values, dict):
        raise InputError(
            f"Expected {path} as smtune wrote it. Got {fault}: restore the file, or delete it and go on with --resume, "
            "which can do without."
        )
    return values


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The log events of a run, in order. A last line cut short by a kill is left out."""
    events = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder that then takes the place of `path`, once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}-unfinished")
    for old in (temporary, path):
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        settle(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
