"""Train by a configuration, on Hugging Face's Trainer: load, score, select, train, save.

`train` does it, `dry_run` checks everything that can be checked without the weights and says what `train` would do.
The recipe is one for all methods: the same rows in the same order, fp32 for whatever is trained, no weight decay
unless asked for.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

import smtune
from smtune.errors import InputError
from smtune.files import write_json, write_text
from smtune.models import fingerprint, identity, portable_name, skeleton, weights_of
from smtune.scoring import DATA_FREE
from smtune.training.callbacks import Checkpoints, Metrics, TrainProgress
from smtune.training.config import TrainConfig
from smtune.training.data import TrainingData, check_same_data, load_data, read_data
from smtune.training.environment import describe_environment
from smtune.training.folder import RunFolder, read_record, step_of, write_folder
from smtune.training.lock import locked
from smtune.training.model import (
    Foreseen,
    check_scoring,
    check_trainable,
    checkpoint_activations,
    expected_plan,
    foresee,
    load_base,
    score,
    warm_up,
    wrap,
)
from smtune.training.result import RunResult, final_result, read_result, save, save_model
from smtune.training.trainer import (
    RecipeTrainer,
    check_engine,
    check_trackers,
    count_steps,
    engine_name,
    is_in_bf16,
    loads_on_first,
    remarks_on_steps,
    rows_per_step,
    training_arguments,
    whole_weights,
)
from smtune.tuner.targets import count_parameters


@dataclass(frozen=True)
class WorkPlan:
    """What a run would do.

    Attributes:
        rows: of one epoch; an example is a row. data: what became of the examples, in words.
        steps: optimizer steps; rows_per_step over all devices.
        checkpoints: written on the way. writes: paths that will be written, in order.
        remarks: what is allowed, but hardly meant.
        dense_warmup_learning_rate: where the scoring batches are steps of full fine-tuning, which are kept.
    """

    model: str
    method: str
    dtype: str
    total_parameters: int
    trainable_parameters: int
    blocks: str
    rows: int
    data: str
    epochs: float
    steps: int
    rows_per_step: int
    scoring_batches: int
    learning_rate: float
    checkpoints: int
    output: str
    writes: tuple[str, ...]
    remarks: tuple[str, ...] = ()
    dense_warmup_learning_rate: float | None = None

    def __rich__(self) -> Table:
        share = self.trainable_parameters / self.total_parameters
        scoring = f"{self.scoring_batches} batches" if self.scoring_batches else "none"
        if self.dense_warmup_learning_rate is not None:
            scoring = (
                f"a dense warm-up: {self.scoring_batches:,} steps of {self.rows_per_step} rows train every weight, "
                f"learning rate {self.dense_warmup_learning_rate:g}; so the whole model is saved"
            )
        table = Table(show_header=False, box=None)
        for label, text in (
            ("model", f"{self.model}, {self.total_parameters:,} parameters, {self.dtype}"),
            ("method", f"{self.method}, learning rate {self.learning_rate:g}"),
            ("trainable", f"{self.trainable_parameters:,} parameters, a share of {share:.4g}{self.blocks}"),
            ("data", self.data),
            ("scoring", scoring),
            ("training", f"{self.steps:,} steps of {self.rows_per_step} rows, {self.epochs:.3g} epochs"),
            ("checkpoints", f"{self.checkpoints}"),
            ("output", self.output),
            ("writes", ", ".join(self.writes)),
            *(("warning", remark) for remark in self.remarks),
        ):
            table.add_row(label, Text(text))
        return table


def train(
    config: TrainConfig,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Run a training configuration to its end.

    Args:
        config: as `load_config` gives it.
        resume: go on with the run in `config.output` from its last checkpoint; start it if there is none yet. On the
            CPU, with the same threads, it ends with the same bits as a run that was never stopped.
        console: for messages and progress; None: the error stream.
        callbacks: further Trainer callbacks.
    Returns:
        The final numbers. A run that is finished already is left as it is.
    Raises:
        InputError: a folder that may not be written, data, model or targets that do not fit, a loss that is not
            finite.
    """
    config = config.resolved()
    console = console or Console(stderr=True)
    folder = RunFolder(config.output)
    check_trackers(config)
    processes = PartialState().num_processes
    if folder.is_finished or folder.path.is_file():
        folder.check_start(config, resume, processes, engine_name(config), is_in_bf16(config))
        _say(console, f"{folder.path} is finished already; nothing to do.")
        return read_result(folder, config)
    check_engine(config)
    arguments = training_arguments(config, folder)
    with locked(folder.path) if PartialState().is_main_process else nullcontext():
        folder.check_start(config, resume, processes, engine_name(config), is_in_bf16(config))
        with folder.room_needed():
            return _train(config, folder, arguments, console, callbacks)


def _train(
    config: TrainConfig,
    folder: RunFolder,
    arguments: TrainingArguments,
    console: Console,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    """`train` in a folder that may be written, and in which no other process is."""
    is_main = PartialState().is_main_process
    checkpoint = _from_main(folder.last_checkpoint(partial(_say, console)) if is_main else None)
    fault = _from_main(_other_base(folder, config) if is_main else None)
    if fault is not None:
        raise InputError(fault)
    records = read_data(config)
    kept = folder.plan if config.method == "smt" and _from_main(folder.has_plan(config)) else None
    makes_plan = config.method == "smt" and config.smt.plan is None
    must_score = makes_plan and kept is None
    # What does not fit the model is found here, before rows are encoded, its weights read and anything is written.
    if must_score:
        check_scoring(config)
    with whole_weights(arguments):
        foreseen = foresee(config, kept)
    data = load_data(config, records)
    check_same_data(folder, data)
    _say(console, f"Data: {data.summary}")
    _say_remarks(console, foreseen)
    _, steps = count_steps(config, len(data.rows), PartialState().num_processes)
    for remark in remarks_on_steps(config, steps):
        _say(console, f"Warning: {remark}")
    if not must_score and not is_main and loads_on_first(config):
        model = skeleton(config.model, config.dtype, buffers=True)
    else:
        # On resuming, too: the mode "auto" tells weights that are loaded whole from those in parts.
        with whole_weights(arguments) if makes_plan else nullcontext():
            model = load_base(config, folder.warmed if config.has_dense_warmup and not must_score else None)
    if must_score:
        model = model.to(arguments.device)  # else the engine, or Trainer, places it
    total_parameters = count_parameters(model)
    set_seed(config.training.seed)
    if config.method == "smt":
        expected_plan(model, config, kept)  # again, of the model as it is: its layers may be quantised
    else:
        model = wrap(model, config, None)
    PartialState().wait_for_everyone()  # every process has looked at the folder as it was
    if is_main:
        _write_start(folder, config, data.record, arguments, checkpoint, console)
    PartialState().wait_for_everyone()

    if config.method == "smt":
        plan = _make_plan(model, data, config, folder, console)
        if config.has_dense_warmup and must_score:
            del model
            model = load_base(config, folder.warmed)  # as a resumed run has it
        model = wrap(model, config, plan)
    check_trainable(model)
    if config.training.gradient_checkpointing:
        checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = sum(math.prod(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained)
    _say(console, f"Training {number:,} of {total_parameters:,} parameters ({config.method})")
    if checkpoint is not None:
        _say(console, f"Resuming from {checkpoint.name}")

    progress = TrainProgress(console)
    metrics = Metrics(folder.metrics, progress)
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.rows.select_columns(["input_ids", "labels"]),
        eval_dataset=data.held_out.select_columns(["input_ids", "labels"]) if data.held_out is not None else None,
        data_collator=data.collator,
        callbacks=[Checkpoints(folder, config.training.keep_checkpoints), metrics, progress, *callbacks],
    )
    trainer.lengths = list(data.rows["length"]) if config.training.group_by_length else None
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        progress.close()
    seconds = metrics.elapsed

    save(trainer, data.tokenizer, config, folder)
    PartialState().wait_for_everyone()  # the metrics are whole
    result = final_result(config, folder, trainer, seconds, number, total_parameters)
    if is_main:
        numbers = dataclasses.asdict(result)
        del numbers["folder"], numbers["trained"]  # the folder may be moved
        folder.sync_metrics()
        write_json(folder.result, numbers)
    PartialState().wait_for_everyone()
    return result


def select_plan(config: TrainConfig, console: Console | None = None) -> smtune.Plan:
    """The plan that `train` would make of a configuration with the method smt, and nothing else. Writes nothing.

    Raises:
        InputError: another method, a plan given already, a dense warm-up, or as `train`.
    """
    config = config.resolved()
    if config.has_dense_warmup:
        raise InputError(
            "Expected no smt.dense_warmup_steps: the plan would be for weights that are not kept. Leave it out."
        )
    if config.method != "smt" or config.smt.plan is not None:
        raise InputError("Expected the method smt without smt.plan: only then is there a plan to make.")
    check_scoring(config)
    records = read_data(config)
    console = console or Console(stderr=True)
    _say_remarks(console, foresee(config))
    data = load_data(config, records)
    model = load_base(config).to(PartialState().device)
    return score(model, data.rows, data.collator, config, console.is_terminal)


def dry_run(config: TrainConfig, resume: bool = False, processes: int | None = None) -> WorkPlan:
    """Check all that can be checked without the weights, and say what `train` would do. Writes no run folder.

    The model is built on the meta device. Its configuration and tokenizer may be fetched into the user's cache.

    Args:
        processes: how many would train. None: as many as there are now.
    Raises:
        InputError: as `train`.
    """
    config = config.resolved()
    folder = RunFolder(config.output)
    check_trackers(config)
    check_engine(config, processes)
    processes = processes or PartialState().num_processes
    folder.check_start(config, resume, processes, engine_name(config), is_in_bf16(config))
    kept = folder.plan if config.method == "smt" and folder.has_plan(config) else None
    if kept is None:
        check_scoring(config)
    records = read_data(config)
    fault = None if folder.is_finished else _other_base(folder, config)
    if fault is not None:
        raise InputError(fault)
    foreseen = foresee(config, kept)
    data = load_data(config, records)
    if not folder.is_finished:
        check_same_data(folder, data)
    blocks, n_scoring, plan = "", 0, foreseen.plan
    if plan is not None:
        blocks = f": {plan.n_blocks:,} blocks of {plan.block_size}² out of {len(plan.modules)} matrices"
        if config.has_dense_warmup:
            n_scoring = config.smt.dense_warmup_steps or 0
        elif config.smt.plan is None and config.smt.criterion not in DATA_FREE:
            n_scoring = min(config.smt.warmup_steps, math.ceil(len(data.rows) / (config.smt.score_batch_size or 1)))
    per_epoch, steps = count_steps(config, len(data.rows), processes)
    writes = ["config.yaml", "environment.json", "data.json"]
    writes += ["scoring.json", "plan.json"] * (config.method == "smt")
    writes += ["metrics.jsonl", "checkpoints/", f"{folder.trained(config).name}/", "result.json"]
    return WorkPlan(
        model=portable_name(config.model),
        method=config.method,
        dtype=config.dtype,
        total_parameters=foreseen.total_parameters,
        trainable_parameters=foreseen.trainable_parameters,
        blocks=blocks,
        rows=len(data.rows),
        data=data.summary,
        epochs=steps / per_epoch,
        steps=steps,
        rows_per_step=rows_per_step(config, processes),
        scoring_batches=n_scoring,
        learning_rate=config.training.learning_rate or 0.0,
        checkpoints=(steps - 1) // config.training.save_steps,
        output=str(folder.path),
        writes=tuple(writes),
        remarks=(*foreseen.remarks, *remarks_on_steps(config, steps)),
        dense_warmup_learning_rate=config.smt.dense_warmup_learning_rate,
    )


# Plan -----------------------------------------------------------------------------------------------------------------


def _make_plan(
    model: nn.Module,
    data: TrainingData,
    config: TrainConfig,
    folder: RunFolder,
    console: Console,
) -> smtune.Plan:
    """The plan of the run: that in the folder, that given, or a new one by scoring.

    A dense warm-up trains the model, and the result stands in the folder too.
    """
    if _from_main(folder.has_plan(config)):
        return smtune.Plan.load(folder.plan)
    started = time.perf_counter()
    record: dict[str, Any] = {}
    if config.smt.plan is not None:
        plan = smtune.Plan.load(config.smt.plan)
    elif config.has_dense_warmup:
        plan, losses = warm_up(model, data.rows, data.collator, config, partial(_say_step, console, config))
        record = {
            "dense_warmup": {
                "learning_rate": config.smt.dense_warmup_learning_rate,
                "steps": len(losses),
                "losses": losses,
            }
        }
    else:
        plan = score(model, data.rows, data.collator, config, console.is_terminal)
    seconds = time.perf_counter() - started if config.smt.plan is None else 0.0
    if PartialState().is_main_process:
        if config.has_dense_warmup:
            folder.plan.unlink(missing_ok=True)
            write_folder(folder.warmed, partial(save_model, model))
        # The plan last: where it stands, scoring is done.
        write_json(folder.scoring, {"seconds": seconds, "batches": plan.batches_seen, **record})
        plan.save(folder.plan)
    _say(console, f"Plan: {plan.n_blocks:,} blocks of {plan.block_size}², scored in {seconds:.1f} s")
    PartialState().wait_for_everyone()
    return plan


def _say_step(console: Console, config: TrainConfig, step: int, loss: float) -> None:
    """Of a dense warm-up, as often as of training."""
    last = config.smt.dense_warmup_steps
    if step % config.training.logging_steps == 0 or step == last:
        _say(console, f"dense warm-up, step {step}/{last}  loss {loss:.4f}")


# Folder and processes -------------------------------------------------------------------------------------------------


def _other_base(folder: RunFolder, config: TrainConfig) -> str | None:
    """What is wrong if the folder holds the work of a run on a base of that name with other weights; else None."""
    if not (folder.holds_work and folder.environment.is_file()):
        return None
    before, now = read_record(folder.environment).get("model", {}).get("weights"), fingerprint(config.model)
    if before is None or weights_of(before) == weights_of(now):
        return None
    return (
        f"Expected the base model that {folder.path} was started with, {before}. Got {now}: its files or its revision "
        f"are others. Restore them, or choose another output; if only their dates are, delete {folder.environment}."
    )


def _write_start(
    folder: RunFolder,
    config: TrainConfig,
    data_record: dict[str, Any],
    arguments: TrainingArguments,
    checkpoint: Path | None,
    console: Console,
) -> None:
    """Write what is known before training; on resuming, add to the environment and forget metrics to be made again."""
    if not folder.holds_work:
        write_text(folder.config, config.to_yaml())  # first: a folder with it may be resumed
        for left in (folder.data, folder.environment, folder.scoring, folder.metrics):
            left.unlink(missing_ok=True)  # by a start that came to nothing
    write_json(folder.data, data_record)
    environment = describe_environment(arguments.device, config.training.seed) | {
        "engine": engine_name(config),
        "autocast": is_in_bf16(config),
    }
    step = step_of(checkpoint) if checkpoint is not None else 0
    if folder.environment.is_file():
        before = read_record(folder.environment)
        before.setdefault("resumed", []).append({"step": step, **environment})
        write_json(folder.environment, before)
    else:
        write_json(folder.environment, environment | {"model": identity(config.model)})
    folder.cut_metrics(step, partial(_say, console))


def _say(console: Console, text: str) -> None:
    """A line from the main process, as it is: paths may hold what rich takes for markup."""
    if PartialState().is_main_process:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _say_remarks(console: Console, foreseen: Foreseen) -> None:
    for remark in foreseen.remarks:
        _say(console, f"Warning: {remark}")


def _from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if PartialState().num_processes == 1:
        return value
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]
