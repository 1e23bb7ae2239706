"""What the study asks of SMT beyond the library, held against gradients of whole matrices written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import smtune
from smtune import SMTConfig
from smtune.bench import arms as bench
from smtune.data import Collator
from smtune.reproduce import arms, variants
from smtune.reproduce.memory import prepared
from smtune.reproduce.optimizers import BlockAdamW
from smtune.reproduce.train import fit, linear, micro_batches

SIZE = 8
RECIPE = {
    "steps": 6,
    "batch_size": 8,
    "micro_batch_size": 8,
    "scoring_batches": 3,
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
    "dense_warmup_rate": 1e-2,
}
CPU = torch.device("cpu")
KINDS = ("q_proj", "k_proj", "v_proj")


def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return prepared(LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=4, vocab_size=40)))


def config(**changes):
    shared = {"method": "smt", "model": "tiny", "block_size": SIZE, "dtype": "float32", "seed": 1, "recipe": RECIPE}
    smt = {"criterion": "abs_of_sum", "targets": None, "shares": None, "shuffled": False, "budget": 10}
    return {**shared, **smt, **changes}


@pytest.fixture(scope="module")
def rows():
    ids = [[(start + k) % 40 for k in range(12)] for start in range(32)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def stream(rows):
    return micro_batches(rows, Collator(0), RECIPE, 1, CPU)


def weights(net: Any) -> dict[str, Any]:
    return {name: module.weight for name, module in net.named_modules() if name.endswith(KINDS)}


def gradients(net, rows, n=RECIPE["scoring_batches"]):
    """By layer, the gradient of every batch."""
    net.requires_grad_(True)
    found = []
    for batch in itertools.islice(stream(rows), n):
        net.zero_grad()
        net(**batch).loss.backward()
        found.append({name: weight.grad.clone() for name, weight in weights(net).items()})
    net.zero_grad()
    net.requires_grad_(False)
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def best(scores, count):
    """The best blocks of {name: (R, C)} as {(name, row, col)}."""
    flat = [
        (-scores[name][row, col].item(), order, row, col)
        for order, name in enumerate(scores)
        for row in range(scores[name].shape[0])
        for col in range(scores[name].shape[1])
    ]
    names = list(scores)
    return {(names[order], row, col) for _, order, row, col in sorted(flat)[:count]}


def chosen(plan):
    return {(name, row, col) for name in plan.modules for row, col in plan.index(name).pairs}


def cut(matrix):
    """(R, C) of the list of blocks."""
    return [list(strip.split(SIZE, 1)) for strip in matrix.split(SIZE, 0)]


EXPECTED = {
    "square_of_sum": lambda w, g, whole_w, whole_g: g.sum(0).square().mean(),
    "over_scale": lambda w, g, whole_w, whole_g: g.sum(0).abs().mean() / whole_w.square().mean().sqrt(),
    "times_scale": lambda w, g, whole_w, whole_g: g.sum(0).abs().mean() * whole_w.square().mean().sqrt(),
    "over_mean": lambda w, g, whole_w, whole_g: g.sum(0).abs().mean() / whole_g.sum(0).abs().mean(),
    "signal": lambda w, g, whole_w, whole_g: (g.sum(0) ** 2 / (g**2).sum(0)).mean(),
    "nuclear": lambda w, g, whole_w, whole_g: torch.linalg.matrix_norm(g.sum(0), "nuc"),
}


@pytest.mark.parametrize("criterion", variants.CRITERIA)
def test_a_criterion_is_what_it_says(criterion, rows):
    net, scores = model(), {}
    for name, g in gradients(net, rows).items():
        w = weights(net)[name]
        blocks_of_batches = [cut(one) for one in g]
        scores[name] = torch.tensor(
            [
                [
                    EXPECTED[criterion](w_block, torch.stack([each[r][c] for each in blocks_of_batches]), w, g).item()
                    for c, w_block in enumerate(strip)
                ]
                for r, strip in enumerate(cut(w.detach()))
            ]
        )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = arms.make_plan(net, config(criterion=criterion), stream(rows))
    assert chosen(plan) == best(scores, 10)
    assert plan.criterion == criterion
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("kept", ["kept", "restored"])
def test_a_dense_warm_up_is_full_fine_tuning(kept, rows):
    twin = model().requires_grad_(True)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    sums = {name: torch.zeros_like(weight) for name, weight in weights(twin).items()}
    for batch in itertools.islice(stream(rows), 3):
        optimizer.zero_grad()
        twin(**batch).loss.backward()
        for name, weight in weights(twin).items():
            sums[name] += weight.grad
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
    scores = {
        name: torch.tensor([[block.abs().mean().item() for block in strip] for strip in cut(total)])
        for name, total in sums.items()
    }
    net = model()
    plan = arms.make_plan(net, config(dense_warmup=kept), stream(rows))
    assert chosen(plan) == best(scores, 10)
    expected = (twin if kept == "kept" else model()).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


def test_whole_rows_are_those_of_largest_gradient_and_the_rest_stays(rows):
    net = model()
    before = {name: weight.clone() for name, weight in weights(net).items()}
    scores = {name: g.sum(0).abs().mean(1) for name, g in gradients(net, rows).items()}
    ranked = sorted(
        (-value.item(), order, row) for order, each in enumerate(scores.values()) for row, value in enumerate(each)
    )
    wanted = {(list(scores)[order], row) for _, order, row in ranked[:20]}  # 10 blocks of 64 are 20 rows of 32
    _, arm = fit(arms.build(net, config(method="rows"), stream(rows)), stream(rows), RECIPE, 3, 1e-2)
    moved = {
        (name, row)
        for name, weight in weights(net).items()
        for row in range(32)
        if not torch.equal(weight[row], before[name][row])
    }
    assert moved == wanted
    assert sum(parameter.numel() for parameter in arm.trained) == 640


def test_a_block_in_the_gradients_basis_is_trained_as_by_autograd(rows):
    """The twin: U C Vᵀ added in every forward, C a parameter. And nothing moves outside the basis."""
    settings = config(method="smt-basis")
    net = model()
    before = {name: weight.detach().clone() for name, weight in weights(net).items()}
    sums = {name: g.sum(0) for name, g in gradients(net, rows).items()}
    arm = arms.build(net, settings, stream(rows))
    losses, _ = fit(arm, stream(rows), RECIPE, 4, 1e-2)

    sizes = [values.shape[0] for values in arm.trained]
    spectra = {name: torch.linalg.svd(total) for name, total in sums.items()}
    wanted, left_over = dict.fromkeys(spectra, 0), 640
    while fitting := [name for name, r in wanted.items() if 2 * r + 1 <= left_over]:
        grows = max(fitting, key=lambda name: spectra[name][1][wanted[name]] / (2 * wanted[name] + 1))
        left_over -= 2 * wanted[grows] + 1
        wanted[grows] += 1
    assert sizes == list(wanted.values())

    twin, cores = model(), []
    for (name, (left, _, right)), r in zip(spectra.items(), sizes, strict=True):
        core = torch.nn.Parameter(torch.zeros(r, r))
        cores.append(core)

        def add(layer, inputs, output, left=left[:, :r], right=right[:r], core=core):
            return output + inputs[0] @ right.T @ core.T @ left.T

        twin.get_submodule(name).register_forward_hook(add)
    other, _ = fit(bench.Arm("", "", twin, trained=cores), stream(rows), RECIPE, 4, 1e-2)
    assert other == pytest.approx(losses, rel=1e-4)
    for name, (left, _, right) in spectra.items():
        moved = left.T @ (weights(net)[name].detach() - before[name]) @ right.T
        r = sizes[list(spectra).index(name)]
        assert moved[:r, :r].abs().max() > 1e-3
        moved[:r, :r] = 0
        assert moved.abs().max() < 1e-5


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_spread_divides_a_score_by_its_two_ranks(n_rows, n_cols, seed):
    """Ranks counted one by one; an equal score that stands earlier ranks before."""
    score = torch.randint(0, 4, (n_rows, n_cols), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.empty(n_rows, n_cols)
    for row, col in itertools.product(range(n_rows), range(n_cols)):
        s = score[row, col]
        in_row = 1 + sum(score[row, c] > s or (score[row, c] == s and c < col) for c in range(n_cols))
        in_column = 1 + sum(score[r, col] > s or (score[r, col] == s and r < row) for r in range(n_rows))
        expected[row, col] = s / (in_row * in_column)
    assert torch.equal(variants.spread(score), expected)


def test_a_spread_plan_is_of_spread_scores(rows):
    plan = arms.make_plan(model(), config(policy="spread"), stream(rows))
    sums = {name: total.sum(0) for name, total in gradients(model(), rows).items()}
    scores = {
        name: torch.stack([torch.stack([b.abs().mean() for b in row]) for row in cut(g)]) for name, g in sums.items()
    }
    assert chosen(plan) == best({name: variants.spread(score) for name, score in scores.items()}, 10)


def test_a_sampled_cell_has_the_librarys_plan(rows):
    plan = arms.make_plan(model(), config(policy="sampled"), stream(rows))
    own = SMTConfig(
        block_size=SIZE, budget=10, policy="sampled", target_modules=list(KINDS), warmup_steps=3, seed=config()["seed"]
    )
    assert plan.policy == "sampled"
    assert chosen(plan) == chosen(smtune.make_plan(model(), stream(rows), own, progress=False))


def test_choosing_anew_the_same_blocks_changes_nothing(rows):
    """What was trained goes on with its moments, to the bit."""
    settings = config(reselect_every=2)
    plain = arms.build(model(), settings, stream(rows))
    assert isinstance(plain.optimizer, BlockAdamW)
    losses, _ = fit(plain, stream(rows), RECIPE, 6, 1e-2)

    arm = arms.build(model(), settings, stream(rows))
    plan = arm.plan

    def again(arm):
        fixed = {**settings, "criterion": "abs_of_sum"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arms, "make_plan", lambda *_: plan)
            return arms.reselect(arm, fixed, stream(rows))

    again_losses, _ = fit(arm, stream(rows), RECIPE, 6, 1e-2, change=(2, again))
    assert again_losses == losses


def test_choosing_anew_keeps_what_was_trained(rows):
    settings = config(reselect_every=2, budget=6)
    arm = arms.build(model(), settings, stream(rows))
    plans = [arm.plan]

    def again(arm):
        new = arms.reselect(arm, settings, stream(rows))
        plans.append(new.plan)
        return new

    losses, arm = fit(arm, stream(rows), RECIPE, 6, 3e-2, change=(2, again))
    assert len(plans) == 3
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    trained: Any = arm.model
    merged, base = trained.merge_and_unload(), model()
    ever = set().union(*map(chosen, plans))
    assert ever > chosen(plans[-1])  # else nothing is tested
    for name, weight in weights(merged).items():
        same = [[torch.equal(a, b) for a, b in zip(*pair)] for pair in zip(cut(weight), cut(weights(base)[name]))]
        moved = {(name, r, c) for r, strip in enumerate(same) for c, equal in enumerate(strip) if not equal}
        assert moved == {block for block in ever if block[0] == name}


def test_the_schedule_is_transformers():
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=10)
    for step in range(10):
        assert linear(step, 3, 10) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
