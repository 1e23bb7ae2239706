from __future__ import annotations

import io
import itertools
import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import smtune
from smtune import InputError, Plan, SMTConfig
from smtune.depth import backward_costs
from smtune.report import plan_table
from smtune.selection import ModulePlan, backward_cost, select, total_score
from smtune.training import parse_config

TOTAL = 10_000


def scores(**grids):
    return {name: torch.tensor(grid, dtype=torch.float32) for name, grid in grids.items()}


def pairs(chosen):
    return {name: index.pairs for name, index in chosen.items()}


def test_global_takes_the_best_of_all():
    chosen = select(scores(a=[[1, 9], [3, 4]], b=[[8, 0], [2, 7]]), block_size=4, budget=3, total_params=TOTAL)
    assert pairs(chosen) == {"a": ((0, 1),), "b": ((0, 0), (1, 1))}


def test_ties_go_by_module_order_then_row_then_column():
    equal = scores(b=[[1, 1], [1, 1]], a=[[1, 1]])
    assert pairs(select(equal, block_size=4, budget=3, total_params=TOTAL)) == {
        "b": ((0, 0), (0, 1), (1, 0)),
        "a": (),
    }


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.one_of(st.integers(1, 40), st.floats(1e-4, 1.0)),
    st.sampled_from(["global", "per_module", "shares", "sampled"]),
    st.integers(0, 1000),
)
def test_never_over_budget_and_deterministic(grids, budget, policy, seed):
    generator = torch.Generator().manual_seed(seed)
    names = ["l.q_proj", "l.up_proj", "l.k_proj", "l.down_proj"][: len(grids)]
    # few distinct values, so that ties are common
    given_scores = {name: torch.randint(0, 3, grid, generator=generator).float() for name, grid in zip(names, grids)}
    shares = {"attention": 0.75, "mlp": 0.25} if policy == "shares" else None
    arguments = {"block_size": 4, "budget": budget, "total_params": 1000, "policy": policy, "shares": shares}
    try:
        chosen = select(given_scores, **arguments)
    except InputError:
        return
    assert pairs(chosen) == pairs(select(given_scores, **arguments))
    count = sum(map(len, chosen.values()))
    assert count <= (budget if isinstance(budget, int) else budget * 1000 / 16 + 1e-6)
    if policy == "per_module":
        room = {name: score.numel() for name, score in given_scores.items()}
        most = max(map(len, chosen.values()))
        assert all(len(index) == min(most, room[name]) for name, index in chosen.items())
    for name, index in chosen.items():
        score = given_scores[name]
        taken = [score[pair].item() for pair in index.pairs]
        left = [s for k, s in enumerate(score.flatten().tolist()) if divmod(k, score.shape[1]) not in index.pairs]
        assert policy == "sampled" or not taken or not left or min(taken) >= max(left)


def test_a_draw_is_by_the_scores():
    """The first of a draw by its weight, in its matrix or another: 1, 2, 5 and 0 of 8, within four deviations."""
    weights, draws = [1.0, 2.0, 5.0, 0.0], 2000
    given_scores = scores(a=[weights[:2]], b=[weights[2:]])
    counts = dict.fromkeys([("a", 0), ("a", 1), ("b", 0), ("b", 1)], 0)
    for seed in range(draws):
        found = select(given_scores, block_size=2, budget=1, total_params=TOTAL, policy="sampled", seed=seed)
        [(name, index)] = [(name, index) for name, index in found.items() if len(index)]
        counts[name, index.pairs[0][1]] += 1
    for count, weight in zip(counts.values(), weights, strict=True):
        share = weight / sum(weights)
        assert abs(count - share * draws) <= 4 * (draws * share * (1 - share)) ** 0.5


def test_a_draw_takes_every_block_but_once_and_zeros_last():
    given_scores = scores(a=[[1.0, 0.0], [3.0, 1e-3]])
    arguments = {"block_size": 2, "total_params": TOTAL, "policy": "sampled"}
    for seed in range(50):
        assert (0, 1) not in pairs(select(given_scores, budget=3, seed=seed, **arguments))["a"]
    assert len(select(given_scores, budget=9, **arguments)["a"]) == 4


def test_a_draw_wants_scores_that_are_not_negative():
    with pytest.raises(InputError, match="at least 0 .* Got -1 in a"):
        select({"a": torch.tensor([[1.0, -1.0]])}, block_size=2, budget=1, total_params=TOTAL, policy="sampled")


def test_a_limit_of_the_cost_leaves_the_draws_as_they_are():
    given_scores = {name: torch.rand(4, 4) for name in COSTS}
    arguments = {"block_size": 2, "total_params": TOTAL, "policy": "sampled", "backward_costs": COSTS}
    limited = pairs(select(given_scores, budget=3, max_backward_cost=0.5, **arguments))
    order = [pairs(select(given_scores, budget=count, **arguments)) for count in range(1, 65)]
    low = ("1.q_proj", "1.o_proj")
    assert {name: limited[name] for name in low} in [{name: found[name] for name in low} for found in order]


def test_a_fraction_that_is_exactly_k_blocks_buys_k():
    for k in range(1, 60):
        chosen = select({"a": torch.rand(10, 10)}, block_size=7, budget=k * 49 / 12345, total_params=12345)
        assert len(chosen["a"]) == k


def test_shares_split_the_budget_between_groups():
    given_scores = {name: torch.rand(4, 4) for name in ("m.q_proj", "m.v_proj", "m.up_proj")}
    chosen = select(
        given_scores,
        block_size=2,
        budget=8,
        total_params=TOTAL,
        policy="shares",
        shares={"attention": 0.75, "mlp": 0.25},
    )
    assert len(chosen["m.q_proj"]) + len(chosen["m.v_proj"]) == 6
    assert len(chosen["m.up_proj"]) == 2
    only_v = select(given_scores, block_size=2, budget=8, total_params=TOTAL, policy="shares", shares={"v_proj": 1.0})
    assert len(only_v["m.v_proj"]) == 8


FUSED = ("q", "q", "k", "v")


def test_shares_of_kinds_take_rows_of_a_fused_matrix():
    given_scores = {name: torch.rand(4, 4) for name in ("0.query_key_value", "1.query_key_value", "0.fc1")}
    kinds = {name: FUSED for name in given_scores if "query" in name}
    arguments = {"block_size": 2, "total_params": TOTAL, "policy": "shares", "kinds": kinds}
    shares = {"q": 0.5, "k": 0.1, "mlp": 0.4}
    chosen = select(given_scores, budget=20, shares=shares, **arguments)
    rows = [row for name in kinds for row in chosen[name].rows.tolist()]
    assert (sum(row < 2 for row in rows), rows.count(2), rows.count(3)) == (10, 2, 0)
    assert len(chosen["0.fc1"]) == 8
    for name in kinds:  # the best of each kind, in order of row, then column
        assert list(chosen[name].pairs) == sorted(chosen[name].pairs)
    of_k = {(name, col): given_scores[name][2, col].item() for name in kinds for col in range(4)}
    taken = {(name, col) for name in kinds for row, col in chosen[name].pairs if row == 2}
    assert taken == set(sorted(of_k, key=of_k.get)[-2:])
    whole = select(given_scores, budget=40, shares={"attention": 1.0}, **arguments)
    assert sum(map(len, whole.values())) == 32
    with pytest.raises(InputError, match="do not overlap"):
        select(given_scores, budget=20, shares={"attention": 0.5, "v": 0.5}, **arguments)
    with pytest.raises(InputError, match="none of fc1, k, q, query_key_value, v belongs to"):
        select(given_scores, budget=20, shares={"o": 1.0}, **arguments)


def test_other_policies_do_not_ask_for_kinds():
    given_scores = {"0.query_key_value": torch.rand(4, 4), "0.fc1": torch.rand(4, 4)}
    for policy in ("global", "per_module"):
        arguments = {"block_size": 2, "budget": 10, "total_params": TOTAL, "policy": policy}
        with_kinds = select(given_scores, kinds={"0.query_key_value": FUSED}, **arguments)
        assert pairs(with_kinds) == pairs(select(given_scores, **arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "fraction of all parameters"),
        ({"budget": 1.5}, "fraction of all parameters"),
        ({"budget": True}, "fraction of all parameters"),
        ({"budget": 1e-6}, "at least one block.*raise it to 0.0004 or more"),
        ({"policy": "globl"}, 'Did you mean "global"'),
        ({"policy": "shares"}, "Expected `shares`"),
        ({"policy": "shares", "shares": {"mpl": 1.0}}, "none of q_proj belongs to"),
        ({"policy": "shares", "shares": {"attention": 0.9, "q_proj": 0.2}}, "sum to at most 1"),
        ({"policy": "shares", "shares": {"attention": 0.5, "q_proj": 0.5}}, "do not overlap"),
        ({"shares": {"attention": 1.0}}, "only with it"),
        ({"policy": "shares", "shares": {"attention": float("nan")}}, "not negative"),
        ({"policy": "shares", "shares": {"attention": 0.1}}, "at least one block"),
    ],
)
def test_bad_requests(changes, message):
    with pytest.raises(InputError, match=message):
        select({"m.q_proj": torch.rand(3, 3)}, **({"block_size": 2, "budget": 4, "total_params": TOTAL} | changes))


@given(st.integers(1, 256), st.integers(1, 10**12))
def test_the_smallest_budget_that_is_named_would_do(size, total_params):
    arguments = {"block_size": size, "total_params": max(total_params, size**2)}
    try:
        select({"q_proj": torch.rand(2, 2)}, budget=1e-15, **arguments)
    except InputError as error:
        least = float(str(error).split("raise it to ")[1].split(" ")[0])
        if least <= 1:
            assert sum(map(len, select({"q_proj": torch.rand(2, 2)}, budget=least, **arguments).values())) == 1


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(InputError, match="bad_proj"):
        select({"bad_proj": torch.tensor([[1.0, torch.nan]])}, block_size=2, budget=1, total_params=TOTAL)


def test_per_module_needs_a_block_each():
    with pytest.raises(InputError, match="per matrix"):
        select(
            {"a": torch.rand(2, 2), "b": torch.rand(2, 2)},
            block_size=2,
            budget=1,
            total_params=TOTAL,
            policy="per_module",
        )


# Within a backward cost -----------------------------------------------------------------------------------------------

COSTS = {"0.q_proj": 1.0, "0.v_proj": 1.0, "0.o_proj": 0.75, "1.q_proj": 0.5, "1.o_proj": 0.25}


block_scores = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=2), min_size=5, max_size=5)


def best_total(given_scores, limit, affords):
    """The highest score of all sets of blocks within the limit that are affordable, by trying each."""
    blocks = [
        (name, score) for name, row in given_scores.items() if COSTS[name] <= limit for score in row.flatten().tolist()
    ]
    plans = (plan for size in range(len(blocks) + 1) for plan in itertools.combinations(blocks, size))
    return max(sum(score for _, score in plan) for plan in plans if affords([name for name, _ in plan]))


@given(block_scores, st.integers(1, 5), st.sampled_from([0.25, 0.3, 0.5, 0.6, 0.75, 1.0]))
def test_global_is_the_best_plan_within_both_budgets(values, count, limit):
    given_scores = {name: torch.tensor([row], dtype=torch.float32) for name, row in zip(COSTS, values)}
    arguments = {"block_size": 4, "total_params": TOTAL, "backward_costs": COSTS, "max_backward_cost": limit}
    chosen = select(given_scores, budget=count, **arguments)
    assert sum(map(len, chosen.values())) <= count
    assert backward_cost(chosen, COSTS) <= limit
    best = best_total(given_scores, limit, lambda names: len(names) <= count)
    assert total_score(chosen, given_scores) == best


@given(block_scores, st.integers(2, 6), st.sampled_from([0.5, 0.6, 0.75, 1.0]), st.sampled_from([0.25, 0.5, 0.6]))
def test_shares_are_the_best_plan_within_all_three(values, count, limit, share):
    given_scores = {name: torch.tensor([row], dtype=torch.float32) for name, row in zip(COSTS, values)}
    arguments = {"block_size": 4, "total_params": TOTAL, "backward_costs": COSTS, "max_backward_cost": limit}
    shares = {"q_proj": share, "o_proj": 1 - share}
    afforded = {group: math.floor(part * count + 1e-9) for group, part in shares.items()}
    chosen = select(given_scores, budget=count, policy="shares", shares=shares, **arguments)
    assert backward_cost(chosen, COSTS) <= limit

    def affords(names):
        groups = [name.partition(".")[2] for name in names]
        return all(groups.count(group) <= afforded.get(group, 0) for group in groups)

    assert total_score(chosen, given_scores) == best_total(given_scores, limit, affords)


@given(block_scores, st.integers(5, 9), st.sampled_from([0.25, 0.3, 0.5, 0.75, 1.0]))
def test_per_module_is_the_best_plan_of_as_many_each(values, count, limit):
    given_scores = {name: torch.tensor([row], dtype=torch.float32) for name, row in zip(COSTS, values)}
    arguments = {"block_size": 4, "total_params": TOTAL, "backward_costs": COSTS, "max_backward_cost": limit}
    chosen = select(given_scores, budget=count, policy="per_module", **arguments)
    assert backward_cost(chosen, COSTS) <= limit
    each = count // sum(cost <= limit for cost in COSTS.values())
    best = best_total(given_scores, limit, lambda names: all(names.count(name) <= each for name in names))
    assert total_score(chosen, given_scores) == best


@pytest.mark.parametrize("policy", ["global", "per_module", "shares", "sampled"])
def test_every_policy_keeps_within_the_limit(policy):
    given_scores = {name: torch.rand(4, 4) for name in COSTS}
    arguments = {"block_size": 2, "budget": 8, "total_params": TOTAL, "policy": policy, "backward_costs": COSTS}
    arguments["shares"] = {"q_proj": 0.5, "o_proj": 0.5} if policy == "shares" else None
    chosen = select(given_scores, max_backward_cost=0.5, **arguments)
    counts = {"per_module": 4, "shares": 4}
    assert list(chosen) == list(COSTS)
    assert {name for name, index in chosen.items() if len(index)} == {"1.q_proj", "1.o_proj"}
    assert policy not in counts or {len(index) for index in chosen.values()} == {0, counts[policy]}
    assert sum(map(len, chosen.values())) == 8
    unlimited = select(given_scores, **arguments)
    assert pairs(unlimited) == pairs(select(given_scores, max_backward_cost=1.0, **arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_backward_cost": 0.2}, "leave a projection that is targeted. Got 0.2.*set it to 0.25 or more"),
        (
            {"max_backward_cost": 0.9, "policy": "shares", "shares": {"v_proj": 0.5, "o_proj": 0.5}},
            "leave a projection of v_proj. Got 0.9.*set it to 1.0 or more",
        ),
        ({"max_backward_cost": 0.5, "backward_costs": None}, "Expected backward_costs"),
        ({"max_backward_cost": 0.0}, r"float in \(0, 1\]"),
        ({"max_backward_cost": 1.5}, r"float in \(0, 1\]"),
        ({"max_backward_cost": True}, r"float in \(0, 1\]"),
        ({"max_backward_cost": float("nan")}, r"float in \(0, 1\]"),
    ],
)
def test_limits_that_cannot_be_kept(changes, message):
    arguments = {"block_size": 2, "budget": 4, "total_params": TOTAL, "backward_costs": COSTS}
    with pytest.raises(InputError, match=message):
        select({name: torch.rand(2, 2) for name in COSTS}, **(arguments | changes))


def test_the_smallest_limit_that_is_named_would_do(tiny_llama):
    scores = smtune.score_blocks(tiny_llama, None, SMTConfig(block_size=16, criterion="random"))
    with pytest.raises(InputError, match="set it to") as error:
        smtune.select_blocks(scores, SMTConfig(budget=4, criterion="random", max_backward_cost=0.01), TOTAL)
    least = float(str(error.value).split("set it to ")[1].split(" ")[0])
    plan = smtune.select_blocks(scores, SMTConfig(budget=4, criterion="random", max_backward_cost=least), TOTAL)
    assert plan.backward_cost == min(scores.backward_costs.values())


def test_a_plan_records_what_it_costs_and_keeps(tiny_llama):
    def config(**changes):
        return SMTConfig(block_size=16, budget=6, criterion="random", policy="global", **changes)

    scores = smtune.score_blocks(tiny_llama, None, config())
    assert scores.backward_costs == backward_costs(tiny_llama, scores)
    free = smtune.select_blocks(scores, config(), TOTAL)
    bound = smtune.select_blocks(scores, config(max_backward_cost=0.6), TOTAL)
    assert (free.backward_cost, free.max_backward_cost, free.score_kept) == (1.0, None, None)
    assert {name.split(".")[2] for name, module in bound.modules.items() if module.rows} == {"1"}
    assert (bound.backward_cost, bound.max_backward_cost) == (
        scores.backward_costs["model.layers.1.self_attn.q_proj"],
        0.6,
    )
    best = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values[:6].sum()
    kept = (
        torch.cat([s.flatten() for name, s in scores.items() if ".1." in name]).sort(descending=True).values[:6].sum()
    )
    assert bound.score_kept == pytest.approx((kept / best).item())
    assert bound.shuffled(1).backward_cost == bound.backward_cost
    assert bound.shuffled(1).score_kept is None

    console = Console(width=100, file=io.StringIO())
    console.print(plan_table(bound))
    shown = f"backward cost {bound.backward_cost:.2f} of the whole dX chain, score kept {100 * bound.score_kept:.0f} %"
    assert shown in console.file.getvalue()


def test_scores_of_ones_own_have_no_cost():
    scores = {"a": torch.rand(2, 2)}
    assert smtune.select_blocks(scores, SMTConfig(block_size=2, budget=1), TOTAL).backward_cost is None
    with pytest.raises(InputError, match="Expected backward_costs"):
        smtune.select_blocks(scores, SMTConfig(block_size=2, budget=1, max_backward_cost=0.5), TOTAL)


def test_the_limit_is_checked_in_both_configurations():
    with pytest.raises(InputError, match="max_backward_cost"):
        SMTConfig(max_backward_cost=2.0)
    values = {"model": "m", "output": "o", "data": {"train": "t"}}
    assert parse_config(values | {"smt": {"max_backward_cost": 0.5}}).smt.max_backward_cost == 0.5
    with pytest.raises(InputError, match="smt.max_backward_cost"):
        parse_config(values | {"smt": {"max_backward_cost": 2.0}})
    with pytest.raises(InputError, match="smt.max_backward_cost: expected without smt.plan"):
        parse_config(values | {"smt": {"max_backward_cost": 0.5, "plan": "plan.json"}})


# Plans ----------------------------------------------------------------------------------------------------------------


def plan(**changes) -> Plan:
    modules = {
        "layers.0.q_proj": ModulePlan((8, 8), (0, 1), (1, 0), 0.5, 1.0),
        "layers.0.k_proj": ModulePlan((4, 8), (), (), 0.1, 0.2),
    }
    values = {
        "modules": modules,
        "block_size": 4,
        "criterion": "abs_of_sum",
        "policy": "global",
        "budget": 0.04,
        "total_params": 1000,
        "batches_seen": 3,
        "model_name": "a/b",
    }
    return Plan(**(values | changes))


class Model(nn.Module):
    def __init__(self, q=(8, 8)):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(*q), "k_proj": nn.Linear(8, 4)})])


def test_plan_round_trip_and_numbers(tmp_path):
    original = plan()
    assert (original.n_blocks, original.n_params, original.fraction) == (2, 32, 0.032)
    original.save(tmp_path / "sub" / "plan.json")
    assert Plan.load(tmp_path / "sub" / "plan.json") == original
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["plan.json"]
    assert isinstance(Plan.load(tmp_path / "sub" / "plan.json").budget, float)
    assert json.loads((tmp_path / "sub" / "plan.json").read_text())["modules"][0]["blocks"] == "0,1 1,0"


def test_a_plan_from_before_costs_were_counted_still_loads(tmp_path):
    costed = plan(max_backward_cost=0.5, backward_cost=0.4, score_kept=0.7)
    assert Plan.from_dict(costed.to_dict()) == costed
    values = {
        k: v for k, v in costed.to_dict().items() if k not in ("max_backward_cost", "backward_cost", "score_kept")
    }
    assert Plan.from_dict(values) == plan()


def test_a_failed_save_leaves_the_old_plan(tmp_path, monkeypatch):
    plan().save(tmp_path / "plan.json")
    monkeypatch.setattr(os, "replace", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan(budget=1).save(tmp_path / "plan.json")
    monkeypatch.undo()
    assert Plan.load(tmp_path / "plan.json") == plan()
    assert len(list(tmp_path.iterdir())) == 1


def test_shuffled_keeps_the_count_of_every_matrix():
    shuffled = plan().shuffled(7)
    assert shuffled == plan().shuffled(7)
    assert {name: len(module.rows) for name, module in shuffled.modules.items()} == {
        "layers.0.q_proj": 2,
        "layers.0.k_proj": 0,
    }
    assert len({plan().shuffled(seed).modules["layers.0.q_proj"].rows for seed in range(20)}) > 1
    assert "shuffled" in shuffled.criterion


def fused_plan(**changes) -> Plan:
    fused = ModulePlan((16, 8), (0, 1, 1, 3), (1, 0, 1, 0), kinds=FUSED)
    return plan(modules={"layers.0.c_attn": fused, "layers.0.fc1": ModulePlan((4, 8), (0,), (1,))}, **changes)


def test_kinds_are_counted_and_kept(tmp_path):
    original = fused_plan()
    assert original.by_kind("layers.0.c_attn") == {"q": (3, 4), "k": (0, 2), "v": (1, 2)}
    assert original.by_kind("layers.0.fc1") == {"fc1": (1, 2)}
    original.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == original
    values = original.to_dict()
    assert [module["kinds"] for module in values["modules"]] == ["q:2 k:1 v:1", ""]
    for module in values["modules"]:
        del module["kinds"]  # as in a plan made before there were kinds
    assert Plan.from_dict(values).by_kind("layers.0.c_attn") == {"c_attn": (4, 8)}


def test_shuffled_keeps_the_count_of_every_kind():
    plans = [fused_plan().shuffled(seed) for seed in range(20)]
    assert all(shuffled.by_kind(name) == fused_plan().by_kind(name) for shuffled in plans for name in shuffled.modules)
    assert len({(p.modules["layers.0.c_attn"].rows, p.modules["layers.0.c_attn"].cols) for p in plans}) > 3


def test_kinds_that_are_not_one_for_each_row_are_refused():
    with pytest.raises(InputError, match=r"layers\.0\.c_attn: Expected a kind for each of 4 rows of blocks\. Got 3"):
        plan(modules={"layers.0.c_attn": ModulePlan((16, 8), (), (), kinds=("q", "k", "v"))})


def test_check_accepts_its_own_model_and_names_every_fault_of_another():
    plan().check(Model())
    with pytest.raises(
        InputError, match=r"'a/b'.*\n  layers.0.q_proj: expected a weight of shape \(8, 8\), got \(12, 8\)"
    ):
        plan().check(Model(q=(8, 12)))
    renamed = plan(modules={"layers.0.q_prj": ModulePlan((8, 8), (), ())})
    with pytest.raises(InputError, match=r'not in the model\. Did you mean "layers.0.q_proj"'):
        renamed.check(Model())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Line 1 is not JSON"),
        ("[]", "Expected a plan"),
        ('{"format": 99}', "format 1. Got 99"),
        ('{"format": 1, "modules": [{"name": "q"}]}', "as `Plan.save` writes it"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Plan.load(path)
    assert str(path) in str(error.value)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_with_a_block_outside_its_matrix_is_refused():
    with pytest.raises(InputError, match=r"layers\.0: Expected blocks inside"):
        plan(modules={"layers.0": ModulePlan((8, 8), (2,), (0,))})
