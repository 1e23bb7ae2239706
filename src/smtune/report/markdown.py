"""Pieces of Markdown, and the signs that numbers in it are written with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

DASH = "–"
"""Where there is no number."""


def section(heading: str, *parts: str) -> str:
    """A heading and what stands under it, empty parts left out; "" where all are."""
    there = [part for part in parts if part]
    return "\n\n".join([heading, *there]) if there else ""


def prose(text: str) -> str:
    """A paragraph on one line, from a text of several."""
    return " ".join(text.split())


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table, short rows filled up; "" without rows."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not lines:
        return ""
    body = ["| " + " | ".join([*line, *[""] * (len(heads) - len(line))]) + " |" for line in lines]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *body])


def bullets(heading: str, lines: Sequence[str]) -> str:
    """A list under a line that says what it is; "" of nothing."""
    return "\n".join([heading, "", *(f"- {line}" for line in lines)]) if lines else ""


def minus(text: str) -> str:
    """Numbers with a minus in place of each hyphen."""
    return text.replace("-", "−")
