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
        """A record by identity. Raises InputError where there is none, or one that cannot be read."""
        path = self.path(cell_id)
        try:
            # Lines end with "\n" alone: splitlines() would also cut at separators inside a completion.
            record, *items = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
        except FileNotFoundError:
            raise InputError(f"Expected a cell at {path}. There is none: its name is that of a file there.") from None
        except ValueError:
            raise InputError(
                f"Expected JSON lines in {path}. Got others: delete the file, and the cell runs again."
            ) from None
        return record | {"items": items}

    def save(self, cell: Cell, record: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
        """Write what a cell gave."""
        lines = [{"cell": cell.id, "label": cell.label, "config": dict(cell.config), **record}, *items]
        write_text(self.path(cell.id), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
