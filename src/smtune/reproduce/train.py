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


def linear(step: int, n_warmup: int, steps: int) -> float:
    """The factor of the learning rate after so many steps, of transformers' schedule "linear"."""
    return step / n_warmup if step < n_warmup else max(0.0, (steps - step) / max(1, steps - n_warmup))


def fit(
    arm: Arm,
    stream: Iterator[Batch],
    recipe: Mapping[str, Any],
    steps: int,
    learning_rate: float,
    autocast: bool = False,
    on_step: Callable[[int], object] = lambda step: None,
    change: tuple[int, Callable[[Arm], Arm]] | None = None,
) -> tuple[list[float], Arm]:
    """Train an arm in place.

    Args:
        stream: of micro batches.
        recipe: see `declared.Recipe`.
        autocast: make products in bf16, for trained weights that are fp32 in a bf16 tier.
        change: after every so many steps but the last, what makes another arm of this one, to go on with.
    Returns:
        The loss of every step; it ends early after one that is not finite. And the arm at the end.
    """
    n_warmup = math.ceil(recipe["warmup_ratio"] * steps)
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
        assert arm.optimizer is not None
        for group in arm.optimizer.param_groups:
            group.update(lr=learning_rate * linear(step - 1, n_warmup, steps), weight_decay=0.0)
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)
        on_step(step)
        if change is not None and step % change[0] == 0 and step < steps:
            arm = change[1](arm)
            arm.model.train()
    return losses, arm
