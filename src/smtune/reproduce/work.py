"""Run one cell: build, train, evaluate; or select, time, count. What comes out is the record of `store`.

`metrics` and the items are the same to the last bit when a cell is run again on the same machine with the same number
of threads; `measured` holds what is not: seconds and memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from smtune.bench.arms import Arm
from smtune.bench.measure import step as timed_step
from smtune.data import Collator, encode, prepare, read_records, to_example
from smtune.errors import InputError
from smtune.evaluation import answer_loss, evaluate
from smtune.models import load_model, load_tokenizer, resolve
from smtune.reproduce import arms, memory, mini
from smtune.reproduce.cells import Cell, Record, resolved
from smtune.reproduce.setting import Data, Setting, load_data
from smtune.reproduce.train import Batch, count_steps, fit, micro_batches
from smtune.selection import Plan
from smtune.training.environment import describe_environment

TIMED_STEPS, WARMUP_STEPS = 1000, 500
"""Of the paper's protocol (§3.3); a recipe of fewer steps times all of them, after a tenth as warm-up."""

OnStep = Callable[[int, int], object]


@dataclass(frozen=True)
class Outcome:
    """What a cell gave: the first line of its file without its identity, and the answered items."""

    record: Record
    items: list[Record]


def run_cell(cell: Cell, setting: Setting, on_step: OnStep = lambda step, steps: None) -> Outcome:
    """Run a cell to its end, on the accelerator where there is one.

    Args:
        cell: any of the setting's tier.
        on_step: called with (steps done, steps in all).
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    started = time.perf_counter()
    config = resolved(cell.config)
    set_seed(config["seed"])
    outcome = KINDS[config["kind"]](config, setting, device, on_step)
    outcome.record["measured"]["seconds"] = round(time.perf_counter() - started, 2)
    record = {"environment": describe_environment(device, cell.config["seed"]), **outcome.record}
    if config["kind"] != "memory" and config["method"] != "base":
        record["dropped_rows"] = _dropped_rows(config, setting)
    return Outcome(record, outcome.items)


# The four kinds -------------------------------------------------------------------------------------------------------


def _train(config: Mapping[str, Any], setting: Setting, device: torch.device, on_step: OnStep) -> Outcome:
    families = [config["family"], *([config["then"]] if "then" in config else [])]
    data = load_data(setting, config["family"])
    tokenizer = _tokenizer(setting, config["model"])
    model: Any = _base(config, setting, device)
    total_parameters = sum(parameter.numel() for parameter in model.parameters())
    can_merge = (
        config["dtype"] == "float32"
    )  # exactly; and what a model in 16 bits loses of a change is not our question
    before = {name: p.detach().clone() for name, p in model.named_parameters()} if can_merge else {}
    metrics: Record = {"total_parameters": total_parameters, "trained_parameters": 0, "finite": True}
    measured: Record = {"preparing_seconds": 0.0, "training_seconds": 0.0}
    plan = None
    if config["method"] != "base":
        for family in families:
            arm = _fit(model, tokenizer, config, family, setting, device, metrics, measured, on_step)
            model, plan = arm.model, arm.plan
            if can_merge and hasattr(model, "merge_and_unload"):
                model = model.merge_and_unload()  # as one would use it, and without adapters in every generated token
            if family != families[-1]:
                memory.prepared(model)
    if can_merge:
        moved = [(p.detach() - before[name]).square().sum() for name, p in model.named_parameters()]
        metrics["distance"] = _finite(torch.stack(moved).sum().sqrt().item())
    started = time.perf_counter()
    items = _evaluate(model, tokenizer, [load_data(setting, family) for family in families], config, metrics)
    if setting.declared.scale == "embedded":
        metrics["other_task_losses"] = {
            name: _loss(model, tokenizer, load_data(setting, name).validation, config)
            for name in setting.declared.others(families)
        }
    measured["evaluation_seconds"] = round(time.perf_counter() - started, 2)
    if device.type == "cuda":
        measured["peak_memory"] = torch.cuda.max_memory_allocated(device)
    return Outcome(_record(metrics, measured, plan, data), items)


def _fit(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    family: str,
    setting: Setting,
    device: torch.device,
    metrics: Record,
    measured: Record,
    on_step: OnStep,
) -> Arm:
    """Train a frozen model on the rows of a family. Fills in what there is to say of it."""
    recipe, (rows, _) = config["recipe"], _rows(setting, config["model"], family)
    steps = count_steps(recipe, len(rows))
    collator = _collator(tokenizer)

    def stream() -> Iterator[Batch]:
        return micro_batches(rows, collator, recipe, config["seed"], device)

    started = time.perf_counter()
    arm = arms.build(model, config, _scoring_batches(config, tokenizer, family, setting, device))
    measured["preparing_seconds"] += round(time.perf_counter() - started, 2)
    started = time.perf_counter()
    every = config.get("reselect_every")
    change = (every, lambda arm: arms.reselect(arm, config, stream())) if every else None
    losses, arm = fit(
        arm,
        stream(),
        recipe,
        steps,
        config["learning_rate"],
        arms.is_under_autocast(config),
        lambda step: on_step(step, steps),
        change,
    )
    measured["training_seconds"] += round(time.perf_counter() - started, 2)
    last = _finite(fmean(losses[-max(1, len(losses) // 10) :]))
    metrics |= {
        "trained_parameters": sum(parameter.numel() for parameter in arm.trained),
        "steps": len(losses),
        "train_loss": last,
        "finite": metrics["finite"] and last is not None,
    }
    return arm


def _select(config: Mapping[str, Any], setting: Setting, device: torch.device, on_step: OnStep) -> Outcome:
    data = load_data(setting, config["family"])
    tokenizer = _tokenizer(setting, config["model"])
    model = _base(config, setting, device)
    started = time.perf_counter()
    batches = _scoring_batches(config, tokenizer, config["family"], setting, device)
    plan = arms.make_plan(model, config, batches)
    metrics = {"trained_parameters": plan.n_params, "total_parameters": plan.total_params, "blocks": plan.n_blocks}
    return Outcome(_record(metrics, {"scoring_seconds": round(time.perf_counter() - started, 2)}, plan, data), [])


def _time(config: Mapping[str, Any], setting: Setting, device: torch.device, on_step: OnStep) -> Outcome:
    data = load_data(setting, config["family"])
    tokenizer = _tokenizer(setting, config["model"])
    recipe, (rows, _) = config["recipe"], _rows(setting, config["model"], config["family"])
    collator = _collator(tokenizer)
    model = _base(config, setting, device)
    total = sum(parameter.numel() for parameter in model.parameters())
    # Blocks at random places, the worst case: where they are changes no other cost.
    plan = arms.count_plan(model, config) if config["method"] == "smt" else None
    arm = arms.build(model, config, None, plan)
    steps = min(TIMED_STEPS, count_steps(recipe, len(rows)))
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    stream = micro_batches(rows, collator, recipe, config["seed"], device)
    parts = recipe["batch_size"] // recipe["micro_batch_size"]
    seconds = []
    arm.model.train()
    if arms.is_under_autocast(config):
        arm.model.forward = torch.autocast(device.type, torch.bfloat16)(arm.model.forward)
    for step in range(warmup + steps):
        taken = [timed_step(arm, next(stream), update=part == parts) for part in range(1, parts + 1)]
        seconds.append(sum(sum(phases.values()) for phases in taken))
        on_step(step + 1, warmup + steps)
    trained = sum(parameter.numel() for parameter in arm.trained)
    metrics = {"trained_parameters": trained, "total_parameters": total, "steps": steps}
    measured = {"step_seconds": [round(one, 5) for one in seconds[warmup:]]}
    return Outcome(_record(metrics, measured, None, data), [])


def _memory(config: Mapping[str, Any], setting: Setting, device: torch.device, on_step: OnStep) -> Outcome:
    recipe = config["recipe"]
    built = architecture(setting, config["model"])
    counted = memory.count(built, config, recipe["micro_batch_size"], recipe["max_length"])
    return Outcome(_record(counted.to_dict(), {}, None, None), [])


KINDS: dict[str, Callable[[Mapping[str, Any], Setting, torch.device, OnStep], Outcome]] = {
    "train": _train,
    "select": _select,
    "time": _time,
    "memory": _memory,
}


# Pieces ---------------------------------------------------------------------------------------------------------------


def architecture(setting: Setting, name: str) -> PreTrainedConfig:
    """Of a model of the tier: the one written by hand where there is one, else its own."""
    declared = setting.declared.models[name]
    if declared.name == "mini":
        return LlamaConfig(**mini.ARCHITECTURE, vocab_size=mini.VOCABULARY)
    if declared.architecture is not None:
        return LlamaConfig(**declared.architecture)
    return AutoConfig.from_pretrained(resolve(declared.name))


def _record(metrics: Record, measured: Record, plan: Plan | None, data: Data | None) -> Record:
    record: Record = {"metrics": metrics, "measured": measured}
    if data is not None:
        record["overlap"] = data.overlap
    if plan is not None:
        record["plan"] = plan.to_dict() | {"model_name": ""}  # a folder's path is no part of a result
    return record


def _base(config: Mapping[str, Any], setting: Setting, device: torch.device) -> nn.Module:
    dtype = "float32" if arms.starts_in_fp32(config["method"]) else config["dtype"]
    return memory.prepared(load_model(setting.model_name(config["model"]), dtype, device))


@cache
def _tokenizer(setting: Setting, model: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(setting.model_name(model))


@cache
def _rows(setting: Setting, model: str, family: str) -> tuple[Dataset, int]:
    """The training rows in tokens, and how many are left out as too long."""
    length = setting.declared.recipe.max_length
    rows, report = prepare(load_data(setting, family).train, _tokenizer(setting, model), max_length=length)
    return rows, report.n_dropped


def _dropped_rows(config: Mapping[str, Any], setting: Setting) -> int:
    """How many of the rows to train on or score with are left out as too long."""
    families = dict.fromkeys([config["family"], config.get("then"), config.get("scored_on")])
    return sum(_rows(setting, config["model"], family)[1] for family in families if family is not None)


def _collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    pad_id: Any = tokenizer.pad_token_id
    return Collator(pad_id)


def _scoring_batches(
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    setting: Setting,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches without end of the rows that blocks are chosen by."""
    rows, _ = _rows(setting, config["model"], config.get("scored_on", family))
    if "half" in config:
        rows = rows.select(range(config["half"] - 1, len(rows), 2))
    return micro_batches(rows, _collator(tokenizer), config["recipe"], config["seed"], device)


def _evaluate(
    model: Any, tokenizer: PreTrainedTokenizerBase, tested: list[Data], config: Mapping[str, Any], metrics: Record
) -> list[Record]:
    """Fill in the losses and accuracies on the data of the families trained on; return the answered test items."""
    evaluation = config["evaluation"]

    def answers(items: list[Any]) -> Any:
        return evaluate(
            model,
            tokenizer,
            items,
            protocol=evaluation["protocol"],
            model_id=config["weights"],
            batch_size=evaluation["batch_size"],
            beams=evaluation.get("beams", 1),
        )

    def of_all(rows: Callable[[Data], list[Any]]) -> list[Any]:
        return [row for data in tested for row in rows(data)]

    model.config.use_cache = True
    validation_items = of_all(lambda data: data.validation_items)
    validated = answers(validation_items).results if validation_items else []
    answered = answers(of_all(lambda data: data.tests))
    metrics["validation"] = {"correct": sum(item.correct for item in validated), "items": len(validated)}
    metrics["validation_loss"] = _loss(model, tokenizer, of_all(lambda data: data.validation), config)
    metrics["other_text_loss"] = _loss(model, tokenizer, of_all(lambda data: data.other_text), config)
    metrics["tests"] = {
        task.task: {"correct": task.correct, "items": task.n, "unparsed": task.unparsed, "truncated": task.truncated}
        for task in answered.summary.tasks
    }
    return [_item(result) for result in answered.results]


def _loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[Record], config: Mapping[str, Any]
) -> float | None:
    """The loss on rows; None where there are none, or none that fits."""
    if not rows:
        return None
    examples = [to_example(record, tokenizer) for record in read_records(rows)]
    try:
        encoded, _ = encode(examples, tokenizer, max_length=config["recipe"]["max_length"])
    except InputError:  # none fits, which must not cost what has been trained
        return None
    return _finite(answer_loss(model, tokenizer, encoded, config["evaluation"]["batch_size"]))


def _item(result: Any) -> Record:
    kept = ("task", "index", "answer", "prediction", "correct", "completion", "log_probs")
    return {name: getattr(result, name) for name in kept if getattr(result, name) is not None or name == "prediction"}


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
