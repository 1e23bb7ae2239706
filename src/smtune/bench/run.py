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
"""Of the available memory that a floor and the arms of a group may need together."""

Say = Callable[[str], object]
Seconds = dict[str, float]


@dataclass(frozen=True)
class How:
    """How everything is measured.

    Attributes:
        rounds: timed rounds.
        threads: of each process; one is busy at a time.
        device: "cpu" or "cuda".
        anew: time arms of the comparing suites that have records too, and keep both.
        say: told what is going on, often.
        tell: told of each finished record.
    """

    rounds: int
    threads: int
    device: str = "cpu"
    anew: bool = False
    say: Say = lambda text: None
    tell: Say = lambda text: None


WARMUPS = 1
"""Steps of an arm that is alone, before those that count."""
WARMUP_ROUNDS = 2
"""Before the timed ones: first steps allocate, and what an arm's step reads went cold while others were built."""
COUNTED_STEPS = 2
"""Of an arm alone, over which its process's peak memory is taken."""
BESIDE = ("flops", "saved_bytes", "peak_tensor_bytes", "peak_rss_bytes")
"""What an arm's record keeps of what was counted of its floor."""
CONTROL = "control"
"""The name of a second floor: what its steps differ from the floor's by says nothing of any arm."""


def run_series(series: Series, results: Results, how: How) -> None:
    """Time the cases that have no rounds yet, in groups that fit into memory beside a floor; then count each alone.

    What was timed is in the file before anything is counted, so a run that is stopped there goes on with counting.

    Raises:
        ChildError: the floor cannot run.
    """
    floor = Case("floor", "floor", options=series.floor)
    anew = how.anew and series.kind == "arm"
    wanted = [case for case in series.cases if anew or not results.has(series.record(case))]
    if len(wanted) < len(series.cases):
        how.tell(f"{series.suite}: {len(series.cases) - len(wanted)} of {len(series.cases)} arms are measured already")
    untimed = [case for case in wanted if anew or results.find(series.record(case)) is None]
    wants_floor = series.kind == "arm" and not results.has(series.record(floor))
    in_groups = list(groups(series, untimed, MEMORY_SHARE * machine.available_memory(how.device)))
    if wants_floor and not in_groups and results.find(series.record(floor)) is None:
        in_groups = [[]]
    for group in in_groups:
        _Timing(series, floor, results, how).run(group)
    timed = [case for case in wanted if (results.find(series.record(case)) or {}).get("uncounted")]
    if timed or wants_floor:
        _count(series, floor, timed, results, how)


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


class _Timing:
    """Arms that take turns with a floor in one process, where they share the model's weights."""

    def __init__(self, series: Series, floor: Case, results: Results, how: How) -> None:
        self.series = series
        self.floor = floor
        self.results = results
        self.how = how
        self.failed: set[str] = set()

    def run(self, cases: Sequence[Case]) -> None:
        """Put the pairs of every case into the file; if the process dies of one, those of the others."""
        load_before = machine.load()
        control = Case(CONTROL, CONTROL, options=self.floor.options)
        self.cases = {CONTROL: control} | {case.name: case for case in cases}
        self.is_asked_for = {case.name for case in cases}
        self.built: dict[str, dict[str, Any]] = {}
        try:
            with Child(self.how.threads) as child:
                self._build(child)
                usage = machine.OthersUsage([child.pid])
                rounds, floor_steps = self._rounds(child)
                others_cores = usage.cores()
        except ChildError:
            left = [case for case in cases if case.name not in self.failed]
            if len(left) == len(cases):
                raise
            return self.run(left)  # the process died of an arm: again, without it
        how = {"timed_on": "shared weights", "others_cores": others_cores, "load": [load_before, machine.load()]}
        how |= {"control": [ratio(each) for each in rounds.get(CONTROL, [])], "error": None, "uncounted": True}
        floor = self.series.record(self.floor) | self.built["floor"] | {"rounds": [], "steps": floor_steps} | how
        if self.series.kind == "arm" and self.results.find(floor) is None:
            self.results.add(floor)
        for name in rounds:
            if name in self.is_asked_for:
                record = self.series.record(self.cases[name]) | self.built[name] | self.cases[name].fields
                self.results.add(record | {"rounds": rounds[name]} | how)

    def _build(self, child: Child) -> None:
        """All arms, before any steps: SMT's originals are to be those of the base, whatever others train of it."""
        for case in (self.floor, *self.cases.values()):
            self.how.say(f"{self.series.suite}: {case.name}: building")
            try:
                self.built[case.name] = build(child, self.series, case, self.how, case.name)
            except ChildError as error:
                if case is self.floor:
                    raise
                self._fail(child, case.name, error)

    def _rounds(self, child: Child) -> tuple[dict[str, list[dict[str, Any]]], list[Seconds]]:
        """The pairs of each arm that is there to the end, and the floor's steps."""
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in self.built if name != "floor"}
        floor_steps: list[Seconds] = []
        for number in range(-WARMUP_ROUNDS, self.how.rounds):
            order, seconds = [], []
            for name in turns(list(rounds), number):
                self.how.say(self._progress(name, number, rounds.get(name, [])))
                try:
                    seconds.append(child.ask("step", name=name))
                except ChildError as error:
                    if name == "floor":
                        raise
                    del rounds[name]
                    self._fail(child, name, error)
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
        text = f"round {number + 1} of {self.how.rounds}" if number >= 0 else "warm-up"
        so_far = f", {median_ratio(rounds):.3f} × floor so far" if rounds else ""
        return f"{self.series.suite}: {text}: {name}{so_far}"

    def _fail(self, child: Child, name: str, error: ChildError) -> None:
        """Record that the arm cannot run, and forget it. Raises ChildError if that was the end of the process."""
        self.failed.add(name)
        case = self.cases[name]
        if name in self.is_asked_for:
            record = {"label": name, "rounds": []} | self.series.record(case) | self.built.get(name, {})
            self.results.add(record | {"error": str(error), "load": [machine.load()] * 2})
        self.how.tell(f"{self.series.suite}: {name}: cannot run: {error}")
        child.ask("drop", name=name)


def _count(series: Series, floor: Case, cases: Sequence[Case], results: Results, how: How) -> None:
    """Add to the records of timed cases, and to the floor's, what is counted of each in a fresh process."""
    of_floor = results.find(series.record(floor)) if series.kind == "arm" else None
    if of_floor is None or of_floor.get("uncounted"):
        counted = _counted(series, floor, how)
        if of_floor is not None:
            results.add(_whole(of_floor, counted))
            how.tell(f"{series.suite}: floor")
        of_floor = counted
    beside = {f"floor_{name}": of_floor[name] for name in BESIDE}
    for case in cases:
        record = results.find(series.record(case))
        assert record is not None
        try:
            counted = _counted(series, case, how)
        except ChildError as error:
            results.add(record | {"uncounted": str(error)})
            how.tell(f"{series.suite}: {case.name}: timed, but cannot be counted: {error}")
        else:
            results.add(_whole(record, counted | beside))
            how.tell(f"{series.suite}: {record['label']}: {median_ratio(record['rounds']):.3f} × floor")


def _whole(timed: dict[str, Any], counted: dict[str, Any]) -> dict[str, Any]:
    """A timed record with what was counted, which it then lacks no more."""
    return {key: value for key, value in timed.items() if key != "uncounted"} | counted


def _counted(series: Series, case: Case, how: How) -> dict[str, Any]:
    """What is counted of an arm alone."""
    how.say(f"{series.suite}: {case.name}: counting")
    with Child(how.threads) as child:
        built = build(child, series, case, how)
        for number in range(WARMUPS + COUNTED_STEPS):
            child.ask("step", fresh_peak=number == WARMUPS)
        counted = {"rss_before_bytes": built["rss_before_bytes"]}
        counted |= child.ask("counts", block_ops=series.block_ops)
        counted |= {"adapter": None, "adapter_error": None}
        if series.kind == "arm":
            try:
                counted["adapter"] = child.ask("adapter")
            except ChildError as error:
                counted["adapter_error"] = str(error)
    return counted | {"fraction_of_7b": fraction_of_7b(series.record(case) | built)}


def build(child: Child, series: Series, case: Case, how: How, name: str | None = None) -> dict[str, Any]:
    """Have the process make the arm of a case, among others if it has a name. Returns what a record says of it."""
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


def ratio(of_pair: dict[str, Any]) -> float:
    """The arm's whole step over the floor's."""
    return sum(of_pair["arm"].values()) / sum(of_pair["floor"].values())


def median_ratio(rounds: Sequence[dict[str, Any]]) -> float:
    """The median of `ratio` over pairs."""
    return statistics.median(map(ratio, rounds))


def fraction_of_7b(record: dict[str, Any]) -> float | None:
    """What share of LLaMA-7B as many blocks in each of its 32 layers would train."""
    if record["model"] != "llama-7b-layers" or not record.get("blocks_per_layer"):
        return None
    return 32 * record["blocks_per_layer"] * record["block_size"] ** 2 / LLAMA_7B_PARAMS
