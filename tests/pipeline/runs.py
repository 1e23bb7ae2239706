"""What the tests of `smtune train` share: a configuration, a stop in the middle, and comparing what two runs left."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from smtune.training import TrainConfig, load_config, read_metrics

STEPS = 8


def write_config(folder: Path, base: Path, rows: Path, *overrides: str, method="smt", output="run") -> TrainConfig:
    """8 steps of 2 batches of 2 rows, with checkpoints after 3 and 6; written to a file and read back."""
    values = {
        "model": str(base),
        "output": str(folder / output),
        "method": method,
        "data": {"train": str(rows), "max_length": 64},
        "smt": {"block_size": 16, "budget": 12, "warmup_steps": 3},
        "lora": {"rank": 2, "dropout": 0.1},
        "training": {
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 3,
            "save_steps": 3,
        },
    }
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path, overrides)


class Stop(Exception):
    """Stands for a kill."""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


def trained_tensors(result):
    return tensors_of(result.trained)


def tensors_of(folder):
    return {
        name: tensor
        for file in sorted(os.listdir(folder))
        if file.endswith(".safetensors")
        for name, tensor in load_file(os.path.join(folder, file)).items()
    }


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def untimed(path):
    return [{k: v for k, v in e.items() if k not in ("elapsed", "tokens_per_second")} for e in read_metrics(path)]
