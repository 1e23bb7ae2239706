"""Results of an evaluation: kept item by item, summarised per task, compared between runs.

A run's folder holds `items.jsonl` (a header that identifies the run, then a line per item as it comes) and
`summary.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from smtune.errors import InputError
from smtune.evaluation import statistics
from smtune.evaluation.answers import Answer, is_correct
from smtune.evaluation.statistics import Estimate, PairedDifference
from smtune.evaluation.tasks import GROUPS, TASKS, Item
from smtune.files import write_json, write_text
from smtune.models import weights_of

ITEMS_FILE = "items.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class ItemResult:
    """What a model made of one item.

    Args:
        key, task, index, answer: of the item (`tasks.Item`).
        prediction: None where the completion gives no answer.
        completion: the text generated; None under option likelihood.
        truncated: whether the completion reached its limit of tokens before it ended.
        log_probs: natural log-probability of each option, summed over its tokens (`tasks.Choice`); None under
            generation.
        characters: length of what was scored of each option.
    """

    key: str
    task: str
    index: int
    answer: str
    prediction: Answer | None
    correct: bool
    completion: str | None = None
    truncated: bool = False
    log_probs: dict[str, float] | None = None
    characters: dict[str, int] | None = None


def likeliest(log_probs: Mapping[str, float], characters: Mapping[str, int], per_character: bool) -> str:
    """The option of the largest log-probability, or the largest per character; the first one of equals."""
    return max(log_probs, key=lambda label: log_probs[label] / (characters[label] if per_character else 1))


# -- a run's folder ----------------------------------------------------------------------------------------------


def resume(folder: Path, run: Mapping[str, Any], items: Iterable[Item]) -> list[ItemResult]:
    """The results that the folder already holds; a new folder gets its header.

    A last line that a kill left half-written is cut off.

    Raises:
        InputError: as `kept_results`.
    """
    path = folder / ITEMS_FILE
    results = kept_results(folder, run, items)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, _line({"run": run}))
        return []
    text = path.read_bytes()
    complete = text.rfind(b"\n") + 1
    if complete < len(text):
        os.truncate(path, complete)
    return results


def kept_results(folder: Path, run: Mapping[str, Any], items: Iterable[Item]) -> list[ItemResult]:
    """The results of this run that the folder holds; none in a new folder. Writes nothing.

    Raises:
        InputError: the folder belongs to another run: names what differs. The same weights by another name do not.
            Or it has results of other questions than `items` at the same places of a task's file.
    """
    path = folder / ITEMS_FILE
    if not path.exists():
        return []
    found, results = load_run(folder)
    differing = sorted(field for field in {*found, *run} if found.get(field) != run.get(field))
    if "model" in differing and weights_of(found.get("model")) == weights_of(run.get("model")):
        differing.remove("model")
    if differing:
        differences = "; ".join(f"{field} {found.get(field)!r}, not {run.get(field)!r}" for field in differing)
        raise InputError(
            f"Expected {path} to hold results of this run. Got those of another: {differences}. "
            "Give another folder, or delete this one to start again."
        )
    keys = {(item.task.name, item.index): item.key for item in items}
    for result in results:
        if keys.get((result.task, result.index), result.key) != result.key:
            raise InputError(
                f"Expected {folder} to hold results of these test items. Got those of others: record "
                f"{result.index + 1} of {result.task} is not the same, so its file or --source is another. Give "
                "another folder, or delete this one to start again."
            )
    return results


def append(folder: Path, results: Iterable[ItemResult]) -> None:
    """Adds the results of a batch to the folder, on disk when it returns."""
    with (folder / ITEMS_FILE).open("a", encoding="utf-8") as file:
        file.write("".join(_line(asdict(result)) for result in results))
        file.flush()
        os.fsync(file.fileno())


def load_run(folder: str | Path) -> tuple[dict[str, Any], list[ItemResult]]:
    """(run, results) of a folder: the header that identifies the run, and its items in the order they came, each once.

    Raises:
        InputError: not a run's folder, or one whose items cannot be read.
    """
    path = Path(folder) / ITEMS_FILE
    if not path.is_file():
        raise InputError(f"Expected a folder with {ITEMS_FILE}, as an evaluation writes it. Got {folder}.")
    # JSON lines end with "\n" alone: splitlines() would also cut at separators inside a completion. What follows the
    # last of them was left half-written, and may end within a character.
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        run, results = rows[0]["run"], [ItemResult(**row) for row in rows[1:]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"Expected the results of an evaluation in {path}. Got {error}. Delete the folder.") from error
    return run, list({result.key: result for result in results}.values())


def write_summary(folder: Path, summary: Summary) -> None:
    """Writes `summary.json`, whole or not at all."""
    write_json(folder / SUMMARY_FILE, summary.to_dict())


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


# -- summary and comparison --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskSummary:
    """A task in numbers.

    Args:
        n, correct, unparsed, truncated: items in all, right ones, ones without a readable answer (they count as
            wrong), and ones whose completion was cut at the limit of tokens.
        accuracy: with Wilson's 95 % interval.
        accuracy_sum, accuracy_per_character: under option likelihood, by the sum and by the mean per character
            (lm-evaluation-harness's acc and acc_norm); `accuracy` is the one that `Task.per_character` names.
        leaked: the published Math10K holds test questions of this task.
    """

    task: str
    n: int
    correct: int
    unparsed: int
    truncated: int
    accuracy: Estimate
    accuracy_sum: float | None
    accuracy_per_character: float | None
    leaked: bool


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Args:
        run: what identifies it (protocol, model, settings).
        tasks: in the order in which they were evaluated.
        averages: unweighted mean over the tasks of "commonsense", "math" and "math, leak-free", each where the
            run has all of them.
    """

    run: Mapping[str, Any]
    tasks: tuple[TaskSummary, ...]
    averages: Mapping[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(results: Iterable[ItemResult], run: Mapping[str, Any]) -> Summary:
    """The numbers of each task and the averages over tasks."""
    tasks = {name: _summarise_task(name, items) for name, items in _by_task(results).items()}
    groups = {**GROUPS, "math, leak-free": tuple(name for name in GROUPS["math"] if not TASKS[name].leaked)}
    averages = {
        group: statistics.mean([tasks[name].accuracy for name in names])
        for group, names in groups.items()
        if all(name in tasks for name in names)
    }
    return Summary(dict(run), tuple(tasks.values()), averages)


def compare(a: Iterable[ItemResult], b: Iterable[ItemResult]) -> dict[str, PairedDifference]:
    """Accuracy of run a minus run b, by task, over the items that both hold.

    Raises:
        InputError: the two share no item.
    """
    of_b = {item.key: item for item in b}
    shared = _by_task(item for item in a if item.key in of_b)
    if not shared:
        raise InputError("Expected two runs over the same items. Got none in common: evaluate the same tasks.")
    return {
        task: statistics.paired_difference([item.correct for item in items], [of_b[item.key].correct for item in items])
        for task, items in shared.items()
    }


def _by_task(results: Iterable[ItemResult]) -> dict[str, list[ItemResult]]:
    by_task: dict[str, list[ItemResult]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    return by_task


def _summarise_task(name: str, items: Sequence[ItemResult]) -> TaskSummary:
    correct = sum(item.correct for item in items)
    return TaskSummary(
        task=name,
        n=len(items),
        correct=correct,
        unparsed=sum(item.prediction is None for item in items),
        truncated=sum(item.truncated for item in items),
        accuracy=statistics.accuracy(correct, len(items)),
        accuracy_sum=_likelihood_accuracy(items, per_character=False),
        accuracy_per_character=_likelihood_accuracy(items, per_character=True),
        leaked=TASKS[name].leaked,
    )


def _likelihood_accuracy(items: Sequence[ItemResult], per_character: bool) -> float | None:
    right = [
        is_correct(TASKS[item.task], likeliest(item.log_probs, item.characters, per_character), item.answer)
        for item in items
        if item.log_probs is not None and item.characters is not None
    ]
    return sum(right) / len(items) if right else None


# -- tables for the terminal -------------------------------------------------------------------------------------


def summary_table(summary: Summary) -> Table:
    """A rich table of a summary, accuracies as fractions."""
    table = Table(title=f"{summary.run['model']}, {summary.run['protocol']}")
    table.add_column("task")
    for heading in ("items", "accuracy", "95 % interval", "unparsed", "truncated"):
        table.add_column(heading, justify="right")
    for task in summary.tasks:
        name = f"{task.task} *" if task.leaked else task.task
        table.add_row(name, str(task.n), *_cells(task.accuracy), str(task.unparsed), str(task.truncated))
    if summary.averages:
        table.add_section()
    for group, estimate in summary.averages.items():
        table.add_row(f"average, {group}", "", *_cells(estimate), "", "")
    if any(task.leaked for task in summary.tasks):
        table.caption = "* test questions are in the published Math10K training set"
    return table


def comparison_table(differences: Mapping[str, PairedDifference], a: str, b: str) -> Table:
    """A rich table of `compare`, for runs named a and b."""
    table = Table(title=f"{a} minus {b}")
    table.add_column("task")
    for heading in ("items", "difference", "95 % interval", "only first", "only second", "McNemar p"):
        table.add_column(heading, justify="right")
    for task, paired in differences.items():
        cells = _cells(paired.difference, sign="+")
        table.add_row(task, str(paired.n), *cells, str(paired.only_a), str(paired.only_b), f"{paired.p_value:.3g}")
    return table


def _cells(estimate: Estimate, sign: str = "") -> tuple[str, str]:
    spec = f"{sign}.3f"
    return f"{estimate.value:{spec}}", f"{estimate.low:{spec}} to {estimate.high:{spec}}"
