"""`SMTModel`: puts `SMTLinear` in place of every layer that the plan trains blocks of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists, onload_layer
from torch import Tensor, nn

from smtune.depth import backward_end, siblings
from smtune.errors import InputError, did_you_mean
from smtune.scoring import DATA_FREE
from smtune.selection import Plan
from smtune.tuner.config import SMTConfig
from smtune.tuner.layer import SMTLayer, SMTLinear
from smtune.tuner.mixed import check_adapter_names, mixed_batch
from smtune.tuner.plan import make_plan
from smtune.tuner.quantised import check_backward, keep_trainable
from smtune.tuner.sharing import SharedInput
from smtune.tuner.targets import DEFAULT_TARGETS, heads

try:
    from peft.utils import quantization_utils
except ImportError:  # older than peft 0.20: no merging into quantised weights
    quantization_utils = None


class SMTModel(BaseTuner):
    """A model with SMT adapters. Made by `peft.get_peft_model`, `peft.PeftModel.from_pretrained` and the like.

    Raises:
        InputError: a configuration without a plan whose criterion needs data, or a plan that does not fit the model.
    """

    prefix = "smt_"
    tuner_layer_cls = SMTLayer
    target_module_mapping = DEFAULT_TARGETS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):  # older than peft 0.21
            self.register_load_state_dict_pre_hook(_check_checkpoint)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Before anything is replaced; PEFT's own hook for this is not called for a second adapter.
        config = self._complete(model, adapter_name)
        self.check_block_size(adapter_name, config)
        self.check_mode(model, config)
        self.check_layers(model, config)
        if not config.inference_mode:
            check_backward(model)
            keep_trainable(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if made := config.__dict__.get("_made_here"):
            made["left"] = config.target_modules  # PEFT may have put this model's names there
        share_inputs(model)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The model's, for a DDP of this module or of the `PeftModel` around it, which asks here."""
        names = getattr(self.model, "_ddp_params_and_buffers_to_ignore", [])
        return [prefix + name for prefix in ("model.", "base_model.model.") for name in names]

    def _complete(self, model: nn.Module, adapter_name: str) -> Any:
        """The adapter's configuration with a plan, made here if it can be had without data, and checked.

        PEFT keeps the caller's own object, who may use it again with another seed or for another model. It then gets
        its plan anew, in a copy, for the object itself is the first adapter's.
        """
        config: Any = self.peft_config[adapter_name]
        if config.plan is None and config.criterion not in DATA_FREE:
            raise InputError(
                f"Expected a plan: the criterion {config.criterion!r} scores blocks by gradients. Got a "
                "configuration without one. Make it first: `plan = smtune.make_plan(model, batches, config)`, "
                "then pass `config.with_plan(plan)`; or use `smtune.get_smt_model(model, config, batches)`."
            )
        made_here: dict[str, Any] = config.__dict__.get("_made_here", {})
        made = made_here.get("plan")
        if config.plan is None or config.plan is made:  # made: by an earlier use
            fresh = copy.copy(config)
            if made is not None and config.block_size == made["block_size"]:
                fresh.block_size = made_here["size"]
            if made is not None and config.target_modules is made_here.get("left"):
                fresh.target_modules = made_here["targets"]
            fresh.plan = None
            asked = {"size": fresh.block_size, "targets": fresh.target_modules}
            if any(isinstance(module, SMTLinear) and module.merged for module in model.modules()):
                # As PEFT does when it sets the adapter; now, for a plan by the weights' own values is of the base's.
                warnings.warn("An adapter cannot be added to a merged model. Unmerging the model first.", stacklevel=2)
                self.unmerge_adapter()
            plan = make_plan(model, None, fresh).to_dict()
            if plan != made or config.plan is None:
                config = config if made is None else fresh
                config.plan, config.block_size = plan, plan["block_size"]
                config.__dict__["_made_here"] = {"plan": plan, **asked}
                self.peft_config[adapter_name] = config
        planned: Plan = config.get_plan()
        planned.check(model)
        self._check_trained_whole(config, adapter_name)
        if config.target_modules is None:
            config.target_modules = {name.rpartition(".")[2] for name in planned.modules}
        return config

    def _check_trained_whole(self, config: Any, adapter_name: str) -> None:
        """Raises InputError for blocks, of any adapter, in a module that an adapter trains whole."""
        configs: dict[str, Any] = {**self.peft_config, adapter_name: config}
        own = {name: [*(each.modules_to_save or ()), *heads(each)] for name, each in configs.items()}
        for adapter, each in configs.items():
            saved = own[adapter_name] if adapter != adapter_name else [one for names in own.values() for one in names]
            for name in each.block_map():
                inside = accumulate(name.split("."), "{}.{}".format)
                if any(prefix.endswith(tuple(saved)) for prefix in inside if saved):
                    raise InputError(
                        f"Expected blocks of layers that no adapter trains whole. Got a plan with {name}, of "
                        f"{adapter!r}, and modules_to_save with {', '.join(dict.fromkeys(saved))}: leave it out of one "
                        "of the two."
                    )

    def check_block_size(self, adapter_name: str, config: Any) -> None:
        """Raises InputError if another adapter than the named one has blocks of another size in a layer of `config`."""
        configs: dict[str, Any] = self.peft_config
        for name, other in configs.items():
            shared = config.block_map().keys() & other.block_map().keys()
            if name != adapter_name and shared and other.block_size != config.block_size:
                raise InputError(
                    f"Expected one block size for all adapters of a layer: {other.block_size}, that of {name!r}. Got "
                    f"{config.block_size} for {adapter_name!r}: make its plan with block_size={other.block_size}."
                )

    @staticmethod
    def check_mode(model: nn.Module, config: Any) -> None:
        """Raises InputError if a layer of `config` has adapters already, and is in another mode."""
        for name in config.block_map():
            layer = model.get_submodule(name)
            if not isinstance(layer, SMTLinear) or config.mode == "auto":
                continue
            if (config.mode == "resident") != layer.resident:
                raise InputError(
                    f'Expected mode="{layer.extra_repr()}", which the adapters that are there have made of {name}, or '
                    f'"auto". Got {config.mode!r}.'
                )

    def check_layers(self, model: nn.Module, config: Any) -> None:
        """Raises InputError for a layer of `config` that cannot be resident, before any is replaced."""
        for name in config.block_map() if config.mode == "resident" else ():
            target = model.get_submodule(name)
            if not isinstance(target, SMTLinear):
                self.wrapped(config, target, name)

    def _prepare_adapter_config(self, peft_config: SMTConfig, model_config: dict) -> SMTConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: SMTConfig, key: str) -> Any:
        if key in peft_config.block_map():
            return True
        # PEFT wants to know of modules that `exclude_modules` took out, so as to warn when it took out none.
        excluded = check_target_module_exists(peft_config, key)
        return excluded if isinstance(excluded, _ExcludedModule) else False

    def _create_and_replace(
        self,
        peft_config: SMTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        places = peft_config.block_map()[current_key]
        if isinstance(target, SMTLinear):
            target.update_layer(adapter_name, places, peft_config.init_weights)
            return
        layer = self.wrapped(peft_config, target, current_key)
        self._replace_module(parent, target_name, layer, target)  # first: it moves what it finds to the base's device
        layer.update_layer(adapter_name, places, peft_config.init_weights)
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)

    def wrapped(self, config: Any, target: nn.Module, name: str) -> SMTLinear:
        """`target` as the base of a layer without adapters, not yet in its place."""
        layer = SMTLinear(target, config.mode, name, is_shared(self.model, target))
        if quantization_utils is not None and not layer.is_dense:
            options = quantization_utils.get_quantization_kwargs(self.model)
            # peft refuses weights that torchao has quantised without transformers: these train, but do not merge.
            with suppress(ValueError):
                layer.quantization_backend = quantization_utils.resolve_quantization_backend(target, **options)
        return layer

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        _prepare(self.model)

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        super().set_requires_grad(*args, **kwargs)
        _prepare(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first by name becomes active, in every layer."""
        if any(adapter_name in module.merged_adapters for module in self.modules() if isinstance(module, SMTLinear)):
            # In the words of peft 0.21; peft 0.20 would go on, and the base be lost.
            raise InputError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        was_active = adapter_name in self.active_adapters
        remaining = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        names = remaining or sorted(self.peft_config)[:1]
        if was_active and names:
            # PEFT lets each layer choose among its own adapters; layers with other ones would disagree.
            self.set_adapter(names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Make adapters part of the weights, for a while. What a layer refuses is refused before any merges."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters merged into it. What a layer refuses is refused before any merges."""
        self._check_merge(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was. A layer that cannot give it back is found before any is unloaded."""
        for layer in self.model.modules():
            if isinstance(layer, SMTLinear):
                layer.restore()
        return super().unload()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raises what a layer's merge would. PEFT merges one by one, and half a model is neither base nor tuned."""
        asked = [] if adapter_names is None or isinstance(adapter_names, str) else adapter_names  # of a str PEFT tells
        for name in asked:
            if name not in self.peft_config:
                raise InputError(
                    f"Expected names of adapters: {', '.join(self.peft_config)}. Got {name!r}."
                    + did_you_mean(name, self.peft_config)
                )
        for layer in self.model.modules():
            if isinstance(layer, SMTLinear):
                with onload_layer(layer):
                    layer.check_merge(safe_merge, adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands the child's weight on to a layer that is unloaded. That has its weight, and a wrapper of
        # trained tokens has none to give.
        if isinstance(new_module, SMTLinear):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: dict) -> dict:
        """As PEFT does; but a checkpoint of other layers than the adapter's is refused, not passed over."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

        marker = f".smt_blocks.{adapter_name}."
        _check_same_layers(adapter_name, remapped, (key for key in model.state_dict() if marker in key))
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        """Stands around every forward of the PEFT model."""
        names = kwargs.get("adapter_names")
        if names is not None:
            check_adapter_names(names, self.peft_config, self.training)
            by_place = args[1] if len(args) > 1 and hasattr(args[1], "num_beams") else None
            with mixed_batch(self.model, names, {"generation_config": by_place} | kwargs):
                yield
            return
        # transformers and PEFT make the embeddings' output require a gradient when checkpointing is on, and keep these
        # hooks; the backward shall end at the lowest trained layer all the same. A compiler would break its graph here.
        asked = not torch.compiler.is_compiling() and getattr(self.model, "_require_grads_hooks", None)
        if not asked or not torch.is_grad_enabled():
            yield
            return
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        with backward_end(self.model, trained):
            yield


def _derived(model: nn.Module) -> list[str]:
    """The buffers that every process makes for itself: copies of the base's blocks, and where blocks are."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SMTLinear)]
    originals = [f"{name}.smt_originals" for name, _ in layers]
    return originals + [f"{name}.smt_blocks.{adapter}.index" for name, layer in layers for adapter in layer.smt_blocks]


def is_shared(model: nn.Module, layer: Any) -> bool:
    """Whether the layer or its weight has another place in the model, such as tied embeddings."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return False
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    return sum(_is_same(weight, own) for module in modules for own in module._parameters.values()) > 1


def _is_same(weight: Tensor, other: Tensor | None) -> bool:
    """Whether two parameters are one, or one's memory is the other's."""
    if weight is other or other is None:
        return weight is other
    are_plain = type(weight.data) is Tensor and type(other.data) is Tensor
    return are_plain and weight.shape == other.shape and weight.data_ptr() == other.data_ptr() != 0


def _check_checkpoint(tuner: SMTModel, state_dict: dict, prefix: str, *args: Any) -> None:
    """Before a state dict is loaded: every adapter that it has blocks of has to have them in the same layers."""
    for name in tuner.peft_config:
        marker = f".smt_blocks.{name}."
        checkpoint = [key.removeprefix(prefix) for key in state_dict if marker in key]
        if checkpoint:
            _check_same_layers(name, checkpoint, (key for key in tuner.state_dict() if marker in key))


def _check_same_layers(adapter_name: str, checkpoint: Iterable[str], model: Iterable[str]) -> None:
    """Raises InputError unless both sets of keys have the blocks of the same layers."""

    def of_blocks(keys: Iterable[str]) -> set[str]:
        return {key.removeprefix("base_model.model.") for key in keys if ".smt_blocks." in key}

    wrong = of_blocks(checkpoint) ^ of_blocks(model)
    if wrong:
        raise InputError(
            f"Expected a checkpoint of the plan of adapter {adapter_name!r}. Got one that trains other layers, such as "
            f"{sorted(wrong)[0]}: load it under another name, with the adapter_config.json saved beside it."
        )


def share_inputs(model: nn.Module) -> None:
    """Let layers that read one input, such as q, k and v of an attention, save its columns together, and no others."""
    for layer in model.modules():
        if isinstance(layer, SMTLinear):
            layer.share_input(None)
    for parent in model.modules():
        groups: dict[tuple[frozenset[str], int, int], list[SMTLinear]] = {}
        for name, layer in parent.named_children():
            if isinstance(layer, SMTLinear) and layer.smt_blocks:
                groups.setdefault((siblings(name), layer.in_features, layer.block_size), []).append(layer)
        for layers in groups.values():
            if len(layers) > 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer.share_input(shared)
    _prepare(model)
    # As DDP reads it: of what follows from the base and the plan nothing is sent before every forward.
    own = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = list(dict.fromkeys([*own, *_derived(model)]))  # type: ignore[assignment]


def _prepare(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, SMTLinear):
            layer.prepare()
