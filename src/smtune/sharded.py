"""Weights that an engine splits over processes: told apart, read whole, and saved whole.

FSDP2 and tensor parallelism make a parameter a `DTensor`, ZeRO-3 empties it between its uses and keeps a part on each
process; ZeRO 1 to 3 keep the fp32 master of a 16-bit parameter in parts. What reads a weight that may be split goes
through `whole`, and `trained_state_dict` is what an adapter is saved from.

Gathering is collective: every process of the group calls it, for the same parameters in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether the tensor is split over processes: a `DTensor`, or a parameter of ZeRO-3."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def whole(tensor: Tensor) -> Tensor:
    """The tensor's values in one piece, detached: a copy of one that is split, else the tensor's own memory."""
    if hasattr(tensor, "full_tensor"):
        split: Any = tensor.detach()
        return split.to(split.device_mesh.device_type).full_tensor()  # NCCL gathers nothing that is offloaded
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What a model's adapters have learned, whole, under DDP, FSDP2 and DeepSpeed's ZeRO 1 to 3 alike.

        state = smtune.trained_state_dict(model)  # on every process
        if rank == 0:
            model.save_pretrained("adapter/", state_dict=state)

    The frozen base is not gathered, unlike with Accelerate's `get_state_dict`, which brings the whole model to one
    process.

    Args:
        model: the `PeftModel`; of DDP's wrapper and DeepSpeed's engine it is the `module`.
    Returns:
        By name, on the CPU: every parameter that requires a gradient or belongs to an adapter (blocks, trained tokens,
        `modules_to_save`), and the adapters' buffers, such as the blocks' indices. A parameter that DeepSpeed holds in
        16 bits comes as its fp32 master. Empty on every process but the first. Frozen embeddings are not in it:
        `save_embedding_layers` of `save_pretrained` then has no effect.
    """
    keeps = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    state = {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "reshard"):  # FSDP2 leaves its last layers whole after an evaluation, in the products' dtype
            module.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or is_of_adapter(name):
            value = _master(parameter)
            if keeps:
                state[name] = value.to("cpu", copy=True)
    if keeps:
        buffers = {name: buffer for name, buffer in model.named_buffers() if is_of_adapter(name)}
        state |= {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()}
    return state


def is_of_adapter(name: str) -> bool:
    """Whether a tensor's name says that it came with an adapter: blocks, copies of modules to save, tokens."""
    return ".smt_blocks." in name or ".modules_to_save." in name or ".trainable_tokens_" in name


def _master(parameter: Tensor) -> Tensor:
    """The parameter as the optimizer knows it, whole."""
    is_deepspeeds = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
    if is_deepspeeds and parameter.dtype in (torch.bfloat16, torch.float16):
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach()
    return whole(parameter)
