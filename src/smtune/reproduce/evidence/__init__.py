"""The page that answers: when SMT wins, ties and loses, which claims of the paper hold, what more would take.

    records     a tier's cells, grouped into arms       contrasts   differences, trends, what a design can tell
    control     is there something to see?              judges      kinds of tests of a claim
    claims      the paper's, and what others doubt      tasks       what stands beside SMT on a task
    sections, study, seven, basis                       the page's parts

Every number and every verdict is made from the cells' files; none is typed in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from smtune.files import write_text
from smtune.report.forest import forest, scatter
from smtune.report.markdown import prose, section
from smtune.reproduce.evidence.basis import basis_section
from smtune.reproduce.evidence.claims import CLAIMS, DOUBTS
from smtune.reproduce.evidence.judges import Evidence
from smtune.reproduce.evidence.records import read
from smtune.reproduce.evidence.sections import (
    claims_section,
    control_section,
    design_section,
    in_short,
    loss_section,
    wins_section,
)
from smtune.reproduce.evidence.seven import seven_section
from smtune.reproduce.evidence.study import (
    better_section,
    equal_section,
    forgetting_points,
    forgetting_section,
    plans_section,
    unseen_section,
)
from smtune.reproduce.evidence.tasks import Task, tasks
from smtune.reproduce.evidence.words import Links

__all__ = ["write_evidence"]

BENCH_FILE = "bench.json"
TITLE = "# Evidence: when SMT wins, ties and loses"


def write_evidence(output: Path, page: Path) -> list[Path]:
    """Write the page and its pictures.

    Args:
        output: a folder with a folder of results for each tier, as `smtune reproduce` writes them. Results of
            `smtune bench` beside it, in bench.json, are used for claims about time.
        page: of the Markdown file; its pictures go into a folder of its name beside it.
    Returns:
        The files written, the page first.
    Raises:
        InputError: a cell that cannot be read.
    """
    bench = output.parent / BENCH_FILE
    benchmarks = json.loads(bench.read_text(encoding="utf-8")) if bench.is_file() else None
    evidence, links = Evidence(read(output), benchmarks), Links(page, bench)
    found = tasks(evidence)
    drawn = _draw(found, page.with_suffix(""))
    pictures = {name: f"{page.stem}/{path.name}" for name, path in drawn.items()}
    write_text(page, _page(evidence, found, links, pictures))
    return [page, *drawn.values()]


def _draw(found: Sequence[Task], folder: Path) -> dict[str, Path]:
    drawn = {}
    for task in found:
        if task.contrasts:
            path = drawn[f"differences {task.slug}"] = folder / f"differences-{task.slug}.png"
            forest(
                {one.second.label: (one.difference, one.verdict) for one in task.contrasts},
                path,
                x="SMT less it, points of accuracy, with 95 % intervals; shaded: a tie",
                title=f"SMT at 0.84 % less each arm: {task.name}",
                subtitle=task.control.fault and f"Nothing may be concluded: {task.control.fault}",
            )
        points = forgetting_points(task)
        if points:
            path = drawn[f"forgetting {task.slug}"] = folder / f"forgetting-{task.slug}.png"
            scatter(
                points,
                path,
                x="gain over the untuned model, points",
                y="rise of the loss on other text, nats per token",
                title=f"Gained and forgotten: {task.name}",
                subtitle="95 % intervals over items and seeds, and over seeds",
            )
    return drawn


def _page(evidence: Evidence, found: Sequence[Task], links: Links, pictures: dict[str, str]) -> str:
    text = """This page is written by `smtune reproduce evidence` from the cells' files alone; no number and no verdict
    is typed in. A link of six characters is a cell: its configuration, environment, metrics and every answered item."""
    claims_text = """Every claim with how it is tested here. *holds*, *does not hold*: the whole interval is on its
    side, or on the other, and p, where there is one, below 0.05; where the paper prints 2 points or more, or no figure,
    a tie (all of it within ±2) does not hold. A claim to be as good *holds* where the whole interval lies above −2
    points. *undecided*: neither. Models here are far smaller than the paper's: what does not hold here may hold there,
    and the other way round."""
    if evidence.benchmarks is not None:
        claims_text += f" Claims about time are judged from the records of `smtune bench`, {links.bench}."
    doubts_text = """What reviewers and later papers say, put as claims."""
    claims = claims_section("## The paper's claims", claims_text, CLAIMS, evidence, links)
    if not evidence.tiers:
        return section(TITLE, prose(text), "**Nothing has been run.** There is no cell to read.", claims) + "\n"
    parts = [
        prose(text),
        in_short(found, links),
        control_section(found, links),
        design_section(found, links),
        wins_section(found, links, pictures),
        unseen_section(evidence.tiers, links),
        loss_section(found, links),
        claims,
        claims_section("## What others doubt", doubts_text, DOUBTS, evidence, links),
        equal_section(found, evidence.tiers, links),
        plans_section(found, links),
        forgetting_section(found, links, pictures),
        better_section(found, links),
        seven_section(found),
        basis_section(evidence.tiers, found, links),
    ]
    return section(TITLE, *parts) + "\n"
