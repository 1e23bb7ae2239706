"""The loop that trains every arm alike.

Not Hugging Face's Trainer: what SIFT and the dense arms train is not what Trainer takes for trainable, and here every
arm must have the same order of rows, schedule and clipping, to the same bits when it is run again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import get_scheduler

from smtune.bench.arms import Arm
from smtune.data import Collator, batches

Batch = dict[str, Tensor]


def count_steps(recipe: Mapping[str, Any], n_rows: int) -> int:
    """Optimizer steps of a recipe on so many rows."""
    return recipe.get("steps") or recipe["epochs"] * max(1, n_rows // recipe["batch_size"])


def micro_batches(
    dataset: Dataset, collator: Collator, recipe: Mapping[str, Any], seed: int, device: torch.device
) -> Iterator[Batch]:
    """Batches without end: each epoch in an order of its own, drawn by the seed alone."""
    for epoch in itertools.count():
        for batch in batches(dataset, collator, recipe["micro_batch_size"], seed=1000 * seed + epoch):
            yield {name: tensor.to(device) for name, tensor in batch.items()}


def fit(
    arm: Arm,
    stream: Iterator[Batch],
    recipe: Mapping[str, Any],
    steps: int,
    learning_rate: float,
    autocast: bool = False,
    on_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Train an arm in place.

    Args:
        stream: of micro batches.
        recipe: see `declared.Recipe`.
        autocast: make products in bf16, for weights that are fp32 in a bf16 tier.
    Returns:
        The loss of every step; it ends early after one that is not finite.
    """
    assert arm.optimizer is not None
    for group in arm.optimizer.param_groups:
        group.update(lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler(
        "linear",
        arm.optimizer,
        num_warmup_steps=math.ceil(recipe["warmup_ratio"] * steps),
        num_training_steps=steps,
    )
    parts = recipe["batch_size"] // recipe["micro_batch_size"]
    device = next(arm.model.parameters()).device
    arm.model.train()
    losses = []
    for step in range(1, steps + 1):
        total = 0.0
        for batch in itertools.islice(stream, parts):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = arm.model(**batch).loss / parts
            loss.backward()
            total += loss.item()
        losses.append(total)
        if not math.isfinite(total):
            break
        torch.nn.utils.clip_grad_norm_(arm.trained, recipe["max_grad_norm"])
        arm.optimizer.step()
        schedule.step()
        arm.optimizer.zero_grad(set_to_none=True)
        on_step(step)
    return losses
