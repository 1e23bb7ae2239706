"""What a tier's folder of results holds, read from its cells alone: no data, no model.

A cell's name is a hash of its configuration, which holds hashes of the weights, the rows and the items. Those are taken
from the stored cells; all else comes from the declared experiments and tiers. So an arm finds its cells by name as it
does where they are run, and a cell of another recipe, of fewer items or of other data than the most complete ones is
not found: trials never count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from smtune.reproduce.cells import Arm, Cell, Record, arms
from smtune.reproduce.declared import SCALES, Experiment, Tier, load_experiment, load_tier
from smtune.reproduce.run import CELLS
from smtune.reproduce.setting import Setting, count_items
from smtune.reproduce.store import Store

COMPARED = ("study-methods", "study-criteria", "table2", "study-short", "table5")
"""The experiments whose arms are held against SMT. An arm of several is that of the one with most seeds of it."""
CONTENT = ("data", "weights")
"""Of a cell's configuration, the hashes that only who has the data and the model can make."""


@dataclass(frozen=True)
class Found:
    """An arm, and what there is of it.

    Attributes:
        arm: the arm.
        records: at its best learning rate, a seed each; at the best so far while the sweep goes on.
        swept: the first seed's records by learning rate.
        n_seeds: how many the experiment asks of it.
        tried: learning rates that the first seed was run at, in other experiments too.
    """

    arm: Arm
    records: list[Record]
    swept: Mapping[float, Record]
    n_seeds: int
    tried: frozenset[float] = frozenset()

    @property
    def label(self) -> str:
        return self.arm.row.label

    @property
    def rate(self) -> float:
        return self.records[0]["config"]["learning_rate"]

    @property
    def lacks(self) -> str:
        """What is missing of the seeds, rates and steps that are declared, in words; "" where nothing is."""
        texts = [f"{len(self.swept)} of {len(self.arm.rates)} rates"] * (len(self.swept) < len(self.arm.rates))
        texts += [f"{len(self.records)} of {self.n_seeds} seeds"] * (len(self.records) < self.n_seeds)
        n_stopped = sum(not record["metrics"].get("finite", True) for record in self.records)
        texts += [f"{n_stopped} stopped at a loss that is not finite"] * (n_stopped > 0)
        return ", ".join(texts)

    @property
    def edge(self) -> str:
        """Where the best rate of a whole sweep stands among all that were tried, if it is not bracketed.

        "smallest" or "largest" at that end, "only" where no other was tried.
        """
        if not self.records or self.arm.row.method == "base" or len(self.swept) < len(self.arm.rates):
            return ""
        rates = sorted({*self.arm.rates, *self.tried})
        if len(rates) == 1:
            return "only"
        return {rates[0]: "smallest", rates[-1]: "largest"}.get(self.rate, "")

    def values(self, name: str) -> dict[int, float]:
        """A metric by seed, where it is there and finite."""
        found = {record["config"]["seed"]: record["metrics"].get(name) for record in self.records}
        return {seed: value for seed, value in found.items() if value is not None}


class Results:
    """What there is of a tier.

    Attributes:
        tier, folder: which, and where.
        records: by cell, all that count.
        n_left_out: how many cells do not.
    """

    def __init__(self, tier: Tier, folder: Path) -> None:
        self.tier, self.folder = tier, folder
        self._setting = Setting(tier.name)
        store = Store(folder / CELLS)
        stored = [store.load(path.stem) for path in sorted((folder / CELLS).glob("*.jsonl"))]
        self._content = _most_complete([record for record in stored if self._is_whole(record)])
        counted = [record for record in stored if self._is_whole(record) and self._is_of_content(record)]
        self.records = {record["cell"]: record for record in counted}
        self.n_left_out = len(stored) - len(counted)
        self._arms: dict[str, list[Found]] = {}

    def _is_whole(self, record: Record) -> bool:
        """Whether a cell has the tier's own recipe, evaluation and number of items: no trial."""
        config = record["config"]
        if config["model"] not in self.tier.models or config["family"] not in self.tier.families:
            return False
        asked = self._setting.shape(config["model"], config["family"])
        if config["kind"] != "memory":
            asked["evaluation"] = self._setting.evaluation
        if any(config.get(key) != value for key, value in asked.items()):
            return False
        tests = record["metrics"].get("tests")
        if not tests:
            return True
        return sum(test["items"] for test in tests.values()) >= count_items(self._setting, config["family"])

    def _is_of_content(self, record: Record) -> bool:
        config = record["config"]
        content = self._content.get((config["model"], config["family"]))
        return config["kind"] == "memory" or {key: config[key] for key in CONTENT} == content

    @cached_property
    def further_seeds(self) -> list[int]:
        """Those that were run and are none of the tier's."""
        return sorted({record["config"]["seed"] for record in self.records.values()} - set(self.tier.seeds))

    def find(self, cell: Cell) -> Record | None:
        return self.records.get(cell.id)

    def arms(self, name: str) -> list[Found]:
        """The arms of an experiment, in the order of its table, run or not."""
        if name not in self._arms:
            self._arms[name] = self._collect(load_experiment(name))
        return self._arms[name]

    def most_run(self, found: Found) -> Found:
        """The arm as the one of `COMPARED` that has most seeds of it found it, under its own label."""
        same = [arm for name in COMPARED for arm in self.arms(name) if arm.arm.fixed == found.arm.fixed]
        best = max([found, *same], key=lambda arm: len(arm.records))
        return found if best is found else replace(best, arm=replace(best.arm, row=found.arm.row))

    def _collect(self, experiment: Experiment) -> list[Found]:

        def base(model: str, family: str) -> Record:
            shape = self._setting.shape(model, family)
            if experiment.kind == "memory":
                return shape
            return {**shape, **self._content.get((model, family), {}), "evaluation": self._setting.evaluation}

        declared = self.tier.seeds_of(experiment)
        found = []
        families = self._setting.families(experiment)
        seeds = list(dict.fromkeys([*declared, *self.further_seeds]))
        for arm in arms(experiment, self.tier, families, seeds, base):
            swept = {rate: record for rate, cell in zip(arm.rates, arm.sweep()) if (record := self.find(cell))}
            n_seeds = min(len(arm.seeds), len(declared))
            tried = self._rates.get(_of_rates({**arm.fixed, "seed": arm.seeds[0]}), frozenset())
            found.append(Found(arm, arm.chosen(self.find), swept, n_seeds, frozenset(tried)))
        return found

    @cached_property
    def _rates(self) -> dict[str, set[float]]:
        """The learning rates of the cells that differ in nothing else."""
        rates: dict[str, set[float]] = {}
        for record in self.records.values():
            config = record["config"]
            rates.setdefault(_of_rates(config), set()).add(config["learning_rate"])
        return rates

    def tests(self, family: str) -> list[str]:
        """The names of a family's tests, by its cells; none where nothing was trained on it alone."""
        for record in self.records.values():
            config, metrics = record["config"], record["metrics"]
            if config["family"] == family and "then" not in config and "tests" in metrics:
                return list(metrics["tests"])
        return []


def _of_rates(config: Mapping[str, Any]) -> str:
    """A cell's configuration but for its learning rate."""
    return json.dumps({key: value for key, value in config.items() if key != "learning_rate"}, sort_keys=True)


def _most_complete(whole: list[Record]) -> dict[tuple[str, str], dict[str, Any]]:
    """By model and family, the weights and data that most items, and then most cells, are of."""
    cells: dict[tuple[str, str], Counter[str]] = {}
    items: Counter[str] = Counter()
    for record in whole:
        config = record["config"]
        if config["kind"] == "memory" or "then" in config:  # the latter has the items of two families
            continue
        content = json.dumps({key: config[key] for key in CONTENT}, sort_keys=True)
        cells.setdefault((config["model"], config["family"]), Counter())[content] += 1
        items[content] = max(items[content], len(record["items"]))
    return {
        key: json.loads(max(counts, key=lambda content: (items[content], counts[content], content)))
        for key, counts in cells.items()
    }


def read(output: Path) -> list[Results]:
    """What there is under a folder, a tier each, in the order of the scales; tiers without cells are left out."""
    names = [name for tiers in SCALES.values() for name in tiers]
    found = [Results(load_tier(name), output / name) for name in names if (output / name / CELLS).is_dir()]
    return [results for results in found if results.records or results.n_left_out]
