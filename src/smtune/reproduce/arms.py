"""Build a cell's model: SMT by its criteria and controls here, its rivals by `smtune.bench.arms`.

Rivals have as many trained parameters as the cell's budget of blocks, as closely as a rank allows; what is trained is
fp32 in every arm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import smtune
from smtune.bench import arms as bench
from smtune.bench.subjects import QKV, Subject
from smtune.reproduce import variants
from smtune.reproduce.cells import WHOLE
from smtune.reproduce.optimizers import BlockAdamW, BlockMuon, ColumnAdamW, carry
from smtune.selection import Plan

Batch = dict[str, Tensor]

OPTIMIZERS: dict[str | None, type[BlockAdamW | BlockMuon]] = {"muon": BlockMuon, "adamw-columns": ColumnAdamW}
"""Of SMT, by the name that a row gives; AdamW has none."""


def starts_in_fp32(method: str) -> bool:
    """Whether the whole model is trained, so that its weights must be fp32 whatever the cell's dtype."""
    return method == "full"


def is_under_autocast(config: Mapping[str, Any]) -> bool:
    """Whether a cell's products are made bf16 by autocast, as by Hugging Face's Trainer with `bf16=True`.

    PEFT multiplies LoRA's fp32 factors in fp32 otherwise. SMT's blocks, and entries of sparse rivals, stand in the
    base's weights, which are bf16.
    """
    return config["dtype"] == "bfloat16" and config["method"].startswith(("full", "lora", "rslora", "dora"))


def make_plan(model: nn.Module, config: Mapping[str, Any], batches: Iterable[Batch]) -> Plan:
    """The plan of an SMT cell, from warm-up batches."""
    criterion = config["criterion"]
    if config.get("dense_warmup"):
        keep, rate = config["dense_warmup"] == "kept", config["recipe"]["dense_warmup_rate"]
        plan = variants.dense_warmup(model, _smt_config(config), batches, rate, keep)
    elif config.get("policy") == "spread":
        plan = variants.spread_plan(model, _smt_config(config), batches)
    elif criterion in variants.CRITERIA:
        plan = variants.make_plan(model, _smt_config(config, "random"), criterion, batches)
    else:
        plan = smtune.make_plan(model, batches, _smt_config(config), progress=False)
    return plan.shuffled(config["seed"]) if config["shuffled"] else plan


def count_plan(model: nn.Module, config: Mapping[str, Any]) -> Plan:
    """A plan of as many blocks as the cell's budget buys, at random places: no data is needed, nor weights."""
    return smtune.make_plan(model, None, _smt_config(config, "random"), progress=False)


def build(
    model: nn.Module, config: Mapping[str, Any], batches: Iterable[Batch] | None, plan: Plan | None = None
) -> bench.Arm:
    """The arm of a cell.

    Args:
        model: the base, everything frozen.
        config: of the cell.
        batches: warm-up batches, for arms that look at gradients. None: SMT's plan is given, and no other looks.
        plan: of SMT, instead of making one; of others, one with as many parameters as they shall have.
    """
    method = config["method"]
    if method == "smt":
        plan = plan or make_plan(model, config, batches or ())
        arm = bench.wrapped(model, _smt_config(config, "random").with_plan(plan), "SMT", plan)
        arm.name = method
        if own := OPTIMIZERS.get(config.get("optimizer")):
            arm.optimizer = own(arm.trained)
        elif config.get("reselect_every"):
            arm.optimizer = BlockAdamW(arm.trained)
        return arm
    if method == "rows":
        count = count_plan(model, config).n_params
        entries = variants.whole_rows(model, _smt_config(config, "random"), batches or (), count)
        return bench.of_parts("rows", "whole rows", model, entries)
    if method == "smt-basis":
        count = count_plan(model, config).n_params
        blocks = variants.in_gradient_basis(model, _smt_config(config, "random"), batches or (), count)
        return bench.of_parts(method, "SMT in the gradient's basis", model, blocks)
    like = plan if plan is not None or method in WHOLE else count_plan(model, config)
    subject = Subject(config["model"], config["block_size"], batch=1, llama=None)
    setting = bench.Setting(subject, config["dtype"], device=str(next(model.parameters()).device), plan=like)
    first = next(iter(batches)) if method == "sift" and batches is not None else {}
    return bench.build(method, setting, model, first, seed=config["seed"])


def reselect(arm: bench.Arm, config: Mapping[str, Any], batches: Iterable[Batch]) -> bench.Arm:
    """SMT with blocks chosen anew for the model as it is now.

    What was trained stays in the weights; blocks that are chosen again keep their moments.
    """
    old_tensors = _block_tensors(arm.model)
    model: Any = arm.model
    model = model.merge_and_unload().requires_grad_(False)
    new = build(model, config, batches)
    old_plan, plan, old_optimizer, optimizer = arm.plan, new.plan, arm.optimizer, new.optimizer
    if not (old_plan and plan and old_optimizer and optimizer):
        raise AssertionError("SMT has a plan and an optimizer")
    kept = {}
    for name, tensor in _block_tensors(new.model).items():
        if name not in old_tensors:
            continue
        places = old_plan.index(name).positions
        both = [(places[pair], k) for k, pair in enumerate(plan.index(name).pairs) if pair in places]
        if both:
            before, after = torch.tensor(both).unbind(1)
            kept[tensor] = (old_tensors[name], before, after)
    carry(old_optimizer, optimizer, kept)
    return new


def _block_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained blocks by the name of their layer in the base."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).partition(".smt_blocks.")[0]: parameter
        for name, parameter in model.named_parameters()
        if ".smt_blocks." in name
    }


def _policy(config: Mapping[str, Any]) -> str:
    """The library's policy of a cell; "spread" is the study's own, by its scores the library's `global`."""
    policy = config.get("policy") or ("shares" if config.get("shares") else "global")
    return "global" if policy == "spread" else policy


def _smt_config(config: Mapping[str, Any], criterion: str | None = None) -> smtune.SMTConfig:
    """SMT's own configuration of a cell.

    Args:
        criterion: instead of the cell's, which the library may not have.
    """
    return smtune.SMTConfig(
        task_type="CAUSAL_LM",
        target_modules=config.get("targets") or list(QKV),
        block_size=config["block_size"],
        budget=config["budget"],
        criterion=criterion or config["criterion"],
        policy=_policy(config),
        shares=config.get("shares"),
        warmup_steps=config["recipe"]["scoring_batches"],
        seed=config["seed"],
    )
