"""The records of `smtune bench` as the report reads them: suites of arms, ratios of pairs, medians and intervals.

A round times one step of every arm, with floor steps in between. A *pair* is an arm's step and the floor step beside
it, or the mean of two; its ratio is what all tables show, so that a machine that slows down slows both. Nothing is
assumed complete: kinds, arms, parts and fields may be missing, and an arm may hold an error instead of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smtune.bench.suites import ARMS
from smtune.evaluation.statistics import Estimate

Record = Mapping[str, Any]

PARTS = ("forward", "backward", "optimizer")
FLOOR = "floor"
WIDE = 0.05
"""A spread is wide if the middle half of the pairs reaches over more than this share of their median."""
MIN_PAIRS = 5
"""Fewer pairs of either arm tell nothing apart."""
RESAMPLES = 4000


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n values."""

    median: float
    low: float
    high: float
    n: int

    @property
    def wide(self) -> bool:
        return self.high - self.low > WIDE * abs(self.median)


@dataclass(frozen=True)
class Suite:
    """The arms that were measured in turn on one model, dtype and batch.

    Attributes:
        name: of the suite.
        arms: record by the arm's name, the floor's included, in the order of `ARMS`; of several that with the most
            pairs.
        turns: all records by the arm's name, of each process in which arms took turns.
    """

    name: str
    arms: dict[str, Record]
    turns: Sequence[Mapping[str, Record]] = ()

    @property
    def floor(self) -> Record:
        return self.arms.get(FLOOR, {})

    @property
    def first(self) -> Record:
        """A record that says what the suite ran on."""
        return self.floor or next(iter(self.arms.values()))

    @property
    def others(self) -> dict[str, Record]:
        """All arms but the floor."""
        return {name: arm for name, arm in self.arms.items() if name != FLOOR}

    def both(self, name: str, other: str) -> tuple[Record | None, Record | None]:
        """Two arms as they are compared: of a process that both took turns in, of several that with the most pairs."""
        found = [(of[name], of[other]) for of in self.turns if name in of and other in of]
        if not found:
            return self.arms.get(name), self.arms.get(other)
        return max(found, key=lambda records: min(len(pairs(record)) for record in records))

    def setting(self) -> str:
        """Model, dtype and size in words, as far as they are known."""
        first = self.first
        words = [first.get("model")]
        words += [f"{first['layers']} layers"] if "layers" in first else []
        words += [first.get("dtype")]
        words += [f"{first['tokens']} tokens"] if "tokens" in first else []
        words += [f"{first['batch']} rows"] if first.get("batch", 1) > 1 else []
        return ", ".join(filter(None, words))

    def is_7b(self, min_tokens: int = 0) -> bool:
        """Whether it has the layers of LLaMA-7B, and at least so many tokens."""
        return self.first.get("model") == "llama-7b-layers" and self.first.get("tokens", 0) >= min_tokens


def of_kind(results: Record, kind: str) -> list[Record]:
    return [record for record in results.get("records", ()) if record.get("kind") == kind]


def suites(results: Record) -> list[Suite]:
    """The suites of "arm" records, in the order of the file."""
    found: dict[str, list[Record]] = {}
    for record in of_kind(results, "arm"):
        found.setdefault(record.get("suite", ""), []).append(record)
    return [_suite(name, records) for name, records in found.items()]


def _suite(name: str, records: Sequence[Record]) -> Suite:
    turns: dict[Any, dict[str, Record]] = {}
    for record in filter(timed_together, records):
        turns.setdefault(process(record), {})[record["arm"]] = record
    by_pairs = sorted(records, key=lambda record: (timed_together(record), len(pairs(record))))
    shown = {record["arm"]: record for record in by_pairs}
    return Suite(name, dict(sorted(shown.items(), key=lambda item: _place(item[0]))), list(turns.values()))


def _place(arm: str) -> int:
    """Arms that are in no comparison come last, in the order of the file."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def ran(record: Record | None) -> bool:
    return bool(record) and not record.get("error")


def label(record: Record) -> str:
    return record.get("label") or record.get("arm", "")


def get(record: Record | None, *keys: str) -> Any:
    """record[key][key]…, or None where anything on the way is missing."""
    value: Any = record
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def of_floor(arm: Record | None, floor: Record | None, *keys: str) -> Any:
    """What was counted of the floor that ran beside the arm, or else of `floor`; None where neither has it."""
    beside = get(arm, f"floor_{keys[0]}", *keys[1:])
    return get(floor, *keys) if beside is None else beside


def beyond_floor(suite: Suite, name: str, *keys: str) -> float | None:
    """What was counted of an arm, less the floor's."""
    arm = suite.arms.get(name)
    return minus(get(arm, *keys), of_floor(arm, suite.floor, *keys))


def over(a: float | None, b: float | None) -> float | None:
    """a / b, or None where either is missing or b is zero."""
    return a / b if a is not None and b else None


def minus(a: float | None, b: float | None) -> float | None:
    return a - b if a is not None and b is not None else None


# -- pairs ---------------------------------------------------------------------------------------------------------


def step(parts: Mapping[str, float]) -> float:
    """Seconds of a whole step."""
    return sum(parts.get(part) or 0.0 for part in PARTS)


def timed_together(record: Record | None) -> bool:
    """Whether its steps were timed in one process with its floor's, on the same weights.

    Equal steps in processes of their own differ by up to a tenth, whatever the intervals say (ADR 0021).
    """
    return bool(get(record, "timed_on"))


def process(record: Record) -> Any:
    """What the records of arms that took turns in one process have in common: its second floor, or the run."""
    return tuple(record.get("control") or ()) or str(record.get("run"))


def all_flops(record: Record | None) -> float | None:
    """Counted FLOPs of forward and backward."""
    parts = [get(record, "flops", part) for part in ("forward", "backward")]
    return None if None in parts else sum(parts)


def floor_flops(arm: Record | None, floor: Record | None = None) -> float | None:
    """Counted FLOPs of the floor that ran beside the arm, or else of `floor`: what an arm's are held against."""
    return all_flops({"flops": of_floor(arm, floor, "flops")})


def pairs(record: Record | None) -> list[Record]:
    """The rounds in which both the arm and its floor were timed."""
    rounds = (record or {}).get("rounds") or ()
    return [pair for pair in rounds if pair.get("arm") and pair.get("floor") and step(pair["floor"]) > 0]


def step_ratios(record: Record | None) -> np.ndarray:
    """Step over floor step, one for each pair."""
    return np.array([step(pair["arm"]) / step(pair["floor"]) for pair in pairs(record)])


def part_ratios(record: Record | None, part: str) -> np.ndarray:
    """One part of the step over the whole floor step, one for each pair that has it."""
    found = [pair for pair in pairs(record) if pair["arm"].get(part) is not None]
    return np.array([pair["arm"][part] / step(pair["floor"]) for pair in found])


def above_floor(record: Record | None, part: str) -> np.ndarray:
    """A part's time above the floor's same part, over the whole floor step."""
    found = [pair for pair in pairs(record) if None not in (pair["arm"].get(part), pair["floor"].get(part))]
    return np.array([(pair["arm"][part] - pair["floor"][part]) / step(pair["floor"]) for pair in found])


# -- statistics ----------------------------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> Spread | None:
    """None of nothing."""
    array = np.asarray(list(values), dtype=float)
    if not array.size:
        return None
    low, median, high = np.quantile(array, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high), array.size)


def median(values: Iterable[float]) -> float | None:
    found = spread(values)
    return None if found is None else found.median


def resampled_medians(values: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Medians of `RESAMPLES` draws with replacement (the bootstrap: Efron 1979, Ann. Stat. 7, 1)."""
    array = np.asarray(values, dtype=float)
    places = np.random.default_rng(seed).integers(array.size, size=(RESAMPLES, array.size))
    return np.median(array[places], axis=1)


def median_interval(values: Sequence[float] | np.ndarray) -> Estimate | None:
    """The median with its 95 % bootstrap interval; None below `MIN_PAIRS` values."""
    if len(values) < MIN_PAIRS:
        return None
    low, high = np.quantile(resampled_medians(values), (0.025, 0.975))
    return Estimate(float(np.median(values)), float(low), float(high))


def difference(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate | None:
    """Median of a minus median of b with a 95 % bootstrap interval; None below `MIN_PAIRS` values of either."""
    if min(len(a), len(b)) < MIN_PAIRS:
        return None
    resampled = resampled_medians(a, seed=0) - resampled_medians(b, seed=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(float(np.median(a) - np.median(b)), float(low), float(high))


def ratio(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate | None:
    """Median of a over median of b, likewise; None too where draws of b reach zero."""
    if min(len(a), len(b)) < MIN_PAIRS:
        return None
    divisors = resampled_medians(b, seed=1)
    if not (divisors > 0).all():
        return None
    low, high = np.quantile(resampled_medians(a, seed=0) / divisors, (0.025, 0.975))
    return Estimate(float(np.median(a) / np.median(b)), float(low), float(high))


# -- quality -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """What training by one plan came to, over its runs: mean held-out loss, and items right of all.

    The plan need not be the one that is timed: `blocks` and `score_kept`, a mean too, are its own.
    """

    held_out_loss: float | None
    right: int
    of: int
    runs: int
    blocks: int | None = None
    score_kept: float | None = None


def quality(results: Record) -> dict[float, Quality]:
    """The rows of "quality" by `max_backward_cost`; several, such as seeds, are put together."""
    rows: dict[float, list[Record]] = {}
    for row in results.get("quality") or ():
        if row.get("max_backward_cost") is not None:
            rows.setdefault(row["max_backward_cost"], []).append(row)
    found = {}
    for cost, of in rows.items():
        scored = [row for row in of if row.get("right") is not None and row.get("of")]
        right, items = (sum(row[key] for row in scored) for key in ("right", "of"))
        loss, kept = (_mean(of, key) for key in ("held_out_loss", "score_kept"))
        found[cost] = Quality(loss, right, items, len(of), of[0].get("blocks"), kept)
    return found


def _mean(rows: Iterable[Record], key: str) -> float | None:
    """Over the rows that have it."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None
