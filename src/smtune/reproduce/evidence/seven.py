"""What it would take to settle the rest on LLaMA-7B: seeds, items and GPU hours, from how far arms vary here.

That arms vary there as here is an assumption, and the page says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from smtune.evaluation.statistics import TIE
from smtune.report.markdown import DASH, prose, section, table
from smtune.reproduce.declared import Tier, load_tier
from smtune.reproduce.dry import seconds_of_cell
from smtune.reproduce.evidence.claims import CLAIMS, SMALL
from smtune.reproduce.evidence.contrasts import Design, of_even_tests
from smtune.reproduce.evidence.tasks import Task
from smtune.reproduce.train import count_steps

MODEL, RATES, MOST = "llama-7b", 5, 50
TESTS = {
    "choice": (3270, 1838, 1954, 10_042, 1267, 2376, 1172, 500),
    "math": (1319, 254, 600, 395, 508, 1000),
}
"""Items of the paper's tests, those of BoolQ to OBQA and of GSM8K, AQuA, MultiArith, AddSub, SingleEq and SVAMP."""


def hours_of_cell(tier: Tier, family: str) -> float:
    """GPU hours of an SMT cell at 0.84 % by its counted FLOP, as `--dry-run` estimates them."""
    total, size = tier.models[MODEL].parameters, tier.families[family].size
    assert total is not None
    recipe = tier.recipe.model_dump(exclude_none=True)
    steps = count_steps(recipe, size.rows)
    trained = round(SMALL * total)
    seconds = seconds_of_cell(tier.flops_per_second, total, trained, recipe, steps, size.items, size, True)
    return seconds / 3600


def seven_section(tasks: Sequence[Task]) -> str:
    """Seeds and GPU hours for every difference that the paper claims on LLaMA-7B."""
    tier = load_tier("paper")
    by_family = {family: _widest(tasks, family) for family in tier.families}
    text = f"""For each difference that the paper prints for LLaMA-7B: the fewest seeds of each of the two arms that
    would tell it from zero with 80 % power, on the paper's own tests and their unweighted mean, if arms varied there as
    they do here (σ and τ of the widest task of the kind, or of what stands in for it; the formula stands
    [above](#what-these-runs-can-tell-apart)). Cells: two arms,
    each with a sweep of {RATES} rates with the first seed and the other seeds at the best. A cell's hours are counted
    FLOP of {MODEL} at an assumed {tier.flops_per_second:.2g} FLOP/s, about half of what an A100 names for bf16: an
    order of magnitude, no promise. The last lines are the margin of a tie."""
    rows = []
    margin = [(f"a difference of {100 * TIE:.0f} points, {family}", family, TIE) for family in tier.families]
    claimed = [(claim.text, claim.family, claim.points) for claim in CLAIMS if claim.points is not None]
    for what, family, points in [*claimed, *margin]:
        items, hours = round(of_even_tests(TESTS[family])), hours_of_cell(tier, family)
        row, cell = [what, f"{100 * points:.1f}", f"{sum(TESTS[family]):,}"], f"{hours:.2g}"
        found = by_family[family]
        if found is None:
            rows.append([*row, DASH, DASH, cell, DASH, "nothing here says how far arms vary"])
            continue
        task, design = found
        seeds = None if design.seed_deviation is None else design.seeds_for(points, items, MOST)
        note = f"σ, τ of {task.name}"
        if seeds is None:
            unknown = design.seed_deviation is None
            why = "τ unknown: one seed" if unknown else _why_not(design, points, items)
            rows.append([*row, DASH, DASH, cell, DASH, f"{why}; {note}"])
            continue
        n_cells = 2 * (seeds + RATES - 1)
        rows.append([*row, seeds, n_cells, cell, f"{n_cells * hours:,.0f}", note])
    heads = ("difference", "points", "test items", "seeds of each arm", "cells", "hours of a cell", "GPU hours", "")
    return section("## What it would take at 7B", prose(text), table(heads, rows))


def _why_not(design: Design, points: float, items: int) -> str:
    at_most = design.smallest_at(items, MOST)
    return f"more than {MOST} seeds: with them {100 * at_most:.1f} points, not {100 * points:.1f}"


def _widest(tasks: Sequence[Task], family: str) -> tuple[Task, Design] | None:
    """The task of a kind, or standing in for it, whose arms vary most over seeds, and then over items."""
    of_kind = [task for task in tasks if task.family in (family, task.results.tier.stand_ins.get(family))]
    found = [(task, task.design) for task in of_kind if task.design and not task.control.fault]
    return max(found, key=lambda pair: (pair[1].seed_deviation or 0.0, pair[1].item_deviation), default=None)
