"""Mixed batches: `adapter_names=` gives every row of a batch an adapter of its own, as PEFT's LoRA does.

For evaluation and generation. The blocks act beside the weight in both modes: one weight cannot hold the blocks of
several adapters at once, so resident ones step out of it for the call. Threads may mix at the same time, each its own
names. But in resident mode no thread may call the model without `adapter_names` meanwhile, which writes blocks into the
weight that the others read as the base.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from smtune.errors import InputError, did_you_mean
from smtune.tuner.layer import BASE, MixedRows, SMTLinear


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
        arguments: of the call, by which generation may repeat the rows.
    """
    copies = _copies(arguments, getattr(model, "generation_config", None))
    before, handles = [], []
    try:
        for module in model.modules():
            if isinstance(module, SMTLinear):
                rows = module.mixed_rows
                before.append((rows, rows.names, rows.copies))
                rows.names, rows.copies = tuple(names), copies  # not by a hook: a compiler does not guard on those
            elif isinstance(module, AuxiliaryTrainingWrapper):
                # PEFT's wrapper fails on an adapter that it does not have.
                available = module._get_available_adapters()
                rows = MixedRows()
                rows.names, rows.copies = tuple(name if name in available else BASE for name in names), copies
                handles.append(module.register_forward_pre_hook(partial(_pass_names, rows), with_kwargs=True))
        yield
    finally:
        for rows, own, own_copies in before:
            rows.names, rows.copies = own, own_copies
        for handle in handles:
            handle.remove()


def _pass_names(rows: MixedRows, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if rows.names is None or not args:  # None in another thread, with a call of its own
        return None
    return args, kwargs | {"adapter_names": rows.of(args[0])}


def _copies(arguments: Mapping[str, Any], own: Any) -> int:
    """How often generation repeats each row, as transformers decides it from `generate`'s arguments.

    Args:
        own: the model's configuration of generation.
    """
    configs = arguments.get("generation_config"), own

    def count(name: str) -> int:
        return arguments.get(name) or next(filter(None, (getattr(config, name, None) for config in configs)), 1)

    return max(count("num_beams"), count("num_return_sequences"))
