"""Pieces of the benchmarks' page: its pictures and verdicts."""

from __future__ import annotations

from collections.abc import Mapping

from smtune.report.benchmarks.claims import DOES_NOT
from smtune.report.benchmarks.targets import MISSED

Pictures = Mapping[str, str]
"""Links to the figures by name: "step <suite>", "memory <suite>", "sweep <axis>", "cost-aware"."""


def image(pictures: Pictures, name: str, text: str) -> str:
    return f"![{text}]({pictures[name]})" if name in pictures else ""


def verdict(word: str) -> str:
    """Bold where something is missed, so that it is not overlooked."""
    return f"**{word}**" if word in (MISSED, DOES_NOT) else f"*{word}*"
