"""From a model, batches and a configuration to a plan: `make_plan` and its two halves.

`score_blocks` and `select_blocks` wire `smtune.scoring` and `smtune.selection`, which take plain arguments, to
`SMTConfig`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from smtune.depth import backward_costs
from smtune.errors import InputError
from smtune.scoring import FORWARD_ONLY, Scores, Target, score
from smtune.selection import ModulePlan, Plan, backward_cost, select, total_score
from smtune.tuner.quantised import check_backward
from smtune.tuner.targets import count_parameters, find_targets, model_name

if TYPE_CHECKING:
    from peft import PeftModel

    from smtune.tuner.config import SMTConfig

Batches = Iterable[Mapping[str, object]]


def make_plan(
    model: nn.Module,
    batches: Batches | None,
    config: SMTConfig,
    *,
    progress: bool | Callable[[int], object] | None = None,
) -> Plan:
    """Score the blocks that `config` targets and select some within its budget, by its policy (paper §3.1, §3.2).

    Args:
        model: the base model, not yet wrapped; left bit for bit as it was.
        batches: keyword dicts for the model's forward whose output has `.loss`; at most `config.warmup_steps` are
            drawn. None for the criteria that need no data.
        config: what to target, how to score and select, the budget.
        progress: True for a progress bar, a function called with the number of batches done, None for a bar where
            the error stream is a terminal.
    Returns:
        The plan; the same one on every rank of a process group.
    Raises:
        InputError: see `smtune.scoring.score` and `smtune.selection.select`.
    """
    scores = score_blocks(model, batches, config, progress=progress)
    plan = select_blocks(scores, config, count_parameters(model))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        holder = [plan]
        dist.broadcast_object_list(holder, src=0)
        plan = holder[0]
    return plan


def score_blocks(
    model: nn.Module,
    batches: Batches | None,
    config: SMTConfig,
    *,
    progress: bool | Callable[[int], object] | None = None,
) -> Scores:
    """The first half of `make_plan`: {module name: (R, C) scores}, with what `select_blocks` needs of the model.

    Args:
        model, batches, config, progress: as for `make_plan`.
    Raises:
        InputError: a model that is wrapped by PEFT already, or what `smtune.scoring.score` refuses.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise InputError(
            "Expected the base model. Got one that is wrapped by PEFT already: make the plan first, or pass "
            "`model.unload()`."
        )
    targets = find_targets(model, config)
    if config.criterion not in FORWARD_ONLY:
        check_backward(model)
    with _progress(progress, config.warmup_steps, batches) as on_batch:
        scores = score(
            model,
            targets,
            batches,
            criterion=config.criterion,
            max_batches=config.warmup_steps,
            accumulator_device=config.accumulator_device,
            accumulator_dtype=config.accumulator_dtype,
            seed=config.seed,
            on_batch=on_batch,
        )
    return with_model(scores, model, targets)


def with_model(scores: Scores, model: nn.Module, targets: Mapping[str, Target]) -> Scores:
    """The scores, with what `select_blocks` needs of the model set in them."""
    scores.model_name = model_name(model)
    scores.backward_costs = backward_costs(model, targets)
    scores.kinds = {name: target.kinds for name, target in targets.items()}
    return scores


def select_blocks(scores: Mapping[str, Tensor], config: SMTConfig, total_params: int) -> Plan:
    """The second half of `make_plan`: scores and `config`'s budgets and policy to a plan.

    Args:
        scores: as `score_blocks` gives them, or any {module name: (R, C) tensor} with a numeric `config.block_size`;
            only the former know what a backward costs.
        config: budget, policy, shares, max_backward_cost, seed.
        total_params: parameters of the whole model, which a fractional budget counts from.
    Raises:
        InputError: see `smtune.selection.select`.
    """
    if not isinstance(scores, Scores):
        if isinstance(config.block_size, str):
            raise InputError('Expected a numeric block_size with scores of your own making. Got "auto".')
        scores = Scores(scores, block_size=config.block_size, criterion=config.criterion)
    costs, limit = scores.backward_costs, config.max_backward_cost
    select_within = partial(
        select,
        scores,
        block_size=scores.block_size,
        budget=config.budget,
        total_params=total_params,
        policy=config.policy,
        shares=config.shares,
        kinds=scores.kinds,
        backward_costs=costs,
        seed=config.seed,
    )
    chosen = select_within(max_backward_cost=limit)
    kept = None
    if limit is not None:
        whole = total_score(select_within(), scores)
        kept = total_score(chosen, scores) / whole if whole else 1.0
    modules = {
        name: ModulePlan(
            shape=(index.grid.out_features, index.grid.in_features),
            rows=index.sides[0],
            cols=index.sides[1],
            score_mean=scores[name].mean().item(),
            score_max=scores[name].max().item(),
            kinds=scores.kinds.get(name, ()),
        )
        for name, index in chosen.items()
    }
    return Plan(
        modules=modules,
        block_size=scores.block_size,
        criterion=scores.criterion,
        policy=config.policy,
        budget=config.budget,
        total_params=total_params,
        batches_seen=scores.batches_seen,
        model_name=scores.model_name,
        shares=config.shares,
        seed=config.seed,
        max_backward_cost=limit,
        backward_cost=backward_cost(chosen, costs) if costs is not None else None,
        score_kept=kept,
    )


def get_smt_model(
    model: nn.Module, config: SMTConfig, batches: Batches | None = None, adapter_name: str = "default"
) -> PeftModel:
    """`make_plan`, then `peft.get_peft_model`, in one call; `batches` are not read where `config` has a plan.

    Raises as `make_plan` does.
    """
    import peft

    if config.plan is None:
        config = config.with_plan(make_plan(model, batches, config))
    return peft.get_peft_model(model, config, adapter_name=adapter_name)  # type: ignore[arg-type]


def preprocess_smt(model: nn.Module, config: SMTConfig, batches: Batches) -> None:
    """Put a plan, and its block size, into `config` in place, after PEFT's convention for data-dependent methods.

    As with `peft.tuners.lora.preprocess_loraga`: call it on the base model, then `peft.get_peft_model(model, config)`.
    Raises as `make_plan` does.
    """
    planned = config.with_plan(make_plan(model, batches, config))
    config.plan, config.block_size = planned.plan, planned.block_size


class _progress:
    """A rich progress bar over the warm-up batches, the caller's own function, or nothing."""

    def __init__(self, progress: bool | Callable[[int], object] | None, steps: int, batches: Batches | None) -> None:
        self._bar = None
        self._on_batch = progress if callable(progress) else None
        show = sys.stderr.isatty() if progress is None else progress is True
        if show and batches is not None:
            from rich.console import Console
            from rich.progress import Progress

            length = getattr(batches, "__len__", None)
            total = min(steps, length()) if length is not None else steps
            self._bar = Progress(console=Console(stderr=True), transient=True)
            task = self._bar.add_task("Scoring blocks", total=total)
            self._on_batch = lambda done: self._bar.update(task, completed=done)  # type: ignore[union-attr]

    def __enter__(self) -> Callable[[int], object] | None:
        if self._bar is not None:
            self._bar.start()
        return self._on_batch

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
