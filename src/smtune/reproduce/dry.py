"""What a request would do, cell by cell, without weights or data: parameters, memory, time, disk.

Every model is built without data and its number of parameters checked against the one declared. Time is counted
FLOP over an assumed rate, which the tier declares: an order of magnitude, no promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smtune.errors import InputError
from smtune.reproduce import memory
from smtune.reproduce.cells import UNBUDGETED, Arm, Record, arms, budget_text, resolved
from smtune.reproduce.declared import Size, load_experiment
from smtune.reproduce.run import Request
from smtune.reproduce.setting import Setting, count_items
from smtune.reproduce.train import count_steps
from smtune.reproduce.work import TIMED_STEPS, WARMUP_STEPS, architecture

BYTES_PER_ITEM = 400
"""Of a cell's file, for each answered item."""

DECODING_SHARE = 0.1
"""Of the rate at which products are made, what generation reaches: it makes one token at a time."""

PROMPT_TOKENS = 100


@dataclass(frozen=True)
class Estimate:
    """Of an arm's cells, each: parameters trained, bytes of a step, seconds, bytes on disk."""

    arm: Arm
    memory: memory.Memory
    steps: int
    seconds: float
    disk: int


def estimate(request: Request, name: str) -> list[Estimate]:
    """An estimate for each arm of an experiment.

    Raises:
        InputError: an architecture that is not the declared one, or a budget that buys nothing of it.
    """
    experiment, setting = load_experiment(name), request.setting
    tier = setting.declared

    found = []
    families = setting.families(experiment)
    for arm in arms(experiment, tier, families, request.seeds, setting.shape, setting.steps):
        recipe = resolved(arm.fixed)["recipe"]
        size = tier.families[arm.family].size
        counted = _count(setting, arm.model, *_memory_key(arm))
        steps = 0
        if experiment.kind == "train" and arm.row.method != "base":
            steps = count_steps(recipe, size.rows) * (1 if arm.row.then is None else 2)
        elif experiment.kind == "time":
            steps = min(TIMED_STEPS, count_steps(recipe, size.rows))
            steps += min(WARMUP_STEPS, max(1, steps // 10))
        items = count_items(setting, arm.family) * (experiment.kind == "train")
        scores = arm.row.method == "smt" and experiment.kind in ("train", "select")
        total, trained = counted.total_parameters, counted.trained_parameters
        seconds = seconds_of_cell(tier.flops_per_second, total, trained, recipe, steps, items, size, scores)
        found.append(Estimate(arm, counted, steps, seconds, BYTES_PER_ITEM * items + 20_000))
    return found


def _memory_key(arm: Arm) -> tuple[Any, ...]:
    targets = tuple(arm.row.targets) if arm.row.targets is not None else None
    shares = tuple(arm.row.shares.items()) if arm.row.shares is not None else None
    return arm.row.method, arm.budget, targets, shares, arm.row.block_size


@cache
def _count(
    setting: Setting,
    model: str,
    method: str,
    budget: float | int,
    targets: Any,
    shares: Any,
    block_size: int | None,
) -> memory.Memory:
    tier = setting.declared
    config: Mapping[str, Any] = {
        "method": method,
        "budget": budget,
        "targets": list(targets) if targets is not None else None,
        "shares": dict(shares) if shares is not None else None,
        "block_size": block_size or tier.block_size,
        "dtype": tier.dtype,
        "model": model,
        "seed": 0,
        "recipe": {"scoring_batches": 1},
    }
    counted = memory.count(architecture(setting, model), config, tier.recipe.micro_batch_size, tier.recipe.max_length)
    declared = tier.models[model].parameters
    if declared is not None and counted.total_parameters != declared:
        raise InputError(
            f"Expected {declared:,} parameters of {model} by its tier's file. Got {counted.total_parameters:,}."
        )
    return counted


def seconds_of_cell(
    rate: float, total: int, trained: int, recipe: Record, steps: int, items: int, size: Size, scores: bool
) -> float:
    """Training and scoring at 2 FLOP a parameter and token for the forward and for dX, and for what is trained; then
    prompts and generated tokens of the items, tested and validated.

    Args:
        rate: FLOP/s.
        total, trained: parameters.
        scores: whether blocks are scored first.
    """
    tokens_of_step = recipe["batch_size"] * size.tokens
    flops = steps * tokens_of_step * (4 * total + 2 * trained)
    if scores:
        flops += recipe["scoring_batches"] * recipe["micro_batch_size"] * size.tokens * 6 * total
    flops += items * 2 * total * (PROMPT_TOKENS + size.answer_tokens / DECODING_SHARE)
    return flops / rate


def table(name: str, estimates: list[Estimate], jobs: int) -> Table:
    """The estimates of an experiment, a line an arm, with the sum of its cells."""
    n_cells = sum(each.arm.n_cells for each in estimates)
    seconds = sum(each.arm.n_cells * each.seconds for each in estimates) / jobs
    disk = sum(each.arm.n_cells * each.disk for each in estimates)
    title = f"{name}: {n_cells} cells, about {_span(seconds)}" + (f" with {jobs} jobs" if jobs > 1 else "")
    shown = Table(
        title=f"{title}, {disk / 1e6:,.1f} MB of results", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    several = {
        "task": len({each.arm.family for each in estimates}) > 1,
        "model": len({each.arm.model for each in estimates}) > 1,
        "steps": len({each.steps for each in estimates if each.steps}) > 1,
    }
    for heading in [heading for heading in ("task", "model") if several[heading]]:
        shown.add_column(heading, no_wrap=True)
    shown.add_column("method", min_width=16)
    for heading in ("cells", "trained", "share", "memory", *["steps"] * several["steps"], "time"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for each in estimates:
        counted, arm = each.memory, each.arm
        trained = counted.trained_parameters
        budget = "" if arm.row.method in UNBUDGETED else f", {budget_text(arm.budget)}"
        shown.add_row(
            *[arm.family] * several["task"],
            *[arm.model] * several["model"],
            arm.row.label + budget,
            str(arm.n_cells),
            f"{trained:,}" if trained < 1e6 else f"{trained / 1e6:,.1f} M",
            f"{100 * trained / counted.total_parameters:.3g} %",
            f"{counted.total / 1e9:.3g} GB",
            *[f"{each.steps:,}"] * several["steps"],
            _span(each.seconds),
        )
    return shown


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if seconds >= 1 else f"{seconds:.2g} s"
