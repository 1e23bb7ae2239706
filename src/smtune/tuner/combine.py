"""Adapters made of adapters, and adapters exchanged in place: what PEFT has for LoRA, by functions closed to others.

`add_weighted_adapter` is exact for SMT: deltas of blocks add up, so the sum of adapters is an adapter over the union
of their plans. `hotswap_adapter` gives a loaded adapter another one's plan and values without building the model anew.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import AuxiliaryTrainingWrapper, load_peft_weights
from torch import Tensor, nn

from smtune.blocks import BlockIndex
from smtune.errors import InputError, did_you_mean
from smtune.selection import ModulePlan, Plan
from smtune.tuner.config import SMTConfig
from smtune.tuner.layer import SMTLinear
from smtune.tuner.model import SMTModel, share_inputs


def add_weighted_adapter(model: nn.Module, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Add the adapter whose delta is Σ weight · delta of some of the model's adapters.

    Its plan is the union of theirs, so it is as exact as fp32 is, and may hold as many blocks as all of them together.
    It is neither active nor trainable until `model.set_adapter(name)`; the others are left as they are.

    Args:
        model: as `peft.get_peft_model` or `peft.PeftModel.from_pretrained` give it, with SMT adapters.
        adapters: names of adapters of the model.
        weights: one for each; any finite numbers, negative ones subtract.
        name: of the new adapter.
    Raises:
        InputError: unknown or no adapters, another number of weights, a weight that is not finite, a name that is
            taken, adapters of several block sizes, or one with modules to save or trainable tokens.
    """
    model, tuner = _peft_model(model)
    configs: dict[str, Any] = tuner.peft_config
    _check_weighted(configs, adapters, weights, name)
    for adapter in adapters:
        _check_blocks_only(tuner, adapter, "a weighted sum")
    plan = _union_plan(tuner.model, [configs[adapter].get_plan() for adapter in adapters], adapters, weights)
    model.add_adapter(name, _config_for(plan, [configs[adapter] for adapter in adapters]))  # type: ignore[operator]
    try:
        for module, places in configs[name].block_map().items():
            layer = tuner.model.get_submodule(module)
            assert isinstance(layer, SMTLinear)
            layer._blocks(name).weight.data.copy_(_weighted_sum(layer, adapters, weights, places))
    except BaseException:
        model.delete_adapter(name)  # type: ignore[operator]
        raise


def hotswap_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", **kwargs: Any) -> None:
    """Give a loaded adapter the values *and the plan* of a saved one, in place. On an error nothing has changed.

    The adapter keeps its name, and stays active and trainable or not, as it was. Where a matrix has as many blocks in
    both plans its parameter is the same object afterwards, and a model compiled for inference in resident mode is not
    compiled again. Otherwise the model is right too, but a compiled one is traced anew at its next call: in additive
    mode and for training the places of blocks are constants of the graph, and another number of blocks is another
    shape. An optimizer that holds the adapter's parameters knows nothing of the swap: make a new one to go on training.

    Args:
        model: as `peft.PeftModel.from_pretrained` gives it, compiled or not, with SMT adapters.
        path: a folder as `save_pretrained` writes it, or a repository of the Hugging Face hub.
        adapter_name: the adapter to replace.
        kwargs: `subfolder`, `revision`, `token`, … as for `peft.PeftModel.from_pretrained`.
    Raises:
        InputError: no such adapter; one is merged; it or the saved one has modules to save or trainable tokens; the
            saved one is no SMT adapter, does not fit the model, has another block size than other adapters of its
            layers, or its weights are not those of its plan.
    """
    model, tuner = _peft_model(model)
    configs: dict[str, Any] = tuner.peft_config
    if adapter_name not in configs:
        raise InputError(_unknown(adapter_name, configs))
    _check_blocks_only(tuner, adapter_name, "a hot-swap")
    old = {name: layer for name, layer in _layers(tuner.model).items() if adapter_name in layer.smt_blocks}
    merged = {name: None for layer in _layers(tuner.model).values() for name in layer.merged_adapters}
    if merged:
        raise InputError(f"Expected no adapter that is merged. Got {', '.join(merged)}: call `unmerge_adapter` first.")
    config = PeftConfig.from_pretrained(os.fspath(path), **kwargs)
    if not isinstance(config, SMTConfig) or config.plan is None:
        raise InputError(f"Expected an SMT adapter with its plan at {os.fspath(path)}. Got one of {config.peft_type}.")
    Plan.from_dict(config.plan).check(tuner.model)
    tuner.check_block_size(adapter_name, config)
    weights = _weights_of(load_peft_weights(os.fspath(path), device="cpu", **kwargs), config, path)

    # Everything that can fail is made before anything is changed.
    new_layers = {
        name: tuner.wrapped(config, tuner.model.get_submodule(name), name)
        for name in weights
        if not isinstance(tuner.model.get_submodule(name), SMTLinear)
    }
    places = config.block_map()
    layers = _layers(tuner.model) | new_layers
    learns = any(layer._blocks(adapter_name).weight.requires_grad for layer in old.values())
    blocks = {}
    for name, weight in weights.items():
        blocks[name] = layers[name].new_blocks(places[name])
        blocks[name].weight.data.copy_(weight)
        blocks[name].weight.requires_grad_(learns)

    example = next(iter(_layers(tuner.model).values()))
    for name, layer in new_layers.items():
        parent, _, child = name.rpartition(".")
        layer.set_adapter(tuner.active_adapters)
        layer.enable_adapters(not example.disable_adapters)
        layer.train(example.training)
        tuner._replace_module(tuner.model.get_submodule(parent), child, layer, layer.base_layer)
    for name, layer in layers.items():
        if name in old or name in blocks:
            layer.swap_adapter(adapter_name, blocks.get(name))
    config.inference_mode = configs[adapter_name].inference_mode
    configs[adapter_name] = config
    share_inputs(tuner.model)  # blocks of another size read other columns


def _peft_model(model: nn.Module) -> tuple[nn.Module, SMTModel]:
    """The PEFT model, taken out of `torch.compile`'s wrapper, and its tuner."""
    model = getattr(model, "_orig_mod", model)
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, SMTModel):
        raise InputError(
            f"Expected a PEFT model with SMT adapters. Got a {type(model).__name__}: make one with "
            "`peft.get_peft_model` or `peft.PeftModel.from_pretrained`."
        )
    return model, tuner


def _layers(model: nn.Module) -> dict[str, SMTLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SMTLinear)}


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    return f"Expected an adapter of the model: {', '.join(known)}. Got {name!r}." + did_you_mean(name, known)


def _check_blocks_only(tuner: SMTModel, adapter: str, what: str) -> None:
    for name, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._get_available_adapters():
            raise InputError(
                f"Expected adapters of blocks alone for {what}. {adapter!r} has modules to save or trainable tokens, "
                f"such as {name}: use `load_adapter` and `set_adapter`."
            )


# Weighted sums ---------------------------------------------------------------------------------------------------


def _check_weighted(configs: Mapping[str, Any], adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    faults = []
    if not adapters or isinstance(adapters, str):
        faults.append(f"Expected a list of adapters. Got {adapters!r}.")
    else:
        faults += [_unknown(adapter, configs) for adapter in adapters if adapter not in configs]
        if len(weights) != len(adapters):
            faults.append(f"Expected a weight for each of {len(adapters)} adapters. Got {len(weights)}.")
        sizes = {adapter: configs[adapter].block_size for adapter in adapters if adapter in configs}
        if len(set(sizes.values())) > 1:
            faults.append(
                f"Expected adapters of one block size. Got {', '.join(f'{k!r} of {v}' for k, v in sizes.items())}."
            )
    faults += [f"Expected finite weights. Got {weight}." for weight in weights if not math.isfinite(weight)]
    if name in configs:
        faults.append(f"Expected a new name. {name!r} is taken: delete that adapter first, or choose another name.")
    if faults:
        raise InputError("\n".join(faults))


def _union_plan(model: nn.Module, plans: Sequence[Plan], adapters: Sequence[str], weights: Sequence[float]) -> Plan:
    """The plan of all blocks of `plans`, each module's by row, then column; modules in the model's order."""
    planned = {name for plan in plans for name in plan.modules}
    modules: dict[str, ModulePlan] = {}
    for name in (name for name, _ in model.named_modules() if name in planned):
        own = [plan.modules[name] for plan in plans if name in plan.modules]
        pairs = sorted({pair for module in own for pair in zip(module.rows, module.cols)})
        rows, cols = tuple(row for row, _ in pairs), tuple(col for _, col in pairs)
        modules[name] = dataclasses.replace(own[0], rows=rows, cols=cols, score_mean=None, score_max=None)
    costs = [plan.backward_cost for plan in plans if plan.backward_cost is not None]
    return dataclasses.replace(
        plans[0],
        modules=modules,
        criterion=" + ".join(f"{weight:g}·{adapter}" for adapter, weight in zip(adapters, weights)),
        policy="union",
        budget=sum(len(module.rows) for module in modules.values()),
        batches_seen=max(plan.batches_seen for plan in plans),
        shares=None,
        max_backward_cost=None,
        backward_cost=max(costs) if len(costs) == len(plans) else None,  # that of the lowest module
        score_kept=None,
    )


def _config_for(plan: Plan, of_parts: Sequence[SMTConfig]) -> SMTConfig:
    config = copy.deepcopy(of_parts[0]).with_plan(plan)
    config.target_modules = {name.rpartition(".")[2] for name in plan.modules}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = config.trainable_token_indices = None
    config.budget, config.policy, config.shares, config.max_backward_cost = plan.n_blocks, "global", None, None
    config.init_weights = True
    if len({each.mode for each in of_parts}) > 1:
        config.mode = "auto"  # the layers are as they are, each in a mode of its own
    return config


def _weighted_sum(layer: SMTLinear, adapters: Sequence[str], weights: Sequence[float], places: BlockIndex) -> Tensor:
    """Σ weight · delta over `places`, (m, l, l) in the deltas' dtype."""
    terms = [(weight, layer._blocks(name)) for name, weight in zip(adapters, weights) if name in layer.smt_blocks]
    example = terms[0][1]()
    total = example.new_zeros(len(places), *example.shape[1:], requires_grad=False)
    for weight, blocks in terms:
        slots = torch.tensor([places.positions[pair] for pair in blocks.places.pairs], device=total.device)
        total[slots] += weight * blocks().detach()
    return total


# Hot-swap --------------------------------------------------------------------------------------------------------


def _weights_of(tensors: dict[str, Tensor], config: SMTConfig, path: str | os.PathLike) -> dict[str, Tensor]:
    """The saved deltas by module, (m, l, l) each, once they are exactly those of the configuration's plan."""
    left = dict(tensors)
    weights = {}
    for module, places in config.block_map().items():
        prefix = f"base_model.model.{module}.smt_blocks."
        weight, index = left.pop(f"{prefix}weight", None), left.pop(f"{prefix}index", None)
        size = places.grid.block_size
        if weight is None or weight.shape != (len(places), size, size):
            came = "none" if weight is None else f"a tensor of shape {tuple(weight.shape)}"
            raise InputError(
                f"Expected {len(places)} blocks of {size}² for {module} at {os.fspath(path)}, by its configuration. "
                f"Got {came}: the weights are of another adapter."
            )
        if index is not None and index.long().tolist() != [list(pair) for pair in places.pairs]:
            raise InputError(
                f"Expected weights of the blocks that the configuration at {os.fspath(path)} plans. Got those of other "
                f"blocks of {module}."
            )
        weights[module] = weight
    # Of a targeted head PEFT saves the frozen base too.
    bases = tuple(f"base_model.model.{module}.base_layer." for module in weights)
    others = sorted(name for name in left if not name.startswith(bases))
    if others:
        raise InputError(
            f"Expected nothing but the blocks of the plan at {os.fspath(path)}. Got {others[0]} too: use "
            "`load_adapter` under a new name, then `set_adapter`."
        )
    return weights
