"""What a tier makes of an experiment: the families it is run on, and what it leaves out."""

from __future__ import annotations

import pytest

from smtune.reproduce.declared import Pruned, load_experiment, load_tier
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


def test_a_figure_leaves_out_what_its_table_does():
    table, figure = (load_tier("smollm2").pruned(load_experiment(name)) for name in ("table3", "figure3"))
    assert table is not None
    assert figure == table


def test_what_is_pruned_says_so():
    rates = {"default": [3e-3], "full": [1e-5, 3e-5]}
    assert str(Pruned(seeds=3, learning_rates=rates)) == "rates 0.003; of full 1e-05, 3e-05; 3 seeds"
