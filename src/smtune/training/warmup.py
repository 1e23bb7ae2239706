"""A dense warm-up: steps of full fine-tuning that are kept, and whose own gradients choose the blocks.

That is what the released code of the paper's authors makes of the paper's warm-up iterations (§3.2);
`smtune.make_plan` takes the gradients of a model that stays as it was. After a dense warm-up every weight differs from
the base, so that no adapter of blocks can express what was trained: save the whole model. It is there for comparison.

    plan, losses = dense_warmup(model, batches, config, steps=100, learning_rate=1e-5)
    model = peft.get_peft_model(model, config.with_plan(plan))
    ...
    model.merge_and_unload().save_pretrained("model/")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import smtune
from smtune.errors import InputError
from smtune.scoring import DATA_FREE, GradientScores, batch_loss, modes_and_flags_kept, score
from smtune.sharded import is_sharded
from smtune.tuner.plan import with_model
from smtune.tuner.quantised import is_quantised
from smtune.tuner.targets import count_parameters, find_targets


def dense_warmup(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: smtune.SMTConfig,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    gradient_accumulation_steps: int = 1,
    autocast_dtype: torch.dtype | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> tuple[smtune.Plan, list[float]]:
    """Train every weight of the model for some steps, and select blocks by the gradients of these steps.

    A step is one of AdamW (betas 0.9 and 0.999) at a constant learning rate, on the mean loss over its labels; norms
    and biases do not decay. In a process group each process passes batches of its own, and all end with the same
    weights and plan. A criterion that needs no data scores the weights as they are afterwards.

    Args:
        model: the base model, in fp32; changed in place. Its modes and `requires_grad` are put back.
        batches: keyword dicts for the model's forward, `labels` (B, L) included; `gradient_accumulation_steps` for each
            step.
        config: what to target, how to score and select, the budget; its `warmup_steps` is not looked at.
        max_grad_norm: the gradient of a step is clipped to it, after it has been scored; 0.0: never.
        autocast_dtype: of the products; None: that of the weights.
        on_step: called after each step with its number, from 1, and its loss.
    Returns:
        The plan, and the loss of each step.
    Raises:
        InputError: a model that is wrapped by PEFT, quantised, sharded or not in fp32; a criterion of activations; too
            few batches; a loss that is not finite; and as `smtune.scoring.score` and `smtune.selection.select`.
    Memory: weights, gradients and AdamW's two moments, 16 bytes for each parameter of the model, and the accumulators
        of `smtune.scoring.GradientScores`.
    """
    if type(steps) is not int or steps < 1:
        raise InputError(f"Expected steps to be a positive integer. Got {steps!r}.")
    _check_model(model)
    targets = find_targets(model, config)
    scoring = None
    if config.criterion not in DATA_FREE:
        scoring = GradientScores(
            targets,
            criterion=config.criterion,
            accumulator_device=config.accumulator_device,
            accumulator_dtype=config.accumulator_dtype,
        )
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)
    remaining = iter(batches)
    losses = []
    with _all_trained(model):
        for step in range(1, steps + 1):
            of_step = list(itertools.islice(remaining, gradient_accumulation_steps))
            if len(of_step) < gradient_accumulation_steps:
                seen = (step - 1) * gradient_accumulation_steps + len(of_step)
                raise InputError(
                    f"Expected {steps * gradient_accumulation_steps} batches, {gradient_accumulation_steps} a step. "
                    f"Got {seen}."
                )
            losses.append(_backward(model, of_step, autocast_dtype, step))
            if scoring is not None:
                scoring.add()
            if max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step, losses[-1])
    if scoring is not None:
        scores = scoring.scores()
    else:
        scores = score(model, targets, None, criterion=config.criterion, seed=config.seed)
    return smtune.select_blocks(with_model(scores, model, targets), config, count_parameters(model)), losses


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise InputError("Expected the base model. Got one that is wrapped by PEFT already: warm up before wrapping.")
    for name, module in model.named_modules():
        if is_quantised(module):
            raise InputError(
                f"Expected a model whose weights can all be trained. {name} is quantised: load the base in float32."
            )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise InputError(f"Expected a whole model on each process. {name} is sharded: warm up before sharding.")
        if parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"Expected weights in float32, since small steps vanish in 16 bits. {name} is {dtype}: load the base "
                "in float32, and pass autocast_dtype for products in 16 bits."
            )


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Every parameter takes part, in train mode; afterwards modes and flags are as before, and gradients gone."""
    with modes_and_flags_kept(model):
        try:
            model.train().requires_grad_(True)
            yield
        finally:
            model.zero_grad(set_to_none=True)


def _backward(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], autocast_dtype: torch.dtype | None, step: int
) -> float:
    """The mean loss over the labels of the batches, of all processes; leaves its gradient in the weights."""
    device = next(model.parameters()).device
    counts = [_count_labels(batch) for batch in batches]
    total = torch.tensor(sum(counts), device=device)
    _add_over_processes(total)
    mean = torch.zeros((), device=device)
    for batch, count in zip(batches, counts):
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            remedy = ", and lower the learning rate of the dense warm-up" if step > 1 else ""
            loss = batch_loss(model, batch, device, step, remedy)
        share = count / max(int(total), 1)
        (loss * share).backward()
        mean += loss.detach() * share
    for parameter in model.parameters():
        if parameter.grad is not None:
            _add_over_processes(parameter.grad)
    _add_over_processes(mean)
    return mean.item()


def _count_labels(batch: Any) -> int:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        raise InputError(
            f"Expected batches of keyword dicts for the model's forward, with labels. Got {type(batch).__name__}"
            + (f" with {', '.join(map(str, batch))}." if isinstance(batch, Mapping) else ".")
        )
    return int((batch["labels"][..., 1:] != -100).sum())  # the first token is nobody's next


def _add_over_processes(values: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
