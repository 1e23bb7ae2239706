"""The last section: which cells there are, what is missing, what they took, on what; and the sweeps."""

from __future__ import annotations

from collections.abc import Sequence

from smtune.evaluation import accuracy
from smtune.report.markdown import DASH, prose, section, table
from smtune.reproduce.cells import Record
from smtune.reproduce.declared import experiment_names, load_experiment
from smtune.reproduce.evidence.records import Found, Results
from smtune.reproduce.evidence.tasks import Task
from smtune.reproduce.evidence.words import Links


def basis_section(tiers: Sequence[Results], tasks: Sequence[Task], links: Links) -> str:
    """Compute, machines, versions; what is there of each experiment; sweeps."""
    parts = [part for results in tiers for part in (_took(results, links), _there(results, links))]
    hours = sum(map(_seconds, tiers)) / 3600
    lead = f"All cells of all tiers took {hours:.1f} hours, of as many threads as each tier names."
    return section("## What this rests on", lead, *parts, *(_sweeps(task, links) for task in tasks))


def _took(results: Results, links: Links) -> str:
    records = list(results.records.values())
    seconds = _seconds(results)
    environments = [record.get("environment", {}) for record in records]
    left = results.n_left_out
    rows = [
        ("cells", f"{len(records):,}, in [{results.folder.name}/cells]({links.to(results.folder / 'cells')})"),
        ("left out", f"{left:,}: of another recipe, of fewer items or of other data; trials are" if left else "none"),
        ("seconds of all cells", f"{seconds:,.0f} ({seconds / 3600:.1f} hours)"),
        ("device", _distinct(environments, "device", "platform")),
        ("threads of a cell", _distinct(environments, "threads")),
        ("versions", _distinct(environments, "smtune", "python")),
        ("packages", _packages(environments)),
        ("commits", _distinct([{"commit": _commit(each)} for each in environments], "commit")),
    ]
    return section(f"### Cells of the tier {results.tier.name}: {results.tier.title}", table(("", ""), rows))


def _seconds(results: Results) -> float:
    return sum(record["measured"].get("seconds", 0.0) for record in results.records.values())


def _commit(environment: Record) -> str | None:
    """Eight digits, and whether files differed from it."""
    whole, plus, _ = (environment.get("commit") or "").partition("+")
    return whole[:8] + (" with changes" if plus else "") or None


def _distinct(environments: Sequence[Record], *names: str) -> str:
    shown = (", ".join(str(each[name]) for name in names if each.get(name) is not None) for each in environments)
    return "; ".join(sorted(filter(None, set(shown)))) or DASH


def _packages(environments: Sequence[Record]) -> str:
    all_packages = (each.get("packages", {}) for each in environments)
    shown = {", ".join(f"{name} {version}" for name, version in packages.items()) for packages in all_packages}
    return "; ".join(sorted(filter(None, shown))) or DASH


def _there(results: Results, links: Links) -> str:
    """How many cells there are of each experiment; those of which there is none in one line."""
    rows, none = [], []
    for name in experiment_names():
        arms = results.arms(name)
        expected = sum(len(arm.arm.rates) + arm.n_seeds - 1 for arm in arms)
        there = sum(_count(arm) for arm in arms)
        if not there:
            none += [name] * bool(arms)
            continue
        page = results.folder / f"{name}.md"
        title = load_experiment(name).title
        shown = f"[{title}]({links.to(page)})" if page.is_file() else title
        rows.append([shown, f"{there} of {expected}", "" if there >= expected else "**incomplete**"])
    missing = f"Not run at this tier: {', '.join(none)}." if none else ""
    return "\n\n".join(part for part in (table(("experiment", "cells", ""), rows), missing) if part)


def _count(arm: Found) -> int:
    """Cells of an arm: its sweep, and the other seeds at the best rate."""
    return len({record["cell"] for record in [*arm.swept.values(), *arm.records]})


def _sweeps(task: Task, links: Links) -> str:
    """The accuracy on held-out training rows at each learning rate with the first seed, by arm."""
    text = """Accuracy in percent on held-out training rows, and their loss, at each learning rate with the first seed;
    the chosen rate is bold."""
    rows = []
    arms = [task.smt, *task.rivals] if task.smt is not None else task.rivals
    for arm in arms:
        if not arm.swept or len(arm.arm.rates) < 2:
            continue
        by_rate = ", ".join(_validated(arm, rate) for rate in arm.arm.rates)
        edge = f"the {arm.edge}: not bracketed" if arm.edge else "bracketed"
        edge = edge if len(arm.swept) == len(arm.arm.rates) else "sweep not finished"
        rows.append([arm.label, by_rate, edge, links.cells(task.results, arm.swept.values())])
    shown = table(("arm", "rate: accuracy (loss)", "the best", "cells"), rows)
    return section(f"### Learning rates: {task.name}", prose(text), shown) if shown else ""


def _validated(arm: Found, rate: float) -> str:
    record = arm.swept.get(rate)
    if record is None:
        return f"{rate:g}: {DASH}"
    validation, loss = record["metrics"]["validation"], record["metrics"]["validation_loss"]
    right = f"{100 * accuracy(validation['correct'], validation['items']).value:.0f}" if validation["items"] else DASH
    text = f"{rate:g}: {right} ({DASH if loss is None else f'{loss:.3f}'})"
    return f"**{text}**" if arm.records and arm.rate == rate else text
