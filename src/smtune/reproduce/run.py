"""The runner: which cells are missing, run them, say how long it will take, and start again anywhere.

Every finished cell is a file (`store`), so stopping and starting again loses the cells that were running and no more.
With several jobs a cell runs in one of as many processes; on GPUs each process has one of them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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
Say = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """What is to be reproduced.

    Attributes:
        experiments: by name.
        setting: tier, data, cuts.
        seeds: None: the tier's.
        max_cells: of each experiment, at most; a cut.
    """

    experiments: Sequence[str]
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
        return list(arms(experiment, tier, self.setting.families(experiment), self.seeds, base))

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
        self.store = Store(self.output / CELLS)

    def run(self, name: str) -> bool:
        """Run the missing cells of an experiment. Returns whether all that are wanted are there."""
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
        with _pool(self.jobs, self.threads) as pool:
            running: dict[Future[Any], Cell] = {}
            while True:
                for cell in self._missing(arms)[: self.jobs - len(running)]:
                    self.tried.add(cell.id)
                    self.say(f"{name}: {cell.label} …")
                    running[pool.submit(_in_worker, cell, self.request.setting)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    self._keep(cell, future, progress, arms)

    def _keep(self, cell: Cell, future: Future[Any], progress: _Progress, arms: Sequence[Arm]) -> None:
        failed = self.output / FAILED / f"{cell.id}.json"
        error = future.exception()
        if isinstance(error, InputError):
            raise error  # it will fail for all others too, and says what to do
        if error is not None:
            text = f"{type(error).__name__}: {error}"
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
    """The main number of a record, and its seconds."""
    metrics, seconds = record["metrics"], record["measured"].get("seconds", 0.0)
    tests = metrics.get("tests")
    if tests:
        correct, items = (sum(test[key] for test in tests.values()) for key in ("correct", "items"))
        return f"{correct} of {items} right, {seconds:.0f} s"
    return f"{metrics['trained_parameters']:,} parameters trained, {seconds:.0f} s"


def check_cell(cell_id: str, store: Store, setting: Setting, threads: int | None = None) -> list[str]:
    """Run a stored cell again and name what differs; nothing, where metrics, plan and answers are the same bits.

    Raises:
        InputError: no such cell, or one of another tier, data or model than the call's.
    """
    import torch

    from smtune.reproduce.work import run_cell

    before = store.load(cell_id)
    config = before["config"]
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
    """The one-job pool: cells run in this process."""

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


def _pool(jobs: int, threads: int | None) -> Any:
    if jobs == 1:
        return _Here(threads)
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(numbers, threads, os.getpid())
    )


def _start_worker(numbers: Any, threads: int | None, parent: int | None = None) -> None:
    """In each process, before torch is used: its GPU, its threads, and an end when its parent is gone."""
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    number = numbers.get() if numbers is not None else None
    if number is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else None
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)] if devices else str(number)
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
