"""What a call of `smtune reproduce` fixes for all its cells: the tier, where its data is, and what is cut short.

Data is read and hashed once; the overlap of training and test questions is counted here.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from smtune.data import arithmetic, comparison, count_overlap, question_key, read_rows
from smtune.errors import InputError
from smtune.evaluation import TASKS, Item, Task, load_items, resolve_tasks
from smtune.evaluation.tasks import RECORDS_URL
from smtune.models import fingerprint
from smtune.reproduce import mini
from smtune.reproduce.cells import Record
from smtune.reproduce.declared import Experiment, Family, Tier, is_file, load_tier

OTHER_TEXT_ROWS = 64
PROCEDURAL = {"arithmetic": arithmetic, "comparison": comparison}
"""Of these there are as many items as a tier asks for; the package's files begin alike."""


@dataclass(frozen=True)
class Setting:
    """A call's choices.

    Attributes:
        tier: its name.
        data: a folder with data. None: what the package and the hub have.
        steps, items: fewer than the tier's, for a trial; what comes of one is no result.
    """

    tier: str
    data: str | None = None
    steps: int | None = None
    items: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a folder that the tier has no use for."""
        if self.data is not None and not self.declared.takes_folder:
            raise InputError(
                "Expected --data with --tier real or --scale paper. The data of "
                f"the tier {self.tier} is in the package: leave it out."
            )

    @property
    def is_cut(self) -> bool:
        return self.steps is not None or self.items is not None or (self.tier == "mini" and mini.is_cut())

    @property
    def declared(self) -> Tier:
        return load_tier(self.tier)

    def families(self, experiment: Experiment) -> list[str]:
        """The families that an experiment is run on."""
        return self.declared.families_of(experiment)

    @property
    def recipe(self) -> Record:
        """The tier's, cut to the steps of a trial."""
        recipe = self.declared.recipe.model_dump(exclude_none=True)
        if self.steps is not None:
            recipe.pop("epochs", None)
            recipe |= {"steps": self.steps, "scoring_batches": min(self.steps, recipe["scoring_batches"])}
        return recipe

    def model_name(self, model: str) -> str:
        """For `smtune.models`: the tier's own model is a folder here."""
        name = self.declared.models[model].name
        return str(mini.folder()) if name == "mini" else name

    def shape(self, model: str, family: str) -> Record:
        """What the cells of a model and a family share that needs neither weights nor data."""
        tier = self.declared
        shared = {"tier": self.tier, "model": model, "dtype": tier.dtype, "block_size": tier.block_size}
        return {**shared, "family": family, "recipe": self.recipe}

    @property
    def evaluation(self) -> Record:
        """How answers are got; how many items there are is in the data's hash."""
        evaluation = self.declared.evaluation.model_dump(exclude={"items"})
        if evaluation["beams"] == 1:  # as in cells from before there were beams
            del evaluation["beams"]
        return evaluation

    def base(self, model: str, family: str) -> Record:
        """What the cells of a model and a family share. Reads the data."""
        named = {"data": load_data(self, family).identity, "weights": weights(self, model)}
        return {**self.shape(model, family), **named, "evaluation": self.evaluation}


@dataclass(frozen=True)
class Data:
    """The rows and items of a family.

    Attributes:
        train, validation: rows in their order; the latter are held out of the former.
        tests: the test items.
        validation_items: the validation rows that name their task, as items.
        other_text: rows of plain text that none of the training is about.
        overlap: by test, how many questions are among the training rows too, those held out of them included.
        identity: hashes of all of them.
    """

    train: list[Record]
    validation: list[Record]
    tests: list[Item]
    validation_items: list[Item]
    other_text: list[Record]
    overlap: dict[str, int]
    identity: Record

    def overlap_text(self) -> str:
        """The overlap in words."""
        found = [f"{task} {count}" for task, count in self.overlap.items() if count]
        marked = f" ({', '.join(found)}): these tests are marked" if found else ""
        count, asked = sum(self.overlap.values()), f"{len(self.tests):,} test questions"
        return f"{count} of {asked} are among {len(self.train) + len(self.validation):,} training rows{marked}"


@cache
def weights(setting: Setting, model: str) -> str:
    """Names the weights of a model; of one on the hub by its name, for its revision is known only there."""
    name = setting.declared.models[model].name
    if setting.declared.scale != "embedded":
        return name
    # Wherever the folder of the tier's own model is, its name is the model's.
    return f"{name} ({fingerprint(setting.model_name(model)).rpartition('(')[2]}"


def count_items(setting: Setting, family: str) -> int:
    """How many test items a family has, by its declared size and what is asked for of each test."""
    tier = setting.declared
    declared, limit = tier.families[family], setting.items or tier.evaluation.items
    if limit is None:
        return declared.size.items
    return min(declared.size.items, limit * len(resolve_tasks(declared.tests)))


@cache
def load_data(setting: Setting, family: str) -> Data:
    """Read, split and hash. Raises InputError for data that is not there."""
    tier = setting.declared
    declared = _family(setting, family)
    tests = _tests(setting, declared)  # before rows, which may be fetched
    rows = [row for source in declared.train for row in _rows(setting, source)]
    places = list(range(len(rows)))
    random.Random("validation").shuffle(places)
    n_held_out = min(setting.items or tier.evaluation.validation_rows, len(rows) // 5)
    held_out = set(places[:n_held_out])
    train = [row for place, row in enumerate(rows) if place not in held_out]
    validation = [rows[place] for place in sorted(held_out)]
    # A question that stands twice must not be on both sides.
    asked = {question_key(str(row.get("instruction"))) for row in validation}
    train = [row for row in train if question_key(str(row.get("instruction"))) not in asked]
    validation_items = [
        Item(TASKS[row["task"]], place, row["instruction"], row.get("input") or "", str(row["answer"]))
        for place, row in enumerate(validation)
        if row.get("task") in TASKS and row.get("answer")
    ]
    overlap = {
        task: count_overlap(rows, [_question(item) for item in tests if item.task.name == task])
        for task in dict.fromkeys(item.task.name for item in tests)
    }
    other = [text for source in declared.other_text for text in map(mini.text_of, read_rows(source))]
    other = [text for text in other if mini.is_held_out(text)][: setting.items or OTHER_TEXT_ROWS]
    return Data(
        train=train,
        validation=validation,
        tests=tests,
        validation_items=validation_items,
        other_text=[{"text": text} for text in other],
        overlap=overlap,
        identity={
            "train": _hash([[row.get(key) for key in ("instruction", "input", "output")] for row in train]),
            "validation": _hash(
                [row.get("instruction") for row in validation] + [item.key for item in validation_items]
            ),
            "tests": _hash([item.key for item in tests]),
            "other_text": _hash(other),
        },
    )


def _family(setting: Setting, family: str) -> Family:
    return setting.declared.tasks(setting.data is not None)[family]


def _rows(setting: Setting, source: str) -> list[Record]:
    """The rows of a source; one in a folder is of the task that its file is named after, where there is one."""
    if not is_file(source):
        return [dict(row) for row in read_rows(source)]
    if setting.data is None:
        raise InputError(
            f"Expected --data with a folder that holds {source}. Got none: `git clone {RECORDS_URL}` has one."
        )
    stem = Path(source).stem
    task = {"task": stem} if stem in TASKS else {}
    return [{**task, **row} for row in read_rows(_path(Path(setting.data), source))]


LLM_ADAPTERS = "dataset"
"""The folder of LLM-Adapters' repository with `<task>/train.json` and `<task>/test.json`."""


def _path(folder: Path, source: str) -> Path:
    """The file of a source, or LLM-Adapters' training rows of its task in place of one that is not there."""
    path = folder / source
    instead = folder / LLM_ADAPTERS / path.stem / "train.json"
    return instead if instead.exists() and not path.exists() else path


def _tests(setting: Setting, declared: Family) -> list[Item]:
    tier = setting.declared
    limit = setting.items or tier.evaluation.items
    folder = None if setting.data is None else _tests_folder(Path(setting.data), tier)
    files = [source for source in declared.train if is_file(source)]
    wanted = f"--data with a folder that holds the tests ({tier.tests_folder} or {LLM_ADAPTERS})"
    wanted += f" and {', '.join(files)}" if files else ""
    if folder is not None and not folder.is_dir():
        raise InputError(f"Expected {wanted}. Got {setting.data}, which has no tests.")
    try:
        return [item for task in resolve_tasks(declared.tests) for item in _items(task, folder, limit, declared.skip)]
    except InputError as error:
        if folder is not None:
            raise
        raise InputError(f"Expected {wanted}. Got none: `git clone {RECORDS_URL}` has the tests.") from error


def _tests_folder(folder: Path, tier: Tier) -> Path:
    tests = folder / tier.tests_folder
    return tests if tests.is_dir() else folder / LLM_ADAPTERS


def _items(task: Task, folder: Path | None, limit: int | None, skip: int = 0) -> list[Item]:
    if limit is None or task.name not in PROCEDURAL:
        return load_items(task, folder, limit)
    rows = list(enumerate(PROCEDURAL[task.name](skip + limit, split="test")))[skip:]
    return [Item(task, place, row["instruction"], row["input"], row["answer"]) for place, row in rows]


def _question(item: Item) -> Record:
    return {"instruction": item.instruction, "input": item.input}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]
