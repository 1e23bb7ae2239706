"""The loss on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from smtune.data import Collator, batches
from smtune.data.encoding import IGNORED


@torch.no_grad()
def answer_loss(model: Any, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the tokens that have loss, in nats.

    Args:
        model: a causal language model; its mode is left as found.
        dataset: of `smtune.data.prepare`.
        batch_size: rows at a time.
    """
    pad_id: Any = tokenizer.pad_token_id
    device = next(model.parameters()).device
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in batches(dataset, Collator(pad_id), batch_size):
        n_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        if n_tokens:
            total += model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.item() * n_tokens
            count += n_tokens
    model.train(was_training)
    return total / count if count else math.nan
