"""Examples to token ids with the loss on the answer, and those to batches.

Each segment is tokenised by itself, so the ids of a prompt are the same in training and evaluation whatever follows.
Labels are masked by position, never by id: many models pad with the very token that ends an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from smtune.data.records import Example
from smtune.errors import InputError, did_you_mean

IGNORED = -100
"""The label of a token without loss."""

ON_LONG = ("drop", "truncate_prompt", "error")


@dataclass(frozen=True)
class Preparation:
    """What became of the examples.

    Attributes:
        n_examples: given. n_kept: rows made of them; texts longer than the limit become several.
        n_dropped: left out since too long. n_prompts_cut: shortened at the beginning of the prompt.
        longest: tokens of the longest example given.
        tokens, answer_tokens: in the rows kept; `answer_tokens` are those with loss.
    """

    n_examples: int
    n_kept: int
    n_dropped: int
    n_prompts_cut: int
    longest: int
    max_length: int
    tokens: int
    answer_tokens: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.n_kept:,} rows, {self.tokens:,} tokens, {self.answer_tokens:,} with loss"
        if self.n_dropped:
            text += f"; {self.n_dropped:,} dropped: longer than {self.max_length} tokens (longest {self.longest})"
        if self.n_prompts_cut:
            text += f"; {self.n_prompts_cut:,} prompts cut at {self.max_length} tokens"
        return text


def prepare(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    train_on: str = "answer",
    on_long: str = "drop",
) -> tuple[Dataset, Preparation]:
    """Tokenise and mask.

    Args:
        examples: as `load_examples` gives them.
        max_length: tokens of a row at most.
        train_on: "answer": the loss falls on answers and the end token behind them. "all": on every token.
        on_long: an example that is longer is left out ("drop"), loses the beginning of its prompt
            ("truncate_prompt"; dropped if its answer alone is too long), or is an error. No answer is ever cut.
            Examples that are all answer (plain text) are split into rows instead.
    Returns:
        A data set with `input_ids`, `labels` and `length` (tokens), and what became of the examples.
    Raises:
        InputError: an unknown option, a too long example with on_long="error", or nothing left.
    """
    for name, value, options in (("train_on", train_on, ("answer", "all")), ("on_long", on_long, ON_LONG)):
        if value not in options:
            raise InputError(
                f"Expected {name} to be one of {', '.join(options)}. Got {value!r}.{did_you_mean(str(value), options)}"
            )
    rows: list[dict[str, Any]] = []
    dropped = cut = longest = 0
    for number, (ids, labels, n_start, n_prompt) in enumerate(_tokenise(examples, tokenizer, train_on), 1):
        longest = max(longest, len(ids))
        if len(ids) <= max_length:
            pieces = [(ids, labels)]
        elif n_prompt == 0:
            starts = range(0, len(ids), max_length)
            pieces = [(ids[k : k + max_length], labels[k : k + max_length]) for k in starts]
        elif on_long == "error":
            raise InputError(
                f"Expected examples of at most {max_length} tokens. Got {len(ids)} in example {number}: raise "
                'max_length, or choose on_long "drop" or "truncate_prompt".'
            )
        elif on_long == "truncate_prompt" and len(ids) - n_prompt <= max_length:
            kept = n_start + len(ids) - max_length  # what stands before `n_start` stays at the front
            pieces = [(ids[:n_start] + ids[kept:], labels[:n_start] + labels[kept:])]
            cut += 1
        else:
            pieces = []
            dropped += 1
        rows += [{"input_ids": ids, "labels": labels, "length": len(ids)} for ids, labels in pieces]
    if not rows:
        raise InputError(
            f"Expected examples of at most {max_length} tokens. All {len(examples)} are longer, up to {longest}: "
            f"raise max_length to {longest}."
        )
    preparation = Preparation(
        n_examples=len(examples),
        n_kept=len(rows),
        n_dropped=dropped,
        n_prompts_cut=cut,
        longest=longest,
        max_length=max_length,
        tokens=sum(row["length"] for row in rows),
        answer_tokens=sum(label != IGNORED for row in rows for label in row["labels"]),
    )
    return Dataset.from_list(rows), preparation


def _tokenise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on: str
) -> Iterator[tuple[list[int], list[int], int, int]]:
    """(ids, labels, special tokens at the start, tokens of the prompt before the first answer) of each example."""
    texts = [segment.text for example in examples for segment in example.segments]
    encoded: Any = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    # What the tokenizer puts before a text by itself, such as a beginning-of-text token. Chat templates bring theirs.
    start: list[Any] = [token for token in tokenizer("").input_ids if token != tokenizer.eos_token_id]
    end: list[Any] = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for example in examples:
        ids: list[int] = [] if example.ends_itself else list(start)
        n_start = len(ids)
        labels = [IGNORED] * n_start
        n_prompt = 0
        for position, segment in enumerate(example.segments):
            tokens = next(encoded)
            if position == 0 and not segment.is_answer:
                n_prompt = len(tokens)
            ids += tokens
            labels += tokens if segment.is_answer or train_on == "all" else [IGNORED] * len(tokens)
        if not example.ends_itself:
            ids, labels = ids + end, labels + end
        yield ids, labels, n_start, n_prompt


def make_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Rows to a batch, padded on the right to a multiple of 8: `input_ids`, `attention_mask`, `labels`, each (B, T)."""
    return DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8, label_pad_token_id=IGNORED)


def scoring_batches(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, n_batches: int, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """At most `n_batches` whole batches of distinct rows in an order drawn by `seed`: what `make_plan` takes."""
    collate = make_collator(tokenizer)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    n_batches = min(n_batches, max(1, len(dataset) // batch_size))
    for k in range(n_batches):
        rows = [dataset[place] for place in order[k * batch_size : (k + 1) * batch_size]]
        yield dict(collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]))
