"""The paper's layouts filled with our cells: a page, a table and figures for each experiment.

Ours and the paper's numbers are never in one table. A table that is not complete says so in a row of its own; what
comes of a trial with fewer steps, items or cells is headed as no result.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from smtune.evaluation import accuracy_over_seeds, verdict
from smtune.evaluation.statistics import Estimate, accuracy_over_tests, difference_over_tests
from smtune.files import write_text
from smtune.maps.layout import projections
from smtune.report import block_map, projection_shares
from smtune.report.curves import bars, curves
from smtune.report.forest import dots
from smtune.report.markdown import DASH, minus, table
from smtune.reproduce.cells import UNBUDGETED, Arm, Record, budget_text
from smtune.reproduce.declared import Experiment, Row, rates_text
from smtune.reproduce.numbers import p_text, points
from smtune.reproduce.run import Request
from smtune.reproduce.store import Store
from smtune.selection import Plan

GB, MB = 10**9, 10**6
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Result:
    """What there is of an experiment.

    Attributes:
        experiment, request: what was asked.
        arms: all of them, run or not.
        found: for each, the records of its table cells: at its best rate, a seed each.
        counts: for each, how many of its cells are there.
        store: where the cells are.
    """

    experiment: Experiment
    request: Request
    arms: list[Arm]
    found: list[list[Record]]
    counts: list[int]
    store: Store

    @property
    def present(self) -> list[tuple[Arm, list[Record]]]:
        return [(arm, records) for arm, records in zip(self.arms, self.found) if records]


def collect(experiment: Experiment, request: Request, store: Store) -> Result:
    """Read what the store has of an experiment."""
    arms = request.arms(experiment)
    counts = [sum(store.find(cell) is not None for cell in arm.cells(store.find)) for arm in arms]
    return Result(experiment, request, arms, [arm.chosen(store.find) for arm in arms], counts, store)


def render(result: Result, folder: Path) -> list[Path]:
    """Write the page, the table as CSV, and the figures; returns the files, the page first."""
    experiment = result.experiment
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / f"{experiment.name}.md", folder / f"{experiment.name}.csv"
    heads, rows = LAYOUTS[experiment.layout](result)
    shown = [*rows, *_missing_row(result, len(heads))]
    pictures = FIGURES[experiment.layout](result, folder) if result.present else []
    extra = claims(result) if experiment.layout == "memory" else ""
    parts = [
        f"# {experiment.title}",
        _trial(result),
        f"## Ours: {result.request.setting.declared.title}",
        _stand_ins(result),
        _pruned(result),
        table(heads, shown),
        extra,
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        _how(result),
        _published(experiment),
        experiment.note.strip() and f"Note: {experiment.note.strip()}",
    ]
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    write_text(data, _csv(heads, shown, experiment))
    return [page, data, *pictures]


# What a page says about itself ----------------------------------------------------------------------------------------


def _expected(result: Result) -> int:
    return sum(arm.n_cells for arm in result.arms)


def _incomplete(result: Result) -> str:
    """As "30 of 36 cells"; "" where all have been run."""
    there, expected = sum(result.counts), _expected(result)
    return f"{there} of {expected} cells" if there < expected else ""


def _missing_row(result: Result, width: int) -> list[list[str]]:
    texts = [f"**incomplete: {part}**"] if (part := _incomplete(result)) else []
    if result.request.is_cut:
        texts.append("**a trial, not a result**")
    return [[text, *[""] * (width - 1)] for text in texts]


def _trial(result: Result) -> str:
    if not result.request.is_cut:
        return ""
    setting, recipe = result.request.setting, result.request.setting.declared.recipe
    named = recipe.steps if recipe.steps is not None else f"the steps of {recipe.epochs} epochs"
    cuts = [f"{setting.steps} of {named} steps"] if setting.steps is not None else []
    cuts += [f"{setting.items} items of each test"] if setting.items is not None else []
    cuts += [f"at most {result.request.max_cells} cells"] if result.request.max_cells is not None else []
    what = ", ".join(cuts) or "its base model is cut short"
    return f"**A trial, not a result: {what}.** It shows that the commands run."


def _stand_ins(result: Result) -> str:
    run, setting = {arm.family for arm in result.arms}, result.request.setting
    pairs = [(asked, other) for asked, other in setting.declared.stand_ins.items() if other in run and asked not in run]
    return " ".join(
        f"**Trained and tested on *{other}* in place of *{asked}*, which the tier's steps do not teach its models.**"
        for asked, other in pairs
    )


def _pruned(result: Result) -> str:
    """Above the table: what of the tier's seeds and learning rates an experiment leaves out."""
    tier = result.request.setting.declared
    pruned = tier.pruned(result.experiment)
    if pruned is None or result.experiment.kind != "train":
        return ""
    of = f"{len(tier.learning_rates['default'])} learning rates and {len(tier.seeds)} seeds"
    return f"**Pruned**, of the tier's {of}: {pruned}."


def _how(result: Result) -> str:
    """How the numbers came about, in a few sentences."""
    if result.experiment.kind != "train":
        return ""
    tier = result.request.setting.declared
    recipe = tier.recipe
    length = f"{result.request.setting.steps or recipe.steps} steps" if recipe.steps else f"{recipe.epochs} epochs"
    most = result.request.setting.steps or math.inf
    own = {arm.row.label: arm.row.steps for arm in result.arms if arm.row.steps and arm.row.steps < most}
    named = "; ".join(f"{label} {steps}" for label, steps in own.items())
    but = f", but for the steps of {named}" if own else ""
    text = (
        "Accuracy in percent, mean over the seeds there are; in parentheses 95 % intervals over items and, where there "
        "are several, seeds. "
        "Every arm has the same rows in the same order, prompts, masks, decoding and schedule: "
        f"{length} of {recipe.batch_size} rows{but}. Each arm's learning rate is the best of its sweep by held-out "
        "training rows. *against SMT*: points, paired over items, with McNemar's p or the interval's; *tie* where the "
        "whole interval lies within ±2 points, *undecided* where it holds zero and more or p is 0.05 and more. "
        "*other text*: loss on held-out text of another kind."
    )
    swept = [f"{_name(arm, result)} {rates_text(arm.rates)}" for arm in result.arms if arm.row.learning_rates]
    if swept:
        text += f" Rates of their own: {'; '.join(dict.fromkeys(swept))}."
    leaked = sorted({task for _, records in result.present for record in records for task in _leaked(record)})
    if leaked:
        text += f" † questions of {', '.join(leaked)} are among the training rows too: differences leave them out."
    return text + _overlap_text(result)


def _overlap_text(result: Result) -> str:
    """How many test questions are among the training rows, by what each family's cells counted."""
    counted = {arm.family: records[0].get("overlap") for arm, records in result.present}
    totals = {family: sum(overlap.values()) for family, overlap in counted.items() if overlap is not None}
    if not totals:
        return ""
    by_family = ", ".join(f"{total} of *{family}*" for family, total in totals.items())
    return f" Test questions that are among the training rows, by normalised text: {by_family}."


def _published(experiment: Experiment) -> str:
    if experiment.published is None:
        return ""
    theirs = table(experiment.published.columns, experiment.published.rows)
    return f"## The paper's own numbers\n\nPrinted in He et al. 2024 (arXiv:2405.15525); not run here.\n\n{theirs}"


# Tables ---------------------------------------------------------------------------------------------------------------


def _accuracy(result: Result) -> Table:
    tests = list(dict.fromkeys(test for _, records in result.present for test in records[0]["metrics"]["tests"]))
    leaked = {task for _, records in result.present for record in records for task in _leaked(record)}
    several = len(result.experiment.families) > 1
    heads = [*["task"] * several, "model", "method", "trained", "rate"]
    heads += [f"{test} †" if test in leaked else test for test in tests]
    heads += ["AVG (95 %)", *["AVG, leak-free"] * bool(leaked), "against SMT", "other text", "seeds", "cells"]
    rows = []
    for arm, records, count in zip(result.arms, result.found, result.counts):
        row = [*[arm.family] * several, arm.model, arm.row.label]
        ends = [_seeds(arm, records, result), f"{count} of {arm.n_cells}"]
        if not records:
            rows.append([*row, *[DASH] * (len(heads) - len(row) - 2), *ends])
            continue
        by_test = accuracies(records)
        free = [test for test in by_test if test not in leaked]
        other = [record["metrics"]["other_text_loss"] for record in records]
        row += [
            trained_share(records[0]),
            f"{records[0]['config']['learning_rate']:g}" if arm.row.method != "base" else DASH,
        ]
        row += [_percent(by_test.get(test)) for test in tests]
        row += [_with_interval(average(records))]
        row += [_with_interval(average(records, free)) if free else DASH] * bool(leaked)
        row += [_against(arm, records, result), f"{fmean(other):.3f}" if None not in other else DASH]
        rows.append([*row, *ends])
    return heads, rows


def _seeds(arm: Arm, records: list[Record], result: Result) -> str:
    """As "3 of 5": of those declared, or asked for if these are more; and how many runs ended early."""
    declared = result.request.setting.declared.seeds_of(result.experiment)
    n_stopped = sum(not record["metrics"].get("finite", True) for record in records)
    stopped = f", {n_stopped} stopped at a loss that is not finite" * (n_stopped > 0)
    n_asked = len(arm.seeds) if arm.row.method == "base" else max(len(arm.seeds), len(declared))
    return f"{len(records)} of {n_asked}{stopped}"


def _scaling(result: Result) -> Table:
    budgets = list(dict.fromkeys(arm.budget for arm in result.arms))
    heads = ["model", "method", *map(budget_text, budgets), "cells"]
    rows: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], list[int]] = {}
    for arm, records, count in zip(result.arms, result.found, result.counts):
        key = (arm.model, arm.row.label)
        row = rows.setdefault(key, [DASH] * len(budgets))
        if records:
            row[budgets.index(arm.budget)] = _with_interval(average(records, compared_tests(records)))
        there, expected = counts.setdefault(key, [0, 0])
        counts[key] = [there + count, expected + arm.n_cells]
    return heads, [[*key, *row, "{} of {}".format(*counts[key])] for key, row in rows.items()]


def _rows(result: Result, heads: Sequence[str], values: Callable[[Arm, list[Record]], list[str]]) -> Table:
    """A row for each arm: model, method, the `values` of its records, how many cells there are; dashes without any."""
    rows = []
    for arm, records, count in zip(result.arms, result.found, result.counts):
        own = values(arm, records) if records else [DASH] * len(heads)
        rows.append([arm.model, arm.row.label, *own, f"{count} of {arm.n_cells}"])
    return ["model", "method", *heads, "cells"], rows


def _plans(result: Result) -> Table:
    def values(arm: Arm, records: list[Record]) -> list[str]:
        kinds = projections(Plan.from_dict(records[0]["plan"]))
        shares = ", ".join(f"{kind.share:.1%}" for kind in kinds)
        frozen = ", ".join(f"{kind.frozen} of {kind.frozen + kind.trained}" for kind in kinds)
        return [f"{records[0]['metrics']['blocks']:,}", trained_share(records[0]), shares, frozen]

    return _rows(result, ["blocks", "trained", "share of Q, K, V", "frozen matrices of Q, K, V"], values)


def _overlaps(result: Result) -> Table:
    """How far plans agree with the first of their family: what a second look, other rows or another task choose."""
    firsts: dict[tuple[str, str], tuple[Arm, Plan]] = {}
    for arm, records in result.present:
        firsts.setdefault((arm.family, arm.model), (arm, Plan.from_dict(records[0]["plan"])))

    def values(arm: Arm, records: list[Record]) -> list[str]:
        first_arm, first = firsts[arm.family, arm.model]
        plans = [Plan.from_dict(record["plan"]) for record in records]
        others = plans[1:] if arm is first_arm else plans
        shares = [overlap(plan, first) for plan in others]
        chance = [overlap_by_chance(plan, first) for plan in others]
        shown = DASH if not shares else f"{fmean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        last = ", ".join(f"{kind.share:.1%}" for kind in projections(plans[0]))
        return [arm.family, f"{plans[0].n_blocks:,}", shown, f"{fmean(chance):.1%}" if chance else DASH, last]

    return _rows(result, ["task", "blocks", "overlap with the first plan", "by chance", "share of Q, K, V"], values)


def overlap(plan: Plan, other: Plan) -> float:
    """The share of a plan's blocks that another has too."""
    shared = sum(len(set(plan.index(name).pairs) & set(other.index(name).pairs)) for name in plan.modules)
    return shared / plan.n_blocks


def overlap_by_chance(plan: Plan, other: Plan) -> float:
    """What `overlap` is expected to be for plans with these counts in every matrix at random places."""
    expected = 0.0
    for name, module in plan.modules.items():
        places = plan.index(name).grid.n_blocks
        expected += len(module.rows) * len(other.modules[name].rows) / places
    return expected / plan.n_blocks


def _times(result: Result) -> Table:
    seconds = {
        id(arm): fmean(records[0]["measured"]["step_seconds"])
        for arm, records in zip(result.arms, result.found)
        if records
    }
    full = {arm.model: seconds[id(arm)] for arm in result.arms if arm.row.method == "full" and id(arm) in seconds}

    def values(arm: Arm, records: list[Record]) -> list[str]:
        own = seconds[id(arm)]
        speedup = f"{full[arm.model] / own:.2f}×" if arm.model in full else DASH
        return [trained_share(records[0]), f"{records[0]['metrics']['steps']:,}", f"{own:.4f}", speedup]

    return _rows(result, ["trained", "steps", "time of a step (s)", "speed-up"], values)


def _memory(result: Result) -> Table:
    parts = ["base", "trained", "gradients", "optimizer", "originals", "activations"]
    heads = ["trained", *[f"{part}, GB" for part in parts], "total, GB", "against full"]
    heads += ["with the paper's bf16, GB", "against full"]
    totals = {(arm.model, arm.row.label, arm.budget): records[0]["metrics"] for arm, records in result.present}
    full = {
        model: metrics
        for (model, _, _), metrics in totals.items()
        if metrics["trained_parameters"] == metrics["total_parameters"]
    }

    def values(arm: Arm, records: list[Record]) -> list[str]:
        metrics = records[0]["metrics"]
        row = [trained_share(records[0]), *[_gb(metrics[part]) for part in parts]]
        for total in ("total", "with_paper_dtypes"):
            ratio = metrics[total] / full[arm.model][total] - 1 if arm.model in full else None
            row += [_gb(metrics[total]), DASH if ratio is None else minus(f"{100 * ratio:+.0f} %")]
        return row

    return _rows(result, heads, values)


LAYOUTS: dict[str, Callable[[Result], Table]] = {
    "accuracy": _accuracy,
    "scaling": _scaling,
    "curve": _scaling,
    "blocks": _plans,
    "shares": _plans,
    "overlap": _overlaps,
    "time": _times,
    "memory": _memory,
}


def claims(result: Result) -> str:
    """The paper's memory claims with what was counted and a verdict; "" at a scale that they are not about."""
    counted = {(arm.model, arm.row.label, arm.budget): records[0]["metrics"] for arm, records in result.present}
    rows = []
    for dtypes, key in (("fp32", "total"), ("bf16, as the paper", "with_paper_dtypes")):
        full, smt = (counted.get(("llama-7b", *name)) for name in (("Full fine-tuning", 1.0), ("SMT", 0.0084)))
        if full is not None and smt is not None:
            saved = 1 - smt[key] / full[key]
            rows.append(["67 % less than full, LLaMA-7B", dtypes, f"{100 * saved:.0f} % less", _holds(saved >= 0.67)])
            rows.append(["LLaMA-7B below 20 GB", dtypes, f"{_gb(smt[key])} GB", _holds(smt[key] < 20 * GB)])
        smt, lora = (counted.get(("llama-13b", name, 0.01)) for name in ("SMT", "LoRA"))
        if smt is not None and lora is not None:
            less = lora[key] - smt[key]
            text = f"{abs(less) / MB:,.0f} MB {'less' if less > 0 else 'more'}"
            rows.append(["LLaMA-13B, 1 %: about 250 MB less than LoRA", dtypes, text, _holds(less >= 200 * MB)])
    return table(["the paper's claim", "trained values, gradients, moments in", "counted", ""], rows)


def _holds(yes: bool) -> str:
    return "holds" if yes else "**does not hold**"


# Figures --------------------------------------------------------------------------------------------------------------


def _accuracy_figures(result: Result, folder: Path) -> list[Path]:
    path, rates = (folder / f"{result.experiment.name}{end}.png" for end in ("", "-rates"))
    panels: dict[str, dict[str, Estimate]] = {}
    several = len({arm.model for arm, _ in result.present}) > 1
    for arm, records in result.present:
        heading = f"{arm.family}, {arm.model}" if several else arm.family
        panels.setdefault(heading, {})[arm.row.label] = average(records, compared_tests(records))
    dots(panels, path, x="accuracy, %, with 95 % interval", title=title_of(result))
    swept, judged_by = _sweeps(result)
    if not swept:
        return [path]
    curves(
        swept, rates, x="learning rate", y=f"{judged_by} on held-out training rows", title=title_of(result), log=True
    )
    return [path, rates]


def _sweeps(result: Result) -> tuple[dict[str, list[tuple[float, Estimate]]], str]:
    """Points by rate of each arm that sweeps some, and what they show: accuracy, or loss where rows have no answers."""
    swept: dict[str, list[tuple[float, Record]]] = {}
    for arm in result.arms:
        found = [(rate, result.store.find(cell)) for rate, cell in zip(arm.rates, arm.sweep())]
        points = [(rate, record["metrics"]) for rate, record in found if record is not None]
        if len(arm.rates) > 1 and len(points) > 1:
            swept[_name(arm, result)] = points
    is_answered = all(metrics["validation"]["items"] for points in swept.values() for _, metrics in points)
    show = _validated if is_answered else _loss
    shown = {
        name: [(rate, estimate) for rate, metrics in points if (estimate := show(metrics)) is not None]
        for name, points in swept.items()
    }
    return shown, "accuracy" if is_answered else "loss"


def _loss(metrics: Record) -> Estimate | None:
    """None of a run that diverged."""
    loss = metrics["validation_loss"]
    return None if loss is None else Estimate(loss, loss, loss)


def _validated(metrics: Record) -> Estimate:
    validation = metrics["validation"]
    return accuracy_over_seeds(
        [[True] * validation["correct"] + [False] * (validation["items"] - validation["correct"])]
    )


def _curve_figures(result: Result, folder: Path) -> list[Path]:
    path = folder / f"{result.experiment.name}.png"
    ours: dict[str, list[tuple[float, Estimate]]] = {}
    for arm, records in result.present:
        metrics = records[0]["metrics"]
        share = 100 * metrics["trained_parameters"] / metrics["total_parameters"]
        ours.setdefault(f"{arm.row.label}, {arm.model}", []).append((share, average(records, compared_tests(records))))
    curves(ours, path, x="trained parameters, %", y="accuracy", title=title_of(result))
    paper = folder / f"{result.experiment.name}-paper.png"
    published = result.experiment.published
    if published is None:
        return [path]
    theirs = {
        f"{row[1]}, {row[0]}": [
            (float(column), Estimate(*[float(str(value).rstrip("*")) / 100] * 3))
            for column, value in zip(published.columns[2:], row[2:])
        ]
        for row in published.rows
    }
    curves(theirs, paper, x="trained parameters, %", y="accuracy", title="The paper's own numbers")
    return [path, paper]


def _plan_figures(result: Result, folder: Path) -> list[Path]:
    draw = projection_shares if result.experiment.layout == "shares" else block_map
    paths = []
    for number, (_, records) in enumerate(result.present):
        paths.append(folder / f"{result.experiment.name}{f'-{number + 1}' * bool(number)}.png")
        draw(Plan.from_dict(records[0]["plan"]), paths[-1])
    return paths


def _bars_of(value: Callable[[Record], float], x: str) -> Callable[[Result, Path], list[Path]]:
    def draw(result: Result, folder: Path) -> list[Path]:
        path = folder / f"{result.experiment.name}.png"
        values = {
            f"{arm.row.label} {budget_text(arm.budget)}, {arm.model}": value(records[0])
            for arm, records in result.present
        }
        bars(values, path, x=x, title=title_of(result))
        return [path]

    return draw


FIGURES: dict[str, Callable[[Result, Path], list[Path]]] = {
    "accuracy": _accuracy_figures,
    "scaling": _curve_figures,
    "curve": _curve_figures,
    "blocks": _plan_figures,
    "shares": _plan_figures,
    "overlap": _plan_figures,
    "time": _bars_of(lambda record: fmean(record["measured"]["step_seconds"]), "seconds of a step"),
    "memory": _bars_of(lambda record: record["metrics"]["total"] / GB, "GB of a step"),
}


def title_of(result: Result) -> str:
    """Of a picture: the experiment's, and what must be said of it as in its table."""
    trial = "A trial, not a result: " if result.request.is_cut else ""
    part = f" ({part})" if (part := _incomplete(result)) else ""
    return f"{trial}{result.experiment.title}{part}"


def _name(arm: Arm, result: Result) -> str:
    """Distinct for every arm of the table."""
    same = [each for each in result.arms if each.row.label == arm.row.label]
    parts = [arm.row.label]
    parts += [arm.model] * (len({each.model for each in same}) > 1)
    parts += [arm.family] * (len({each.family for each in same}) > 1)
    parts += [budget_text(arm.budget)] * (len({each.budget for each in same}) > 1)
    return ", ".join(parts)


# Numbers --------------------------------------------------------------------------------------------------------------


def accuracies(records: Sequence[Record]) -> dict[str, Estimate]:
    """By test, the mean over seeds with its interval."""
    runs = [right(record) for record in records]
    return {test: accuracy_over_seeds([run[test] for run in runs]) for test in runs[0]}


def average(records: Sequence[Record], tests: Iterable[str] | None = None) -> Estimate:
    """The mean over tests, None: all, and over seeds, with its interval."""
    runs = [right(record) for record in records]
    return accuracy_over_tests([[run[test] for run in runs] for test in (runs[0] if tests is None else tests)])


def right(record: Record) -> dict[str, list[bool]]:
    """By test, whether each item was right."""
    by_test: dict[str, list[bool]] = {}
    for item in record["items"]:
        by_test.setdefault(item["task"], []).append(item["correct"])
    return by_test


def compared_tests(*arms: Sequence[Record]) -> list[str]:
    """The tests of all arms by which they are compared: without those that have questions among the training rows.

    Where all have, all of them.
    """
    first, *others = (right(records[0]) for records in arms)
    tests = [test for test in first if all(test in other for other in others)]
    leaked = {test for records in arms for test in _leaked(records[0])}
    return [test for test in tests if test not in leaked] or tests


def difference(a: Sequence[Record], b: Sequence[Record]) -> tuple[Estimate, float]:
    """Accuracy of arm a less that of b, the mean over `compared_tests` with its interval; and its p-value."""
    runs_a, runs_b = ([right(record) for record in records] for records in (a, b))
    tests = compared_tests(a, b)
    found = difference_over_tests([([run[test] for run in runs_a], [run[test] for run in runs_b]) for test in tests])
    return found.difference, found.p_value


def _against(arm: Arm, records: Sequence[Record], result: Result) -> str:
    """The difference from SMT of the same model, family and size; of an arm without a budget, from the first SMT."""
    others = [
        (other, found)
        for other, found in result.present
        if (other.family, other.model, other.row.method) == (arm.family, arm.model, "smt")
        and not _is_variant(other)
        and (arm.row.method in UNBUDGETED or of_one_size(other.budget, arm.budget))
    ]
    if not others or others[0][0] is arm:
        return DASH
    total, p_value = difference(records, others[0][1])
    return f"{points(total)}, {p_text(p_value)}, *{verdict(total, p_value)}*"


def of_one_size(a: float, b: float) -> bool:
    """Whether two budgets are as near as ranks allow: within a twentieth."""
    return math.isclose(a, b, rel_tol=0.05)


def _is_variant(arm: Arm) -> bool:
    plain = Row(label=arm.row.label, method="smt")
    aside = {"budgets": plain.budgets, "models": None, "families": None, "learning_rates": None}
    return arm.row.model_copy(update=aside) != plain


def _leaked(record: Record) -> list[str]:
    return [task for task, count in record.get("overlap", {}).items() if count]


def trained_share(record: Mapping[str, Any]) -> str:
    metrics = record["metrics"]
    return f"{100 * metrics['trained_parameters'] / metrics['total_parameters']:.3g} %"


def _percent(estimate: Estimate | None) -> str:
    return DASH if estimate is None else f"{100 * estimate.value:.1f}"


def _with_interval(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / GB:.3g}" if n_bytes < GB else f"{n_bytes / GB:.1f}"


def _csv(heads: Sequence[str], rows: Sequence[Sequence[str]], experiment: Experiment) -> str:
    """Ours, an empty line, the paper's; the first column says whose a row is."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([["source", *heads], *(["smtune", *row] for row in rows)])
    if experiment.published is not None:
        writer.writerows([[], ["source", *experiment.published.columns]])
        writer.writerows(["paper", *row] for row in experiment.published.rows)
    return text.getvalue()
