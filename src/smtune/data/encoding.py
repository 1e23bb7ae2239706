"""From examples to masked token ids, a dataset the Trainer takes, and batches.

    L  tokens of an example, B  examples of a batch.

Segments are tokenised one by one and joined. The token border therefore falls exactly where the answer starts, as it
does when a model generates after the prompt; tokenised as one string, a token could straddle it. A conversation is
tokenised as one string where none does, as it is when the model is asked: some tokenizers begin every string with a
space, which would come to stand before every turn. The end-of-sequence token follows the answer and gets loss, or the
model would not learn to stop; a begin-of-sequence token leads only if the tokenizer itself adds one. A chat template
writes both, so nothing is added to a conversation.

Labels are masked by position, never by id: for many models the padding token *is* the end-of-sequence token, whose
label must stay.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor

from smtune.data.formats import Example, Format, to_example
from smtune.data.sources import Source, read_records
from smtune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["answer", "all"]
OnLong = Literal["drop", "truncate_prompt", "error"]

IGNORED = -100
"""The label without loss, as everywhere in transformers."""

FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")})


@dataclass(frozen=True)
class EncodingReport:
    """What became of the examples.

    Args:
        n_examples: those kept.
        n_dropped: examples left out because they are longer than `max_length`.
        n_prompt_truncated: those kept whose prompt lost its beginning. No answer is ever cut.
        n_split: plain texts cut into pieces; each piece counts as an example.
        n_endless: conversations kept of which no answer holds the end-of-sequence token: their template ends a turn by
            another.
        longest: tokens of the longest example, before anything was dropped or truncated.
        tokens: of all examples kept.
        answer_tokens: of their answers, with the token that ends each.
        max_length: the most tokens an example may have.
    """

    n_examples: int
    n_dropped: int
    n_prompt_truncated: int
    n_split: int
    n_endless: int
    longest: int
    tokens: int
    answer_tokens: int
    max_length: int

    def __str__(self) -> str:
        parts = [f"{self.n_examples:,} examples, {self.tokens:,} tokens ({self.answer_tokens:,} of answers)"]
        parts += [f"longest {self.longest:,} of {self.max_length:,} allowed"]
        if self.n_dropped:
            parts += [f"{self.n_dropped:,} dropped as too long"]
        if self.n_prompt_truncated:
            parts += [f"{self.n_prompt_truncated:,} with a truncated prompt"]
        if self.n_split:
            parts += [f"{self.n_split:,} texts split"]
        if self.n_endless:
            parts += [
                f"{self.n_endless:,} conversations of which no answer ends in the tokenizer's end-of-sequence token "
                "(generation has to be told of the token that ends a turn, or it will not stop)"
            ]
        return "; ".join(parts)


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    format: Format = "auto",
    train_on: TrainOn = "answer",
    on_long: OnLong = "drop",
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Dataset, EncodingReport]:
    """Read, check, render and encode: `read_records`, `to_example` and `encode` in one.

    Returns:
        The dataset (see `encode`) and what became of the examples.
    Raises:
        InputError: whatever is wrong with the data or the arguments, before anything else is done.
    """
    _check_options(max_length, train_on, on_long)
    records = read_records(source, format=format, limit=limit, seed=seed)
    examples = [to_example(record, tokenizer) for record in records]
    return encode(examples, tokenizer, max_length=max_length, train_on=train_on, on_long=on_long)


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "answer",
    on_long: OnLong = "drop",
) -> tuple[Dataset, EncodingReport]:
    """Tokenise and mask.

    Args:
        examples: at least one.
        max_length: the most tokens of an example, special tokens included.
        train_on: "answer" gives loss to answers alone, "all" to every token.
        on_long: an example beyond `max_length` is left out ("drop"), loses the beginning of its prompt where at
            least one token of that stays and is dropped otherwise ("truncate_prompt"), or is an "error". A plain
            text, which has no answer to keep whole, is split into even pieces instead, of which none is lost.
    Returns:
        A dataset with the int32 columns `input_ids` (L), `labels` (L; -100 without loss) and `length` (the L that
        the Trainer's `train_sampling_strategy="group_by_length"` groups by), in the order of the examples; and what
        became of them.
    Raises:
        InputError: no example, none that fits, one that does not under "error", or a tokenizer without an
            end-of-sequence token.
    """
    _check_options(max_length, train_on, on_long)
    if not examples:
        raise InputError("Expected at least one example. Got none.")
    rows: list[tuple[list[int], list[bool]]] = []
    lengths: list[int] = []
    n_dropped = n_truncated = n_split = n_endless = 0
    for example, (ids, is_answer, n_bos) in zip(examples, _tokenise(examples, tokenizer)):
        lengths.append(len(ids))
        excess = len(ids) - max_length
        if excess <= 0:
            rows.append((ids, is_answer))
        elif on_long == "error":
            raise InputError(
                f"Expected at most {max_length} tokens at {example.where}. Got {len(ids)}: raise max_length, or "
                'set on_long to "drop" or "truncate_prompt".'
            )
        elif all(segment.is_answer for segment in example.segments):
            n_pieces = math.ceil(len(ids) / max_length)
            cuts = [len(ids) * k // n_pieces for k in range(n_pieces + 1)]
            rows += [(ids[left:right], is_answer[left:right]) for left, right in pairwise(cuts)]
            n_split += 1
        elif on_long == "truncate_prompt" and n_bos + excess < is_answer.index(True):
            cut = slice(n_bos, n_bos + excess)
            del ids[cut], is_answer[cut]
            rows.append((ids, is_answer))
            n_truncated += 1
        else:
            n_dropped += 1
            continue
        if example.templated:
            n_endless += not any(answer and token == tokenizer.eos_token_id for token, answer in zip(ids, is_answer))

    if not rows:
        raise InputError(
            f"Expected examples of at most {max_length} tokens. Got none: all {len(examples)} are longer, from "
            f"{min(lengths)} to {max(lengths)}. Raise max_length to {max(lengths)} to keep them all"
            + ("." if on_long == "truncate_prompt" else ', or set on_long to "truncate_prompt".')
        )
    labels = [[token if train_on == "all" or answer else IGNORED for token, answer in zip(*row)] for row in rows]
    columns = {"input_ids": [ids for ids, _ in rows], "labels": labels, "length": [len(ids) for ids, _ in rows]}
    report = EncodingReport(
        n_examples=len(rows),
        n_dropped=n_dropped,
        n_prompt_truncated=n_truncated,
        n_split=n_split,
        n_endless=n_endless,
        longest=max(lengths),
        tokens=sum(columns["length"]),
        answer_tokens=sum(sum(is_answer) for _, is_answer in rows),
        max_length=max_length,
    )
    return Dataset.from_dict(columns, features=FEATURES), report


def _check_options(max_length: int, train_on: str, on_long: str) -> None:
    if max_length < 2:
        raise InputError(f"Expected max_length of at least 2 tokens. Got {max_length}.")
    for name, value, options in (
        ("train_on", train_on, ("answer", "all")),
        ("on_long", on_long, ("drop", "truncate_prompt", "error")),
    ):
        if value not in options:
            raise InputError(
                f'Expected {name} among {", ".join(options)}. Got "{value}".{did_you_mean(value, options)}'
            )


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: its begin-of-sequence token, or nothing."""
    first: Any = tokenizer("")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _tokenise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[bool], int]]:
    """Of each example the token ids (L), whether each belongs to an answer (L), and the number of leading bos."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise InputError("Expected a tokenizer with an end-of-sequence token. Got none: set its eos_token.")
    bos = leading_bos(tokenizer)
    for example, pieces in zip(examples, _pieces(examples, tokenizer)):
        ids = [] if example.templated else list(bos)
        is_answer = [False] * len(ids)
        for segment, piece in zip(example.segments, pieces):
            ids += piece
            is_answer += [segment.is_answer] * len(piece)
        if not example.templated:
            ids.append(eos)
            is_answer.append(True)
        # A template writes its bos itself, and some begin every turn with it: only the tokenizer tells it apart.
        yield ids, is_answer, len(bos) if ids[:1] == bos else 0


def _pieces(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """Of each example the token ids of its segments."""
    cut: list[list[list[int]] | None] = [None] * len(examples)
    whole = {k: example.segments for k, example in enumerate(examples) if example.templated and tokenizer.is_fast}
    if whole:
        texts = ["".join(segment.text for segment in segments) for segments in whole.values()]
        encoded = _encoded(tokenizer, texts, return_offsets_mapping=True)
        for (k, segments), ids, spans in zip(whole.items(), encoded["input_ids"], encoded["offset_mapping"]):
            cut[k] = _cut(ids, spans, [len(segment.text) for segment in segments])
    texts = [segment.text for example, pieces in zip(examples, cut) if pieces is None for segment in example.segments]
    alone = iter(_encoded(tokenizer, texts)["input_ids"] if texts else ())
    for example, pieces in zip(examples, cut):
        yield [next(alone) for _ in example.segments] if pieces is None else pieces


def _cut(ids: list[int], spans: list[tuple[int, int]], lengths: Sequence[int]) -> list[list[int]] | None:
    """Tokens of a text by the segments, of so many characters, that they lie in; None if one lies in two."""
    ends = list(accumulate(lengths))
    pieces: list[list[int]] = [[] for _ in lengths]
    reached = 0
    for token, (start, end) in zip(ids, spans):
        start = min(start, reached)  # of a token that begins with a space some tokenizers tell where the word starts
        k = min(bisect_right(ends, start), len(ends) - 1)
        if end > ends[k]:
            return None
        pieces[k].append(token)
        reached = max(reached, end)
    return pieces


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any) -> dict[str, Any]:
    """What the tokenizer makes of each text, never cut by a setting that came with it."""
    options = {"add_special_tokens": False, "truncation": False, "padding": False} | options
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
    return cast("dict[str, Any]", encoded)


@dataclass(frozen=True)
class Collator:
    """Rows of an encoded dataset to a batch, padded on the right to its longest row.

    The library's own collators pad through the tokenizer, which needs a padding token that many models lack, and
    would hand `length` to the model.

    Args:
        pad_token_id: fills `input_ids`; any id does, for padding is masked by position in attention and labels.
        multiple_of: L is rounded up to a multiple of it; 8 suits tensor cores.
    """

    pad_token_id: int
    multiple_of: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns: `input_ids`, `attention_mask` (1 on tokens) and `labels` (-100 on padding), int64, (B, L)."""
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED)
        for k, row in enumerate(rows):
            n_tokens = len(row["input_ids"])
            input_ids[k, :n_tokens] = torch.as_tensor(row["input_ids"])
            attention_mask[k, :n_tokens] = 1
            labels[k, :n_tokens] = torch.as_tensor(row["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches(
    dataset: Dataset, collator: Collator, batch_size: int, *, seed: int = 0, n: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Keyword dicts for a model's forward, in an order drawn by `seed`; what scoring reads.

    Every row comes at most once: where the dataset has fewer than `n` batches it ends early, and the last batch
    may be smaller.

    Args:
        batch_size: rows of a batch, at least 1.
        n: at most this many batches; None for one pass over the dataset.
    """
    if batch_size < 1:
        raise InputError(f"Expected a batch size of at least 1. Got {batch_size}.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = range(0, len(order), batch_size)
    for start in starts if n is None else starts[:n]:
        yield collator([dataset[row] for row in order[start : start + batch_size]])
