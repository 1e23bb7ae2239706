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
from smtune.selection import Plan

Batch = dict[str, Tensor]


def starts_in_fp32(method: str) -> bool:
    """Whether the whole model is trained, so that its weights must be fp32 whatever the cell's dtype."""
    return method == "full"


def make_plan(model: nn.Module, config: Mapping[str, Any], batches: Iterable[Batch]) -> Plan:
    """The plan of an SMT cell, from warm-up batches."""
    plan = smtune.make_plan(model, batches, _smt_config(config), progress=False)
    return plan.shuffled(config["seed"]) if config["shuffled"] else plan


def count_plan(model: nn.Module, config: Mapping[str, Any]) -> Plan:
    """A plan of as many blocks as the cell's budget buys, at random places: no data is needed, nor weights."""
    return smtune.make_plan(model, None, _smt_config({**config, "criterion": "random"}), progress=False)


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
        arm = bench.wrapped(model, _smt_config(config).with_plan(plan), "SMT", plan)
        arm.name = method
        return arm
    like = plan if plan is not None or method in ("full", "dense-v", "dense-qkv") else count_plan(model, config)
    subject = Subject(config["model"], config["block_size"], batch=1, llama=None)
    setting = bench.Setting(subject, config["dtype"], device=str(next(model.parameters()).device), plan=like)
    first = next(iter(batches)) if method == "sift" and batches is not None else {}
    torch.manual_seed(config["seed"])
    return bench.build(method, setting, model, first, seed=config["seed"])


def _smt_config(config: Mapping[str, Any]) -> smtune.SMTConfig:
    return smtune.SMTConfig(
        task_type="CAUSAL_LM",
        target_modules=config.get("targets") or list(QKV),
        block_size=config["block_size"],
        budget=config["budget"],
        criterion=config.get("criterion", "random"),
        policy="shares" if config.get("shares") else "global",
        shares=config.get("shares"),
        warmup_steps=config["recipe"]["scoring_batches"],
        seed=config["seed"],
    )
