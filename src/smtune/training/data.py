"""What a run trains on: its rows as tokens, those held out, and the record by which a resumed run knows them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from smtune.data import Collator, Record, encode, read_records, to_example
from smtune.errors import InputError
from smtune.models import load_tokenizer
from smtune.training.config import TrainConfig
from smtune.training.folder import RunFolder, read_record


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        tokenizer: the model's.
        rows: to train on, encoded.
        held_out: rows whose loss is told, encoded; None if none are.
        record: of all rows, for `data.json`.
        summary: the same in words.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    held_out: Dataset | None
    record: dict[str, Any]
    summary: str

    @property
    def collator(self) -> Collator:
        """Makes batches of rows."""
        assert isinstance(self.tokenizer.pad_token_id, int)  # `load_tokenizer` sees to it
        return Collator(self.tokenizer.pad_token_id)


@dataclass(frozen=True)
class Records:
    """What a run's rows are made of: records to train on, and those held out, None if none are."""

    train: list[Record]
    held_out: list[Record] | None


def read_data(config: TrainConfig) -> Records:
    """Read the records, before anything is asked of the model: a file that is missing is told at once.

    Raises:
        InputError: a source that cannot be read, or too few records to hold some out.
    """
    data, seed = config.data, config.training.seed
    records = read_records(data.train, format=data.format, limit=data.limit, seed=seed)
    if isinstance(data.validation, (str, list)):
        return Records(records, read_records(data.validation, format=data.format))
    if isinstance(data.validation, int):
        # Records and not rows: pieces of one long text stay together.
        return Records(*_split(records, data.validation, seed))
    return Records(records, None)


def load_data(config: TrainConfig, records: Records) -> TrainingData:
    """Encode the rows.

    Raises:
        InputError: rows without text, or that do not fit.
    """
    data = config.data
    held_out_sources = data.train if isinstance(data.validation, int) else data.validation
    tokenizer = load_tokenizer(config.model)

    encoded = partial(
        encode, tokenizer=tokenizer, max_length=data.max_length, train_on=data.train_on, on_long=data.on_long
    )
    rows, report = encoded([to_example(record, tokenizer) for record in records.train])
    held_out, summary = None, str(report)
    record = {"sources": _digests(data.train), **dataclasses.asdict(report)}
    if records.held_out is not None:
        try:
            held_out, held_out_report = encoded([to_example(record, tokenizer) for record in records.held_out])
        except InputError as error:
            raise InputError(f"data.validation: {error}") from error
        summary += f". Held out: {held_out_report}"
        record["validation"] = {"sources": _digests(held_out_sources), "rows_sha256": _rows_sha256(held_out)}
    return TrainingData(tokenizer, rows, held_out, record | {"rows_sha256": _rows_sha256(rows)}, summary)


def _split(records: Sequence[Record], n_held_out: int, seed: int) -> tuple[list[Record], list[Record]]:
    """The records to train on, and so many drawn by the seed to hold out, both in their order."""
    if n_held_out >= len(records):
        raise InputError(
            f"data.validation: expected fewer rows than there are to train on. Got {n_held_out} of {len(records)}: "
            "keep fewer, or name a file of others."
        )
    chosen = set(random.Random(seed).sample(range(len(records)), n_held_out))
    return [r for k, r in enumerate(records) if k not in chosen], [r for k, r in enumerate(records) if k in chosen]


def check_same_data(folder: RunFolder, data: TrainingData) -> None:
    """Raises InputError if the folder holds the work of a run on other rows: names the files that changed."""
    if not (folder.holds_work and folder.data.is_file()):
        return
    before, now = read_record(folder.data, "rows_sha256", "sources"), data.record
    pairs = [(before, now)]
    if "validation" in before and "validation" in now:
        pairs.append((before["validation"], now["validation"]))
    for old, new in pairs:
        if old["rows_sha256"] != new["rows_sha256"]:
            changed = [source for source, digest in new["sources"].items() if old["sources"].get(source) != digest]
            remedy = "restore them" if changed else "the files are the same, so use the smtune that began it"
            raise InputError(
                f"Expected the data that {folder.path} was started with. Got other rows from "
                f"{', '.join(changed or new['sources'])}: {remedy}, or choose another output."
            )


def _digests(sources: Any) -> dict[str, str | None]:
    return {source: _file_sha256(Path(source)) for source in ([sources] if isinstance(sources, str) else sources)}


def _rows_sha256(dataset: Dataset) -> str:
    rows = hashlib.sha256()
    for ids, labels in zip(dataset["input_ids"], dataset["labels"]):
        rows.update(json.dumps([ids, labels]).encode())
    return rows.hexdigest()


def _file_sha256(path: Path) -> str | None:
    """None for what is no file: packaged data, or the hub's."""
    path = path.expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
