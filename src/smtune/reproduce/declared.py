"""What the YAML files beside this module declare: experiments (what is compared) and tiers (on what, and how).

An experiment lists rows; a tier gives the model, data, recipe, seeds and learning rates that fill them in. Unknown keys
are faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from smtune.errors import InputError, did_you_mean

HERE = Path(__file__).parent
SCALES = {"embedded": ("mini", "smollm2", "real"), "paper": ("paper",)}
"""The tiers of each scale, the default first."""

STUDY = "study"
STUDY_PARTS = [
    f"{STUDY}-{part}"
    for part in (
        "control",
        "short",
        "criteria",
        "methods",
        "budgets",
        "places",
        "sizes",
        "plans",
        "warmup",
        "equal",
        "forgetting",
        "better",
        "spread",
        "fine",
        "unseen",
    )
]
"""The parts of the study in their order: first that there is something to see."""

Method = Literal[
    "base",
    "smt",
    "smt-basis",
    "lora",
    "lora-all",
    "lora-adapters",
    "rslora",
    "dora",
    "dora-adapters",
    "shira",
    "supertuning",
    "sift",
    "rows",
    "dense-v",
    "dense-qkv",
    "full",
]
Layout = Literal["accuracy", "scaling", "curve", "blocks", "shares", "overlap", "time", "memory"]
Kind = Literal["train", "select", "time", "memory"]
Budget = Annotated[float, Field(gt=0.0, le=1.0)] | Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Row(_Section):
    """One method of an experiment.

    Attributes:
        label: as the table shows it.
        method: what is trained; "base" is the untrained model. `smtune.reproduce.arms` builds it.
        budgets: fractions of all parameters, or numbers of blocks; of other methods than SMT, whose number of trained
            parameters they follow as closely as a rank allows.
        criterion, targets, shares: of SMT: how blocks are scored, in which projections, and shares by group. The
            targets are also those of SMT in the gradient's basis.
        policy: of SMT: how blocks are chosen by their scores, if not the best of all or by shares: "spread" over rows
            and columns of blocks, or "sampled", drawn with the scores as weights.
        shuffled: of SMT: as many blocks in every matrix, at random places.
        block_size, steps, scoring_batches: in place of the tier's.
        optimizer: of SMT: AdamW, that with shorter steps where inputs are large, or Muon on its blocks.
        reselect_every: of SMT: score and select anew after so many steps, time and again.
        dense_warmup: of SMT: score in steps of full fine-tuning, as the released code does, and keep or undo them.
        scored_on: of SMT: score with the rows of another family. half: with one half of the rows, every second one.
        then: a family to train on afterwards, in the same way; both are tested.
        models: of the tier's models, by name. families: of the experiment's. None: all.
        learning_rates: None: the tier's for this method.
    """

    label: str
    method: Method
    budgets: list[Budget] = [0.0084]
    criterion: str = "abs_of_sum"
    targets: list[str] | None = None
    shares: dict[str, float] | None = None
    policy: Literal["spread", "sampled"] | None = None
    shuffled: bool = False
    block_size: Count | None = None
    steps: Count | None = None
    scoring_batches: Count | None = None
    optimizer: Literal["adamw", "adamw-columns", "muon"] = "adamw"
    reselect_every: Count | None = None
    dense_warmup: Literal["kept", "restored"] | None = None
    scored_on: str | None = None
    half: Literal[1, 2] | None = None
    then: str | None = None
    models: list[str] | None = None
    families: list[str] | None = None
    learning_rates: list[float] | None = None


class Published(_Section):
    """The paper's own numbers, as printed."""

    columns: list[str]
    rows: list[list[str | float | int]]


def rates_text(rates: Sequence[float]) -> str:
    """As "0.003, 0.01"."""
    return ", ".join(f"{rate:g}" for rate in rates)


class Pruned(_Section):
    """Fewer seeds and learning rates than the tier's, since other experiments have shown where to look.

    Attributes:
        seeds: the first so many of the tier's, or those named.
        learning_rates: of rows that name none of their own, by method; "default" for the others.
        tiers: where it is so; elsewhere all of the tier's are run.
    """

    seeds: Count | list[int]
    learning_rates: dict[str, list[float]]
    tiers: list[str] = ["mini", "smollm2"]

    def __str__(self) -> str:
        """As "rates 0.003, 0.01; of full 3e-05; 3 seeds", or "rates named by row; seeds 5, 6"."""
        by_method = {method: rates_text(rates) for method, rates in self.learning_rates.items()}
        others = [f"of {method} {rates}" for method, rates in by_method.items() if method != "default"]
        if isinstance(self.seeds, list):
            seeds = f"seeds {', '.join(map(str, self.seeds))}"
        else:
            seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return f"rates {'; '.join([by_method.get('default', 'named by row'), *others])}; {seeds}"


class Experiment(_Section):
    """A table or figure.

    Attributes:
        name, title: for the command line and for people.
        kind: what a cell does: "train" (and evaluate), "select" (a plan only), "time" (steps), "memory" (count).
        layout: how it is shown.
        families: the tasks trained on and tested, those of them that a tier has.
        rows: by scale. models: by scale, those of the tier's models that rows without their own are run on; None: all.
        cells_of: another experiment whose rows these are.
        pruned: what is left out, and in which tiers.
        published: the paper's numbers; note: what else the page says.
    """

    name: str
    title: str
    kind: Kind = "train"
    layout: Layout
    families: list[str] = ["choice"]
    rows: dict[Literal["embedded", "paper"], list[Row]] = {}
    models: dict[Literal["embedded", "paper"], list[str]] = {}
    cells_of: str | None = None
    pruned: Pruned | None = None
    published: Published | None = None
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if bool(self.cells_of) == bool(self.rows):
            raise ValueError("expected rows or cells_of, one of the two")
        return self

    def rows_at(self, scale: Any) -> list[Row]:
        """The rows at a scale, its own or those of the experiment it shares cells with."""
        if self.cells_of is not None:
            return load_experiment(self.cells_of).rows_at(scale)
        models = self.models.get(scale)
        rows = self.rows.get(scale, [])
        return [row if row.models else row.model_copy(update={"models": models}) for row in rows]


class Recipe(_Section):
    """The training of every arm alike: AdamW without weight decay, linear schedule after a warm-up, clipped gradients.

    Attributes:
        steps, epochs: how long, by one of the two.
        batch_size: rows of a step. micro_batch_size: rows at a time.
        scoring_batches: warm-up batches that SMT scores with.
        dense_warmup_rate: the learning rate of a dense warm-up.
    """

    steps: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 16
    micro_batch_size: Count = 16
    max_length: Count = 256
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    scoring_batches: Count = 100
    dense_warmup_rate: Annotated[float, Field(gt=0.0)] = 1e-4

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.steps is None) == (self.epochs is None) or self.batch_size % self.micro_batch_size:
            raise ValueError("expected steps or epochs, one of the two, and micro batches that divide a batch")
        return self


class Size(_Section):
    """Of a family's data, roughly, for the dry run: training rows, tokens of one, test items, tokens of an answer."""

    rows: Count
    tokens: Count
    items: Count
    answer_tokens: Count


class Family(_Section):
    """A kind of task.

    Attributes:
        train: sources to train on. tests: by name.
        other_text: sources of another text, whose loss tells what is forgotten.
        skip: so many of the items that procedural tests begin with, for tests that nobody has looked at.
        chance: the share of the tests that blind guessing gets.
        size: for the dry run.
    """

    train: list[str]
    tests: list[str]
    other_text: list[str] = []
    skip: Annotated[int, Field(ge=0)] = 0
    chance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    size: Size = Size(rows=1, tokens=1, items=1, answer_tokens=1)


class Evaluation(_Section):
    """How answers are got.

    Attributes:
        items: of each test, at most. None: all.
        validation_rows: training rows held out; their loss, and the accuracy on those that name their task, choose
            the learning rate.
        batch_size: prompts at a time.
        beams: of the search for an answer; 1 is greedy.
    """

    protocol: Literal["generate", "likelihood"] = "generate"
    items: Count | None = None
    validation_rows: Count = 100
    batch_size: Count = 50
    beams: Count = 1

    @model_validator(mode="after")
    def _check(self) -> Evaluation:
        if self.beams > 1 and self.protocol != "generate":
            raise ValueError("expected beams of generated answers only")
        return self


class Model(_Section):
    """A base model: its name for `smtune.models`, and for those too large to be here its architecture by hand."""

    name: str
    architecture: dict[str, Any] | None = None
    parameters: int | None = None


class Tier(_Section):
    """Where experiments run.

    Attributes:
        models: by the name that rows use.
        block_size, dtype: of SMT, and of the frozen weights.
        learning_rates: by method; "default" for the others.
        families: the tasks; sources that end in .json or .jsonl are files of a folder of data. folder: the same where
            such a folder is given, for tiers that can do without.
        stand_ins: by family, another that experiments train on instead: one that the tier's models can learn in its
            steps.
        tests_folder: of the test files inside that folder.
        flops_per_second: what the dry run assumes of a device.
    """

    name: str
    title: str
    models: dict[str, Model]
    block_size: Count
    dtype: Literal["float32", "bfloat16"]
    recipe: Recipe
    seeds: list[int]
    learning_rates: dict[str, list[float]]
    families: dict[str, Family]
    folder: dict[str, Family] = {}
    stand_ins: dict[str, str] = {}
    tests_folder: str = "test"
    evaluation: Evaluation
    flops_per_second: float

    @property
    def scale(self) -> str:
        return "paper" if self.name == "paper" else "embedded"

    def rates(self, experiment: Experiment, row: Row) -> list[float]:
        """The learning rates that a row of an experiment sweeps; one of no meaning where nothing is trained."""
        if row.method == "base" or experiment.kind != "train":
            return [0.0]
        pruned = self.pruned(experiment)
        by_method = pruned.learning_rates if pruned else self.learning_rates
        return row.learning_rates or by_method.get(row.method) or by_method["default"]

    def others(self, families: Sequence[str]) -> list[str]:
        """What else may be forgotten: families other than these, stand-ins, further items of the same tests, and those
        of a folder, which may lack them."""
        there = [name for name, one in self.families.items() if not (one.skip or any(map(is_file, one.train)))]
        return [name for name in there if name not in (*families, *self.stand_ins.values())]

    def seeds_of(self, experiment: Experiment) -> list[int]:
        """The seeds that an experiment runs with if it is not told which."""
        pruned = self.pruned(experiment)
        if pruned is None:
            return self.seeds
        return pruned.seeds if isinstance(pruned.seeds, list) else self.seeds[: pruned.seeds]

    def tasks(self, has_folder: bool) -> dict[str, Family]:
        """The families, where a folder of data is given or where there is none."""
        return self.folder if has_folder and self.folder else self.families

    @property
    def takes_folder(self) -> bool:
        """Whether a folder of data is of any use."""
        sources = [source for family in self.families.values() for source in family.train]
        return bool(self.folder) or any(map(is_file, sources))

    def families_of(self, experiment: Experiment) -> list[str]:
        """The families of an experiment that there are; of what is trained, stand-ins for those that it names without
        them."""
        families = [family for family in experiment.families if family in self.families]
        if experiment.kind != "train":
            return families
        stand_ins = {one: other for one, other in self.stand_ins.items() if other not in families}
        return [stand_ins.get(family, family) for family in families]

    def pruned(self, experiment: Experiment) -> Pruned | None:
        """What an experiment leaves out in this tier; of one that shares another's cells, what that leaves out."""
        if experiment.cells_of is not None:
            return self.pruned(load_experiment(experiment.cells_of))
        return experiment.pruned if experiment.pruned and self.name in experiment.pruned.tiers else None


def is_file(source: str) -> bool:
    """Whether a source of rows is a file of a folder of data."""
    return source.endswith((".json", ".jsonl"))


def experiment_names() -> list[str]:
    """All experiments, in the order of the paper."""
    names = [path.stem for path in (HERE / "experiments").glob("*.yaml")]
    of_paper = [name for name in names if not name.startswith(STUDY)]
    order = ["table", "figure", "memory"]
    of_paper.sort(key=lambda name: (order.index(name.rstrip("0123456789")), name))
    return of_paper + [part for part in STUDY_PARTS if part in names]


def expand(names: Sequence[str]) -> list[str]:
    """Experiments by name, the study by its parts."""
    expanded = [part for name in names for part in (STUDY_PARTS if name == STUDY else [name])]
    return list(dict.fromkeys(expanded))


@cache
def load_experiment(name: str) -> Experiment:
    """An experiment by name. Raises InputError for an unknown one."""
    if name not in experiment_names():
        known = [*experiment_names(), STUDY]
        raise InputError(f"Expected experiments among {', '.join(known)}. Got {name!r}.{did_you_mean(name, known)}")
    return _load(Experiment, HERE / "experiments" / f"{name}.yaml", name)


@cache
def load_tier(name: str) -> Tier:
    """A tier by name. Raises InputError for an unknown one."""
    known = [tier for tiers in SCALES.values() for tier in tiers]
    if name not in known:
        raise InputError(f"Expected a tier among {', '.join(known)}. Got {name!r}." + did_you_mean(name, known))
    return _load(Tier, HERE / "tiers" / f"{name}.yaml", name)


def _load(kind: Any, path: Path, name: str) -> Any:
    try:
        return kind.model_validate({"name": name, **yaml.safe_load(path.read_text(encoding="utf-8"))})
    except (ValidationError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
