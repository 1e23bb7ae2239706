"""What a tier makes of an experiment: the families and budgets it is run on, and what it leaves out."""

from __future__ import annotations

import pytest

from smtune.reproduce.declared import Pruned, experiment_names, load_experiment, load_tier
from smtune.reproduce.setting import Setting


@pytest.mark.parametrize(
    ("tier", "experiment", "families"),
    [
        ("mini", "table2", ["choice"]),
        ("paper", "table2", ["choice"]),
        ("smollm2", "table2", ["comparison"]),
        ("smollm2", "table5", ["math"]),
        ("smollm2", "figure4", ["choice"]),  # nothing is trained
        ("smollm2", "study-control", ["math", "choice", "comparison"]),
        ("mini", "study-control", ["math", "choice"]),
    ],
)
def test_a_stand_in_is_trained_where_the_experiment_does_not_name_both(tier, experiment, families):
    assert Setting(tier).families(load_experiment(experiment)) == families


def test_with_a_folder_of_data_nothing_stands_in():
    assert Setting("smollm2", data="anywhere").families(load_experiment("table2")) == ["choice"]
    assert Setting("smollm2", data="anywhere").families(load_experiment("study-control")) == ["math", "choice"]
    assert Setting("mini", data="anywhere").families(load_experiment("table2")) == ["choice"]  # it has no folder


def test_what_else_is_forgotten_is_asked_of_no_stand_in():
    tier = load_tier("smollm2")
    assert tier.others(["math"]) == ["choice"]
    assert tier.others(["comparison"]) == ["choice", "math"]
    assert load_tier("mini").others(["math", "choice"]) == []


@pytest.mark.parametrize("tier", ["mini", "smollm2", "paper"])
def test_stand_ins_are_families(tier):
    declared = load_tier(tier)
    assert {*declared.stand_ins, *declared.stand_ins.values()} <= set(declared.families)


@pytest.mark.parametrize("name", experiment_names())
def test_some_budget_is_left_of_every_row(name):
    experiment = load_experiment(name)
    for tier in map(load_tier, ("mini", "smollm2", "paper")):
        for row in experiment.rows_at(tier.scale):
            kept = tier.budgets(experiment, row)
            assert kept
            assert [budget for budget in row.budgets if budget in kept] == kept


def test_three_budgets_of_table_3_in_the_slower_tier_and_of_the_figure_that_shows_it():
    for name in ("table3", "figure3"):
        experiment = load_experiment(name)
        for row in experiment.rows_at("embedded"):
            assert load_tier("smollm2").budgets(experiment, row) == [0.0043, 0.0084, 0.0491]
            assert load_tier("mini").budgets(experiment, row) == row.budgets


def test_what_is_pruned_says_so():
    rates = {"default": [3e-3], "full": [1e-5, 3e-5]}
    assert str(Pruned(seeds=3, learning_rates=rates)) == "rates 0.003; of full 1e-05, 3e-05; 3 seeds"
    pruned = Pruned(seeds=1, learning_rates=rates, budgets=[0.0043, 27])
    assert str(pruned) == "rates 0.003; of full 1e-05, 3e-05; 1 seeds; budgets 0.43 %, 27 blocks"
