"""Kinds of tests that a claim can be put to. Verdicts follow from intervals, and from counts, alone.

A test is judged on every tier that has its cells. One of accuracies counts on tasks whose positive control has passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from smtune.evaluation.statistics import SIGNIFICANT, TIE, Estimate, mean_over_seeds
from smtune.maps.layout import Projection, projections
from smtune.report.benchmarks import claims as cost_claims
from smtune.report.benchmarks import targets
from smtune.report.benchmarks.words import arm as shown_arm
from smtune.report.markdown import minus
from smtune.reproduce import numbers
from smtune.reproduce.cells import Record, validated
from smtune.reproduce.evidence import words
from smtune.reproduce.evidence.contrasts import contrast, share_of_gap, trend, trends_difference
from smtune.reproduce.evidence.control import EXPERIMENT, Control, controls
from smtune.reproduce.evidence.records import COMPARED, Found, Results
from smtune.selection import Plan

HOLDS, DOES_NOT, UNDECIDED, NOT_TESTABLE = "holds", "does not hold", "undecided", "not testable here"
NOT_RUN = "not run yet"
OF_BENCHMARK = {
    targets.HOLDS: HOLDS,
    targets.MISSED: DOES_NOT,
    cost_claims.DOES_NOT: DOES_NOT,
    targets.OPEN: UNDECIDED,
    targets.PART: UNDECIDED,
    cost_claims.NOT_HERE: f"{NOT_TESTABLE}: it is about whole models on GPUs",
}
"""By a verdict of `smtune bench`, the one here."""


class Evidence:
    """All that claims are held against.

    Attributes:
        tiers: what there is of each.
        benchmarks: the results of `smtune bench`, or None.
    """

    def __init__(self, tiers: Sequence[Results], benchmarks: dict[str, Any] | None = None) -> None:
        self.tiers, self.benchmarks = tiers, benchmarks
        self._controls = {results.tier.name: controls(results) for results in tiers}

    def controls(self, results: Results) -> dict[tuple[str, str], Control]:
        """Of a tier, by model and family."""
        return self._controls[results.tier.name]


@dataclass(frozen=True)
class Judged:
    """A test held against a tier: where, what came of it, its verdict, and the cells that it rests on."""

    where: str
    effect: str
    verdict: str
    records: Sequence[Record] = ()
    results: Results | None = None


class OfExperiment:
    """A test that rests on an experiment's cells."""

    experiment: str

    @property
    def command(self) -> str:
        return f"`smtune reproduce {self.experiment}`"


BEST = "best"
"""In place of a budget: the one that does best on held-out training rows."""

# Kinds of tests -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Better(OfExperiment):
    """One arm is better than another.

    Attributes:
        experiment: of the first arm; its label.
        against: of the second; in `second_experiment` where that is another one.
        family: the task.
        budget, second_budget: where the label has several; of the second, BEST is the one that does best on held-out
            training rows with the first seed, of those that have been run.
        as_good: the claim is only that it is no more than the margin of a tie worse.
        claimed: the least difference that the paper prints; a tie refutes one of at least a tie's margin.
        gap_from: experiment and label of a third arm: how much of the way from it to the second the first has come.
    """

    experiment: str
    label: str
    against: str
    family: str
    budget: float | None = None
    second_budget: float | str | None = None
    second_experiment: str | None = None
    as_good: bool = False
    claimed: float = TIE
    gap_from: tuple[str, str] | None = None

    def judge(self, evidence: Evidence) -> Iterator[Judged]:
        for results in evidence.tiers:
            second = self.second_experiment or self.experiment
            for first, other in _of_same_model(
                pick(results, self.experiment, self.label, self.family, self.budget),
                pick(results, second, self.against, self.family, self.second_budget),
            ):
                found = contrast(first, other)
                if found is None:
                    continue
                effect = f"{numbers.points(found.difference)}, {numbers.p_text(found.p_value)}"
                if self.second_budget == BEST:
                    sizes = [each for each in self._sizes(results, second) if each.arm.model == other.arm.model]
                    effect += f"; the best of {sum(bool(each.records) for each in sizes)} of {len(sizes)} sizes"
                arms = [first, other]
                shown = found.difference
                verdict = _as_good(shown) if self.as_good else _above_zero(shown, self.claimed, found.p_value)
                if self.gap_from is not None:
                    for third, _ in _of_same_model(pick(results, *self.gap_from, self.family), [other]):
                        if third.records:
                            effect += f"; {_gap(first, third, other)}"
                            arms.append(third)
                yield _gated(evidence, results, arms, f"{self._name(first)} less {self._name(other)}", effect, verdict)

    def _sizes(self, results: Results, experiment: str) -> list[Found]:
        """The second arm at all of its budgets."""
        return [each for each in _of_family(results, experiment, self.family) if each.label == self.against]

    def _name(self, found: Found) -> str:
        own, other = self.budget, self.second_budget
        return words.name(found, with_budget=own is not None or other is not None)


def _gap(arm: Found, low: Found, high: Found) -> str:
    share = share_of_gap(arm, low, high)
    if share is None:
        return f"no gap between {low.label} and {high.label} is shown"
    return f"{numbers.share(share)} of the gap from {low.label} closed"


@dataclass(frozen=True)
class Trend(OfExperiment):
    """Accuracy rises, or does not, with something.

    Attributes:
        experiment, family: where.
        points: rows by label with what they have of it.
        label: in place of `points`, a row over its budgets, by their logarithm to the base ten.
        than: another such row: the claim is that the first rises more.
        rises: False: the claim is that it stays or falls.
        from_budget: budgets below are left out, as the claim says.
        per: what the slope is by.
    """

    experiment: str
    family: str
    label: str = ""
    points: tuple[tuple[str, float], ...] = ()
    than: str = ""
    rises: bool = True
    from_budget: float = 0.0
    per: str = "tenfold budget"

    def judge(self, evidence: Evidence) -> Iterator[Judged]:
        for results in evidence.tiers:
            for model in results.tier.models:
                arms, x = self._line(results, model, self.label)
                others, other_x = self._line(results, model, self.than) if self.than else ([], [])
                if self.than:
                    both = [place for place in x if place in other_x]
                    arms = [arms[x.index(place)] for place in both]
                    others = [others[other_x.index(place)] for place in both]
                    x = both
                if len(arms) < 3:
                    continue
                slope = trends_difference(arms, others, x) if self.than else trend(arms, x)
                effect = f"{numbers.points(slope)} per {self.per}, over {len(x)} of {self._n_points(results)}"
                where = (self.label or "trend") + (f" less {self.than}" if self.than else "")
                if self.rises:
                    verdict = _above_zero(slope, 0.0)
                else:
                    verdict = HOLDS if slope.high <= 0 else DOES_NOT if slope.low > 0 else UNDECIDED
                yield _gated(evidence, results, [*arms, *others], where, effect, verdict)

    def _line(self, results: Results, model: str, label: str) -> tuple[list[Found], list[float]]:
        """The arms that have been run, with their places."""
        line = []
        for arm in _of_family(results, self.experiment, self.family):
            if arm.arm.model != model or not arm.records:
                continue
            if label and arm.label == label and arm.arm.budget >= self.from_budget:
                line.append((arm, math.log10(arm.arm.budget)))
            line += [(arm, place) for name, place in self.points if not label and arm.label == name]
        return [arm for arm, _ in line], [place for _, place in line]

    def _n_points(self, results: Results) -> int:
        model = next(iter(results.tier.models))
        arms = [arm for arm in _of_family(results, self.experiment, self.family) if arm.arm.model == model]
        return len(self.points) or sum(arm.label == self.label and arm.arm.budget >= self.from_budget for arm in arms)


@dataclass(frozen=True)
class Places(OfExperiment):
    """Something about where a plan's blocks are.

    Attributes:
        experiment, label, family: whose plan; the seeds' mean where there are several.
        share_of: the projection whose share of the blocks must be more than half.
        frozen: in place of it: all matrices of this projection have blocks, and most of the others have none.
    """

    experiment: str
    label: str
    family: str
    share_of: str = ""
    frozen: str = ""

    def judge(self, evidence: Evidence) -> Iterator[Judged]:
        for results in evidence.tiers:
            for arm in pick(results, self.experiment, self.label, self.family):
                kinds = [projections(Plan.from_dict(record["plan"])) for record in arm.records if "plan" in record]
                if kinds:
                    effect, verdict = self._share(kinds) if self.share_of else self._frozen(kinds)
                    where = f"{_where(results, arm)}: {words.name(arm, with_budget=True)}"
                    yield Judged(where, effect, verdict, arm.records, results)

    def _share(self, plans: Sequence[Sequence[Projection]]) -> tuple[str, str]:
        shares = [sum(kind.share for kind in kinds if _is_of(kind, self.share_of)) for kinds in plans]
        low, high = min(shares), max(shares)
        verdict = HOLDS if low > 0.5 else DOES_NOT if high <= 0.5 else UNDECIDED
        return f"{numbers.share(mean_over_seeds(shares))} of the blocks", verdict

    def _frozen(self, plans: Sequence[Sequence[Projection]]) -> tuple[str, str]:
        texts, agree = [], []
        for kinds in plans:
            own = [kind for kind in kinds if _is_of(kind, self.frozen)]
            rest = [kind for kind in kinds if not _is_of(kind, self.frozen)]
            agree.append(all(kind.frozen == 0 for kind in own) and all(kind.frozen > kind.trained for kind in rest))
            texts.append(", ".join(f"{kind.name} {kind.frozen} of {kind.frozen + kind.trained}" for kind in kinds))
        verdict = HOLDS if all(agree) else UNDECIDED if any(agree) else DOES_NOT
        return "frozen: " + "; ".join(dict.fromkeys(texts)), verdict


def _is_of(kind: Projection, projection: str) -> bool:
    return kind.name.removesuffix("_proj") == projection


@dataclass(frozen=True)
class Counted:
    """The memory of a training step, counted at the paper's scale.

    Attributes:
        model, label, budget: whose.
        against, against_budget: whose it is compared with; "" for none.
        bound: bytes at most; against another, the share that must be saved, or with `is_share` False the bytes.
        part: of the count.
        needs_more: the claim is that at least `bound` bytes are needed.
    """

    model: str
    label: str
    budget: float
    bound: float
    against: str = ""
    against_budget: float = 1.0
    is_share: bool = True
    part: str = "total"
    needs_more: bool = False

    @property
    def command(self) -> str:
        return "`smtune reproduce memory --scale paper`"

    def judge(self, evidence: Evidence) -> Iterator[Judged]:
        keys = {"total": "what is trained in fp32", "with_paper_dtypes": "in the paper's bf16"}
        keys = keys if self.part == "total" else {self.part: "fp32"}
        for results in evidence.tiers:
            counted = {
                (arm.arm.model, arm.label, arm.arm.budget): arm.records[0]
                for arm in results.arms("memory")
                if arm.records
            }
            own = counted.get((self.model, self.label, self.budget))
            other = counted.get((self.model, self.against, self.against_budget))
            if own is None or (self.against and other is None):
                continue
            for key, dtypes in keys.items():
                value = own["metrics"][key]
                if other is None:
                    effect, holds = numbers.gigabytes(value), (value >= self.bound) == self.needs_more
                elif self.is_share:
                    saved = 1 - value / other["metrics"][key]
                    effect, holds = f"{100 * saved:.1f} % less", saved >= self.bound
                else:
                    saved = other["metrics"][key] - value
                    direction = "less" if saved > 0 else "more"
                    effect, holds = f"{numbers.gigabytes(abs(saved))} {direction}", saved >= self.bound
                where = f"{results.tier.name}: {self.model}, {numbers.percent(self.budget)}, {dtypes}"
                records = [own, *([other] if other else [])]
                yield Judged(where, effect, HOLDS if holds else DOES_NOT, records, results)


@dataclass(frozen=True)
class Timed:
    """A claim about costs that `smtune bench` has judged, by the paper's words."""

    quote: str

    @property
    def command(self) -> str:
        return words.BENCHMARKS

    def judge(self, evidence: Evidence) -> Iterator[Judged]:
        if evidence.benchmarks is None:
            return
        for row in cost_claims.other_rows(evidence.benchmarks):
            if row.quote == self.quote and row.verdict != targets.ABSENT:
                yield Judged(f"{words.BENCHMARKS}, {row.where}", row.measured, OF_BENCHMARK[row.verdict])
        for row in cost_claims.share_rows(evidence.benchmarks):
            if row.claim.quote == self.quote and row.to_claimed != targets.ABSENT:
                values = [of[cost_claims.SMALLEST] for of in row.values.values() if cost_claims.SMALLEST in of]
                least, most = (minus(f"{100 * value:.2f}") for value in (min(values), max(values)))
                span = least if least == most else f"{least} to {most}"
                effect = f"{shown_arm(cost_claims.SMALLEST)}, {row.claim.measure}: {span} % of full's"
                yield Judged(words.BENCHMARKS, effect, OF_BENCHMARK[row.to_claimed])


Test = Better | Trend | Places | Counted | Timed


# Verdicts -------------------------------------------------------------------------------------------------------------


def _above_zero(difference: Estimate, claimed: float, p_value: float = 0.0) -> str:
    """Of a claim that a difference is above zero; a tie refutes one that is said to be as large as a tie's margin."""
    is_shown = p_value < SIGNIFICANT
    is_tie = claimed >= TIE and difference.low >= -TIE and difference.high <= TIE
    if is_tie or (is_shown and difference.high < 0):
        return DOES_NOT
    return HOLDS if is_shown and difference.low > 0 else UNDECIDED


def _as_good(difference: Estimate) -> str:
    """Of a claim that an arm is no more than the margin of a tie worse."""
    return HOLDS if difference.low >= -TIE else DOES_NOT if difference.high < -TIE else UNDECIDED


def _gated(
    evidence: Evidence, results: Results, arms: Sequence[Found], where: str, effect: str, verdict: str
) -> Judged:
    """Not testable where the task's positive control has not passed. Says what the arms, the first one's task, lack."""
    arm = arms[0]
    control = evidence.controls(results).get((arm.arm.model, arm.arm.family))
    fault = "no positive control is declared for it" if control is None else control.fault
    notes = [f"{each.label}: {each.lacks}" for each in arms if each.lacks]
    notes += [f"{each.label}: the {each.edge} rate tried" for each in arms if each.edge]
    return Judged(
        where=f"{_where(results, arm)}: {where}",
        effect="; ".join([effect, *dict.fromkeys(notes)]),
        verdict=f"{NOT_TESTABLE}: {fault}" if fault else verdict,
        records=[record for each in arms for record in each.records],
        results=results,
    )


def _where(results: Results, arm: Found) -> str:
    several = len(results.tier.models) > 1
    return f"{results.tier.name}, {arm.arm.family}" + f", {arm.arm.model}" * several


def pick(results: Results, experiment: str, label: str, family: str, budget: float | str | None = None) -> list[Found]:
    """Arms of an experiment by label, family and budget, one for each model."""
    found: dict[str, Found] = {}
    for each in _of_family(results, experiment, family):
        if each.label != label or budget not in (None, BEST, each.arm.budget):
            continue
        other = found.setdefault(each.arm.model, each)
        if budget == BEST and each.records and (not other.records or _held_out(each) > _held_out(other)):
            found[each.arm.model] = each
    return list(found.values())


def _held_out(found: Found) -> tuple[float, float]:
    return validated(found.records[0])


def _of_family(results: Results, experiment: str, family: str) -> list[Found]:
    """The arms of an experiment that are of a family, or of the one that stands in for it in the tier."""
    families = (family, results.tier.stand_ins.get(family))
    found = [each for each in results.arms(experiment) if each.arm.family in families]
    return [results.most_run(each) for each in found] if experiment in (*COMPARED, EXPERIMENT) else found


def _of_same_model(first: Iterable[Found], second: Iterable[Found]) -> list[tuple[Found, Found]]:
    by_model = {each.arm.model: each for each in second}
    return [(each, by_model[each.arm.model]) for each in first if each.arm.model in by_model]
