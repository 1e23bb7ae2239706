"""The sections of the study's further parts: equal time and memory, plans, forgetting, a better SMT, sizes, places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from smtune.evaluation.statistics import Estimate, mean_over_seeds
from smtune.report.markdown import DASH, minus, prose, section, table
from smtune.reproduce import numbers
from smtune.reproduce.cells import Cell, Record
from smtune.reproduce.declared import load_experiment
from smtune.reproduce.evidence import words
from smtune.reproduce.evidence.contrasts import Contrast, contrast, paired
from smtune.reproduce.evidence.control import UNSEEN, unseen_controls
from smtune.reproduce.evidence.records import Found, Results
from smtune.reproduce.evidence.sections import contrast_table
from smtune.reproduce.evidence.tasks import BUDGET, DRAWN, Task, adjusted, is_lost_to_holm, not_run
from smtune.reproduce.evidence.words import Links
from smtune.reproduce.layouts import accuracies, average, overlap, overlap_by_chance
from smtune.selection import Plan

NOT_RUN = "Not run yet."


def _of_tasks(tasks: Sequence[Task], heading: str, body: Callable[[Task], Sequence[str]]) -> list[str]:
    """A part for each task that has something to show; that nothing has been run, where none has."""
    parts = [section(f"### {heading}: {task.name}", *body(task)) for task in tasks]
    return [part for part in parts if part] or [f"### {heading}\n\n{NOT_RUN}"]


def _left(arms: Sequence[Found]) -> str:
    missing = not_run(arms)
    return f"Not run: {words.listed(missing)}." if missing else ""


def _fault(task: Task) -> str:
    return f"**Nothing may be concluded here: {task.control.fault}.**" if task.control.fault else ""


# Equal time, equal memory ---------------------------------------------------------------------------------------------


def equal_section(tasks: Sequence[Task], tiers: Sequence[Results], links: Links) -> str:
    """SMT against others given the same time, and what a step of each takes of memory."""
    text = """Steps are cut so that every arm would take as long on SmolLM2-135M as LoRA does, SMT's scoring counted, by
    the ratios that the experiment `study-equal` names. The cells' own seconds stand with them and are not equal: the
    products of a small model take other shares of a step. *Memory of LoRA*: as many steps as LoRA, scoring not
    counted, and as many blocks as fit into LoRA's memory, which is counted, not measured: `smtune reproduce
    memory`."""
    return section(
        "## Equal time, equal memory",
        prose(text),
        *_of_tasks(tasks, "Equal time", lambda task: _equal_time(task, links)),
        *_memory(tiers, links),
    )


def _equal_time(task: Task, links: Links) -> list[str]:
    arms = task.arms("study-equal")
    firsts = [arm for arm in arms if arm.label in _EQUAL_TIME and arm.records]
    if not firsts:
        return []
    parts = []
    for first in firsts:
        contrasts = [one for arm in arms if arm is not first and (one := contrast(first, arm))]
        scored = [record["measured"]["preparing_seconds"] / _working_seconds(record) for record in first.records]
        lead = (
            f"{first.label}: {links.cells(task.results, first.records)}. Building the arm and scoring took "
            f"{numbers.percent(fmean(scored), 2)} of the seconds in which its cells built, scored and trained."
        )
        parts += [lead, contrast_table(task, contrasts, links)]
    seconds = [f"{arm.label} {fmean(map(_working_seconds, arm.records)):.1f}" for arm in arms if arm.records]
    taken = f"Seconds of building, scoring and training, as these cells took them: {'; '.join(seconds)}."
    return [taken, _fault(task), *parts, _left(arms)]


_EQUAL_TIME = ("SMT, steps less its scoring", "SMT, sampled, steps less its scoring")


def _working_seconds(record: Record) -> float:
    return record["measured"]["preparing_seconds"] + record["measured"]["training_seconds"] or 1.0


def _memory(tiers: Sequence[Results], links: Links) -> list[str]:
    """A step of each arm, by tier and model."""
    parts = []
    for results in tiers:
        for model in results.tier.models:
            arms = [arm for arm in results.arms("memory") if arm.arm.model == model and arm.records]
            smt = next((arm for arm in arms if arm.arm.row.method == "smt" and arm.arm.budget == BUDGET), None)
            if smt is None:
                continue
            own = smt.records[0]["metrics"]["total"]
            rows = []
            for arm in arms:
                total = arm.records[0]["metrics"]["total"]
                ratio = minus(f"{100 * (own / total - 1):+.1f} %") if arm is not smt else DASH
                cells = links.cells(results, arm.records)
                rows.append([words.name(arm, with_budget=True), numbers.gigabytes(total), ratio, cells])
            heads = ("arm", "a step, counted", "SMT 0.84 % against it", "cells")
            parts.append(section(f"### Memory of a step: {results.tier.name}, {model}", table(heads, rows)))
    return parts or [f"### Memory of a step\n\n{NOT_RUN}"]


# Tests that nobody has looked at ------------------------------------------------------------------------------------


def unseen_section(tiers: Sequence[Results], links: Links) -> str:
    """All arms less SMT with its blocks drawn, and less SMT, on items and seeds that nothing was chosen by."""
    text = """Variants of SMT were found by looking at test items, those above. Here are further items of the same
    tests, other seeds, and learning rates that were chosen above: nothing was chosen by what stands here. *better* and
    *worse* are of the arm in the row."""
    parts = []
    for results in tiers:
        for control in unseen_controls(results).values():
            task = Task(results, control)
            parts += [_unseen(task, label, links) for label in _UNSEEN_REFERENCES]
    return section("## Tests that nobody has looked at", prose(text), *([part for part in parts if part] or [NOT_RUN]))


_UNSEEN_REFERENCES = ("SMT, sampled", DRAWN["mini"][0][1], "SMT")


def _unseen(task: Task, label: str, links: Links) -> str:
    against = task.arm(UNSEEN, label)
    if against is None:
        return ""
    arms = task.arms(UNSEEN)
    contrasts = [one for arm in arms if arm.label != label and (one := contrast(arm, against))]
    right = numbers.share(average(against.records))
    lead = f"{label}: {right} right, rate {against.rate:g}. Cells: {links.cells(task.results, against.records)}."
    shown = contrast_table(task, contrasts, links, less=label, given_rates=True)
    return section(f"### {task.name}: less {label}", lead, _fault(task), shown, _left(arms))


# Plans ----------------------------------------------------------------------------------------------------------------


def plans_section(tasks: Sequence[Task], links: Links) -> str:
    """How far plans agree, over seeds, data, tasks and criteria."""
    text = """Overlap: the share of a plan's blocks that another has too; by chance: what plans with as many blocks in
    every matrix at random places would share. Blocks are chosen at 0.84 %."""
    return section("## Do plans agree?", prose(text), *_of_tasks(tasks, "Overlap", lambda task: _overlaps(task, links)))


def _overlaps(task: Task, links: Links) -> list[str]:
    arms = task.arms("study-plans")
    by_label = {arm.label: arm for arm in arms if arm.records}
    first = by_label.get("SMT, seeds")
    if first is None:
        return []
    halves = [by_label[label] for label in ("first half of the rows", "second half of the rows") if label in by_label]
    pairs: list[tuple[str, list[tuple[Record, Record]]]] = [
        ("SMT: other seeds with the first", [(record, first.records[0]) for record in first.records[1:]])
    ]
    if len(halves) == 2:
        pairs.append(("one half of the rows with the other, seed by seed", _by_seed(*halves)))
    for arm in by_label.values():
        if arm is not first and arm not in halves:
            pairs.append((f"{arm.label} with SMT, seed by seed", _by_seed(arm, first)))
    rows = []
    for label, both in pairs:
        if not both:
            continue
        plans = [(Plan.from_dict(a["plan"]), Plan.from_dict(b["plan"])) for a, b in both]
        shared = _within_one(mean_over_seeds([overlap(a, b) for a, b in plans]))
        chance = fmean(overlap_by_chance(a, b) for a, b in plans)
        word = "more than chance" if shared.low > chance else "not told from chance"
        word = "less than chance" if shared.high < chance else word
        cells = links.cells(task.results, [record for pair in both for record in pair])
        rows.append([label, numbers.share(shared), numbers.percent(chance), len(plans), f"*{word}*", cells])
    heads = ("plans", "overlap (95 % over pairs)", "by chance", "pairs", "", "cells")
    return [table(heads, rows), _left(arms)]


def _within_one(share: Estimate) -> Estimate:
    """A share whose interval, if it has one, ends at 0 and 1."""
    if not math.isfinite(share.low):
        return share
    return Estimate(share.value, max(0.0, share.low), min(1.0, share.high))


def _by_seed(first: Found, second: Found) -> list[tuple[Record, Record]]:
    others = {record["config"]["seed"]: record for record in second.records}
    both = [(record, others.get(record["config"]["seed"])) for record in first.records]
    return [(record, other) for record, other in both if other is not None]


# Forgetting -----------------------------------------------------------------------------------------------------------


def forgetting_section(tasks: Sequence[Task], links: Links, pictures: dict[str, str]) -> str:
    """How far arms move from the base, and what they lose of other text and of the other task."""
    text = """At the cells of *wins, ties and losses*: the distance of the trained weights from the base's (Euclidean,
    over all of them), and how much the loss rises on held-out text of another kind and on the rows of the other task
    (nats per token; above zero is forgotten). *SMT less it*: of the rise on other text, paired by seed, with Student's
    95 % interval; arms gain different amounts on the task, so the figure shows both."""
    parts = _of_tasks(tasks, "After one task", lambda task: _forgotten(task, links, pictures))
    return section(
        "## Forgetting",
        prose(text),
        *parts,
        *_of_tasks(tasks, "Two tasks in sequence", lambda task: _sequence(task, links)),
    )


def forgetting_points(task: Task) -> dict[str, tuple[Estimate, Estimate]]:
    """By arm, its gain over the untuned model in points, and the rise of the loss on other text."""
    base, points = task.control.untuned, {}
    if not base.records or task.smt is None:
        return {}
    for arm in [task.smt, *task.rivals]:
        rise, gain = _rise(arm, base, "other_text_loss"), contrast(arm, base)
        if rise is not None and gain is not None:
            points[arm.label] = (_percent(gain.difference), rise)
    return points


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)


def _rise(arm: Found, base: Found, name: str) -> Estimate | None:
    """A loss less the untuned model's, over the arm's seeds."""
    before = next(iter(base.values(name).values()), None)
    after = list(arm.values(name).values())
    return None if before is None or not after else mean_over_seeds([value - before for value in after])


def _forgotten(task: Task, links: Links, pictures: dict[str, str]) -> list[str]:
    base = task.control.untuned
    if not base.records or task.smt is None:
        return []
    rows = []
    for arm in [task.smt, *task.rivals]:
        if not arm.records:
            continue
        distances = list(arm.values("distance").values())
        less = None if arm is task.smt else paired(task.smt, arm, "other_text_loss")
        word = DASH if less is None else "less" if less.high < 0 else "more" if less.low > 0 else "undecided"
        rows.append(
            [
                arm.label,
                f"{fmean(distances):.2f}" if distances else DASH,
                numbers.loss(_rise(arm, base, "other_text_loss")),
                _other_task(arm, base),
                numbers.loss(less),
                f"*{word}*" if less is not None else word,
                links.cells(task.results, arm.records),
            ]
        )
    lead = f"Untuned: {links.cells(task.results, base.records)}."
    heads = ("arm", "distance", "other text", "other task", "SMT less it", "SMT forgets", "cells")
    name = f"forgetting {task.slug}"
    picture = f"![Gain against the loss on other text, {task.name}]({pictures[name]})" if name in pictures else ""
    return [lead, _fault(task), table(heads, rows), picture]


def _other_task(arm: Found, base: Found) -> str:
    before = base.records[0]["metrics"].get("other_task_losses") or {}
    texts = []
    for name, loss in before.items():
        found = [(record["metrics"].get("other_task_losses") or {}).get(name) for record in arm.records]
        rises = [value - loss for value in found if value is not None and loss is not None]
        if rises:
            texts.append(f"{name} {numbers.loss(mean_over_seeds(rises))}")
    return ", ".join(texts) or DASH


def _sequence(task: Task, links: Links) -> list[str]:
    """What is left of the first task after the second."""
    arms = task.arms("study-forgetting")
    rows = []
    for arm in arms:
        if not arm.records:
            continue
        alone = _before(arm, task.results)
        first = task.results.tests(task.family)
        after = accuracies(arm.records)
        before = accuracies(alone.records) if alone.records else {}
        lost = numbers.points(_lost(arm, alone, first)) if before else DASH
        rows.append(
            [
                arm.label,
                _mean(before, first),
                _mean(after, first),
                lost,
                _mean(after, [test for test in after if test not in first]),
                links.cells(task.results, [*arm.records, *alone.records]),
            ]
        )
    heads = (
        "arm",
        "first task alone, %",
        "after both, %",
        "after less before, points (95 %)",
        "second task, %",
        "cells",
    )
    return [table(heads, rows), _left(arms)] if rows else []


def _before(arm: Found, results: Results) -> Found:
    """The same arm, rate and seeds without what came afterwards: those of them that were run."""
    configs = [
        {key: value for key, value in record["config"].items() if key not in ("then", "further_data")}
        for record in arm.records
    ]
    found = [record for config in configs if (record := results.find(Cell(config, ""))) is not None]
    return Found(arm.arm, found, {}, len(found))


def _lost(after: Found, before: Found, tests: Sequence[str]) -> Estimate:
    """Accuracy on the first task's tests after the second task, less that before it."""

    def of(found: Found) -> Found:
        kept = [{**record, "items": [i for i in record["items"] if i["task"] in tests]} for record in found.records]
        return Found(found.arm, kept, found.swept, found.n_seeds)

    one = contrast(of(after), of(before))
    assert one is not None
    return one.difference


def _mean(by_test: dict[str, Estimate], tests: Sequence[str]) -> str:
    values = [by_test[test].value for test in tests if test in by_test]
    return f"{100 * fmean(values):.1f}" if values else DASH


# Variants of SMT ------------------------------------------------------------------------------------------------------


def better_section(tasks: Sequence[Task], links: Links) -> str:
    """Variants of SMT against SMT."""
    text = """Each variant less the arm named first, both at their own best learning rates; *better* and *worse* are of
    the variant. Of an arm with one seed the interval knows the items alone, and is too narrow."""
    parts = []
    for heading, experiment, reference in (
        ("A better SMT", "study-better", "SMT"),
        ("A better SMT, against LoRA", "study-better", "LoRA on q, k, v"),
        ("Blocks drawn or spread", "study-spread", "SMT"),
        ("Blocks drawn or spread, against LoRA", "study-spread", "LoRA on q, k, v"),
        ("Small blocks drawn, against LoRA", "study-fine", "LoRA on q, k, v"),
        ("Blocks drawn, against random ones", "study-spread", "random, all linear layers, 4²"),
        ("All arms, against SMT with blocks drawn", *DRAWN["mini"][0]),
        ("Warm-up, and blocks chosen anew", "study-warmup", "SMT"),
        ("Size of the blocks", "study-sizes", "blocks of 8²"),
        ("Length of the warm-up", "study-sizes", ""),
        ("Where the blocks are", "study-places", "q, k, v"),
    ):
        parts += _of_tasks(tasks, heading, lambda task, e=experiment, r=reference: _variants(task, e, r, links))
    return section("## A better SMT, sizes, warm-up and places", prose(text), *parts)


def _variants(task: Task, experiment: str, reference: str, links: Links) -> list[str]:
    """The rows of an experiment of the reference's budget, less it; SMT itself for none."""
    arms = task.arms(experiment)
    against = task.arm(experiment, reference) if reference else task.smt
    if against is None:
        return []
    others = [arm for arm in arms if arm.arm.budget == against.arm.budget and not _is_arm(arm, against)]
    contrasts: list[Contrast] = [one for arm in others if (one := contrast(arm, against))]
    if not contrasts:
        return []
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for one, p in zip(contrasts, adjusted(contrasts)):
        if one.verdict in found:
            found[one.verdict].append(one.first.label + ", not after Holm" * is_lost_to_holm(one, p))
    told = [f"{word}: {words.listed(labels)}" for word, labels in found.items() if labels]
    pruned = task.results.tier.pruned(load_experiment(experiment))
    lead = [
        f"{words.name(against, with_budget=True)}: {links.cells(task.results, against.records)}.",
        f"By the interval, {'; '.join(told)}." if told else "None is told apart from it.",
        *([f"A pruned sweep: {pruned}."] if pruned else []),
        load_experiment(experiment).note.strip(),
    ]
    return [
        "" if task.control.fault else " ".join(lead),
        _fault(task),
        contrast_table(task, contrasts, links, less=words.name(against)),
        _left(others),
    ]


def _is_arm(arm: Found, other: Found) -> bool:
    return dict(arm.arm.fixed) == dict(other.arm.fixed)
