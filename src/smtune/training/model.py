"""The model of a run: loaded as its method needs it, its blocks chosen, and wrapped so that it can be trained."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

import smtune
from smtune.data import Collator, batches
from smtune.depth import backward_costs
from smtune.errors import InputError
from smtune.models import (
    adapter_base,
    checkpoint_quantisation,
    cpu_is_slow_in_bf16,
    load_model,
    portable_name,
    resolve,
    skeleton,
    wrapping,
)
from smtune.scoring import Scores, device_here
from smtune.training.config import LEARNING_RATES, TrainConfig
from smtune.training.warmup import dense_warmup
from smtune.tuner.model import is_shared
from smtune.tuner.targets import count_parameters, find_targets


def load_base(config: TrainConfig, warmed: Path | None = None) -> nn.Module:
    """The model to start from. Weights that are all trained are fp32 whatever the dtype.

    Args:
        warmed: what a dense warm-up left, to go on with.
    """
    all_trained = config.saves_whole_model and warmed is None
    return load_model(str(warmed or config.model), "float32" if all_trained else config.dtype)


def smt_config(config: TrainConfig) -> smtune.SMTConfig:
    """The adapter's own configuration, without a plan."""
    others = {"layers", "score_batch_size", "plan", "dense_warmup_steps", "dense_warmup_learning_rate"}
    return smtune.SMTConfig(
        task_type="CAUSAL_LM",
        layers_to_transform=config.smt.layers,
        seed=config.training.seed,
        **config.smt.model_dump(exclude=others),
    )


@dataclass(frozen=True)
class Foreseen:
    """What a run will train, as far as the model's skeleton tells.

    Attributes:
        plan: None but for smt. remarks: what is allowed, but hardly meant.
    """

    total_parameters: int
    trainable_parameters: int
    plan: smtune.Plan | None
    remarks: tuple[str, ...]


def foresee(config: TrainConfig, kept: Path | None = None) -> Foreseen:
    """Build the model on the meta device, and choose or wrap what is trained of it.

    Args:
        kept: the plan that the run has already.
    Raises:
        InputError: whatever does not fit the model, before its weights are read.
    """
    check_dense(config)
    if adapter_base(resolve(config.model)) is not None:
        raise InputError(
            f"Expected a model without an adapter. {config.model!r} has one: merge it first, and train the result."
        )
    model = skeleton(config.model)
    total_parameters = count_parameters(model)
    if config.method == "smt":
        plan = expected_plan(model, config, kept)
        if config.has_dense_warmup:
            _check_mergeable(model, [name for name, own in plan.modules.items() if kept is None or own.rows])
        remarks = (*_remarks_on_dtype(config), *_remarks_on_warmup(config), *_remarks_on_length(model, config))
        remarks += tuple(_remarks_on_budget(plan, config))
        return Foreseen(total_parameters, plan.n_params, plan, remarks)
    remarks = (*_remarks_on_dtype(config), *_remarks_on_length(model, config))
    parameters = wrap(model, config, None).parameters()
    return Foreseen(total_parameters, sum(p.numel() for p in parameters if p.requires_grad), None, remarks)


def _check_mergeable(model: nn.Module, modules: Sequence[str]) -> None:
    """Raises InputError if another module shares the weight of one of `modules`: a dense warm-up ends in a merge."""
    shared = next((name for name in modules if is_shared(model, model.get_submodule(name))), None)
    if shared is not None:
        raise InputError(
            "smt.dense_warmup_steps: expected targets with weights of their own, since blocks are merged into them at "
            f"the end. Got {shared}, whose weight another module shares: leave it out of smt.target_modules, or "
            "leave the dense warm-up out."
        )


def _remarks_on_dtype(config: TrainConfig) -> Iterator[str]:
    on_cpus = getattr(PartialState().device, "type", None) == "cpu"
    if config.dtype == "bfloat16" and on_cpus and cpu_is_slow_in_bf16():
        yield (
            "dtype is bfloat16, which this CPU cannot multiply: products take some 6 to 200 times as long as in "
            "float32. Use float32 here."
        )


def _remarks_on_warmup(config: TrainConfig) -> Iterator[str]:
    rate = config.smt.dense_warmup_learning_rate
    usual = LEARNING_RATES["full"]
    if config.has_dense_warmup and rate is not None and rate > 10 * usual:
        yield (
            f"smt.dense_warmup_learning_rate is {rate:g}, and trains every weight, for which {usual:g} is usual. "
            "Blocks want larger rates: give the warm-up one of its own."
        )


def _remarks_on_length(model: Any, config: TrainConfig) -> Iterator[str]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        yield (
            f"data.max_length is {config.data.max_length:,}, and the model was made for {positions:,} positions: "
            "lower it, or know that the model can go beyond."
        )


def _remarks_on_budget(plan: smtune.Plan, config: TrainConfig) -> Iterator[str]:
    budget, area = config.smt.budget, plan.block_size**2
    if config.smt.plan is not None:
        return  # it was decided when the plan was made
    if isinstance(budget, int) and budget < len(plan.modules):
        yield (
            f"smt.budget is a number of blocks, {budget} for {len(plan.modules)} matrices: for a fraction of all "
            f"parameters write a float, such as {float(budget) if budget == 1 else 0.0084}."
        )
    asked = budget if isinstance(budget, int) else math.floor(budget * plan.total_params / area)
    if plan.n_blocks < 0.9 * asked:
        exist = sum(math.prod(module.shape) // area for module in plan.modules.values())
        reason = "all that the targeted matrices have" if plan.n_blocks == exist else "all that the policy can spend"
        yield (
            f"smt.budget is {budget}, {asked:,} blocks, and {plan.n_blocks:,} will be trained, {reason}: a share of "
            f"{plan.fraction:.4g} of all parameters."
        )


def check_scoring(config: TrainConfig) -> None:
    """Raises InputError for accumulators on a device that is not here."""
    if config.method == "smt" and config.smt.plan is None:
        device_here(config.smt.accumulator_device)


def expected_plan(model: nn.Module, config: TrainConfig, kept: Path | None = None) -> smtune.Plan:
    """The plan kept or given, or one of the size that scoring will lead to; checked against the model."""
    place = kept or config.smt.plan
    if place is not None:
        plan = smtune.Plan.load(place)
        plan.check(model)
        return plan
    adapter = smt_config(config)
    targets = find_targets(model, adapter)
    grids = {name: target.grid for name, target in targets.items()}
    block_size = next(iter(grids.values())).block_size
    scores = Scores(
        {name: torch.zeros(grid.shape) for name, grid in grids.items()},
        block_size=block_size,
        criterion=adapter.criterion,
        backward_costs=backward_costs(model, targets),
    )
    return smtune.select_blocks(scores, adapter, count_parameters(model))


def score(model: nn.Module, dataset: Dataset, collator: Collator, config: TrainConfig, progress: bool) -> smtune.Plan:
    """A new plan from warm-up batches of the training rows, each process taking its share of them."""
    state = PartialState()
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    warmup = batches(
        dataset,
        collator,
        config.smt.score_batch_size or config.training.batch_size,
        seed=config.training.seed,
        n=config.smt.warmup_steps,
    )
    share = itertools.islice(warmup, state.process_index, None, state.num_processes)
    plan = smtune.make_plan(model, share, smt_config(config), progress=progress and state.is_main_process)
    checkpoint_activations(model, False)
    return dataclasses.replace(plan, model_name=portable_name(config.model))


def warm_up(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    config: TrainConfig,
    on_step: Callable[[int, float], object],
) -> tuple[smtune.Plan, list[float]]:
    """The dense warm-up: steps of as many rows as in training, in the order of scoring, again and again."""
    smt, training, state = config.smt, config.training, PartialState()
    assert smt.dense_warmup_steps is not None
    assert smt.dense_warmup_learning_rate is not None
    passes = (batches(dataset, collator, training.batch_size, seed=training.seed + k) for k in itertools.count())
    share = itertools.islice(itertools.chain.from_iterable(passes), state.process_index, None, state.num_processes)
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    plan, losses = dense_warmup(
        model,
        share,
        smt_config(config),
        steps=smt.dense_warmup_steps,
        learning_rate=smt.dense_warmup_learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        autocast_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
        on_step=on_step,
    )
    checkpoint_activations(model, False)
    return dataclasses.replace(plan, model_name=portable_name(config.model)), losses


def wrap(model: nn.Module, config: TrainConfig, plan: smtune.Plan | None) -> nn.Module:
    """Make a base model trainable by the method: a PeftModel, or with "full" the model itself.

    Raises:
        InputError: target modules that match nothing.
    """
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method == "smt":
        assert plan is not None
        adapter: Any = smt_config(config).with_plan(plan)
    else:
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.rank,
            lora_alpha=config.lora.alpha or 2.0 * config.lora.rank,  # type: ignore[arg-type]
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            use_dora=config.method == "dora",
        )
    with wrapping():
        try:
            return peft.get_peft_model(model, adapter)  # type: ignore[arg-type]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"lora.target_modules: {error}") from error


def check_trainable(model: nn.Module) -> None:
    """Raises InputError unless something is trained, and all of it in fp32: small steps vanish in 16 bits.

    Weights that ZeRO-3 splits in 16 bits will do: it trains an fp32 copy.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = [
        f"{name} ({str(parameter.dtype).removeprefix('torch.')})"
        for name, parameter in trained.items()
        if parameter.dtype != torch.float32 and not hasattr(parameter, "ds_id")
    ]
    if not trained:
        raise InputError("Expected something to train. Got a model with every parameter frozen.")
    if wrong:
        raise InputError(
            f"Expected every trained parameter in float32. Got {len(wrong)} that are not, such as {wrong[0]}."
        )


def check_dense(config: TrainConfig) -> None:
    """Raises InputError where all weights of a checkpoint are to be trained and cannot be, before it is loaded."""
    quantised_by = checkpoint_quantisation(config.model) if config.saves_whole_model else None
    if quantised_by is not None:
        key, remedy = ("smt.dense_warmup_steps", "leave the dense warm-up out")
        if config.method == "full":
            key, remedy = "method", "train blocks or adapters beside it"
        raise InputError(
            f"{key}: expected a model whose weights can all be trained. {config.model!r} is quantised "
            f"({quantised_by}): choose another model, or {remedy}."
        )


def checkpoint_activations(model: Any, on: bool = True) -> None:
    """Switch activation checkpointing, which older releases of transformers call gradient checkpointing."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    word = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if on:
        # Not reentrant: then no input has to require a gradient, and the backward ends at the lowest trained layer.
        getattr(base, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base, f"{word}_checkpointing_disable")()
