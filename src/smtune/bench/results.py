"""The result file: one JSON object, whole at any time, that a stopped run goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smtune.bench.machine import SAME
from smtune.errors import InputError
from smtune.files import write_json
from smtune.version import commit

FORMAT = 1
IDENTITY = {
    "arm": ("arm",),
    "sweep": ("sweep", "value"),
    "write": ("when",),
    "scoring": ("criterion", "accumulator"),
    "kernel": ("features", "block_size", "blocks", "candidate"),
    "table1": ("arm",),
    "cost_aware": ("max_backward_cost",),
}
"""What, beside kind, suite, model, dtype and tokens, makes a record one of its own."""
TIMED = ("arm", "sweep", "write", "cost_aware")
"""Kinds whose steps are timed in one process with a floor's; their records say so in `timed_on`."""


def identity(record: Mapping[str, Any]) -> tuple:
    names = ("kind", "suite", "model", "dtype", "tokens", *IDENTITY[record["kind"]])
    return tuple(record.get(name) for name in names)


def _gives_way(old: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether a record is replaced by another of its identity: unless it is of an arm's turns with other ones."""
    is_of_turns = old["kind"] == "arm" and old.get("timed_on") and not old.get("error")
    return not is_of_turns or old.get("control") == record.get("control")


class Results:
    """Records by identity, in a file.

    Args:
        path: read if it is there.
        machine: what this run is on.
        command: the command line; a file that several have added to names them all.
    Raises:
        InputError: a file that is no result of `smtune bench`, or one of another machine or other versions.
    """

    def __init__(self, path: Path, machine: dict[str, Any], command: str) -> None:
        self.path = path
        self.run = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "command": command}
        self.values: dict[str, Any] = {
            "format": FORMAT,
            "command": command,
            "started": time.strftime("%Y-%m-%d"),
            "machine": machine,
            "records": [],
        }
        if path.exists():
            self.values = self._read(path, machine)
            if command not in self.values["command"].splitlines():
                self.values["command"] += f"\n{command}"

    @staticmethod
    def _read(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            is_ours = values["format"] == FORMAT and isinstance(values["records"], list)
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise InputError(f"Expected --output to be new, or a result of `smtune bench`. {path} is neither.")
        other = [name for name in SAME if values["machine"].get(name) != machine[name]]
        if other:
            kept = ", ".join(f"{name} {values['machine'].get(name)} not {machine[name]}" for name in other)
            raise InputError(
                f"Expected to go on with results of this machine. {path} is of another: {kept}. Choose another "
                "--output, or remove the file."
            )
        return values

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.values["records"]

    def find(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of this identity, unless it is to be done anew: a failure, or timed apart from its floor.

        Of several runs of an arm the one that is still to be counted, or else the last.
        """
        found = [old for old in self.records if identity(old) == identity(record) and not old.get("error")]
        found = [old for old in found if old.get("timed_on") or old["kind"] not in TIMED]
        uncounted = [old for old in found if old.get("uncounted")]
        return (uncounted or found or [None])[-1]

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether `find` finds a record that nothing is missing of."""
        found = self.find(record)
        return found is not None and not found.get("uncounted")

    def add(self, record: dict[str, Any]) -> None:
        """Put a record in place of the one that gives way to it, or at the end, and write the file.

        It is kept with the day, the commit and the command that it was timed by, and, if that was another, with those
        that it was counted by. An arm that was timed with others keeps the record of those turns beside that of later
        ones, since arms are compared within one process.
        """
        timed = record.get("run", self.run)
        counted = {} if timed == self.run or record.get("uncounted") else {"counted_run": self.run}
        record = record | {"run": timed} | counted
        same = [k for k, old in enumerate(self.records) if identity(old) == identity(record)]
        places = [k for k in same if _gives_way(self.records[k], record)]
        if places:
            self.records[places[0]] = record
        else:
            self.records.append(record)
        write_json(self.path, self.values)
