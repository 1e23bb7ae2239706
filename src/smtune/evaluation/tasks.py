"""The evaluation tasks: what each asks for, how its records are read, and the options they spell out.

Records are LLM-Adapters' (Hu et al. 2023, arXiv:2304.01933): one JSON object with `instruction`, `input` and
`answer`, the options written inside the instruction.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from smtune.data import alpaca_prompt, packaged_tests, read_rows
from smtune.errors import InputError, did_you_mean

RECORDS_URL = "https://github.com/AGI-Edgerunners/LLM-Adapters"
"""Where the records of all tasks but the packaged ones come from (its folder `dataset`)."""

_HOW_TO_GET = f'`git clone {RECORDS_URL}` has the sets: give its folder "dataset".'

LETTERS = tuple("ABCDE")


@dataclass(frozen=True)
class Task:
    """What a task asks for.

    Args:
        name: LLM-Adapters' name of the set, and the name of its file.
        group: the average it belongs to.
        kind: the answer is a `label` such as "answer2" (or "true"), a `letter` A to E, or a `number`.
        stem: a label without its number ("answer"); empty for true/false and for other kinds.
        opening: the words before the answer in the training sets, for option likelihood; empty where an option
            continues the sentence that the instruction leaves open.
        max_new_tokens: the room a generated answer gets; LLM-Adapters' own 32 and 256.
        per_character: whether option likelihood divides by the option's length (`Choice`).
        leaked: test questions of the set are in the published Math10K training set, so a model trained on
            that one has seen them.
        source: who made the set.
        aliases: other names accepted, any case.
    """

    name: str
    group: Literal["commonsense", "math", "packaged"]
    kind: Literal["label", "letter", "number"]
    source: str
    stem: str = ""
    opening: str = "the correct answer is"
    max_new_tokens: int = 32
    per_character: bool = True
    leaked: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def has_options(self) -> bool:
        """Whether option likelihood can score it."""
        return self.kind != "number"


def _commonsense(name: str, stem: str, source: str, *aliases: str, **fields: Any) -> Task:
    return Task(name, "commonsense", "label", source, stem, aliases=aliases, **fields)


def _math(name: str, source: str, *, kind: Literal["letter", "number"] = "number", leaked: bool = False) -> Task:
    return Task(name, "math", kind, source, opening="The answer is", max_new_tokens=256, leaked=leaked)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        # "true" and "false" differ in length, not in how much they say.
        _commonsense("boolq", "", "Clark et al. 2019, google/boolq", per_character=False),
        _commonsense("piqa", "solution", "Bisk et al. 2020, ybisk/piqa"),
        _commonsense("social_i_qa", "answer", "Sap et al. 2019, allenai/social_i_qa", "siqa"),
        _commonsense("hellaswag", "ending", "Zellers et al. 2019, Rowan/hellaswag", opening=""),
        _commonsense("winogrande", "option", "Sakaguchi et al. 2020, allenai/winogrande"),
        _commonsense("ARC-Easy", "answer", "Clark et al. 2018, allenai/ai2_arc", "arc-e", "arc_easy"),
        _commonsense("ARC-Challenge", "answer", "Clark et al. 2018, allenai/ai2_arc", "arc-c", "arc_challenge"),
        _commonsense("openbookqa", "answer", "Mihaylov et al. 2018, allenai/openbookqa", "obqa"),
        _math("gsm8k", "Cobbe et al. 2021, openai/gsm8k"),
        _math("SingleEq", "Koncel-Kedziorski et al. 2015", leaked=True),
        _math("SVAMP", "Patel et al. 2021, arkilpatel/SVAMP"),
        _math("MultiArith", "Roy and Roth 2015", leaked=True),
        _math("AddSub", "Hosseini et al. 2014", leaked=True),
        _math("AQuA", "Ling et al. 2017, google-deepmind/AQuA", kind="letter"),
        Task("arithmetic", "packaged", "number", "procedural, packaged with smtune", max_new_tokens=64),
        Task("comparison", "packaged", "label", "procedural, packaged with smtune", "answer"),
    )
}

GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(name for name, task in TASKS.items() if task.group == group) for group in ("commonsense", "math")
}


def resolve_tasks(names: Iterable[str]) -> list[Task]:
    """The tasks by name, alias or group, in the order given, each once.

    Raises:
        InputError: names every unknown one, with the closest that exists.
    """
    by_name: dict[str, tuple[str, ...]] = dict(GROUPS)
    for task in TASKS.values():
        by_name |= {name.lower(): (task.name,) for name in (task.name, *task.aliases)}
    names = list(names)
    unknown = [name for name in names if name.lower() not in by_name]
    if unknown or not names:
        came = " ".join(f'"{name}".{did_you_mean(name.lower(), by_name)}' for name in unknown) or "none."
        raise InputError(f"Expected tasks or groups among {', '.join([*GROUPS, *TASKS])}. Got {came}")
    # A dict keeps the order and drops repeats, as in "commonsense,boolq".
    return [TASKS[name] for name in dict.fromkeys(task for name in names for task in by_name[name.lower()])]


@dataclass(frozen=True)
class Item:
    """One question of a task: `index` is its position in the file, `answer` the truth."""

    task: Task
    index: int
    instruction: str
    input: str
    answer: str

    @cached_property
    def prompt(self) -> str:
        """The Alpaca prompt, exactly as in training."""
        return alpaca_prompt(self.instruction, self.input)

    @cached_property
    def key(self) -> str:
        """Names the item across runs and models: 16 hex digits over task, index, prompt and answer."""
        identity = json.dumps([self.task.name, self.index, self.prompt, self.answer])
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


def load_items(task: Task, source: str | Path | None = None, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task.

    Args:
        source: a folder with `<task>.jsonl`, `<task>.json` or `<task>/test.json` (LLM-Adapters' layout), or what
            `smtune.data.read_rows` takes: a file, a packaged name, a data set of the hub. Records that name
            another `task` are left out. None: the packaged folder, with a few items of some tasks. A packaged
            task need not be in the folder.
        limit: at most this many items, a sample drawn by `seed`; None for all. The order is the source's.
    Raises:
        InputError: nothing there, a record that is not one, or no record of the task.
    """
    if limit is not None and limit < 1:
        raise InputError(f"Expected a limit of at least 1 item. Got {limit}.")
    source = packaged_tests() if source is None else source
    if Path(source).is_dir():
        source = _find(task, Path(source))
    items = [
        _item(task, index, record, source)
        for index, record in enumerate(read_rows(source))
        if not isinstance(record, Mapping) or record.get("task", task.name) == task.name
    ]
    if not items:
        raise InputError(f"Expected records of {task.name} in {source}. Got none. {_HOW_TO_GET}")
    if limit is not None and limit < len(items):
        chosen = random.Random(f"{seed} {task.name}").sample(range(len(items)), limit)
        items = [items[k] for k in sorted(chosen)]
    return items


def _find(task: Task, folder: Path) -> Path:
    names = (f"{task.name}.jsonl", f"{task.name}.json", f"{task.name}/test.json")
    candidates = [folder / name for name in names]
    if task.group == "packaged":
        candidates.append(packaged_tests() / names[0])
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(f"Expected {', '.join(names[:-1])} or {names[-1]} in {folder}. Got none of them. {_HOW_TO_GET}")


def _item(task: Task, index: int, record: Any, source: str | Path) -> Item:
    fields = record if isinstance(record, Mapping) else {}
    answer = fields.get("answer")
    if not isinstance(fields.get("instruction"), str) or not isinstance(answer, (str, int, float)):
        raise InputError(
            f'Expected "instruction" and "answer" in {source}, record {index + 1}. Got the fields {sorted(fields)}.'
        )
    answer = str(answer).strip()
    if not _is_answer(task, answer):
        expected = {"number": "a number", "letter": "a letter A to E", "label": "a label"}[task.kind]
        raise InputError(f'Expected "answer" to be {expected} in {source}, record {index + 1}. Got {answer!r}.')
    extra = fields.get("input") or ""
    if not isinstance(extra, str):
        raise InputError(f'Expected "input" to be a string in {source}, record {index + 1}. Got {extra!r}.')
    return Item(task, index, fields["instruction"], extra, answer)


def _is_answer(task: Task, answer: str) -> bool:
    """Whether it is an answer of the task's kind, so that predictions can be compared with it."""
    if task.kind == "number":
        return re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", answer) is not None
    if task.kind == "letter":
        return answer.upper() in LETTERS
    return re.fullmatch(rf"{task.stem}\d+" if task.stem else "true|false", answer.lower()) is not None


@dataclass(frozen=True)
class Choice:
    """One option as likelihood scores it: log p(`scored` | `prompt` + `opening`), in all or per character.

    The *text* of the option is scored, never its label, and the prompt asks without listing the options: a small
    model knows nothing of "answer2", and tends to repeat the head of a list. `prompt` is the Alpaca prompt around the
    rest of the instruction; `opening` is how a trained answer begins ("the correct answer is"), or nothing for
    HellaSwag, whose endings continue the prompt. WinoGrande asks no question: there the prompt asks to complete a
    sentence, `opening` is the sentence up to and with the option, and `scored` what follows, the same for both
    (partial scoring: Trinh and Le 2018, arXiv:1806.02847).
    """

    label: str
    prompt: str
    opening: str
    scored: str


def choices(item: Item) -> list[Choice]:
    """The options that the instruction spells out, in its order.

    Raises:
        ValueError: the task has none.
        InputError: the instruction does not spell them as the set does.
    """
    task, text = item.task, item.instruction
    if not task.has_options:
        raise ValueError(f"Expected a task with options. Got {task.name}.")
    if task.kind == "letter":
        body, labels, markers = text, LETTERS, [f"({letter})" for letter in LETTERS]
    else:
        form = re.search(r"Answer format:\s*(\S+)\s*$", text)
        if form is None:
            raise InputError(f'Expected "Answer format: .../..." at the end of {_name(item)}. Got {text[-60:]!r}.')
        body, labels = text[: form.start()], tuple(form[1].split("/"))
        markers = [f"{label.capitalize()}:" for label in labels] if task.stem else []

    texts = [] if markers else list(labels)  # true and false are their own texts
    # Backwards: the options stand at the end, and the question before them may hold anything.
    for marker in reversed(markers):
        body, mark, option = body.rpartition(marker)
        if not mark or not option.strip():
            raise InputError(f'Expected an option after "{marker}" in {_name(item)}. Got {text!r}.')
        texts.insert(0, option.strip())
    question = body.strip().removesuffix("Answer Choices:").rstrip()
    if task.name == "winogrande":
        return _fill_blank(item, question, labels, texts)
    prompt = alpaca_prompt(question, item.input)
    space = " " if task.opening else ""
    return [Choice(label, prompt, task.opening, space + option) for label, option in zip(labels, texts)]


def _fill_blank(item: Item, question: str, labels: Sequence[str], texts: Sequence[str]) -> list[Choice]:
    request, mark, sentence = question.partition("given sentence:")
    before, blank, after = sentence.strip().partition("_")
    if not mark or not blank or not after:
        raise InputError(
            f'Expected "given sentence:" and a sentence that goes on after "_" in {_name(item)}. Got {question!r}.'
        )
    prompt = alpaca_prompt(request + mark, item.input)
    return [Choice(label, prompt, before + option, after) for label, option in zip(labels, texts)]


def _name(item: Item) -> str:
    return f"{item.task.name}, record {item.index + 1}"
