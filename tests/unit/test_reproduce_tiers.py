"""What a tier makes of an experiment: the families it is run on, and what it leaves out."""

from __future__ import annotations

import pytest

from smtune.data import question_key
from smtune.errors import InputError
from smtune.reproduce import dry
from smtune.reproduce.cells import arms, resolved
from smtune.reproduce.declared import SCALES, Pruned, experiment_names, load_experiment, load_tier
from smtune.reproduce.run import Request
from smtune.reproduce.setting import Setting, count_items, load_data


@pytest.mark.parametrize(
    ("tier", "experiment", "families"),
    [
        ("mini", "table2", ["choice"]),
        ("paper", "table2", ["choice"]),
        ("smollm2", "table2", ["comparison"]),
        ("smollm2", "table5", ["math"]),
        ("smollm2", "figure4", ["choice"]),  # nothing is trained
        ("real", "table2", ["choice"]),
        ("real", "study-control", ["math", "choice"]),
        ("smollm2", "study-control", ["math", "choice", "comparison"]),
        ("mini", "study-control", ["math", "choice"]),
    ],
)
def test_a_stand_in_is_trained_where_the_experiment_does_not_name_both(tier, experiment, families):
    assert Setting(tier).families(load_experiment(experiment)) == families


def test_which_tiers_a_folder_of_data_is_of_any_use_to():
    tiers = [name for names in SCALES.values() for name in names]
    assert [name for name in tiers if load_tier(name).takes_folder] == ["real", "paper"]


def test_what_else_is_forgotten_is_asked_of_no_stand_in():
    tier = load_tier("smollm2")
    assert tier.others(["math"]) == ["choice"]
    assert tier.others(["comparison"]) == ["choice", "math"]
    assert load_tier("mini").others(["math", "choice"]) == []
    assert load_tier("real").others(["math"]) == []  # the folder may have nothing else


@pytest.mark.parametrize("tier", ["mini", "smollm2", "real", "paper"])
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
    assert str(Pruned(seeds=[5, 6], learning_rates={})) == "rates named by row; seeds 5, 6"


def test_tests_that_nobody_has_looked_at_are_others_of_the_same_kind():
    looked_at, unseen = (load_data(Setting("mini", items=20), family).tests for family in ("math", "unseen-math"))
    assert {item.task.name for item in unseen} == {"arithmetic"}
    assert [item.index for item in unseen] == list(range(500, 520))
    first = load_data(Setting("mini"), "math").tests
    assert first[:20] == looked_at
    assert not {question_key(item.instruction) for item in first} & {question_key(item.instruction) for item in unseen}


def test_nothing_else_changes_for_tests_that_nobody_has_looked_at():
    math, unseen = (load_data(Setting("mini", items=20), family).identity for family in ("math", "unseen-math"))
    assert {key for key in math if math[key] != unseen[key]} == {"tests"}
    experiment = load_experiment("study-unseen")
    assert load_tier("mini").seeds_of(experiment) == [5, 6, 7, 8, 9]
    assert load_tier("smollm2").families_of(experiment) == []


def test_a_row_may_be_of_one_family_alone():
    experiment, tier = load_experiment("study-unseen"), load_tier("mini")
    found = arms(experiment, tier, tier.families_of(experiment), None, lambda model, family: {})
    rates = {arm.family: arm.rates for arm in found if arm.row.label == "control: random blocks"}
    assert rates == {"unseen-math": [0.03], "unseen-choice": [0.1]}


@pytest.mark.parametrize("tier", ["mini", "smollm2", "real", "paper"])
def test_steps_of_a_rows_own_are_of_the_tier(tier):
    """Equal time gives random blocks, which need no scoring, 1 % more steps; nobody has more."""
    declared = load_tier(tier)
    for experiment in map(load_experiment, experiment_names()):
        for arm in arms(experiment, declared, declared.families_of(experiment), None, lambda model, family: {}):
            if arm.row.steps is not None:
                assert declared.recipe.steps is not None
                assert arm.row.steps <= 1.01 * declared.recipe.steps


def test_a_trial_cuts_the_steps_of_a_rows_own_too():
    def recipes(setting, name):
        experiment, tier = load_experiment(name), setting.declared
        found = arms(experiment, tier, tier.families_of(experiment), None, setting.shape, setting.steps)
        return {arm.row.label: resolved(arm.fixed)["recipe"] for arm in found}

    whole, cut = (recipes(Setting("mini", steps=steps), "study-equal") for steps in (None, 150))
    label = "SMT, steps less its scoring"
    assert (whole[label]["steps"], cut[label]["steps"]) == (178, 150)
    assert cut["Full fine-tuning, steps of equal time"]["steps"] == 138  # fewer already
    sizes = recipes(Setting("mini", steps=5), "study-sizes")
    assert {recipe["scoring_batches"] for recipe in sizes.values()} == {1, 5}
    request = Request(Setting("mini", steps=5))
    assert {each.steps for each in dry.estimate(request, "study-equal")} == {5}


def test_a_group_of_tests_counts_as_many_items_as_its_tests():
    assert count_items(Setting("real"), "choice") == 400
    assert count_items(Setting("real", items=7), "choice") == 56
    assert count_items(Setting("real"), "math") == 200
    assert count_items(Setting("mini"), "math") == 500
    assert count_items(Setting("smollm2"), "choice") == 150


def test_a_folder_of_no_use_is_refused():
    with pytest.raises(InputError, match="leave it out"):
        Setting("smollm2", data="anywhere")
