"""Mixed batches: `adapter_names=` gives every row of a batch an adapter of its own, as PEFT's LoRA does.

For evaluation and generation. The blocks act beside the weight in both modes: one weight cannot hold the blocks of
several adapters at once, so resident ones step out of it for the call. Imports torch, peft and `SMTLinear`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from smtune.errors import InputError, did_you_mean
from smtune.tuner.layer import BASE, SMTLinear


def check_adapter_names(names: Any, known: Collection[str], training: bool) -> None:
    """Raises InputError unless `names` is a list of known adapters or "__base__", and the model is in evaluation."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"Expected adapter_names to be a list of names, one for each row of the batch. Got {names!r}.")
    # The errors below begin with PEFT's words, which programs that mix LoRA adapters may know.
    unknown = sorted({name for name in names if name != BASE and name not in known})
    if unknown:
        raise InputError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Expected names of {', '.join(known)} "
            f"or {BASE!r}." + did_you_mean(unknown[0], [*known, BASE])
        )
    if training:
        raise InputError(
            "Cannot pass `adapter_names` when the model is in training mode. Call `model.eval()`, or train one adapter "
            "at a time with `set_adapter`."
        )


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], arguments: Mapping[str, Any]) -> Iterator[None]:
    """While this stands, every adapted layer of `model` runs row k of its input with the adapter `names[k]`.

    Args:
        model: with `SMTLinear` layers and PEFT's wrappers of modules to save and trainable tokens.
        names: one for each row of the batch that the caller passes; "__base__" is no adapter.
        arguments: of the call: generation repeats the rows for beams and for returned sequences, except in an encoder.
    """
    copies = _copies(arguments)
    repeated = [name for name in names for _ in range(copies)]
    encoder = model.get_encoder() if copies > 1 and hasattr(model, "get_encoder") else None  # type: ignore[operator]
    in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()
    layers, handles = [], []
    try:
        for module in model.modules():
            own = list(names) if module in in_encoder else repeated
            if isinstance(module, SMTLinear):
                layers.append(module)
                module.mixed_rows = tuple(own)  # not by a hook: a compiler does not guard on those
            elif isinstance(module, AuxiliaryTrainingWrapper):
                # PEFT's wrapper fails on an adapter that it does not have.
                available = module._get_available_adapters()
                own = [name if name in available else BASE for name in own]
                handles.append(module.register_forward_pre_hook(partial(_pass_names, own), with_kwargs=True))
        yield
    finally:
        for layer in layers:
            layer.mixed_rows = None
        for handle in handles:
            handle.remove()


def _pass_names(names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": names}


def _copies(arguments: Mapping[str, Any]) -> int:
    """How often generation repeats each row, as transformers decides it from `generate`'s arguments."""
    config = arguments.get("generation_config")
    counts = [arguments.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(counts)
