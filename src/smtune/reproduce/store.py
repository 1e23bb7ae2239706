"""Results by content: a file of JSON lines for each cell, named by the cell's identity, there whole or not at all.

The first line is the record (configuration, environment, metrics, plan), every further line one answered test item. A
killed sweep therefore loses the cells that were running and nothing else, and several processes may write at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smtune.errors import InputError
from smtune.files import write_text
from smtune.reproduce.cells import Cell, Record


class Store:
    """The cells in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, Record] = {}

    def path(self, cell_id: str) -> Path:
        return self.folder / f"{cell_id}.jsonl"

    def find(self, cell: Cell) -> Record | None:
        """The record of a cell with its `items`, or None where it has not been run."""
        if cell.id not in self._read and self.path(cell.id).is_file():
            self._read[cell.id] = self.load(cell.id)
        return self._read.get(cell.id)

    def load(self, cell_id: str) -> Record:
        """A record by identity. Raises InputError where there is none, or one that is not whole."""
        path = self.path(cell_id)
        try:
            # Lines end with "\n" alone: splitlines() would also cut at separators inside a completion.
            *lines, rest = path.read_text(encoding="utf-8").split("\n")
            record, *items = map(json.loads, lines)
            tests = record.get("metrics", {}).get("tests") or {}
            is_whole = rest == "" and record["cell"] == cell_id
            is_whole = is_whole and (not tests or len(items) == sum(test["items"] for test in tests.values()))
        except FileNotFoundError:
            raise InputError(f"Expected a cell at {path}. There is none: its name is that of a file there.") from None
        except (ValueError, KeyError, TypeError):
            is_whole, record, items = False, {}, []
        if not is_whole:
            raise InputError(
                f"Expected the whole of cell {cell_id} in {path}. Got a part of it, or something else: delete the "
                "file, and the cell runs again."
            )
        return record | {"items": items}

    def save(self, cell: Cell, record: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
        """Write what a cell gave."""
        lines = [{"cell": cell.id, "label": cell.label, "config": dict(cell.config), **record}, *items]
        write_text(self.path(cell.id), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
