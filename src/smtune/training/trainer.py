"""Hugging Face's Trainer as a configuration asks for it: its engine, its arguments, and the order of rows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import str_to_bool
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_length_grouped_indices

from smtune.errors import InputError, did_you_mean
from smtune.training.config import TrainConfig
from smtune.training.folder import RunFolder

HOURS_TO_WAIT = 2
"""That processes wait for the first, which may read or write a whole large model meanwhile."""

# Engine ---------------------------------------------------------------------------------------------------------------


def check_engine(config: TrainConfig, processes: int | None = None) -> None:
    """Raises InputError for an engine that is not installed, whose file is missing, or that cannot start.

    Args:
        processes: that a launcher would start. None: train in this one, and in those that were started with it.
    """
    deepspeed, fsdp = config.training.deepspeed, config.training.fsdp
    if deepspeed is not None and find_spec("deepspeed") is None:
        raise InputError(
            "training.deepspeed: deepspeed is not installed: `pip install -e '.[distributed]'` in a clone of smtune."
        )
    _check_deepspeed(config, _deepspeed_values(config))
    _check_precision(config)
    if deepspeed is not None and processes is None and "LOCAL_RANK" not in os.environ:
        raise InputError(
            "training.deepspeed: expected a launcher, which one process needs, too. Got none: start it with --nproc 1 "
            "or more, torchrun or accelerate launch, or leave it out."
        )
    if fsdp is not None and (processes or int(os.environ.get("WORLD_SIZE", 1))) < 2:
        raise InputError(
            "training.fsdp: expected several processes to shard the model over. Got one: start them with --nproc, "
            "torchrun or accelerate launch, or leave it out."
        )
    if config.has_dense_warmup and (_uses_deepspeed(config) or _uses_fsdp()):
        raise InputError(
            "smt.dense_warmup_steps: expected one process, or several with a whole model each (DDP). Got a launcher "
            "that asks for DeepSpeed or FSDP: use --nproc or torchrun, or leave the dense warm-up out."
        )
    if engine_name(config) == "fsdp":
        _check_fsdp(config)


def _check_precision(config: TrainConfig) -> None:
    """Raises InputError for a launcher's mixed precision: Trainer would cast what the recipe multiplies in fp32."""
    by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if by_launcher != "no" and not (by_launcher == "bf16" and is_in_bf16(config)):
        raise InputError(
            "dtype: expected accelerate launch to leave the precision to the recipe, and so its mixed_precision to be "
            f"'no'. Got {by_launcher!r}: launch with --mixed_precision no."
        )


def is_in_bf16(config: TrainConfig) -> bool:
    """Whether Trainer computes in bf16 what is trained in fp32: of a model that is to be bf16, all but SMT's blocks.

    They stand in its weights. PEFT's factors would be multiplied in fp32; with DeepSpeed and FSDP2, which cast or widen
    the frozen weights too where this is on, they are.
    """
    is_cast = config.method == "full" or (config.method != "smt" and engine_name(config) == "none")
    return is_cast and config.dtype == "bfloat16"


def _deepspeed_values(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, of the recipe or a launcher; empty without one."""
    if isinstance(config.training.deepspeed, dict):
        return config.training.deepspeed
    by_launcher = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if _uses_deepspeed(config) else "none"
    path = config.training.deepspeed or by_launcher
    return {} if path == "none" else _read_engine_file(path)


def _check_deepspeed(config: TrainConfig, values: dict[str, Any]) -> None:
    """Raises InputError for a configuration of DeepSpeed that contradicts the recipe."""
    training = config.training
    source = "training.deepspeed" if training.deepspeed is not None else "The launcher's file of DeepSpeed"
    of_recipe = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "bf16.enabled": is_in_bf16(config),
        "fp16.enabled": False,
        "optimizer.params.lr": training.learning_rate,
        "optimizer.params.weight_decay": training.weight_decay,
    }
    for name, expected in of_recipe.items():
        found: Any = values
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found not in (None, "auto", expected):
            raise InputError(
                f'{source}: expected {name} of "auto", or {expected!r} as the recipe has it. Got {found!r}.'
            )
    if "scheduler" in values:
        raise InputError(
            f"{source}: expected no scheduler, since training.schedule and the warm-up say how the rate changes. Got "
            "one, which would be used instead: leave it out."
        )
    if values and training.deepspeed is None and "gradient_clipping" not in values:
        raise InputError(
            f'{source}: expected "gradient_clipping": "auto", so that training.max_grad_norm is heard. Got none, which '
            "clips at 1: add it."
        )


def _fsdp_keys(config: TrainConfig) -> dict[str, Any]:
    """The recipe's keys for FSDP as Trainer reads them."""
    return {key.removeprefix("fsdp_"): value for key, value in (config.training.fsdp or {}).items()}


def _check_fsdp(config: TrainConfig) -> None:
    """Raises InputError for what gives parameters other names, by which nothing could be loaded again."""
    keys = _fsdp_keys(config)
    by_launcher = os.environ.get("FSDP_VERSION", "1")  # which Trainer's own keys do not look at
    if str(keys.get("version", by_launcher if config.training.fsdp is None else 2)) != "2":
        raise InputError(
            "training.fsdp: expected FSDP2. Got FSDP1: set its version, or fsdp_version for accelerate launch, to 2."
        )
    by_launcher = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false")
    if str_to_bool(str(keys.get("activation_checkpointing", by_launcher))):
        raise InputError(
            "training.fsdp: expected activations to be checkpointed by the model. Got FSDP's own "
            "activation_checkpointing, here or for accelerate launch: set training.gradient_checkpointing instead."
        )


def _read_engine_file(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"training.deepspeed: expected a JSON file at {path}. It cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise InputError(f"training.deepspeed: expected a JSON object in {path}. Got something else.")
    return values


def engine_name(config: TrainConfig) -> str:
    """Which engine trains, by the configuration or the launcher: "deepspeed", "fsdp", or "none" (DDP, one process)."""
    if _uses_deepspeed(config):
        return "deepspeed"
    return "fsdp" if config.training.fsdp is not None or _uses_fsdp() else "none"


def _uses_deepspeed(config: TrainConfig) -> bool:
    by_launcher = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return config.training.deepspeed is not None or by_launcher


def _uses_fsdp() -> bool:
    """Whether the launcher asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _start_deepspeed_on_cpus() -> None:
    """Start the process group: Accelerate knows no backend for DeepSpeed's processes where there is no accelerator."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo", timeout=timedelta(hours=HOURS_TO_WAIT))


def loads_on_first(config: TrainConfig) -> bool:
    """Whether only the first process is to read the weights; Accelerate then gives the others their parts of them."""
    by_launcher = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    asked = _fsdp_keys(config).get("cpu_ram_efficient_loading", _uses_fsdp() and by_launcher)
    return config.method != "full" and str(asked).lower() == "true"


@contextmanager
def whole_weights(arguments: TrainingArguments) -> Iterator[None]:
    """Load all of the weights on every process, for scoring, where ZeRO-3 would give each a part."""
    by_parts = getattr(arguments, "hf_deepspeed_config", None) or getattr(arguments.deepspeed_plugin, "dschf", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if by_parts is not None:
            set_hf_deepspeed_config(by_parts)


# Trainer --------------------------------------------------------------------------------------------------------------


def rows_per_step(config: TrainConfig, processes: int) -> int:
    training = config.training
    return training.batch_size * training.gradient_accumulation_steps * processes


def count_steps(config: TrainConfig, n_rows: int, processes: int) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run), as Trainer counts them."""
    per_epoch = math.ceil(n_rows / rows_per_step(config, processes))
    if config.training.max_steps is not None:
        return per_epoch, config.training.max_steps
    return per_epoch, math.ceil((config.training.epochs or 0.0) * per_epoch)


def remarks_on_steps(config: TrainConfig, steps: int) -> Iterator[str]:
    """What is hardly meant by a warm-up as long as the run, of so many steps."""
    key, given = "warmup_ratio", config.training.warmup_ratio or 0.0
    warmup = math.ceil(given * steps)
    if config.training.warmup_steps is not None:
        key, given = "warmup_steps", config.training.warmup_steps
        warmup = given
    if warmup >= steps > 0:
        rate = "is zero in its only step" if steps == 1 else "never gets to training.learning_rate"
        yield (
            f"the learning rate {rate}: its warm-up takes {warmup} steps by training.{key}, {given:g}, and the run has "
            f"{steps}. Lower it, or train for longer."
        )


def check_trackers(config: TrainConfig) -> None:
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


SCHEDULES = {"constant": "constant_with_warmup"}
"""transformers' names of schedules where they differ; its own "constant" leaves the warm-up out."""


def training_arguments(config: TrainConfig, folder: RunFolder) -> TrainingArguments:
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
        lr_scheduler_type=SCHEDULES.get(training.schedule, training.schedule),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        # DeepSpeed clips at 1 where its configuration does not say.
        deepspeed=None if training.deepspeed is None else {"gradient_clipping": "auto"} | _deepspeed_values(config),
        bf16=is_in_bf16(config),
        ddp_timeout=HOURS_TO_WAIT * 3600,
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        eval_strategy="no" if config.data.validation is None else "steps",
        eval_steps=training.save_steps,
        per_device_eval_batch_size=training.batch_size,
        prediction_loss_only=True,
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


class _Epochs(TrainerCallback):
    """Tells a sampler its epoch, since Trainer does not reach it in a run of several processes that is resumed."""

    def __init__(self, sampler: _LengthGrouped) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0.0))


class RecipeTrainer(Trainer):
    lengths: list[int] | None = None
    """Tokens of each row, to group rows by; None: a random order."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        """Trainer's; in evaluation the mean of a process's own batch, not its share of all processes' sum."""
        if not torch.is_grad_enabled():
            num_items_in_batch = None
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        sampler = _LengthGrouped(self.lengths, batch_size, self.args.data_seed or 0)
        self.add_callback(_Epochs(sampler))
        return sampler
