"""What a run ran on: versions, commit, device, threads, command.

For the record; on resuming a run's processes, engine and base are held against it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from smtune.version import __version__, command_line, commit

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


def describe_environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Plain JSON values; nothing about the user or the machine's name."""
    return {
        "smtune": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: metadata.version(package) for package in _PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "seed": seed,
        "command": command_line(),
    }
