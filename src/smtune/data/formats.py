"""The four shapes a training record may have, how it is checked, and the text it becomes.

A `Record` is a checked row that knows where it stands; an `Example` is its text, cut into segments with and without
loss. All rows of a source are checked before any is used, so a bad one is met before training, not within it.

The prompt of the instruction shape is Stanford Alpaca's. LLM-Adapters (Hu et al. 2023, arXiv:2304.01933) asks by it,
but indents all lines after the first by 16 spaces. Training and evaluation share the one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from smtune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Shape = Literal["messages", "instruction", "prompt_completion", "text"]
Format = Literal["auto", "messages", "instruction", "prompt_completion", "text"]

SHAPES: Mapping[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys that make each shape. Others, such as "answer" or "task", are kept and not trained on."""

SHOWN_FAULTS = 5
"""How many faults a message spells out; the rest are counted."""


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Alpaca prompt, up to where the answer starts; without its input section if `input` is empty."""
    if input:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


@dataclass(frozen=True, slots=True)
class Record:
    """A row that was checked: `where` it stands ("train.jsonl, line 3"), its shape and its fields."""

    where: str
    shape: Shape
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that either is an answer, which gets loss, or leads to one."""

    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class Example:
    """The text of a record, in segments.

    Args:
        segments: in order; a prompt and its answer, the turns of a conversation, or one text.
        templated: a chat template wrote the special tokens already, so none are added.
        where: the record it comes from, for messages.
    """

    segments: tuple[Segment, ...]
    templated: bool = False
    where: str = "example"


def check_records(rows: Iterable[tuple[str, Any]], format: Format = "auto") -> list[Record]:
    """Check all rows of one source.

    Args:
        rows: (where it stands, value as parsed from JSON).
        format: the shape they must have; "auto" takes that of the first row that has one.
    Returns:
        The records in order.
    Raises:
        InputError: an unknown format, no row, or faulty rows: where the first few stand, what was expected and
            what came, and how many there are.
    """
    if format != "auto" and format not in SHAPES:
        options = ("auto", *SHAPES)
        raise InputError(
            f'Expected a format among {", ".join(options)}. Got "{format}".{did_you_mean(format, options)}'
        )
    shape: Shape | None = None if format == "auto" else format
    records: list[Record] = []
    faults: list[str] = []
    n_rows = 0
    for where, row in rows:
        n_rows += 1
        fault = _shape_fault(row, shape)
        if fault is None:
            shape = shape or _shapes_of(row)[0]
            fault = _field_fault(row, shape)
            if fault is None:
                records.append(Record(where, shape, row))
        if fault is not None:
            faults.append(f"{where}: {fault}")
    if faults:
        raise faults_error(faults, f"of {n_rows:,} records")
    if not records:
        raise InputError("Expected at least one record. Got none.")
    return records


SHAREGPT = (
    ' ShareGPT\'s "conversations" become "messages", a list of {"role": "user" or "assistant", "content": …}: '
    '"from" is the role (human is user, gpt is assistant), "value" the content.'
)


def faults_error(faults: Sequence[str], among: str) -> InputError:
    """One error for many faults: the first few in full, and their number."""
    lines = [f"  {fault}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"  ... and {len(faults) - SHOWN_FAULTS:,} more.")
    count = "1 fault" if len(faults) == 1 else f"{len(faults):,} faults"
    return InputError("\n".join([f"Found {count} {among}:", *lines, "Correct or remove them and start again."]))


def _shapes_of(row: Mapping[str, Any]) -> list[Shape]:
    # Parquet and the hub give a missing field as null.
    found: list[Shape] = [shape for shape, keys in SHAPES.items() if all(row.get(key) is not None for key in keys)]
    # Alpaca's own file has the rendered "text" beside the fields it was made from.
    return [shape for shape in found if shape != "text"] or found


def _shape_fault(row: object, shape: Shape | None) -> str | None:
    """Why `row` is not of `shape`, or of one shape alone where that is None."""
    if not isinstance(row, Mapping):
        return f"Expected an object with named fields. Got {_kind(row)}."
    if shape is not None:
        missing = [key for key in SHAPES[shape] if row.get(key) is None]
        if not missing:
            return None
        others = _shapes_of(row)
        got = f"a record of the shape {others[0]}" if others else _fields(row)
        hint = " All records of a source have one shape: split the file and give a list of both." if others else ""
        return f"Expected {_quoted(SHAPES[shape])} (shape {shape}). Got {got}.{hint}"
    shapes = _shapes_of(row)
    if not shapes:
        options = "; ".join(f"{_quoted(keys)} ({name})" for name, keys in SHAPES.items())
        known = [key for keys in SHAPES.values() for key in keys]
        hints = [
            SHAREGPT if key == "conversations" else did_you_mean(str(key), known) for key in row if key not in known
        ]
        return f"Expected the fields of one shape: {options}. Got {_fields(row)}.{next(filter(None, hints), '')}"
    if len(shapes) > 1:
        return f'Expected the fields of one shape. Got those of {" and ".join(shapes)}: say which by "format".'
    return None


def _field_fault(row: Mapping[str, Any], shape: Shape) -> str | None:
    """What is wrong with the fields of a row that has them all."""
    if shape == "messages":
        if row.get("tools") not in (None, "", "[]", "{}", "null", [], {}):
            return 'Expected a conversation without "tools", which are not rendered into the prompt. Got some.'
        return _messages_fault(row["messages"])
    keys = SHAPES[shape]
    optional = ("input",) if shape == "instruction" and row.get("input") is not None else ()
    for key in (*keys, *optional):
        if fault := _text_fault(row[key], key):
            return fault
    # A completion may follow an empty prompt; an instruction or an answer that says nothing is a slip.
    for key in keys:
        if key != "prompt" and not row[key].strip():
            return f'Expected "{key}" to hold text. Got an empty string.'
    return None


def _messages_fault(messages: object) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return f'Expected "messages" to be a list. Got {_kind(messages)}.'
    for k, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f'Expected message {k} to be an object with "role" and "content". Got {_kind(message)}.'
        for key in ("role", "content"):
            if fault := _text_fault(message.get(key), key):
                return f"In message {k}: {fault}"
        if message["role"] == "assistant" and not message["content"].strip():
            return f"Expected message {k}, an assistant's, to hold text. Got an empty string."
    if messages and messages[0]["role"] == "assistant":
        return "Expected a message before the first answer. Got a conversation that begins with an assistant's."
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(message["role"] for message in messages) or "no messages"
        return f'Expected a message with the role "assistant" to train on. Got {roles}.'
    return None


def _text_fault(value: object, key: str) -> str | None:
    if not isinstance(value, str):
        return f'Expected "{key}" to be a string. Got {_kind(value)}.'
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half a character, which no tokenizer takes.
        return f'Expected "{key}" to be Unicode text. Got the lone surrogate {value[error.start]!r}.'
    return None


def _kind(value: object) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, Sequence) else "an object"


def _quoted(keys: Iterable[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)


def _fields(row: Mapping[str, Any]) -> str:
    names = [str(key) for key, value in row.items() if value is not None]
    return f"the fields {', '.join(names)}" if names else "no fields"


TODAY = datetime(2024, 7, 26)
"""The date for templates that write today's, or the same rows would be others on another day. Llama's own default."""
_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "dmyYbBaAjHIMSp")
    + " }}{% endmacro %}{{ '' }}"
)
"""Before a template: transformers' own `strftime_now` is this macro there; functions cannot be handed to one."""


def to_example(record: Record, tokenizer: PreTrainedTokenizerBase | None = None) -> Example:
    """The text of a record; a conversation is rendered with the tokenizer's chat template.

    Plain text is an answer from end to end. In a conversation every assistant turn is an answer, with the mark
    that ends it: that is how the model learns to stop.

    Raises:
        InputError: a conversation, and the tokenizer is missing, has no chat template, or has one that cannot
            render it or rewrites earlier turns.
    """
    fields = record.fields
    if record.shape == "messages":
        return Example(_turns(record, tokenizer), templated=True, where=record.where)
    if record.shape == "text":
        return Example((Segment(fields["text"], True),), where=record.where)
    if record.shape == "instruction":
        prompt, answer = alpaca_prompt(fields["instruction"], fields.get("input") or ""), fields["output"]
    else:
        prompt, answer = fields["prompt"], fields["completion"]
    return Example((Segment(prompt, False), Segment(answer, True)), where=record.where)


def _turns(record: Record, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Segment, ...]:
    """The rendered conversation, cut where assistant turns start and end.

    Few templates mark assistant turns (`{% generation %}`), so the cuts are found by rendering every prefix of the
    conversation. That is right only if each rendering continues the one before, which is checked.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise InputError(
            f"Expected a tokenizer with a chat template to render {record.where}. Got none: use the tokenizer of an "
            'instruction-tuned model, set its "chat_template", or give the data as "prompt" and "completion".'
        )
    # Parquet and the hub give a key of one message to all, as null; templates ask only whether it is there, and older
    # releases of transformers hand it on.
    messages = [
        {key: value for key, value in message.items() if value is not None} for message in record.fields["messages"]
    ]
    segments: list[Segment] = []
    done = ""
    for k, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(record, tokenizer, messages[:k], add_generation_prompt=True)
            after = _render(record, tokenizer, messages[: k + 1])
            segments += _continuation(record, done, before, is_answer=False)
            segments += _continuation(record, before, after, is_answer=True)
            done = after
    segments += _continuation(record, done, _render(record, tokenizer, messages), is_answer=False)
    return tuple(segments)


def _render(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = False,
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program and may raise anything
        raise InputError(
            f"Expected a conversation that the chat template can render at {record.where}. Got: {error}"
        ) from error
    return cast(str, rendered)


def _continuation(record: Record, start: str, whole: str, is_answer: bool) -> list[Segment]:
    if not whole.startswith(start):
        raise InputError(
            "Expected a chat template that only appends when a turn is added, so that answers can be told from the "
            f"rest. Got one that rewrites what stood before, at {record.where}: use another template, or one record "
            "per answer."
        )
    return [Segment(whole[len(start) :], is_answer)] if whole != start else []
