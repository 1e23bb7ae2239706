"""The parent: starts the processes, gives them their turns, pairs their times with the floor's, keeps the records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from smtune.bench import machine
from smtune.bench.process import Child, ChildError
from smtune.bench.results import Results
from smtune.bench.subjects import LLAMA_7B_PARAMS
from smtune.bench.suites import Case, Series, needed_memory
from smtune.bench.turns import pair, turns

MEMORY_SHARE = 0.8
"""Of the available memory that the processes of a group may need together."""

Say = Callable[[str], object]
Seconds = dict[str, float]


@dataclass(frozen=True)
class How:
    """How everything is measured.

    Attributes:
        rounds: timed rounds.
        warmups: steps of each arm before them.
        threads: of each process; one steps at a time.
        device: "cpu" or "cuda".
        say: told what is going on, often.
        tell: told of each finished record.
    """

    rounds: int
    threads: int
    device: str = "cpu"
    warmups: int = 1
    say: Say = lambda text: None
    tell: Say = lambda text: None


def run_series(series: Series, results: Results, how: How) -> None:
    """Measure the cases of a series that have no record yet, in groups that fit into memory beside a floor."""
    floor = Case("floor", "floor", options=series.floor)
    wanted = [case for case in series.cases if not results.has(series.record(case))]
    if series.kind == "arm" and not wanted and not results.has(series.record(floor)):
        wanted_groups: list[list[Case]] = [[]]
    else:
        wanted_groups = list(groups(series, wanted, MEMORY_SHARE * machine.available_memory()))
    for group in wanted_groups:
        _Group(series, floor, results, how).run(group)


def groups(series: Series, cases: Sequence[Case], memory: float) -> Iterator[list[Case]]:
    """The cases in as few groups as fit into `memory` with their floor; full fine-tuning is alone in its own."""
    free = memory - needed_memory(series, None)
    alone = [case for case in cases if case.arm.startswith("full")]
    group: list[Case] = []
    taken = 0
    for case in (case for case in cases if case not in alone):
        need = needed_memory(series, case)
        if group and taken + need > free:
            yield group
            group, taken = [], 0
        group.append(case)
        taken += need
    if group:
        yield group
    yield from ([case] for case in alone)


BESIDE = ("flops", "saved_bytes", "peak_tensor_bytes", "peak_rss_bytes")
"""What an arm's record keeps of the floor that ran beside it."""


class _Group:
    """Processes that are there at the same time."""

    def __init__(self, series: Series, floor: Case, results: Results, how: How) -> None:
        self.series = series
        self.floor = floor
        self.results = results
        self.how = how
        self.children: dict[str, Child] = {}
        self.cases: dict[str, Case] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def run(self, cases: Sequence[Case]) -> None:
        self.load_before = machine.load()
        with ExitStack() as stack:
            self._start(self.floor, stack)
            for case in cases:
                try:
                    self._start(case, stack)
                except ChildError as error:
                    self._fail(case.name, error)
            usage = machine.OthersUsage(child.pid for child in self.children.values())
            rounds, floor_steps = self._rounds()
            self.others_cores = usage.cores()
            floor = self._finish("floor", {"rounds": [], "steps": floor_steps})
            if self.series.kind == "arm" and not self.results.has(floor):
                self._keep(floor)
            counted = {f"floor_{name}": floor[name] for name in BESIDE}
            for name in [name for name in self.children if name != "floor"]:
                try:
                    record = self._finish(name, {"rounds": rounds[name], **counted})
                except ChildError as error:
                    self._fail(name, error)
                else:
                    self._keep(record)

    def _start(self, case: Case, stack: ExitStack) -> None:
        """A process with the arm built and warm."""
        self.how.say(f"{self.series.suite}: {case.name}: building")
        self.cases[case.name] = case
        child = stack.enter_context(Child(self.how.threads))
        built = build(child, self.series, case, self.how)
        for number in range(self.how.warmups):
            self.how.say(f"{self.series.suite}: {case.name}: warm-up {number + 1} of {self.how.warmups}")
            child.ask("step")
        self.children[case.name] = child
        self.records[case.name] = self.series.record(case) | built | case.fields

    def _rounds(self) -> tuple[dict[str, list[dict[str, Any]]], list[Seconds]]:
        """All rounds, after one that does not count: while the others were built, each arm's memory went cold.

        Returns the pairs of each arm that is still there, and the floor's steps.
        """
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in self.children if name != "floor"}
        floor_steps: list[Seconds] = []
        for number in range(-1, self.how.rounds):
            order, seconds = [], []
            for name in turns(list(rounds), number):
                if name not in self.children:
                    continue
                self.how.say(self._progress(name, number, rounds.get(name, [])))
                try:
                    seconds.append(self.children[name].ask("step", fresh_peak=number == 0 and name not in order))
                except ChildError as error:
                    if name == "floor":
                        raise
                    self._fail(name, error)
                    continue
                order.append(name)
            for place, name in enumerate(order if number >= 0 else ()):
                if name == "floor":
                    floor_steps.append(seconds[place])
                elif name in rounds:
                    beside = pair(order, seconds, place)
                    rounds[name].append({"order": order, "floor": beside, "arm": seconds[place]})
        return rounds, floor_steps

    def _progress(self, name: str, number: int, rounds: Sequence[dict[str, Any]]) -> str:
        ratio = f", {median_ratio(rounds):.3f} × floor so far" if rounds else ""
        return f"{self.series.suite}: round {number + 1} of {self.how.rounds}: {name}{ratio}"

    def _finish(self, name: str, measured: dict[str, Any]) -> dict[str, Any]:
        """What is counted, after the timed rounds; the whole record."""
        child = self.children[name]
        self.how.say(f"{self.series.suite}: {name}: counting")
        record = self.records[name] | measured
        record |= child.ask("counts", block_ops=self.series.block_ops)
        record["adapter"], record["adapter_error"] = None, None
        if self.series.kind == "arm":
            try:
                record["adapter"] = child.ask("adapter")
            except ChildError as error:
                record["adapter_error"] = str(error)
        child.close()
        record["fraction_of_7b"] = fraction_of_7b(record)
        return record | {"others_cores": self.others_cores, "error": None, "load": [self.load_before, machine.load()]}

    def _keep(self, record: dict[str, Any]) -> None:
        self.results.add(record)
        ratio = f": {median_ratio(record['rounds']):.3f} × floor" if record["rounds"] else ""
        self.how.tell(f"{record['suite']}: {record['label']}{ratio}")

    def _fail(self, name: str, error: ChildError) -> None:
        """Record that the arm cannot run, and go on without it."""
        case = self.cases[name]
        child = self.children.pop(name, None)
        if child is not None:
            child.close()
        record = {"label": case.name, "rounds": []} | self.series.record(case) | self.records.get(name, {})
        record |= {"error": str(error), "load": [self.load_before, machine.load()]}
        self.results.add(record)
        self.how.tell(f"{self.series.suite}: {name}: cannot run: {error}")


def build(child: Child, series: Series, case: Case, how: How) -> dict[str, Any]:
    """Have the process make the arm of a case. Returns what a record says of it."""
    return child.ask(
        "build",
        arm=case.arm,
        model=series.model,
        dtype=series.dtype,
        tokens=series.tokens,
        device=how.device,
        threads=how.threads,
        **case.options,
    )


def median_ratio(rounds: Sequence[dict[str, Any]]) -> float:
    """The median over pairs of the arm's whole step over the floor's."""
    return statistics.median(sum(each["arm"].values()) / sum(each["floor"].values()) for each in rounds)


def fraction_of_7b(record: dict[str, Any]) -> float | None:
    """What share of LLaMA-7B as many blocks in each of its 32 layers would train."""
    if record["model"] != "llama-7b-layers" or not record.get("blocks_per_layer"):
        return None
    return 32 * record["blocks_per_layer"] * record["block_size"] ** 2 / LLAMA_7B_PARAMS
