"""What stands beside SMT on a task: the arms that are compared, in which experiments, and what was not run.

A task is a family of tests learnt by a model of a tier.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from smtune.evaluation.statistics import SIGNIFICANT, holm
from smtune.reproduce.cells import UNBUDGETED
from smtune.reproduce.evidence.contrasts import Contrast, Design, accuracies_by_seed, contrast, design
from smtune.reproduce.evidence.control import Control
from smtune.reproduce.evidence.judges import Evidence
from smtune.reproduce.evidence.records import COMPARED, Found, Results
from smtune.reproduce.layouts import of_one_size

BUDGET = 0.0084

_OF_SMOLLM2 = [("study-short", "SMT, sampled, all linear layers, blocks of 32²"), ("table2", "SMT, sampled")]
DRAWN = {
    "mini": [("study-methods", "SMT, sampled, all linear layers, blocks of 4²")],
    "smollm2": _OF_SMOLLM2,
    "real": _OF_SMOLLM2,
}
"""SMT with its blocks drawn: by tier, experiments and labels, of which the first that a task has counts."""
LOOKED_AT = {("mini", "math"): 0}
"""Where what `DRAWN` names was found by looking at the tests of variants: the seed whose tests were seen."""


@dataclass(frozen=True, eq=False)
class Task:
    """A family of tests learnt by a model.

    Attributes:
        results, model, family: which.
        control: full fine-tuning against the untuned model.
    """

    results: Results
    control: Control

    @property
    def model(self) -> str:
        return self.control.model

    @property
    def family(self) -> str:
        return self.control.family

    @property
    def name(self) -> str:
        """ "mini, math (arithmetic)"."""
        tests = self.results.tests(self.family)
        several = len(self.results.tier.models) > 1
        parts = f"{self.results.tier.name}, {self.family}" + f", {self.model}" * several
        return parts + (f" ({', '.join(tests)})" if tests else "")

    @property
    def slug(self) -> str:
        return f"{self.results.tier.name}-{self.family}-{self.model}"

    @cached_property
    def smt(self) -> Found | None:
        """SMT itself; None where it has not been run."""
        found = self.arm(COMPARED[0], "SMT")
        return None if found is None else self.results.most_run(found)

    @cached_property
    def drawn(self) -> Found | None:
        """SMT with its blocks drawn; None where it has not been run."""
        places = DRAWN.get(self.results.tier.name, [])
        return next((arm for place in places if (arm := self.arm(*place))), None)

    @cached_property
    def rivals(self) -> list[Found]:
        """All arms that SMT is held against, run or not, each once."""
        rivals: dict[str, Found] = {}
        compared = [arm for name in COMPARED for arm in self.arms(name)]
        for arm in sorted(compared, key=lambda arm: arm.arm.budget != BUDGET):  # those of the very budget first
            row = arm.arm.row
            is_smt = (row.method, row.criterion, row.policy, row.shuffled) == ("smt", "abs_of_sum", None, False)
            if row.method == "base" or is_smt or not (row.method in UNBUDGETED or of_one_size(arm.arm.budget, BUDGET)):
                continue
            but_budget = {key: value for key, value in arm.arm.fixed.items() if key != "budget"}
            rivals.setdefault(json.dumps(but_budget, sort_keys=True), self.results.most_run(arm))
        return list(rivals.values())

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """SMT less each rival that has been run."""
        return [] if self.smt is None else [one for arm in self.rivals if (one := contrast(self.smt, arm))]

    @cached_property
    def design(self) -> Design | None:
        return design(self.contrasts)

    @cached_property
    def leads_of_first_seed(self) -> tuple[list[float], list[float]]:
        """Of each compared arm the first seed's accuracy less the others': where it chose the rate, and where not."""
        leads: tuple[list[float], list[float]] = [], []
        for arm in (*([self.smt] if self.smt else []), *self.rivals):
            if arm.arm.row.method != "base" and len(arm.records) > 1:
                first, *others = accuracies_by_seed(arm)
                leads[len(arm.arm.rates) == 1].append(first - fmean(others))
        return leads

    def arms(self, experiment: str) -> list[Found]:
        """Those of an experiment that are of this task, in its order."""
        return [
            arm for arm in self.results.arms(experiment) if (arm.arm.model, arm.arm.family) == (self.model, self.family)
        ]

    def arm(self, experiment: str, label: str) -> Found | None:
        """An arm that has been run, by its label."""
        return next((arm for arm in self.arms(experiment) if arm.label == label and arm.records), None)


def tasks(evidence: Evidence) -> list[Task]:
    """All of every tier that something was trained or selected at, those not run yet included."""
    found = []
    for results in evidence.tiers:
        kinds = {record["config"]["kind"] for record in results.records.values()}
        if kinds & {"train", "select"}:
            found += [Task(results, control) for control in evidence.controls(results).values()]
    return found


def adjusted(contrasts: Sequence[Contrast]) -> list[float]:
    """Their p-values by Holm's method, over all of them."""
    return holm([one.p_value for one in contrasts])


def is_lost_to_holm(one: Contrast, adjusted_p: float) -> bool:
    """Whether a difference is told by its own interval, and no longer once the table's others are counted in."""
    return one.verdict in ("better", "worse") and adjusted_p >= SIGNIFICANT


def not_run(arms: Iterable[Found]) -> list[str]:
    return list(dict.fromkeys(arm.label for arm in arms if not arm.records))
