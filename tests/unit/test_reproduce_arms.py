"""Every arm trains, with as many parameters as SMT where it shall, in the same order of rows, and to the same bits."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from smtune.data import Collator
from smtune.reproduce import arms
from smtune.reproduce.declared import Method
from smtune.reproduce.memory import prepared
from smtune.reproduce.train import count_steps, fit, micro_batches

RECIPE = {
    "steps": 4,
    "batch_size": 32,
    "micro_batch_size": 32,
    "scoring_batches": 2,
    "warmup_ratio": 0.25,
    "max_grad_norm": 1.0,
}
CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=40,
    )
    return prepared(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def rows():
    """Counting up from somewhere, 16 tokens each; a batch is all of them, so that every step is seen in the loss."""
    ids = [[(start + k) % 40 for k in range(16)] for start in range(32)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def config(method, **changes):
    shared = {"method": method, "model": "tiny", "block_size": 16, "dtype": "float32", "seed": 1, "recipe": RECIPE}
    smt = {"criterion": "abs_of_sum", "targets": None, "shares": None, "shuffled": False}
    return {**shared, "budget": 0.05, **(smt if method == "smt" else {}), **changes}


def trained(method, rows, recipe: Any = RECIPE, **changes) -> tuple[list[float], Any]:
    """(losses, arm) after the recipe's steps."""
    settings = config(method, **changes)
    arm = arms.build(model(), settings, micro_batches(rows, Collator(0), recipe, 1, CPU))
    return fit(arm, micro_batches(rows, Collator(0), recipe, 1, CPU), recipe, recipe["steps"], 3e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # SHiRA's
@pytest.mark.parametrize("method", [name for name in get_args(Method) if name != "base"])
def test_every_arm_learns_to_the_same_bits(method, rows):
    losses, arm = trained(method, rows)
    assert losses[-1] < losses[0]
    assert losses == trained(method, rows)[0]
    n_trained = sum(parameter.numel() for parameter in arm.trained)
    budget = arms.count_plan(model(), config("smt")).n_params
    if method.startswith("dense") or method == "full":
        assert n_trained > budget
    else:
        assert abs(n_trained - budget) <= 0.35 * budget  # a rank of this small model is 16 % of the budget
    assert all(parameter.dtype == torch.float32 for parameter in arm.trained)
    assert arm.optimizer is not None
    assert all(group["weight_decay"] == 0.0 for group in arm.optimizer.param_groups)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_shira_draws_its_places_by_the_seed():
    def places(seed):
        built = arms.build(model(), config("shira", seed=seed), None)
        layers = (module for module in built.model.modules() if hasattr(module, "shira_indices"))
        return [layer.shira_indices["default"].tolist() for layer in layers]

    assert places(0) == places(0) != places(1)


def test_all_arms_start_at_the_same_loss(rows):
    """Nothing is changed before the first step, and the first batch is the same."""
    first = {method: trained(method, rows)[0][0] for method in ("smt", "lora", "dora", "sift", "full")}
    assert max(first.values()) - min(first.values()) < 1e-6


@pytest.mark.parametrize("criterion", ["net", "sum_of_abs", "fisher", "activation", "weight", "random"])
def test_every_criterion_trains(criterion, rows):
    losses, arm = trained("smt", rows, criterion=criterion)
    assert losses[-1] < losses[0]
    assert arm.plan.criterion == criterion


def test_the_matched_control_has_as_many_blocks_in_every_matrix_elsewhere(rows):
    plans = [trained("smt", rows, shuffled=shuffled)[1].plan for shuffled in (False, True)]
    counts = [[len(module.rows) for module in plan.modules.values()] for plan in plans]
    assert counts[0] == counts[1]
    assert plans[0].modules != plans[1].modules


def test_where_blocks_may_be(rows):
    plan = trained("smt", rows, targets=["k_proj"])[1].plan
    assert {name.rpartition(".")[2] for name in plan.modules} == {"k_proj"}
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    plan = trained("smt", rows, targets=targets, shares={"attention": 0.75, "mlp": 0.25})[1].plan
    blocks = {
        group: sum(len(module.rows) for name, module in plan.modules.items() if f".{group}." in name)
        for group in ("self_attn", "mlp")
    }
    assert blocks["self_attn"] == pytest.approx(3 * blocks["mlp"], abs=3)
    assert blocks["mlp"] > 0


def test_micro_batches_are_a_batch(rows):
    whole, _ = trained("full", rows)
    parts, _ = trained("full", rows, recipe=RECIPE | {"micro_batch_size": 8})
    assert whole == pytest.approx(parts, abs=1e-5)


def test_the_order_of_rows_is_the_seeds_alone(rows):
    def first_tokens(seed, n):
        stream = micro_batches(rows, Collator(0), RECIPE | {"micro_batch_size": 8}, seed, CPU)
        return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(stream, n)]

    torch.manual_seed(5)
    order = first_tokens(1, 8)
    torch.manual_seed(6)
    assert first_tokens(1, 8) == order
    assert first_tokens(2, 4) != order[:4]
    epochs = order[:4], order[4:]
    assert [sorted(itertools.chain(*epoch)) for epoch in epochs] == [list(range(32))] * 2
    assert epochs[0] != epochs[1]


def test_steps_of_a_recipe():
    assert count_steps({"steps": 7, "batch_size": 16}, 1000) == 7
    assert count_steps({"epochs": 3, "batch_size": 16}, 170_420) == 3 * 10_651


def test_a_loss_that_is_not_finite_ends_a_run(rows):
    arm = arms.build(model(), config("full"), None)
    arm.trained[0].data.fill_(float("inf"))
    losses, _ = fit(arm, micro_batches(rows, Collator(0), RECIPE, 1, CPU), RECIPE, 4, 1e-3)
    assert len(losses) == 1
