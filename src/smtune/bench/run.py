"""The parent: starts the processes, gives the arms their turns, pairs their times with the floor's, keeps records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
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
        threads: of each process; one is busy at a time.
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


COUNTED_STEPS = 2
"""Of an arm in its own process, over which that process's peak memory is taken."""

BESIDE = ("flops", "saved_bytes", "peak_tensor_bytes", "peak_rss_bytes")
"""What an arm's record keeps of the floor that ran beside it."""


class _Group:
    """Arms that are there at the same time: timed in one process, then each counted in one of its own."""

    def __init__(self, series: Series, floor: Case, results: Results, how: How) -> None:
        self.series = series
        self.floor = floor
        self.results = results
        self.how = how
        self.records: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()

    def run(self, cases: Sequence[Case]) -> None:
        self.load_before = machine.load()
        self.cases = {case.name: case for case in cases}
        try:
            rounds, floor_steps = self._timed(cases)
        except ChildError:
            left = [case for case in cases if case.name not in self.failed]
            if len(left) == len(cases):
                raise
            return self.run(left)  # the process died of an arm: again, without it
        floor = self._counted(self.floor, {"rounds": [], "steps": floor_steps})
        if self.series.kind == "arm" and not self.results.has(floor):
            self._keep(floor)
        beside = {f"floor_{name}": floor[name] for name in BESIDE}
        for name in rounds:
            case = self.cases[name]
            try:
                record = self._counted(case, {"rounds": rounds[name], **beside})
            except ChildError as error:
                self._fail(case, error)
            else:
                self._keep(record)

    def _timed(self, cases: Sequence[Case]) -> tuple[dict[str, list[dict[str, Any]]], list[Seconds]]:
        """As `_rounds`, in a process that is there for them."""
        self.records.clear()
        with Child(self.how.threads) as child:
            self._start(child, self.floor)
            for case in cases:
                try:
                    self._start(child, case)
                except ChildError as error:
                    self._fail(case, error)
                    child.ask("drop", name=case.name)
            usage = machine.OthersUsage([child.pid])
            timed = self._rounds(child)
            self.others_cores = usage.cores()
        return timed

    def _start(self, child: Child, case: Case) -> None:
        """The arm built and warm."""
        self.how.say(f"{self.series.suite}: {case.name}: building")
        built = build(child, self.series, case, self.how, case.name)
        self.records[case.name] = self.series.record(case) | built | case.fields
        for number in range(self.how.warmups):
            self.how.say(f"{self.series.suite}: {case.name}: warm-up {number + 1} of {self.how.warmups}")
            child.ask("step", name=case.name)

    def _rounds(self, child: Child) -> tuple[dict[str, list[dict[str, Any]]], list[Seconds]]:
        """All rounds, after one that does not count: while the others were built, each arm's memory went cold.

        Returns the pairs of each arm that is still there, and the floor's steps.
        """
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in self.records if name != "floor"}
        floor_steps: list[Seconds] = []
        for number in range(-1, self.how.rounds):
            order, seconds = [], []
            for name in turns(list(rounds), number):
                self.how.say(self._progress(name, number, rounds.get(name, [])))
                try:
                    seconds.append(child.ask("step", name=name))
                except ChildError as error:
                    if name == "floor":
                        raise
                    del rounds[name]
                    self._fail(self.cases[name], error)
                    child.ask("drop", name=name)
                    continue
                order.append(name)
            for place, name in enumerate(order if number >= 0 else ()):
                if name == "floor":
                    floor_steps.append(seconds[place])
                else:
                    beside = pair(order, seconds, place)
                    rounds[name].append({"order": order, "floor": beside, "arm": seconds[place]})
        return rounds, floor_steps

    def _progress(self, name: str, number: int, rounds: Sequence[dict[str, Any]]) -> str:
        ratio = f", {median_ratio(rounds):.3f} × floor so far" if rounds else ""
        return f"{self.series.suite}: round {number + 1} of {self.how.rounds}: {name}{ratio}"

    def _counted(self, case: Case, measured: dict[str, Any]) -> dict[str, Any]:
        """The whole record, with what is counted in a fresh process."""
        self.how.say(f"{self.series.suite}: {case.name}: counting")
        with Child(self.how.threads) as child:
            built = build(child, self.series, case, self.how)
            for number in range(self.how.warmups + COUNTED_STEPS):
                child.ask("step", fresh_peak=number == self.how.warmups)
            record = self.records[case.name] | {"rss_before_bytes": built["rss_before_bytes"]} | measured
            record |= child.ask("counts", block_ops=self.series.block_ops)
            record["adapter"], record["adapter_error"] = None, None
            if self.series.kind == "arm":
                try:
                    record["adapter"] = child.ask("adapter")
                except ChildError as error:
                    record["adapter_error"] = str(error)
        record["fraction_of_7b"] = fraction_of_7b(record)
        record["timed_on"] = "shared weights"
        return record | {"others_cores": self.others_cores, "error": None, "load": [self.load_before, machine.load()]}

    def _keep(self, record: dict[str, Any]) -> None:
        self.results.add(record)
        ratio = f": {median_ratio(record['rounds']):.3f} × floor" if record["rounds"] else ""
        self.how.tell(f"{record['suite']}: {record['label']}{ratio}")

    def _fail(self, case: Case, error: ChildError) -> None:
        """Record that the arm cannot run."""
        self.failed.add(case.name)
        record = {"label": case.name, "rounds": []} | self.series.record(case) | self.records.pop(case.name, {})
        record |= {"error": str(error), "load": [self.load_before, machine.load()]}
        self.results.add(record)
        self.how.tell(f"{self.series.suite}: {case.name}: cannot run: {error}")


def build(child: Child, series: Series, case: Case, how: How, name: str = "arm") -> dict[str, Any]:
    """Have the process make the arm of a case. Returns what a record says of it."""
    return child.ask(
        "build",
        name=name,
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
