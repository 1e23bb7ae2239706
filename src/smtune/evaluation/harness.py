"""lm-evaluation-harness (EleutherAI's package `lm_eval`), to compute option likelihood a second time.

`log_probs` asks its model class `HFLM` for what `tasks.Choice` scores. `write_task` writes items as a task of the
harness, which `run_tasks`, or its own command with `--include_path`, runs; `agreement` compares its answers with ours,
item by item.

Two things the harness does otherwise. It cuts prompt and answer into tokens as one text, where training and `run` cut
them apart: the same tokens from a byte-level tokenizer, but not always from SentencePiece's. And it counts white space
before an option to the option, so that HellaSwag's endings, which follow the prompt itself, include the end of its last
line.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from smtune.errors import InputError
from smtune.evaluation.answers import is_correct
from smtune.evaluation.results import ItemResult, likeliest
from smtune.evaluation.tasks import TASKS, Choice, Item, choices
from smtune.files import write_text

NEAR_TIE = 1e-3
"""Options whose log-probabilities differ by fewer nats may change places by rounding in fp32; per character, divided by
the characters of the shortest option."""

PREFIX = "smtune_"
"""Of the names of our tasks in the harness, which has tasks of the same sets with other prompts."""

UNSEEDED = dict.fromkeys(["random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"])
"""The harness seeds every generator that it is not told to leave alone."""

Record = dict[str, Any]


def require() -> None:
    """Raises InputError where `lm_eval` is not installed."""
    if util.find_spec("lm_eval") is None:
        raise InputError(
            "Expected the package `lm_eval` (EleutherAI's lm-evaluation-harness). It is not installed: "
            "`pip install -e '.[lm-eval]'` in a clone of smtune."
        )


def version() -> str:
    """Of the installed `lm_eval`."""
    return metadata.version("lm_eval")


def load(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's own model class, `HFLM`, around a model.

    Args:
        model: a causal language model on its device; set to evaluation mode.
        tokenizer: copied, since the harness chooses a pad token for it.
        batch_size: sequences at a time.
    Raises:
        InputError: `lm_eval` is not installed.
    """
    require()
    # It warns that a model was given and not a name.
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return _module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size
        )
    finally:
        logger.setLevel(level)


def log_probs(lm: Any, options: Sequence[Choice]) -> list[float]:
    """Natural log-probability of each option's `scored` after `prompt` and `opening`, summed over its tokens.

    Args:
        lm: of `load`.
    """
    request = _module("lm_eval.api.instance").Instance
    requests = [
        request("loglikelihood", doc={}, arguments=(option.prompt + option.opening, option.scored), idx=k)
        for k, option in enumerate(options)
    ]
    return [log_prob for log_prob, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def write_task(items: Sequence[Item], folder: str | Path) -> str:
    """Write the items of one task as a task of the harness: a YAML file and its records as JSON Lines.

    `acc` is the accuracy by the sum, `acc_norm` per character. Tasks whose options differ in the context (WinoGrande)
    have `acc` alone: what is scored is of one length there.

    Args:
        items: of one task, with options.
        folder: where the files go; the YAML names the records by their absolute path, and a cache beside them.
    Returns:
        The name of the task in the harness.
    Raises:
        InputError: as `tasks.choices`, or an answer that is none of the options.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    task = items[0].task
    in_context = task.name == "winogrande"
    records = folder / f"{task.name}.jsonl"
    write_text(records, "".join(json.dumps(_record(item, in_context)) + "\n" for item in items))
    fields = {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "scored"}
    if not in_context:
        fields = {"doc_to_text": "context", "doc_to_choice": "options", "doc_to_target": "gold"}
    declared = {
        "task": PREFIX + task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(records)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        **fields,
        "target_delimiter": " " if task.opening and not in_context else "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in (["acc"] if in_context else ["acc", "acc_norm"])
        ],
    }
    write_text(folder / f"{task.name}.yaml", yaml.safe_dump(declared, sort_keys=False))
    return declared["task"]


def _record(item: Item, in_context: bool) -> Record:
    options = choices(item)
    labels = [option.label.lower() for option in options]
    if item.answer.lower() not in labels:
        raise InputError(f"Expected an answer among {', '.join(labels)} in {item.task.name}. Got {item.answer!r}.")
    record: Record = {"key": item.key, "labels": [option.label for option in options]}
    record["gold"] = labels.index(item.answer.lower())
    contexts = [option.prompt + option.opening for option in options]
    if in_context:
        return {**record, "contexts": contexts, "scored": options[0].scored}
    return {**record, "context": contexts[0], "options": [option.scored.strip() for option in options]}


def run_tasks(lm: Any, folder: str | Path, names: Sequence[str]) -> dict[str, list[Record]]:
    """Run tasks of `write_task` by the harness.

    Args:
        lm: of `load`.
        folder: that they were written to.
        names: theirs in the harness.
    Returns:
        By name, the harness's sample of every item, in the order of the items.
    """
    manager = _module("lm_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    found = _module("lm_eval.evaluator").simple_evaluate(
        lm,
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
        **UNSEEDED,
    )
    return {name: sorted(found["samples"][name], key=lambda sample: sample["doc_id"]) for name in names}


def agreement(ours: Sequence[ItemResult], theirs: Sequence[Mapping[str, Any]]) -> Record:
    """Compare our answers with the harness's, item by item and by each of its metrics.

    Args:
        ours: by option likelihood.
        theirs: samples of the same items in the same order (`run_tasks`).
    Returns:
        For JSON, of pairs the first ours: `items`, how many; `accuracy` by metric; `agree` by metric, the number of
        items for which both choose the same option and come to the same verdict; `near_ties`, those whose two best
        options are within `NEAR_TIE` of each other, whether or not they agree; `differ`, the others that disagree; and
        the `largest_difference` of a log-probability, in nats.
    Raises:
        ValueError: not the same items.
    """
    if [result.key for result in ours] != [sample["doc"]["key"] for sample in theirs]:
        raise ValueError("Expected the harness's samples of the same items, in the same order.")
    found: Record = {"items": len(ours), "accuracy": {}, "agree": {}, "near_ties": [], "differ": []}
    for metric in [metric for metric in ("acc", "acc_norm") if metric in theirs[0]]:
        compared = [_compare(result, sample, metric) for result, sample in zip(ours, theirs)]
        found["accuracy"][metric] = [fmean(one["right"][k] for one in compared) for k in (0, 1)]
        found["agree"][metric] = sum(_agrees(one) for one in compared)
        near = [one["margin"] < one["tolerance"] for one in compared]
        found["near_ties"] += [one for one, is_near in zip(compared, near) if is_near]
        found["differ"] += [one for one, is_near in zip(compared, near) if not is_near and not _agrees(one)]
    found["largest_difference"] = max(
        abs(value - _log_probs(sample)[label])
        for result, sample in zip(ours, theirs)
        for label, value in (result.log_probs or {}).items()
    )
    return found


def _compare(result: ItemResult, sample: Mapping[str, Any], metric: str) -> Record:
    """The option that each has chosen, and whether each calls it right: ours first."""
    per_character = metric == "acc_norm"
    values, characters = result.log_probs or {}, result.characters or {}
    chosen = [likeliest(each, characters, per_character) for each in (values, _log_probs(sample))]
    scores = sorted(values[label] / (characters[label] if per_character else 1) for label in values)
    return {
        "index": result.index,
        "metric": metric,
        "margin": scores[-1] - scores[-2],
        "tolerance": NEAR_TIE / min(characters.values()) if per_character else NEAR_TIE,
        "chosen": chosen,
        "right": [is_correct(TASKS[result.task], chosen[0], result.answer), bool(sample[metric])],
    }


def _agrees(compared: Record) -> bool:
    return all(first == second for first, second in (compared["chosen"], compared["right"]))


def _log_probs(sample: Mapping[str, Any]) -> dict[str, float]:
    return {label: log_prob for label, (log_prob, _) in zip(sample["doc"]["labels"], sample["filtered_resps"])}


def _module(name: str) -> Any:
    """A module of `lm_eval`, without the warnings that it and what it brings raise about themselves on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
