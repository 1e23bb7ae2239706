"""How deep a backward goes: what it costs down to a layer, and how to make it end there.

A frozen model's backward is one chain of products dX = dY W from the loss downwards, 2·O·I FLOP a token for every
linear layer on the way. It ends at the lowest layer that is trained: a layer's own weight gradient needs its dY and
its X, but no dX, and nothing below it is computed. So the higher the lowest trained layer, the cheaper the step:

    cost of a plan = Σ O·I of the linear layers above its lowest selected one / the same for the lowest targeted one

Layers that read one input (q, k and v) stand side by side: none is above another. All others are put in one line, in
the order of the data: that of the modules in the model, but for the few that are not made in this order. So of two
branches (a router and its experts, latent queries and keys, an MLP beside its attention) one counts as below the other,
and its cost is too high. Where an MLP is beside attention (GPT-J, Phi, Cohere, Falcon), it is the MLP.
Attention's own products and norms, which have no weight matrix, are not in the count; every expert of a mixture counts
as if all tokens went through it.

Autograd ends there by itself, unless something makes the embeddings' output require a gradient, as transformers does
for activation checkpointing. `backward_end` undoes that for the layers below the lowest trained one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from smtune.weights import shape_OI

SHARED_INPUTS = frozenset(
    """
    q_proj k_proj v_proj q_a_proj kv_a_proj_with_mqa query key value q_lin k_lin v_lin q k v a_proj b_proj g_proj
    in_proj_qkv in_proj_z in_proj_b in_proj_a in_proj_qkvz in_proj_ba linear_x linear_y
    gate_proj up_proj wi_0 wi_1 w1 w3
    """.split()
)
"""Last names of modules that, under one parent, read the same input."""

READ_FIRST = SHARED_INPUTS | {"qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj"}
"""Those, and last names of modules that read their parent's input alone: what else is under it comes after them."""

MIXERS = ("attn", "attention", "mamba")
"""Of parts of a layer's names: its attention, or what has its place."""

MLPS = frozenset({"mlp", "feed_forward", "shared_mlp", "block_sparse_moe"})
"""Parts of a layer that come after its attention, in whichever order the two are made."""

PARALLEL = frozenset({"codegen", "cohere", "cohere2", "gptj", "phi"})
"""Model types whose MLP stands beside the attention."""


def siblings(name: str) -> frozenset[str]:
    """The last names of the modules that, under one parent, read the same input as `name`, its own included."""
    last = name.rpartition(".")[2]
    return SHARED_INPUTS if last in SHARED_INPUTS else frozenset({last})


def backward_costs(model: nn.Module, targets: Iterable[str]) -> dict[str, float]:
    """What the backward costs if a target is the lowest that is trained.

    Args:
        model: its linear layers are counted by the shapes of their weights, quantised ones and the head too.
        targets: names of linear layers of the model.
    Returns:
        The cost by name, a fraction of the chain down to the lowest target, which costs 1.
    """
    sizes: dict[str, int] = {}
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        shape = shape_OI(module)
        if name.startswith(adapted) or shape is None:
            continue
        if hasattr(module, "base_layer") or hasattr(module, "original_module"):  # it stands for the layer inside it
            adapted = (*adapted, f"{name}.")
        sizes[name] = math.prod(shape)
    by_place: dict[tuple[str, frozenset[str]], int] = {}
    for name in _in_order_of_data(model, list(sizes)):
        by_place[_place(name)] = by_place.get(_place(name), 0) + sizes[name]
    above: dict[tuple[str, frozenset[str]], int] = {}
    rest = sum(by_place.values())
    for place, size in by_place.items():
        rest -= size
        above[place] = rest
    chain = {name: above[_place(name)] for name in targets}
    whole = max(chain.values(), default=0)
    return {name: size / whole if whole else 0.0 for name, size in chain.items()}


def _place(name: str) -> tuple[str, frozenset[str]]:
    """The same for all modules that read one input: their parent and their last names."""
    return name.rpartition(".")[0], siblings(name)


def _in_order_of_data(model: nn.Module, names: list[str]) -> list[str]:
    """Names of linear layers, in the order of the model, by when a forward comes to them.

    Within a layer the MLP comes after attention, or before it where it stands beside it; within a parent come first
    those that read its input. Else it is the order of the model.
    """
    lists = _layer_lists(model)
    first: dict[tuple[str, str], int] = {}
    mixers: dict[str, list[int]] = {}
    places: dict[str, tuple[str, str, int]] = {}
    for number, name in enumerate(names):
        outermost = _outermost(name, lists)
        layer = name if outermost is None else ".".join(name.split(".")[: outermost.count(".") + 2])
        part = name.removeprefix(f"{layer}.").partition(".")[0]
        parent, _, last = name.rpartition(".")
        first.setdefault(("layer", layer), number)
        of_parent = number if parent == layer else first.setdefault(("parent", parent), number)
        places[name] = layer, part, of_parent if last in READ_FIRST else number
        if any(word in part for word in MIXERS):
            mixers.setdefault(layer, []).append(places[name][2])
    is_parallel = _is_parallel(model)
    keys: dict[str, tuple] = {}
    for name, (layer, part, place) in places.items():
        own, side = place, 0
        if part in MLPS and layer in mixers:
            own, side = (min(mixers[layer]), -1) if is_parallel else (max(place, *mixers[layer]), 1)
        keys[name] = first["layer", layer], own, side, place, name.rpartition(".")[2] not in READ_FIRST
    return sorted(names, key=keys.__getitem__)


def _is_parallel(model: nn.Module) -> bool:
    """Whether the layers' MLPs stand beside attention, by the configuration of a transformers model of text."""
    config: Any = getattr(model, "config", None)
    flags = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
    return getattr(config, "model_type", None) in PARALLEL or any(getattr(config, flag, False) for flag in flags)


def _layer_lists(model: nn.Module) -> set[str]:
    """Names of the lists of modules."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _outermost(name: str, lists: set[str]) -> str | None:
    """The outermost of the lists that a module or parameter is in, by their names."""
    return next((prefix for prefix in accumulate(name.split("."), "{}.{}".format) if prefix in lists), None)


@contextmanager
def backward_end(model: nn.Module, trained: Iterable[str]) -> Iterator[bool]:
    """Let the backward of the forwards run inside end at the lowest layer that is trained.

    A *layer* is an item of a list of layers, such as a decoder's. The output of frozen embeddings requires no gradient,
    whatever hooks say that were there before, so the layers below the lowest trained one keep nothing; nor are they
    checkpointed, where that is done inside of their hooks, for there is nothing to recompute. The input of the lowest
    trained layer requires a gradient only if that layer is under reentrant checkpointing, which runs a layer's backward
    for the sake of its inputs; dX of all its products is then computed. What does take a gradient below, such as a
    trained embedding or the caller's own embeddings, still gets it.

    Args:
        model: its embeddings are what `get_input_embeddings()` gives, if it has that.
        trained: names of modules or parameters that take gradients; those outside lists of layers do not count.
    Yields:
        Whether it stands. False, and nothing is done, where not exactly one list of layers holds what is trained in
        any, or its layers may be under reentrant checkpointing from outside: hooks would then run inside of it.
    """
    layers = _up_to_lowest(model, trained)
    from_inside = all(map(_checkpoints_itself, layers))
    from_outside = not from_inside and all(map(_checkpoints_in_call, layers)) and not any(map(_is_reentrant, layers))
    if not layers or not (from_inside or from_outside):
        yield False
        return
    first, below, lowest = layers[0], layers[:-1], layers[-1]
    with ExitStack() as stack:

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            # A leaf that requires a gradient has only been told to; a trained embedding's output has a history.
            return output.detach() if isinstance(output, Tensor) and output.is_leaf else output

        def run_once(hidden: Tensor) -> Tensor:
            for layer in () if hidden.requires_grad else below:
                function = getattr(layer, _CHECKPOINT, _call)
                if function is not _call:
                    stack.callback(setattr, layer, _CHECKPOINT, function)
                    setattr(layer, _CHECKPOINT, _call)
            return hidden

        def require(hidden: Tensor) -> Tensor:
            return hidden.detach().requires_grad_() if _is_reentrant(lowest) and not hidden.requires_grad else hidden

        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        hooks = [
            layer.register_forward_pre_hook(_on_hidden_states(change), with_kwargs=True)
            for layer, change in ((first, run_once), (lowest, require))
            if from_inside
        ]
        if isinstance(embeddings, nn.Module):
            hooks.append(embeddings.register_forward_hook(cut))  # the last of its hooks
        for hook in hooks:
            stack.callback(hook.remove)
        yield True


_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers' layers keep the function that runs them under checkpointing."""


def _up_to_lowest(model: nn.Module, trained: Iterable[str]) -> list[nn.Module]:
    """The layers from the first to the lowest trained one; none without exactly one list of layers."""
    lists = _layer_lists(model)
    places: set[tuple[str, int]] = set()
    for name in trained:
        outermost = _outermost(name, lists)
        if outermost is not None:
            places.add((outermost, int(name.removeprefix(f"{outermost}.").partition(".")[0])))
    if len({name for name, _ in places}) != 1:
        return []
    name, lowest = min(places)
    return list(model.get_submodule(name).children())[: lowest + 1]


def _checkpoints_itself(layer: nn.Module) -> bool:
    """Whether the layer's own `forward` does its checkpointing, as in transformers: hooks then run outside of it.

    Asked of the class, since a wrapper passes its layer's attributes off as its own.
    """
    if layer._compiled_call_impl is not None:  # what hooks do to a checkpoint cannot be traced
        return False
    return hasattr(type(layer), "gradient_checkpointing") and type(layer).__call__ is nn.Module.__call__


def _checkpoints_in_call(layer: nn.Module) -> bool:
    """Whether the layer does its checkpointing around its hooks, as transformers' layers did before 5.23."""
    owner = next(each for each in type(layer).__mro__ if "__call__" in vars(each))
    return owner.__name__ == "GradientCheckpointingLayer" and layer._compiled_call_impl is None


def _is_reentrant(layer: Any) -> bool:
    """Whether the layer is under reentrant checkpointing, which is assumed of a function that does not say."""
    keywords = getattr(getattr(layer, _CHECKPOINT, None), "keywords", {})
    return bool(layer.gradient_checkpointing and layer.training and keywords.get("use_reentrant", True) is not False)


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


def _on_hidden_states(change: Callable[[Tensor], Tensor]) -> Callable:
    """A hook that changes what a layer reads: its first argument, or `hidden_states`."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if args and isinstance(args[0], Tensor):
            return (change(args[0]), *args[1:]), kwargs
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}
        return None

    return hook
