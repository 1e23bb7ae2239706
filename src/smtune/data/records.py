"""Read training data in the shapes people have, and check every row of it before anything expensive starts.

Shapes, told by their fields: `instruction` + `output` (+ `input`; Alpaca, LLM-Adapters), `prompt` + `completion`,
`messages` (a chat, rendered by the tokenizer's template), `text`. Files: .json, .jsonl, .parquet. Other sources: a
packaged name, or a data set of the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from smtune.data.arithmetic import arithmetic
from smtune.data.prompts import alpaca_prompt
from smtune.errors import InputError, did_you_mean

FORMATS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""The fields that make a record of each shape."""

PACKAGED = {
    "arithmetic": "word problems made by our own templates (train); `arithmetic/test` is kept apart",
    "arithmetic/test": "word problems never in `arithmetic`",
    "mini/math": "GSM8K and AQuA, 1,100 training rows",
    "mini/commonsense": "WinoGrande, SocialIQA and OpenBookQA, 900 training rows",
    "mini/test": "50 test rows each of GSM8K, AQuA, SVAMP, WinoGrande, SocialIQA and OpenBookQA",
}
"""Names of the data inside the package."""

ARITHMETIC_ROWS = {"train": 2000, "test": 500}
FAULTS_SHOWN = 5

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether the loss falls on it when training on answers."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Example:
    """One training text, in pieces.

    Attributes:
        segments: in order; their texts joined are the whole.
        ends_itself: the last segment closes with the chat template's own end; no end-of-text token is added.
    """

    segments: tuple[Segment, ...]
    ends_itself: bool = False


@dataclass(frozen=True)
class _Row:
    where: str
    record: Any


def read_records(source: str | Path | Sequence[str | Path], *, split: str = "train") -> list[dict[str, Any]]:
    """All records of a source, as objects, unchecked but for being objects.

    Args:
        source: a path, a packaged name, a hub name (`owner/name`, `owner/name:configuration`), or several of these.
        split: of a hub data set.
    Raises:
        InputError: what cannot be read, with path and line.
    """
    return [dict(row.record) for row in _read(source, split)]


def load_examples(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
) -> list[Example]:
    """Read a source and check every row.

    Args:
        source, split: see `read_records`.
        format: one of `FORMATS`, or "auto": told by the fields of the first row.
        tokenizer: renders `messages`; not needed for other shapes.
    Raises:
        InputError: with path and line of the first faulty rows and the count of all.
    """
    if format != "auto" and format not in FORMATS:
        raise InputError(
            f"Expected a data format of auto, {', '.join(FORMATS)}. Got {format!r}.{did_you_mean(format, FORMATS)}"
        )
    rows = _read(source, split)
    shape = _detect(rows[0]) if format == "auto" else format
    examples, faults = [], []
    for row in rows:
        try:
            examples.append(_example(row, shape, tokenizer))
        except InputError as error:
            faults.append(str(error))
    if faults:
        more = f"\n  … and {len(faults) - FAULTS_SHOWN} more." if len(faults) > FAULTS_SHOWN else ""
        shown = "\n  ".join(faults[:FAULTS_SHOWN])
        raise InputError(f"{len(faults)} of {len(rows)} rows are not {shape} records:\n  {shown}{more}")
    return examples


def question_key(text: str) -> str:
    """The text's letters and digits in lower case: equal for questions that differ in spacing or punctuation."""
    return re.sub(r"[\W_]+", "", text.lower())


def count_overlap(left: Iterable[Record], right: Iterable[Record]) -> int:
    """How many records of `left` ask a question (`instruction`) that `right` asks too."""
    asked = {question_key(record["instruction"]) for record in right}
    return sum(question_key(record["instruction"]) in asked for record in left)


# Sources ----------------------------------------------------------------------------------------------------------


def _read(source: str | Path | Sequence[str | Path], split: str) -> list[_Row]:
    if not isinstance(source, (str, Path)):
        return [row for part in source for row in _read(part, split)]
    rows = list(_rows(source, split))
    if not rows:
        raise InputError(f"Expected records in {source}. Got an empty source.")
    for row in rows:
        if not isinstance(row.record, Mapping):
            raise InputError(f"{row.where}: expected a JSON object. Got {type(row.record).__name__}.")
    return rows


def _rows(source: str | Path, split: str) -> Iterator[_Row]:
    name, path = str(source), Path(source)
    if name in PACKAGED:
        yield from _packaged(name)
    elif path.is_file():
        yield from _file(path)
    elif path.is_dir():
        raise InputError(f"Expected a file of records. {path} is a folder: name the file in it.")
    elif isinstance(source, str) and _may_be_hub_name(name):
        yield from _hub(name, split)
    else:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or did_you_mean(name, PACKAGED)
        raise InputError(
            f"Expected data at {name}. There is no such file.{hint} Packaged names: {', '.join(PACKAGED)}. "
            "A data set of the hub is named owner/name."
        )


def _may_be_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) is not None and Path(name).suffix not in _READERS


def _packaged(name: str) -> Iterator[_Row]:
    kind, _, part = name.partition("/")
    if kind == "arithmetic":
        split = "test" if part == "test" else "train"
        for number, record in enumerate(arithmetic(ARITHMETIC_ROWS[split], split), 1):
            yield _Row(f"{name}, record {number}", record)
    else:
        yield from _lines(Path(str(files("smtune.data") / "assets" / f"{part}.jsonl")))


def _hub(name: str, split: str) -> Iterator[_Row]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the libraries below raise many kinds for "not there" and "not reachable"
        raise InputError(
            f"Expected data at {name}: no such file, and the hub gave no data set of that name "
            f"(split {split!r}): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    for number, record in enumerate(dataset, 1):
        yield _Row(f"{name}, record {number}", record)


def _file(path: Path) -> Iterator[_Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"Expected a file ending in {', '.join(_READERS)}. Got {path}.")
    yield from reader(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: expected UTF-8 text. Got a byte that is not.") from None


def _lines(path: Path) -> Iterator[_Row]:
    # JSON lines end with "\n" alone; str.splitlines would also cut at separators inside a string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield _Row(f"{path}, line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: expected one JSON object. Got {error.msg} at column {error.colno}."
                ) from None


def _array(path: Path) -> Iterator[_Row]:
    try:
        records = json.loads(_text(path) or "[]")
    except json.JSONDecodeError as error:
        hint = " If each line is an object of its own, name the file .jsonl." if "Extra data" in error.msg else ""
        raise InputError(f"{path}, line {error.lineno}: expected JSON. Got {error.msg}.{hint}") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a JSON array of records. Got {type(records).__name__}.")
    for number, record in enumerate(records, 1):
        yield _Row(f"{path}, record {number}", record)


def _parquet(path: Path) -> Iterator[_Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file. {str(error).splitlines()[0]}") from None
    for number, record in enumerate(table.to_pylist(), 1):
        yield _Row(f"{path}, record {number}", record)


_READERS = {".jsonl": _lines, ".json": _array, ".parquet": _parquet}


# Shapes -----------------------------------------------------------------------------------------------------------


def _detect(row: _Row) -> str:
    for shape, fields in FORMATS.items():
        if all(field in row.record for field in fields):
            return shape
    expected = "; ".join(f"{' + '.join(fields)} ({shape})" for shape, fields in FORMATS.items())
    known = [field for fields in FORMATS.values() for field in fields]
    hints = (did_you_mean(key, known) for key in row.record if key not in known)
    hint = next((hint for hint in hints if hint), "")
    raise InputError(f"{row.where}: expected the fields {expected}. Got {', '.join(row.record) or 'none'}.{hint}")


def _example(row: _Row, shape: str, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    record = row.record
    missing = [field for field in FORMATS[shape] if field not in record]
    if missing:
        raise InputError(
            f"{row.where}: expected {' + '.join(FORMATS[shape])}. Got {', '.join(record) or 'no field'}, "
            f"without {', '.join(missing)}."
        )
    if shape == "messages":
        return _chat(row, tokenizer)
    if shape == "text":
        return Example((Segment(_string(row, "text"), True),))
    if shape == "instruction":
        prompt = alpaca_prompt(_string(row, "instruction"), _string(row, "input", optional=True))
        return Example((Segment(prompt, False), Segment(_string(row, "output"), True)))
    prompt, completion = _string(row, "prompt", optional=True), _string(row, "completion")
    return Example((Segment(prompt, False), Segment(completion, True)))


def _string(row: _Row, field: str, optional: bool = False) -> str:
    value = row.record.get(field)
    if optional and (value is None or value == ""):
        return ""
    if not isinstance(value, str):
        raise InputError(f'{row.where}: expected "{field}" to be a string. Got {type(value).__name__}.')
    if not value.strip():
        raise InputError(f'{row.where}: expected "{field}" to have text. Got an empty string.')
    return value


def _chat(row: _Row, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    """The chat as its template renders it, cut so that each assistant turn, with its end mark, is an answer.

    Templates rarely mark the generated spans, so the cuts are found by rendering ever longer beginnings of the chat.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            f"{row.where}: expected a tokenizer with a chat template for `messages`. Got one without: use a chat "
            "model, or records of another shape."
        )
    messages = row.record["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f'{row.where}: expected "messages" to be a list of turns. Got {type(messages).__name__}.')
    for number, turn in enumerate(messages, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise InputError(f'{row.where}, turn {number}: expected an object with "role" and "content".')
        if not isinstance(turn.get("content"), str):
            raise InputError(f'{row.where}, turn {number}: expected "content" to be a string.')
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise InputError(f"{row.where}: expected an assistant turn with text, to train on. Got none.")

    segments: list[Segment] = []
    done = ""
    for number, turn in enumerate(messages, 1):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[: number - 1], add_generation_prompt=True)
        after = _render(tokenizer, messages[:number], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise InputError(
                f"{row.where}, turn {number}: expected a chat template that renders a longer chat as a longer text. "
                "This tokenizer's rewrites earlier turns, so answers cannot be told from prompts: split the chat "
                "into one record per answer."
            )
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return Example(tuple(segment for segment in segments if segment.text), ends_itself=True)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping], *, add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(
        [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text
