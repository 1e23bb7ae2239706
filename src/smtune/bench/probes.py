"""Measurements that are no training step: one batch of scoring, one block gradient; and plans from real scores."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import smtune
from smtune.bench import measure
from smtune.bench.floor import end_backward_at
from smtune.bench.subjects import QKV, Subject, attention_inputs
from smtune.blocks import BlockGrid
from smtune.kernels.candidates import CANDIDATES
from smtune.kernels.loop import way
from smtune.models import DTYPES

SCORED_BATCHES, ROWS, MAX_LENGTH = 8, 4, 256
"""What plans held to a backward cost are scored on: batches of the packaged word problems."""
BUDGET = 0.0084
"""Of these plans: the share of the model's parameters that benchmarks/cost_aware.py trains."""


# Scoring ------------------------------------------------------------------------------------------------------------


def scoring(
    model: nn.Module,
    subject: Subject,
    batch: Mapping[str, Tensor],
    criterion: str,
    accumulator: str,
    rounds: int,
) -> dict[str, Any]:
    """One warm-up batch of scoring, in turn with the floor and with the floor and dense gradients.

    Args:
        accumulator: a dtype, or "cpu" for fp32 ones kept there.
    Returns:
        Fields of the record: seconds and FLOPs of each, and memory. A scored batch is the second of two, timed from
        the end of the first, so that making the accumulators and reading them at the end do not count.
    """
    device = next(model.parameters()).device
    config = smtune.SMTConfig(
        target_modules=list(QKV),
        block_size=subject.block_size,
        criterion=criterion,
        accumulator_device="cpu" if accumulator == "cpu" else None,
        accumulator_dtype="float32" if accumulator == "cpu" else accumulator,
    )
    layers = attention_inputs(model)
    modules = [module for layer in layers for module in layer.values()]
    weights = [module.weight for module in modules]

    def floor() -> None:
        handles = end_backward_at(layers[0].values())
        model(**batch).loss.backward()
        for handle in handles:
            handle.remove()

    def dense() -> None:
        for weight in weights:
            weight.requires_grad_(True)
        model(**batch).loss.backward()

    def drop_dense() -> None:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)

    def score(batches: int) -> list[float]:
        """The times at which each batch was done."""
        done: list[float] = []
        smtune.score_blocks(
            model, itertools.repeat(batch, batches), config, progress=lambda _: done.append(measure.now(device))
        )
        return done

    seconds = partial(measure.seconds_of, device)

    def flops(action: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            action()
        return counter.get_total_flops()

    floor()
    dense()
    drop_dense()
    rss_before = measure.rss_bytes()
    measure.reset_peak_rss()
    score(1)
    peak = measure.peak_rss_bytes()
    times = []
    for _ in range(rounds):
        entry = {"floor": seconds(floor), "dense": seconds(dense)}
        drop_dense()
        first, second = score(2)
        times.append(entry | {"score": second - first})
    counted = {"floor": flops(floor), "dense": flops(dense)}
    drop_dense()
    counted["score"] = flops(lambda: score(1))
    grids = [BlockGrid(module.out_features, module.in_features, subject.block_size) for module in modules]
    itemsize = 2 if accumulator == "bfloat16" else 4
    kept = sum(weight.numel() if criterion == "abs_of_sum" else grid.n_blocks for weight, grid in zip(weights, grids))
    return {
        "rounds": times,
        "flops": counted,
        "rss_before_bytes": rss_before,
        "peak_rss_bytes": peak,
        "accumulator_bytes": kept * itemsize,
    }


# Kernels ------------------------------------------------------------------------------------------------------------


def kernels(
    candidates: Sequence[str],
    dtype: str,
    tokens: int,
    features: int,
    block_size: int,
    blocks: int,
    rounds: int,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Ways to compute the block gradient of a square weight, by name: fields of their records, or the error of one.

    All take turns, in another order each round, and each comes after a dense dYᵀX: that is what it is held against, and
    it leaves the caches to none of them.
    """
    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    grid = BlockGrid(features, features, block_size)
    places = torch.randperm(grid.n_blocks, generator=generator)[:blocks].sort().values.tolist()
    pairs = [divmod(place, grid.shape[1]) for place in places]
    grad_y_NO, x_NI = (torch.randn(tokens, features, generator=generator).to(where, DTYPES[dtype]) for _ in range(2))
    seconds = partial(measure.seconds_of, where)
    share = blocks / grid.n_blocks
    found: dict[str, dict[str, Any]] = {
        name: {
            "used": where.type == "cpu" and name == way(DTYPES[dtype], where, block_size),  # on a GPU Triton's is
            "seconds": [],
            "ideal_seconds": [],
            "error": None,
        }
        for name in candidates
    }
    shuffler = random.Random(0)
    for number in range(rounds + 1):
        for name in shuffler.sample(list(candidates), len(candidates)):
            record = found[name]
            if record["error"] is not None:
                continue
            dense = seconds(lambda: grad_y_NO.T @ x_NI)
            try:
                own = seconds(lambda name=name: CANDIDATES[name](grad_y_NO, x_NI, pairs, block_size))
            except Exception as error:  # whatever it raises is a result
                record["error"] = f"{type(error).__name__}: {error}"
                continue
            if number:  # the first is a warm-up
                record["seconds"].append(own)
                record["ideal_seconds"].append(dense * share)
    return found


# Plans held to a backward cost --------------------------------------------------------------------------------------


def plans(model: nn.Module, name: str, subject: Subject, limits: list[float]) -> list[dict[str, Any]]:
    """For each limit the plan of `BUDGET` from the same scores, by `abs_of_sum` over the packaged word problems."""
    from smtune.data import Collator, arithmetic, batches, prepare
    from smtune.models import load_tokenizer

    tokenizer: Any = load_tokenizer(name)
    dataset, _ = prepare(arithmetic(SCORED_BATCHES * ROWS), tokenizer, max_length=MAX_LENGTH)
    total = sum(parameter.numel() for parameter in model.parameters())

    def config(limit: float) -> smtune.SMTConfig:
        return smtune.SMTConfig(
            target_modules=list(QKV),
            block_size=subject.block_size,
            budget=BUDGET,
            policy="global",
            max_backward_cost=limit,
        )

    batch = batches(dataset, Collator(tokenizer.pad_token_id), ROWS)
    scores = smtune.score_blocks(model, batch, config(1.0), progress=False)
    found = []
    for limit in limits:
        plan = smtune.select_blocks(scores, config(limit), total)
        with_blocks = [
            number
            for number, layer in enumerate(attention_inputs(model))
            if any(plan.modules[module].rows for module in layer)
        ]
        fields = {
            "backward_cost": plan.backward_cost,
            "score_kept": plan.score_kept,
            "lowest_layer": min(with_blocks),
            "label": f"SMT, backward cost ≤ {limit:g}",
        }
        found.append({"plan": plan.to_dict(), "fields": fields})
    return found
