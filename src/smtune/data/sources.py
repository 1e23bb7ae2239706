"""Where rows come from: files, the data packaged with smtune, the hub, or a list of them.

Files are JSON (an array of objects), JSON Lines and Parquet. A row keeps the place it stands at (path and line, or
record number), so that whatever is wrong with it can be found.
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Union

import datasets
from datasets.exceptions import DatasetsError

from smtune.data.arithmetic import arithmetic
from smtune.data.comparison import comparison
from smtune.data.formats import Format, Record, check_records, faults_error
from smtune.errors import InputError, did_you_mean

Source = Union[str, "os.PathLike[str]", Iterable[Union[str, "os.PathLike[str]"]], Iterable[Mapping[str, Any]]]
"""A path, a packaged name or a hub name; several of them; or the rows themselves."""

Rows = list[tuple[str, Any]]
"""(where it stands, the value), such as ("train.jsonl, line 3", {"text": "..."})."""

ASSETS = Path(__file__).parent.parent / "assets"
TEST_TASKS = ("gsm8k", "AQuA", "SVAMP", "winogrande", "social_i_qa", "openbookqa")
N_ARITHMETIC = N_COMPARISON = 2000
"""Training records of the packaged names `arithmetic` and `comparison`; the functions give as many as asked for."""


def read_records(source: Source, *, format: Format = "auto", limit: int | None = None, seed: int = 0) -> list[Record]:
    """Read and check training records; nothing is returned unless every one of them is sound.

    Args:
        source: a path (.json, .jsonl, .parquet), a packaged name (`PACKAGED`), a hub name `owner/name`, or
            `hub:owner/name:config:split` with the parts after the name optional (split "train"); several of
            these, each of any shape, for a mix; or rows as mappings.
        format: the shape of the records, found by itself by default (`formats.SHAPES`).
        limit: at most this many records, a sample drawn by `seed` from all of them, in their order.
    Raises:
        InputError: what is wrong with the source or its records, and where.
    """
    if limit is not None and limit < 1:
        raise InputError(f"Expected a limit of at least 1 record. Got {limit}.")
    records = [record for rows in _parts(source) for record in check_records(rows, format)]
    if limit is not None and limit < len(records):
        chosen = random.Random(seed).sample(range(len(records)), limit)
        records = [records[k] for k in sorted(chosen)]
    return records


def read_rows(source: Source) -> list[Any]:
    """The rows of a source as they stand: for test sets, whose records may lack an answer to train on.

    Raises:
        InputError: the source cannot be read.
    """
    return [row for rows in _parts(source) for _, row in rows]


def packaged_tests() -> Path:
    """The folder that holds `<task>.jsonl` for every packaged test set: `TEST_TASKS`, `arithmetic` and `comparison`."""
    return ASSETS / "test"


def _parts(source: Source) -> list[Rows]:
    """The rows of each source, separately: each may have a shape of its own."""
    if isinstance(source, (str, os.PathLike)):
        return [_read(source)]
    parts = list(source)
    if not parts:
        raise InputError("Expected at least one source of data. Got an empty list.")
    if all(isinstance(part, Mapping) for part in parts):
        return [[(f"record {k}", part) for k, part in enumerate(parts, 1)]]
    for part in parts:
        if not isinstance(part, (str, os.PathLike)):
            raise InputError(f"Expected paths or names, or rows alone. Got a list with a {type(part).__name__} in it.")
    return [_read(part) for part in parts if isinstance(part, (str, os.PathLike))]


def _read(source: str | os.PathLike[str]) -> Rows:
    name, path = os.fspath(source), Path(source).expanduser()
    if name in PACKAGED:
        return PACKAGED[name]()
    if name.startswith("hub:"):
        return _read_hub(name.removeprefix("hub:"))
    # A folder that exists makes it a path, though hub names have a slash too.
    if path.suffix.lower() in READERS or path.exists() or (path.parent != Path(".") and path.parent.is_dir()):
        return _read_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", name) and not name.startswith("mini/"):
        return _read_hub(name)
    raise InputError(
        f"Expected a file ({', '.join(READERS)}), a packaged name ({', '.join(PACKAGED)}) or a hub name "
        f'("owner/name"). Got "{name}".{did_you_mean(name, PACKAGED)}'
    )


def _read_file(path: Path) -> Rows:
    files = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.is_dir():
        raise InputError(
            f"Expected a file. Got the folder {path}: give the files in it, as a list where there are several."
        )
    if not path.exists():
        raise InputError(f"Expected a file at {path}. Got nothing there.{did_you_mean(path.name, files)}")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f'Expected {", ".join(READERS)}. Got the extension "{path.suffix}" in {path}: convert the file, or '
            "rename it if it is one of these."
        )
    rows = read(path)
    if not rows:
        raise InputError(f"Expected at least one record in {path}. Got an empty file.")
    return rows


def _read_json(path: Path) -> Rows:
    """An array of records, or one record a line: both come under either extension, so the content decides."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"Expected UTF-8 text at {path}, line {line}. Got the byte 0x{data[error.start]:02x}: save the file "
            "as UTF-8."
        ) from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"Expected a JSON array of records at {path}, line {error.lineno}. Got {error.msg} at column "
                f"{error.colno}."
            ) from error
        return [(f"{path}, record {k}", value) for k, value in enumerate(values, 1)]
    rows: Rows = []
    faults: list[str] = []
    # Lines end with "\n" alone: splitlines() would also cut at separators within a string.
    for k, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {k}", json.loads(line)))
        except json.JSONDecodeError as error:
            faults.append(
                f"{path}, line {k}: Expected one JSON object on a line. Got {error.msg} at column {error.colno}."
            )
    if faults:
        raise faults_error(faults, f"of {len(rows) + len(faults):,} lines")
    return rows


def _read_parquet(path: Path) -> Rows:
    # Streaming reads the file in place; otherwise a copy of it is left in the cache.
    try:
        rows = list(datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True))
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(f"Expected a Parquet file at {path}. Got one that cannot be read: {error}") from error
    return [(f"{path}, record {k}", row) for k, row in enumerate(rows, 1)]


def _read_hub(name: str) -> Rows:
    repository, config, split = (*name.split(":", 2), "", "")[:3]
    if not repository:
        raise InputError(f'Expected a data set of the hub as name:config:split. Got "{name}", without a name.')
    try:
        rows = datasets.load_dataset(repository, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it needs a script
        raise InputError(
            f'Expected a data set "{repository}" on the hub that can be loaded as name:config:split. Got: {error} '
            f"If it is private, log in with `hf auth login`; if it is a file, there is none at that path."
            f"{did_you_mean(name, PACKAGED)}"
        ) from error
    return [(f"{name}, record {k}", row) for k, row in enumerate(rows, 1)]


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _assets(*names: str) -> Callable[[], Rows]:
    return lambda: [row for name in names for row in _read_json(ASSETS / name)]


PACKAGED: Mapping[str, Callable[[], Rows]] = {
    "arithmetic": lambda: [(f"arithmetic, record {k}", row) for k, row in enumerate(arithmetic(N_ARITHMETIC), 1)],
    "arithmetic/test": _assets("test/arithmetic.jsonl"),
    "comparison": lambda: [(f"comparison, record {k}", row) for k, row in enumerate(comparison(N_COMPARISON), 1)],
    "comparison/test": _assets("test/comparison.jsonl"),
    "mini/math": _assets("math.jsonl"),
    "mini/commonsense": _assets("commonsense.jsonl"),
    "mini/test": _assets(*(f"test/{task}.jsonl" for task in TEST_TASKS)),
}
"""The data packaged with smtune by name; `assets/README.md` says what is in it, `NOTICE` whose it is."""
