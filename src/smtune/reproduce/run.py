"""The runner: which cells are missing, run them, say how long it will take, and start again anywhere.

Every finished cell is a file (`store`), so stopping and starting again loses the cells that were running and no more.
With several jobs a cell runs in one of as many processes, and one that is killed loses its cell alone; on GPUs each
process has one of them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from smtune.errors import InputError
from smtune.files import write_json
from smtune.reproduce.cells import Arm, Cell, Record, arms
from smtune.reproduce.declared import Experiment, load_experiment
from smtune.reproduce.setting import Setting, load_data
from smtune.reproduce.store import Store

CELLS = "cells"
FAILED = "failed"
SECONDS_BETWEEN_REPORTS = 120
KILLED = "its process was killed, mostly for want of memory, or crashed"
Say = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """How something is to be reproduced.

    Attributes:
        setting: tier, data, cuts.
        seeds: None: the tier's.
        max_cells: of each experiment, at most; a cut.
    """

    setting: Setting
    seeds: Sequence[int] | None = None
    max_cells: int | None = None

    @property
    def is_cut(self) -> bool:
        return self.setting.is_cut or self.max_cells is not None

    def arms(self, experiment: Experiment) -> list[Arm]:
        """The arms of an experiment. Its data is read, where it needs some, and hashed into their configuration."""
        tier = self.setting.declared
        base = self.setting.shape if experiment.kind == "memory" else self.setting.base
        families = self.setting.families(experiment)
        return list(arms(experiment, tier, families, self.seeds, base, self.setting.steps))

    def families(self, name: str) -> list[str]:
        """The families whose data an experiment reads: its own, and those that its rows train or score on besides."""
        experiment, tier = load_experiment(name), self.setting.declared
        families = self.setting.families(experiment) if experiment.kind != "memory" else []
        besides = [each for row in experiment.rows_at(tier.scale) for each in (row.then, row.scored_on) if each]
        return list(dict.fromkeys([*families, *besides])) if families else []

    def wanted(self, arms: Sequence[Arm], store: Store) -> list[Cell]:
        """The cells known so far, in order: all sweeps, then the other seeds at the rates that were found best."""
        cells = [cell for arm in arms for cell in arm.sweep()]
        cells += [cell for arm in arms for cell in arm.cells(store.find)[len(arm.rates) :]]
        return _by_id(cells)[: self.max_cells]


def _by_id(cells: Iterable[Cell]) -> list[Cell]:
    return list({cell.id: cell for cell in cells}.values())


@dataclass
class Runner:
    """Runs what is missing of a request.

    Attributes:
        output: the folder of results.
        jobs: cells at a time.
        threads: of each. None: the cores shared among the jobs.
        say: told of every step that matters, a line each.
    """

    request: Request
    output: Path
    jobs: int = 1
    threads: int | None = None
    say: Say = print
    tried: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises InputError for more jobs than GPUs, where there are any."""
        import torch

        n_devices = torch.cuda.device_count() if torch.cuda.is_available() else self.jobs
        if self.jobs > n_devices:
            raise InputError(
                f"Expected --jobs of at most {n_devices}, the number of GPUs here. Got {self.jobs}: give fewer, or "
                "hide the GPUs by CUDA_VISIBLE_DEVICES= to run on the CPU."
            )
        self.store = Store(self.output / CELLS)

    def run(self, name: str) -> bool:
        """Run the missing cells of an experiment.

        Returns:
            Whether all that are wanted are there.
        Raises:
            InputError: what a cell says is wrong with the request, once the cells beside it have ended and are kept.
        """
        experiment = load_experiment(name)
        arms = self.request.arms(experiment)
        if not arms:
            self.say(f"{name}: nothing to run at this scale")
            return True
        for family in self.request.families(name):
            self.say(f"{name}: {family}: {load_data(self.request.setting, family).overlap_text()}")
        expected = min(sum(arm.n_cells for arm in arms), self.request.max_cells or 1 << 30)
        done = len([cell for cell in self.request.wanted(arms, self.store) if self.store.find(cell)])
        self.say(f"{name}: {expected} cells, {done} of them there already")
        self._run_all(name, arms, expected)
        return all(self.store.find(cell) for cell in self.request.wanted(arms, self.store))

    def _missing(self, arms: Sequence[Arm]) -> list[Cell]:
        wanted = self.request.wanted(arms, self.store)
        return [cell for cell in wanted if cell.id not in self.tried and self.store.find(cell) is None]

    def _run_all(self, name: str, arms: Sequence[Arm], expected: int) -> None:
        progress = _Progress(name, expected, self.jobs, self.say)
        refused: InputError | None = None
        with _pool(self.jobs, self.threads) as pool:
            running: dict[Future[Any], Cell] = {}
            while True:
                missing = self._missing(arms) if refused is None else []
                for cell in missing[: self.jobs - len(running)]:
                    self.tried.add(cell.id)
                    self.say(f"{name}: {cell.label} …")
                    running[pool.submit(_in_worker, cell, self.request.setting)] = cell
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        self._keep(running.pop(future), future, progress, arms)
                    except InputError as error:  # it will fail for all others too, and says what to do
                        refused = refused or error
        if refused is not None:
            raise refused

    def _keep(self, cell: Cell, future: Future[Any], progress: _Progress, arms: Sequence[Arm]) -> None:
        failed = self.output / FAILED / f"{cell.id}.json"
        error = future.exception()
        if isinstance(error, InputError):
            raise error
        if error is not None:
            text = KILLED if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
            write_json(failed, {"cell": cell.id, "label": cell.label, "config": dict(cell.config), "error": text})
            self.say(f"{cell.label} failed: {text}. It is tried again with the next call.")
            return
        outcome = future.result()
        self.store.save(cell, outcome.record, outcome.items)
        failed.unlink(missing_ok=True)
        cells = self.request.wanted(arms, self.store)
        progress.tell(cell, outcome.record, sum(self.store.find(each) is not None for each in cells))


class _Progress:
    """A line for each finished cell, with what it gave and the time left by the mean of those of this call."""

    def __init__(self, name: str, expected: int, jobs: int, say: Say) -> None:
        self.name, self.expected, self.jobs, self.say = name, expected, jobs, say
        self.seconds: list[float] = []

    def tell(self, cell: Cell, record: Record, done: int) -> None:
        self.seconds.append(record["measured"]["seconds"])
        mean = sum(self.seconds) / len(self.seconds)
        left = timedelta(seconds=round(mean * (self.expected - done) / self.jobs))
        self.say(f"{self.name}: {done}/{self.expected}  {cell.label}: {in_short(record)}  {left} left")


def in_short(record: Mapping[str, Any]) -> str:
    """The main number of a record, the training rows left out as too long, if any, and its seconds."""
    metrics, tests = record["metrics"], record["metrics"].get("tests")
    if tests:
        correct, items = (sum(test[key] for test in tests.values()) for key in ("correct", "items"))
        texts = [f"{correct} of {items} right"]
    else:
        texts = [f"{metrics['trained_parameters']:,} parameters trained"]
    n_dropped = record.get("dropped_rows", 0)
    texts += [f"{n_dropped:,} training rows dropped as too long"] * (n_dropped > 0)
    return ", ".join([*texts, f"{record['measured'].get('seconds', 0.0):.0f} s"])


def check_cell(cell_id: str, store: Store, setting: Setting, threads: int | None = None) -> list[str]:
    """Run a stored cell again and name what differs; nothing, where metrics, plan and answers are the same bits.

    Raises:
        InputError: no such cell, or one of another tier, data or model than the call's.
    """
    import torch

    from smtune.reproduce.work import run_cell

    before = store.load(cell_id)
    config = before["config"]
    if config["tier"] != setting.tier:
        option = "--scale paper" if config["tier"] == "paper" else f"--tier {config['tier']}"
        raise InputError(
            f"Expected a cell of the tier {setting.tier}. Got {cell_id}, of {config['tier']}: give {option}."
        )
    shared = setting.shape if config["kind"] == "memory" else setting.base
    here = {**config, **shared(config["model"], config["family"])}
    differing = [key for key in config if here[key] != config[key]]
    if differing:
        raise InputError(
            f"Expected the tier, data, model and cuts that cell {cell_id} was run with. Got others in "
            f"{', '.join(differing)}: give the same --tier, --data, --steps and --items."
        )
    torch.set_num_threads(threads or before["environment"]["threads"])
    outcome = run_cell(Cell(config, before["label"]), setting)
    differences = [
        f"{key}: {before['metrics'].get(key)!r} before, {outcome.record['metrics'].get(key)!r} now"
        for key in before["metrics"] | outcome.record["metrics"]
        if before["metrics"].get(key) != outcome.record["metrics"].get(key)
    ]
    if _blocks(before) != _blocks(outcome.record):
        differences.append("plan: other blocks")
    changed = sum(a != b for a, b in zip(before["items"], outcome.items))
    if changed or len(before["items"]) != len(outcome.items):
        differences.append(f"items: {changed} answered otherwise")
    return differences


def _blocks(record: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of a record's plan by module; what else a plan says may change with the code."""
    plan = record.get("plan") or {"modules": []}
    return {module["name"]: module["blocks"] for module in plan["modules"]}


# Processes ------------------------------------------------------------------------------------------------------------


class _Here:
    """The pool of one job: cells run in this process."""

    def __init__(self, threads: int | None) -> None:
        _start_worker(None, threads)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class _Processes:
    """The pool of several jobs: a process each, in an executor of its own, so that a killed one breaks no other."""

    def __init__(self, jobs: int, threads: int | None) -> None:
        self.threads = threads or max(1, (os.cpu_count() or 1) // jobs)
        self.executors = [self._start(number) for number in range(jobs)]
        self.last: list[Future[Any] | None] = [None] * jobs

    def _start(self, number: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        arguments = (number, self.threads, os.getpid())
        return ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=arguments)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for executor in self.executors:
            executor.shutdown()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """To the first process that has nothing to do, or one in its place where it was killed."""
        number = next(number for number, last in enumerate(self.last) if last is None or last.done())
        try:
            future = self.executors[number].submit(work, *arguments)
        except BrokenProcessPool:
            self.executors[number] = self._start(number)
            future = self.executors[number].submit(work, *arguments)
        self.last[number] = future
        return future


def _pool(jobs: int, threads: int | None) -> _Here | _Processes:
    return _Here(threads) if jobs == 1 else _Processes(jobs, threads)


def _start_worker(number: int | None, threads: int | None, parent: int | None = None) -> None:
    """In each process, before torch is used: its GPU, its threads, and an end when its parent is gone."""
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if number is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible is not None else None  # "" hides all, and so does its one entry
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)] if devices is not None else str(number)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended: a killed sweep leaves no work behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _in_worker(cell: Cell, setting: Setting) -> Any:
    from smtune.reproduce.work import run_cell

    return run_cell(cell, setting, on_step=_Reporter(cell.label))


class _Reporter:
    """Tells of the steps of a long cell, once in a while."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = self.told = time.monotonic()

    def __call__(self, step: int, steps: int) -> None:
        now = time.monotonic()
        if now - self.told > SECONDS_BETWEEN_REPORTS:
            self.told = now
            left = timedelta(seconds=round((now - self.started) / step * (steps - step)))
            print(f"{self.label}: step {step:,} of {steps:,}, {left} left to train", file=sys.stderr, flush=True)
