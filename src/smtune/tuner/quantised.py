"""Quantised bases: which layers they are, whether what is trained beside them gets its gradients, and back to dense.

Blocks act beside a quantised weight (additive mode), which stays as it is. Merging into it quantises the sum anew and
so rounds away a part of what was trained; `dequantize` first, then merging, keeps all of it:

    merged = smtune.dequantize(model, torch.float32).merge_and_unload()
"""

from __future__ import annotations

import copy
import warnings
from itertools import chain
from typing import Any, TypeVar

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from smtune.errors import InputError
from smtune.sharded import is_of_adapter, is_sharded
from smtune.weights import shape_OI

ModelT = TypeVar("ModelT", bound=nn.Module)


def is_quantised(layer: Any) -> bool:
    """Whether a module is a linear layer whose weight is in a quantised format, one unknown to us included."""
    if shape_OI(layer) is None or next(layer.children(), None) is not None:
        return False
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):  # GPTQ and AWQ keep a `qweight`
        return True
    if is_sharded(weight):
        return False
    return (
        type(weight) not in (nn.Parameter, Tensor)  # classes of bitsandbytes and torchao
        or not weight.is_floating_point()
        or weight.dtype.itemsize == 1
    )


def dense_weight(layer: Any) -> Tensor:
    """A quantised layer's weight, (O, I) floating, a copy; the layer stays as it is.

    Raises:
        InputError: a format that peft cannot dequantise.
    """
    layer = copy.deepcopy(layer)  # peft's dequantising leaves bitsandbytes' 8-bit layers in disorder
    if _is_packed(layer):
        layer.state_dict()  # in which bitsandbytes takes its packing back,
        state = layer.weight.quant_state
        if state.absmax.dim() == 2:  # but leaves scales transposed that are not quantised themselves
            state.absmax = state.absmax.T.reshape(-1).float()
    weight = None
    if hasattr(layer, "W_q") or getattr(layer, "weight", None) is not None:
        try:
            weight = dequantize_module_weight(layer).detach()
        except NotImplementedError:
            weight = None
    if weight is None or tuple(weight.shape) != shape_OI(layer) or weight.dtype.itemsize == 1:
        raise InputError(
            f"Expected a weight that can be dequantised: of bitsandbytes, torchao or HQQ. Got a {type(layer).__name__}"
            f"{_format(layer)}: load the base in 16 or 32 bits."
        )
    return weight


def dequantize(model: ModelT, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ModelT:
    """Make every quantised weight of a model dense, in place; a `PeftModel` keeps its adapters.

    Merging afterwards loses nothing but the rounding to `dtype`. The dense model computes what the quantised one did
    up to rounding, but for formats that also round the layer's input (bitsandbytes int8).

    Args:
        model: a transformers model, or a `PeftModel` around one.
        dtype: of the base's floating weights afterwards, and of frozen `modules_to_save`. None: that which the base's
            have outside quantised layers. Blocks, trained tokens and what requires a gradient stay as they are.
        device: where the model is to be: with "cpu", a GPU that holds the quantised one needs no room for the dense.
            None: each weight stays where it is.
    Returns:
        The model, no longer recorded as a quantised one, so that saving it writes a plain checkpoint.
    Raises:
        InputError: nothing is quantised, adapters are merged, or no way to dequantise; the model is as before.
    """
    quantised: dict[str, Any] = {name: module for name, module in model.named_modules() if _holds_quantised(module)}
    if not quantised:
        raise InputError("Expected a quantised model. Got one without a quantised layer: merge into it as it is.")
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        raise InputError(
            f"Expected adapters that are not merged. Those of {merged[0]} are: they have been quantised with its "
            "weight. Call `model.unmerge_adapter()` first."
        )
    is_asked, dtype = dtype is not None, dtype or floating_dtype(model)
    weights = {name: _dequantised(module).to(device, dtype) for name, module in quantised.items()}
    for name in list(quantised):
        module = quantised.pop(name)
        weight = nn.Parameter(weights.pop(name), requires_grad=False)
        if not is_quantised(module):  # an embedding
            module.weight = weight
            continue
        out_features, in_features = weight.shape
        dense = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
        dense.weight, dense.bias = weight, module.bias
        model.set_submodule(name, dense.train(module.training))
    has_adapters = hasattr(model, "get_base_model")
    for name, parameter in model.named_parameters():
        # A module to save computes in its own dtype, from what the base's compute in theirs.
        is_learned = is_of_adapter(name) and not (is_asked and ".modules_to_save." in name)
        is_kept = is_learned or (has_adapters and parameter.requires_grad)
        if parameter.is_floating_point() and not is_kept:
            parameter.data = parameter.data.to(dtype)
    _forget_quantisation(model.get_base_model() if has_adapters else model)  # type: ignore[operator]
    return model if device is None else model.to(device)


def check_backward(model: nn.Module) -> None:
    """Refuse a model with quantised layers whose backward is not that of their forward: it would train silently wrong.

    What is trained learns from gradients that come down through all layers above. The backward of a linear layer
    is the transpose of its forward: ⟨g, W d⟩ = |d|² for d = Wᵀ g, whatever the format. That is tried for random g in
    the first layer of each type and last name.

    Raises:
        InputError: naming the layer, its format, and what its backward gives instead.
    """
    tried = set()
    for name, layer in model.named_modules():
        if not is_quantised(layer):
            continue
        last = name.removesuffix(".base_layer").rpartition(".")[2]
        kind = type(layer), type(getattr(layer, "weight", None)), last
        if kind in tried:
            continue
        tried.add(kind)
        fault = _backward_fault(layer, floating_dtype(model))
        if fault is not None:
            packed = " bitsandbytes has packed it in an evaluation on this CPU: load it anew." * _is_packed(layer)
            raise InputError(
                f"Expected quantised layers whose backward gives the gradient of their forward. {name}, a "
                f"{type(layer).__name__}{_format(layer)}, gives {fault}: blocks below it would learn nothing, or "
                f"something else.{packed} Formats that quantise the weight alone can be trained beside: bitsandbytes "
                "4 and 8 bit; torchao's Int8WeightOnlyConfig, Float8WeightOnlyConfig, IntxWeightOnlyConfig."
            )


def keep_trainable(model: nn.Module) -> None:
    """Let no evaluation on a CPU pack weights of bitsandbytes: a packed layer has no backward."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Of the first frozen floating weight outside quantised layers; float32 if there is none."""
    own = (
        parameter.dtype
        for name, module in model.named_modules()
        if ".smt_blocks." not in f".{name}." and not _holds_quantised(module)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.is_floating_point() and parameter.dtype.itemsize > 1
    )
    return next(own, torch.float32)


TOKENS = 32
"""Rows to try a layer with; int8 kernels on GPUs want more than 16."""
TOLERANCE = 0.1
"""Of the relative difference of the two sides; rounding, of inputs to 8 bits too, makes 0.01 at most."""


def _backward_fault(layer: Any, dtype: torch.dtype) -> str | None:
    """What is wrong with the gradient that the layer passes on; None if nothing is, or it cannot be run here."""
    place = next(chain(layer.parameters(), layer.buffers()), None)
    shape = shape_OI(layer)
    if place is None or place.device.type == "meta" or shape is None:
        return None
    generator = torch.Generator().manual_seed(0)
    grad_y, x = (torch.randn(TOKENS, size, generator=generator).to(place.device, dtype) for size in shape)
    was_training = layer.training
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.train()
            x.requires_grad_()
            y = layer(x)
            if not y.requires_grad:
                return "no gradient"
            (grad_x,) = torch.autograd.grad(y, x, grad_y.to(y.dtype), allow_unused=True)
            if grad_x is None or not grad_x.any():
                return "a gradient of zero"
            # In its direction, but of the size that an input has.
            direction = (grad_x / grad_x.square().mean().sqrt()).detach().requires_grad_()
            y = layer(direction) - (0 if getattr(layer, "bias", None) is None else layer.bias)
            forward = (grad_y.double() * y.double()).sum()
            backward = (grad_x.double() * direction.double()).sum()
            error = ((forward - backward).abs() / backward).item()
    except Exception:
        return None  # a layer that cannot be run here tells so itself when it is used
    finally:
        layer.train(was_training)
    return None if error < TOLERANCE else f"another gradient, off by {error:.2g} of it"


def _holds_quantised(module: nn.Module) -> bool:
    return is_quantised(module) or (isinstance(module, nn.Embedding) and _is_torchao(module.weight))


def _dequantised(module: Any) -> Tensor:
    return module.weight.dequantize().detach() if isinstance(module, nn.Embedding) else dense_weight(module)


def _is_torchao(weight: Any) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _is_packed(layer: Any) -> bool:
    """Whether bitsandbytes has rearranged a 4-bit weight for a CPU's matrix unit, where nothing else can read it."""
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def _format(layer: Any) -> str:
    weight = getattr(layer, "weight", None)
    return "" if weight is None or type(weight) is nn.Parameter else f" with a weight of type {type(weight).__name__}"


def _forget_quantisation(model: Any) -> None:
    """So that transformers saves, moves and casts the model as a plain one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.__dict__.pop("_weight_conversions", None)  # how a quantised checkpoint was read, which cannot be reversed
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, flag, False):
            setattr(model, flag, False)
