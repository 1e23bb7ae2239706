"""The run folder: what stands where, who may start in it, and files that are there whole or not at all.

    config.yaml       the resolved configuration      metrics.jsonl   a line per log event
    environment.json  versions, commit, seed          checkpoints/    to resume from; a COMPLETE marker in each
    data.json         what became of the examples     adapter/        what was trained; or model/, the whole model
    scoring.json      what making the plan took       result.json     the final numbers; the run is finished
    plan.json         the selected blocks

After a dense warm-up, checkpoints/dense-warm-up is the model that it left, which the later checkpoints go with.

Imports `smtune.training.config` and `smtune.errors`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from smtune.errors import InputError
from smtune.files import write_text
from smtune.training.config import TrainConfig, load_config

COMPLETE = "COMPLETE"
"""Stands in a checkpoint once every file of it is written."""

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
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        return self.result.is_file()

    def check_start(self, config: TrainConfig, resume: bool) -> None:
        """Raises InputError unless `config` (resolved) may start here: in a new or empty folder, or as the same run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InputError(f"Expected output to be a folder. {self.path} is a file.")
        if not self.is_begun:
            if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise InputError(
                    f"Expected a new or empty folder. {self.path} holds other files: choose another output."
                )
            return
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

    def last_checkpoint(self) -> Path | None:
        """The latest complete checkpoint. Those that a kill left incomplete are removed."""
        checkpoints = sorted(self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in checkpoints:
            if not (path / COMPLETE).is_file():
                shutil.rmtree(path)
        complete = [path for path in checkpoints if path.is_dir()]
        return complete[-1] if complete else None

    def cut_metrics(self, step: int) -> None:
        """Drop the lines behind a step, and one that a kill cut short: the steps will be trained again."""
        if self.metrics.is_file():
            kept = [line for line in read_metrics(self.metrics) if line["step"] <= step]
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _flat(config: TrainConfig) -> dict[str, Any]:
    """{dotted key: value} of what decides the result."""
    flat = {}
    for key, value in yaml.safe_load(config.to_yaml()).items():
        if key not in _MAY_CHANGE:
            flat |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    return flat


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
    """Let `fill` write into a new folder that then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}-unfinished")
    for old in (temporary, path):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    temporary.rename(path)
