"""Cells: the smallest things that are run, and which of them an experiment still wants.

A cell is one configuration in plain JSON values, complete: it names the weights, the rows and the test items by their
hashes, so its identity is a hash of its content, and two experiments that want the same cell share it.

Learning rates are swept with the first seed; the other seeds run at the best rate, by accuracy on held-out training
rows (their loss decides among equals). Tests are never looked at for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smtune.reproduce.declared import Experiment, Row, Tier

Record = dict[str, Any]
WHOLE = ("full", "dense-v", "dense-qkv")
"""Methods that train all of something."""

UNBUDGETED = ("base", *WHOLE)
"""Those, and what trains nothing."""

Find = Callable[["Cell"], "Record | None"]
"""The stored record of a cell, or None."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One configuration; `label` says in words which, and has no part in its identity."""

    config: Mapping[str, Any]
    label: str

    @cached_property
    def id(self) -> str:
        """16 hex digits over the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Arm:
    """A row of an experiment with everything fixed but the learning rate and the seed.

    Attributes:
        row, model, family, budget: what it is.
        fixed: its cells' configuration without the two.
        rates, seeds: what is run: every rate with the first seed, the best one with all.
    """

    row: Row
    model: str
    family: str
    budget: float | int
    fixed: Mapping[str, Any]
    rates: Sequence[float]
    seeds: Sequence[int]

    @property
    def label(self) -> str:
        return f"{self.family}, {self.model}, {self.row.label}, {budget_text(self.budget)}"

    @property
    def n_cells(self) -> int:
        return len(self.rates) + len(self.seeds) - 1

    def cell(self, rate: float, seed: int) -> Cell:
        label = self.label + (f", rate {rate:g}" if len(self.rates) > 1 else "") + f", seed {seed}"
        return Cell({**self.fixed, "learning_rate": rate, "seed": seed}, label)

    def sweep(self) -> list[Cell]:
        """A cell for each learning rate, with the first seed."""
        return [self.cell(rate, self.seeds[0]) for rate in self.rates]

    def best(self, find: Find) -> float | None:
        """The chosen learning rate, or None while some of the sweep is missing."""
        records = {rate: find(cell) for rate, cell in zip(self.rates, self.sweep())}
        if len(self.rates) == 1:
            return self.rates[0]
        found = {rate: record for rate, record in records.items() if record is not None}
        return max(found, key=lambda rate: validated(found[rate])) if len(found) == len(self.rates) else None

    def cells(self, find: Find) -> list[Cell]:
        """Those known so far: the sweep, and once it is done the other seeds."""
        best = self.best(find)
        return self.sweep() + ([self.cell(best, seed) for seed in self.seeds[1:]] if best is not None else [])

    def chosen(self, find: Find) -> list[Record]:
        """What there is of the table's cells: at the best rate, the best so far while the sweep goes on."""
        best = self.best(find)
        if best is None:
            so_far = [record for cell in self.sweep() if (record := find(cell)) is not None]
            return [max(so_far, key=validated)] if so_far else []
        records = [find(self.cell(best, seed)) for seed in self.seeds]
        return [record for record in records if record is not None]


def validated(record: Record) -> tuple[float, float]:
    """What a learning rate is judged by, the larger the better; a run that diverged, below all others."""
    metrics = record["metrics"]
    validation = metrics["validation"]
    accuracy = validation["correct"] / validation["items"] if validation["items"] else 0.0
    loss = metrics["validation_loss"]
    if loss is not None:
        return accuracy, -loss
    return (accuracy, -math.inf) if metrics.get("finite", True) else (-1.0, 0.0)


def budget_text(budget: float | int) -> str:
    """A number of blocks, or percent of the parameters."""
    return f"{budget} blocks" if isinstance(budget, int) else f"{100 * budget:.3g} %"


def arms(
    experiment: Experiment,
    tier: Tier,
    families: Sequence[str],
    seeds: Sequence[int] | None,
    base: Callable[[str, str], Record],
    most_steps: int | None = None,
) -> Iterator[Arm]:
    """The arms of an experiment, in the order of its table.

    Args:
        experiment, tier: as declared.
        families: that it is run on.
        seeds: of every arm, None: as declared; the untrained model and what draws nothing have the first only.
        base: (model, family) to what all cells of the two share: data, recipe, evaluation.
        most_steps: of a trial; the steps and scoring batches of a row's own are at most as many.
    """
    seeds = seeds or tier.seeds_of(experiment)
    for family in families:
        for model in tier.models:
            for row in experiment.rows_at(tier.scale):
                if row.models is not None and model not in row.models:
                    continue
                if row.families is not None and family not in row.families:
                    continue
                for budget in [1.0] if row.method in UNBUDGETED else row.budgets:
                    other = row.then or row.scored_on
                    further = base(model, other).get("data") if other is not None else None
                    varies = experiment.layout == "overlap" or (experiment.kind == "train" and row.method != "base")
                    yield Arm(
                        row=row,
                        model=model,
                        family=family,
                        budget=budget,
                        fixed={
                            "kind": experiment.kind,
                            **base(model, family),
                            **_of_row(row, budget, most_steps),
                            **_given({"further_data": further}),
                        },
                        rates=tier.rates(experiment, row),
                        seeds=seeds if varies else seeds[:1],
                    )


def _of_row(row: Row, budget: float | int, most_steps: int | None) -> Record:
    """What a row asks for. What it leaves at its default has no part in a cell's identity, but for the first four."""
    smt = {"criterion": row.criterion, "targets": row.targets, "shares": row.shares, "shuffled": row.shuffled}
    further = {
        "policy": row.policy,
        "optimizer": row.optimizer if row.optimizer != "adamw" else None,
        "reselect_every": row.reselect_every,
        "dense_warmup": row.dense_warmup,
        "scored_on": row.scored_on,
        "half": row.half,
        "then": row.then,
    }
    recipe = _given({"steps": row.steps, "scoring_batches": row.scoring_batches})
    if most_steps is not None:
        recipe = {name: min(count, most_steps) for name, count in recipe.items()}
    instead = _given({"block_size": row.block_size, "recipe": recipe or None})
    return {
        "method": row.method,
        "budget": budget,
        **(smt if row.method == "smt" else {}),
        **({"targets": row.targets} if row.method == "smt-basis" else {}),
        **_given(further),
        **_given({"instead": instead or None}),
    }


def _given(values: Mapping[str, Any]) -> Record:
    return {name: value for name, value in values.items() if value is not None}


def resolved(config: Mapping[str, Any]) -> Record:
    """A cell's configuration with what its row has `instead` of the tier's."""
    instead = config.get("instead", {})
    recipe = {**config["recipe"], **instead.get("recipe", {})}
    return {**config, **instead, "recipe": recipe}
