"""Which layers of a model blocks are chosen from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from smtune.blocks import BlockGrid, resolve_block_size
from smtune.errors import InputError, did_you_mean
from smtune.scoring import Target
from smtune.tuner.layer import SMTLinear

if TYPE_CHECKING:
    from smtune.tuner.config import SMTConfig

_SPLIT_QKV = ["q_proj", "k_proj", "v_proj"]

DEFAULT_TARGETS: dict[str, list[str]] = dict.fromkeys(
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "phi",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    ],
    _SPLIT_QKV,
)
"""Default targets by `model.config.model_type`: the q, k and v projections (paper §3.1)."""


def find_targets(model: nn.Module, config: SMTConfig) -> dict[str, Target]:
    """The layers that `config` targets, by name in model order, cut into blocks.

    Raises:
        InputError: nothing matches, a match is no linear layer, or the block size does not divide every weight.
    """
    names = _matches(model, config)
    modules = dict(model.named_modules())
    for name in names:
        if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise InputError(
                f"Expected layers that are called. {name} is inside an nn.MultiheadAttention, which reads its weight "
                "and never calls it: leave it out of target_modules."
            )
    shapes: dict[str, tuple[int, int]] = {}
    for name in names:
        shape = (getattr(modules[name], "out_features", None), getattr(modules[name], "in_features", None))
        if None in shape:
            raise InputError(
                f"Expected target_modules to be linear layers. {name} is a {type(modules[name]).__name__}: "
                "leave it out of target_modules."
            )
        shapes[name] = shape  # type: ignore[assignment]
    block_size = resolve_block_size(config.block_size, shapes)
    return {
        name: Target(modules[name], BlockGrid(*shapes[name], block_size), _dense_weight_of(modules[name]))
        for name in names
    }


def _dense_weight_of(module: Any) -> Callable[[], Tensor]:
    def weight() -> Tensor:
        base = module
        if isinstance(module, SMTLinear):
            module.restore()
            base = module.base_layer
        return base.weight.data if base.weight.is_floating_point() else dequantize_module_weight(base).detach()

    return weight


def _matches(model: nn.Module, config: SMTConfig) -> list[str]:
    config = copy.copy(config)
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS:
            raise InputError(
                f"Expected target_modules: there is no default for model type {model_type!r}. "
                f"Linear layers of this model: {_linear_endings(model)}."
            )
        config.target_modules = set(DEFAULT_TARGETS[model_type])
    asked = config.target_modules
    _maybe_include_all_linear_layers(config, model)  # expands "all-linear" in place
    # Inside an adapted layer stand its base layer and its blocks; the layer itself is the target.
    inside = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    matches = [
        name
        for name, _ in model.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    ]
    if not matches:
        endings = _linear_endings(model)
        known = endings.split(", ")
        unknown = [] if isinstance(asked, str) else [name for name in sorted(asked or ()) if name not in known]
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise InputError(
            f"Expected target_modules that match a layer. Got {asked!r}"
            + (f" with exclude_modules={config.exclude_modules!r}" if config.exclude_modules else "")
            + (f" with modules_to_save={config.modules_to_save!r}" if config.modules_to_save else "")
            + (f" in layers {config.layers_to_transform!r}" if config.layers_to_transform is not None else "")
            + f", which match none.{hint} Linear layers of this model: {endings}."
        )
    return matches


def _linear_endings(model: nn.Module) -> str:
    """The distinct last names of the model's linear layers, in model order."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def count_parameters(model: nn.Module) -> int:
    """All parameters by logical shape: tied ones once, a quantised weight by its elements, adapters left out."""
    seen: set[int] = set()
    total = 0
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or ".smt_blocks." in f".{name}.":
                continue
            seen.add(id(parameter))
            total += _logical_size(module, parameter_name, parameter)
    return total


def _logical_size(module: Any, name: str, parameter: Tensor) -> int:
    if name == "weight" and not parameter.is_floating_point() and hasattr(module, "in_features"):
        return module.out_features * module.in_features  # 4-bit weights are packed
    return math.prod(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor


def model_name(model: nn.Module) -> str:
    """Where the model came from, as transformers recorded it, or ""."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""
