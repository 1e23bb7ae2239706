"""`SMTLinear`: a linear layer with block adapters, and the life of the blocks that stand in its weight.

What is trained is the *delta* of each selected block, fp32 (m, l, l), starting at zero. In *resident* mode the active
adapters' blocks stand in W itself: before every use W is written as

    W[blocks] = round(original + Σ active deltas),    summed in fp32 in order of activation,

so no forward sees stale blocks however the deltas changed (an optimizer step, `load_state_dict`, a `.data.copy_`), and
again before the backward, so that a forward with other adapters in between does no harm. The write goes through
`.data`, which autograd's version counter does not see: recomputation under checkpointing rests on that. `originals`
is one copy of the base's blocks over the union of all adapters; everything that must give the base back (disabling,
switching, unmerging, `state_dict`) copies it into W, nothing is ever subtracted. Between uses W holds what the last
one wrote, or the base.

In *additive* mode W is left alone and the blocks' product is added to the layer's output.

The weight of GPT-2's `Conv1D` is stored as (I, O). Blocks are cut from its (O, I) view, and writing there writes to it.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smtune.blocks import BlockColumns, BlockIndex, gather, scatter_
from smtune.errors import InputError
from smtune.linear import TakeColumns, additive_block_linear, block_linear
from smtune.sharded import is_sharded
from smtune.tuner.quantised import dense_weight
from smtune.tuner.sharing import SharedInput
from smtune.weights import is_transposed, shape_OI, view_OI

BASE = "__base__"
"""In a mixed batch, the name for a row without an adapter, as PEFT has it."""


class Blocks(nn.Module):
    """The trainable deltas of one adapter in one layer, with their places.

    Attributes:
        weight: (m, l, l) delta of each block, fp32 (fp64 for an fp64 base).
        index: (m, 2) int64, (row, col) of each block. Saved with the weights so that a checkpoint of another plan is
            refused instead of landing on the wrong blocks; the configuration is the truth.
    """

    index: Tensor

    def __init__(self, places: BlockIndex, dtype: torch.dtype, device: torch.device, init_weights: bool) -> None:
        super().__init__()
        self.places = places
        size = places.grid.block_size
        weight = torch.zeros(len(places), size, size, dtype=dtype, device=device)
        if not init_weights:
            nn.init.normal_(weight, std=0.02)
        self.weight = nn.Parameter(weight)
        self.register_buffer("index", self._index().to(device))

    def _index(self) -> Tensor:
        return torch.stack([self.places.rows, self.places.cols], dim=1)

    def forward(self) -> Tensor:
        """The deltas. Called, not read, so that hooks which bring an offloaded tensor in are run."""
        return self.weight

    def become(self, other: Blocks) -> None:
        """Take over the places and values of as many other blocks."""
        self.places = other.places
        with torch.no_grad():  # and not through `.data`: a backward that comes too late is to see it
            self.weight.copy_(other.weight)
        self.index.copy_(other.index)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        index = state_dict.get(prefix + "index")
        expected = self._index()
        if index is None and is_sharded(self.weight):
            state_dict[prefix + "index"] = expected  # see `_save_to_state_dict`
        if index is not None and not torch.equal(index.cpu().to(expected.dtype), expected):
            errors.append(
                f"{prefix}index: the checkpoint trains other blocks than this adapter's plan. Load it with the "
                "adapter_config.json that was saved beside it."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_meta and is_sharded(self.weight):
            # Accelerate fills a model of FSDP2 from one process by names: all that stands here has to be sharded.
            del destination[prefix + "index"]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.index.is_meta:  # then nothing would bring it back
            self.index = self._index()
        return self

    def extra_repr(self) -> str:
        return f"{len(self.places)} blocks of {self.places.grid.block_size}²"


class SMTLayer(BaseTunerLayer):
    """What PEFT asks of a tuner's layer: where its adapters are kept."""

    adapter_layer_names = ("smt_blocks",)
    other_param_names = ()


class MixedRows(threading.local):
    """What this thread's call mixes, while `mixed.mixed_batch` stands.

    Attributes:
        names: the adapter of each row of the caller's batch; None: no mixing.
        copies: how often generation repeats a row.
    """

    def __init__(self) -> None:  # for each thread anew
        self.names: tuple[str, ...] | None = None
        self.copies = 1

    def of(self, x: Tensor) -> Sequence[str]:
        """The adapter of each row of x: generation repeats rows for beams and returned sequences, but in an encoder."""
        assert self.names is not None
        return self.names if len(x) == len(self.names) else [name for name in self.names for _ in range(self.copies)]

    def __reduce__(self) -> tuple:
        return MixedRows, ()  # a copy is of no call


class _Positions:
    """Where the blocks of an index stand in another."""

    def __init__(self, index: BlockIndex, within: BlockIndex) -> None:
        self._host = [within.positions[pair] for pair in index.pairs]
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """(m,) int64 on `device`; copied there once."""
        if device not in self._on:
            with torch.inference_mode(False):  # autograd saves it, even if the first use is in inference
                self._on[device] = torch.tensor(self._host, dtype=torch.int64, device="cpu").to(device)
        return self._on[device]

    def __deepcopy__(self, memo: dict) -> _Positions:
        return self  # immutable

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_on": {}}


class _ActiveSet:
    """The union of some adapters' blocks, and how deltas and originals fit into it.

    Attributes:
        names: the adapters, in order of activation.
        index: the union of their blocks.
        slots: for each adapter, the positions of its blocks in `index`; None where they are all of it, in order.
    """

    def __init__(self, names: tuple[str, ...], places: Sequence[BlockIndex]) -> None:
        self.names = names
        self.index = _union(places)
        self.slots = [_positions(each, self.index) for each in places]
        self._within: tuple[BlockIndex, _Positions | None] | None = None
        self._keeping: BlockIndex | None = None

    def positions(self, all_places: BlockIndex) -> _Positions | None:
        """Those of `index` among all places of the layer; None if the two are the same."""
        if self._within is None or self._within[0] is not all_places:
            self._within = all_places, _positions(self.index, all_places)
        return self._within[1]

    def keeping(self, columns: BlockColumns) -> BlockIndex:
        """`index.keeping(columns)`, made once."""
        if self._keeping is None or self._keeping.columns is not columns:
            self._keeping = self.index.keeping(columns)
        return self._keeping

    def total(self, deltas: Sequence[Tensor]) -> Tensor:
        """Σ of the adapters' deltas over `index`, (U, l, l), a sum in fp32 or wider; differentiable in each."""
        if len(deltas) == 1 and self.slots[0] is None:
            return deltas[0]
        dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas), torch.float32)
        total = deltas[0].new_zeros(len(self.index), *deltas[0].shape[1:], dtype=dtype)
        for slots, delta in zip(self.slots, deltas):
            term = delta.to(dtype)
            total = total + term if slots is None else total.index_add(0, slots.on(term.device), term)
        return total


class SMTLinear(nn.Module, SMTLayer):
    """A linear layer with SMT adapters.

    Args:
        base_layer: an `nn.Linear`, a transformers `Conv1D`, or a quantised layer with `in_features` and `out_features`.
        mode: "auto", "resident" or "additive"; see `SMTConfig`.
        name: the layer's name in the model, for messages.
        is_shared: whether another module has the same weight, such as tied embeddings; blocks written into it would
            act there too, so it is left alone.
    Raises:
        InputError: no linear layer, or resident mode for a weight that is shared or not a dense floating tensor.
    """

    base_layer: Any
    smt_originals: Tensor | None

    def __init__(self, base_layer: Any, mode: str = "auto", name: str = "", is_shared: bool = False) -> None:
        super().__init__()
        if is_shared and mode == "resident":
            raise InputError(
                f"Expected a weight of its own for resident mode. That of {name} is shared with another module: use "
                'mode="additive", or "auto".'
            )
        self.base_layer = base_layer
        self.is_shared = is_shared
        shape = shape_OI(base_layer)
        if shape is None:
            raise InputError(f"Expected a linear layer at {name}. Got a {type(base_layer).__name__}: leave it out.")
        self.out_features, self.in_features = shape
        self._transposed = is_transposed(base_layer)
        self.smt_blocks = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters = []
        self._name = name
        # Resident mode takes the place of the layer's own forward, so it has to be the plain product.
        can_be_resident = self.is_dense and _is_plain(base_layer)
        if mode == "resident" and not can_be_resident:
            raise InputError(
                f"Expected a plain nn.Linear or Conv1D with a dense floating weight for resident mode. Got "
                f'{type(base_layer).__name__} at {name}{_what_is_not_plain(base_layer)}: use mode="additive", or '
                '"auto".'
            )
        is_whole = not is_sharded(getattr(base_layer, "weight", None))
        self.resident = (can_be_resident and is_whole and not is_shared) if mode == "auto" else mode == "resident"

        # The base's blocks over the union of all adapters, (U, l, l) in its dtype or a narrower one that holds them.
        self.register_buffer("smt_originals", None, persistent=False)
        self._union: BlockIndex | None = None
        self._active_sets: dict[tuple[str, ...], _ActiveSet] = {}
        self._shared: SharedInput | None = None
        self.mixed_rows = MixedRows()
        self._is_unloaded = False
        # A quantised layer put aside while its merged copy serves; in a list so that it is no submodule.
        self._put_aside: list[nn.Module] = []

        self.register_state_dict_pre_hook(_restore_base)
        self.register_load_state_dict_post_hook(_take_originals)

    @property
    def is_dense(self) -> bool:
        """Whether the base's weight is an ordinary floating matrix that blocks can be written into."""
        return is_dense(self.base_layer)

    # The adapters -----------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, places: BlockIndex, init_weights: bool = True) -> None:
        """Add an adapter that trains the blocks at `places`."""
        if (places.grid.out_features, places.grid.in_features) != (self.out_features, self.in_features):
            raise InputError(
                f"Expected a plan for a ({self.out_features}, {self.in_features}) weight at {self._name}. Got one for "
                f"({places.grid.out_features}, {places.grid.in_features})."
            )
        self.restore()
        self.smt_blocks[adapter_name] = self.new_blocks(places, init_weights)
        self._set_union()

    def new_blocks(self, places: BlockIndex, init_weights: bool = True) -> Blocks:
        """Deltas for this layer, not yet an adapter of it."""
        device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if device is None:  # PEFT knows the names of some quantised weights only
            kept = itertools.chain(self.base_layer.parameters(), self.base_layer.buffers())
            device = next((tensor.device for tensor in kept), None)
        if device is None or device.type == "meta":
            # The base is elsewhere: `device_map` brings it to its device for each use, where blocks are needed too.
            # FSDP2 under Accelerate tells what is trained by its memory, so there must be some.
            place = getattr(getattr(self.base_layer, "_hf_hook", None), "execution_device", None)
            device = torch.device("cpu" if place is None else place)
        return Blocks(places, dtype, device, init_weights)

    def swap_adapter(self, adapter_name: str, blocks: Blocks | None) -> None:
        """Give an adapter other blocks; where there are as many, its parameter stays the same object.

        Args:
            blocks: made by `new_blocks`; None: the adapter leaves this layer whole.
        """
        self.restore()
        if blocks is None:
            del self.smt_blocks[adapter_name]
        elif adapter_name in self.smt_blocks and len(self._blocks(adapter_name).places) == len(blocks.places):
            self._blocks(adapter_name).become(blocks)
        else:
            self.smt_blocks[adapter_name] = blocks
        self._set_union()
        self.prepare()

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore()
        super().delete_adapter(adapter_name)
        self._set_union()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.restore()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._adapters(self.active_adapters)

    def prepare(self) -> None:
        """Make what a forward of the active adapters looks up, so that one that is traced has nothing to remember."""
        adapters = self._adapters(self.active_adapters)
        device = self._get_base_layer_device_and_dtype(self.base_layer)[0]
        if adapters is None or self._union is None or device is None or device.type == "meta":
            return
        learners = self._learners(adapters)
        learning = learners or adapters
        index = learning.index
        if learners is not None and self._shared is not None:
            index = learners.keeping(self._shared.columns())
        sets = [each for each in (adapters, learning, self._others(adapters, learning)) if each is not None]
        for positions in (adapters.positions(self._union), *(slots for each in sets for slots in each.slots)):
            if positions is not None:
                positions.on(device)
        for each in (self._union, index, *(each.index for each in sets)):
            each.on(device)
        index.columns.on(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for layer in self._put_aside:
            layer._apply(fn)
        self.prepare()
        return self

    def enable_adapters(self, enabled: bool) -> None:
        self.restore()
        super().enable_adapters(enabled)

    def _set_union(self) -> None:
        """Fit `originals` to the adapters there are now, keeping what it knows: W may be merged."""
        old_union, old_originals = self._union, self.smt_originals
        places = self._places()
        self._union = _union(places) if places else None
        self._active_sets.clear()
        self.smt_originals = None
        if self.resident or self.merged:
            self.take_originals(old_union, old_originals)

    def take_originals(self, known_places: BlockIndex | None = None, known: Tensor | None = None) -> None:
        """Copy the base's blocks out of W, which must be the base now, but for those already known.

        Takes nothing from a weight that is elsewhere.
        """
        self.smt_originals = None
        if self._union is None or not self.is_dense or not _is_here(self.base_layer.weight):
            return
        with torch.inference_mode(False):  # kept for later uses, which may be in training
            originals = gather(self._weight_OI(), self._union)
            if known is not None and known_places is not None and known_places.grid == self._union.grid:
                for k, pair in enumerate(self._union.pairs):
                    if pair in known_places.positions:
                        originals[k] = known[known_places.positions[pair]]
            self.smt_originals = _narrowed(originals)

    def _adapters(self, names: Sequence[str]) -> _ActiveSet | None:
        """The named adapters that this layer has, as a set; None if it has none of them."""
        present = tuple(name for name in names if name in self.smt_blocks)
        if not present:
            return None
        if present not in self._active_sets:
            self._active_sets[present] = _ActiveSet(present, [self._blocks(name).places for name in present])
        return self._active_sets[present]

    def _blocks(self, name: str) -> Blocks:
        blocks = self.smt_blocks[name]
        assert isinstance(blocks, Blocks)
        return blocks

    def _places(self) -> list[BlockIndex]:
        return [self._blocks(name).places for name in self.smt_blocks]

    def _deltas(self, adapters: _ActiveSet) -> list[Tensor]:
        return [self._blocks(name)() for name in adapters.names]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the base's dtype, which would round the deltas to 16 bits on loading.
        target = device if device is not None else self._get_base_layer_device_and_dtype(self.base_layer)[0]
        if adapter_name in self.smt_blocks and target is not None and target.type != "meta":
            blocks = self._blocks(adapter_name)
            if blocks.weight.device.type != "meta":
                blocks.to(target)

    # Blocks in the weight ---------------------------------------------------------------------------------------

    def _weight_OI(self) -> Tensor:
        """The dense weight to read and write, outside autograd."""
        return view_OI(self.base_layer.weight.data, self._transposed)

    def _stand(self, adapters: _ActiveSet, total: Tensor) -> None:
        """Write original + total over the adapters' blocks of W, and the originals over those of other adapters.

        Nothing is remembered of what stands in W, so a compiled forward has no state to guard or to change. All goes in
        one write: forwards of the same adapters in other threads write the same, so none sees the base in between.
        """
        values = self._values(adapters, total)
        assert self._union is not None
        assert self.smt_originals is not None
        positions = adapters.positions(self._union)
        places = adapters.index
        if positions is not None:
            places, own = self._union, values
            values = self.smt_originals.to(own.dtype, copy=True)
            values[positions.on(own.device)] = own
        scatter_(self._weight_OI(), places, values)

    def _values(self, adapters: _ActiveSet, total: Tensor) -> Tensor:
        """round(original + total) at the adapters' blocks, (U, l, l) in the weight's dtype."""
        if self.smt_originals is None:
            self.take_originals()
        assert self._union is not None
        assert self.smt_originals is not None
        positions, originals = adapters.positions(self._union), self.smt_originals
        if positions is not None:
            originals = originals[positions.on(originals.device)]
        total = total.detach().to(torch.promote_types(total.dtype, torch.float32))
        return torch.add(total, originals).to(self.base_layer.weight.dtype)

    def restore(self) -> None:
        """Take resident blocks out of W, if there are any: it is the base again, bit for bit."""
        if self.resident and not self.merged and self.smt_originals is not None:
            self._write_originals()

    def _write_originals(self) -> None:
        if getattr(self.base_layer, "_is_replica", False):
            raise InputError(
                "Expected a process for each GPU. Got a replica of nn.DataParallel, out of which resident blocks "
                "cannot be taken: launch with `torchrun` or `accelerate launch`, or show the process one GPU by "
                "CUDA_VISIBLE_DEVICES."
            )
        if _is_converted(self.base_layer):
            raise InputError(
                f"Expected the weight of {self._name} as it was when its adapters were made. It has been quantised, "
                "pruned or parametrised since, perhaps with blocks in it, which cannot be taken out. Convert the base "
                "before its adapters are made, or after they are merged or unloaded."
            )
        if not _is_here(self.base_layer.weight):
            return  # a sharded weight is gathered anew for its next use
        assert self._union is not None
        assert self.smt_originals is not None
        scatter_(self._weight_OI(), self._union, self.smt_originals)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The base weight may be about to change: what stands in it goes first; the originals are taken anew after.
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    # Forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is None and self.mixed_rows.names is not None:
            adapter_names = self.mixed_rows.of(x)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            adapters = None
        elif adapter_names is not None:
            return self._mixed_forward(x, adapter_names, *args, **kwargs)
        else:
            adapters = None if self.merged else self._adapters(self.active_adapters)
        base = self.base_layer
        if self.resident and torch.is_grad_enabled() and base.weight.requires_grad and not self.merged:
            self._check_frozen()
        if adapters is None:
            self.restore()
            return self._hooked(base(x, *args, **kwargs), None)
        deltas = self._deltas(adapters)
        total = adapters.total(deltas)
        learners = self._learners(adapters) if torch.is_grad_enabled() else None
        learning, trained = learners or adapters, total
        if learning is not adapters:
            trained = learning.total(self._deltas(learning))
        index, take = self._saving(learners, x) if learners is not None else (adapters.index, None)
        if not (self.resident and _is_here(base.weight) and _is_plain(base)):
            self.restore()
            y = base(x, *args, **kwargs)
            others = self._others(adapters, learning)
            if others is not None:
                y = additive_block_linear(y, x, others.total(self._deltas(others)), others.index)
            return self._hooked(additive_block_linear(y, x, trained, index, take), None)
        self._stand(adapters, total)
        y = block_linear(x, base.weight, base.bias, trained, index, take, self._transposed)
        return self._hooked(y, adapters, total, deltas)

    def _check_frozen(self) -> None:
        """Raises InputError for an unfrozen weight that has adapters: what it learned at the blocks would be undone."""
        if self.smt_blocks:
            raise InputError(
                f"Expected a frozen weight under resident blocks, active or not. That of {self._name} requires a "
                "gradient, and what it learned would not last where blocks are: freeze it, or train it with "
                '`modules_to_save`, beside blocks of mode="additive", or after `unload`.'
            )

    def _mixed_forward(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Row k of the batch with the adapter `adapter_names[k]`, acting beside the weight in either mode."""
        # These errors are in PEFT's words, which programs that mix LoRA adapters may know.
        if self.merged:
            raise InputError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged: {', '.join(self.merged_adapters)}."
            )
        if len(x) != len(adapter_names):
            raise InputError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. Pass a name, or {BASE!r}, for each row that "
                f"{self._name or 'the layer'} is given."
            )
        self.restore()
        y = self._hooked(self.base_layer(x, *args, **kwargs), None)
        mixed = y.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.smt_blocks:  # else the base, or an adapter that leaves this layer whole
                rows = torch.tensor([k for k, own in enumerate(adapter_names) if own == name], device=y.device)
                blocks = self._blocks(name)
                mixed[rows] = additive_block_linear(y[rows], x[rows], blocks(), blocks.places)
        return mixed

    def _saving(self, learners: _ActiveSet, x: Tensor) -> tuple[BlockIndex, TakeColumns | None]:
        """The learning adapters' blocks with the columns of x that are saved for them, and how those are come by."""
        shared = self._shared
        if shared is None:
            return learners.index, None
        return learners.keeping(shared.columns()), partial(shared.take, self, x)

    def learning(self) -> BlockIndex | None:
        """The blocks that a forward of the active adapters takes gradients for; None if there are none."""
        adapters = self._adapters(self.active_adapters)
        learners = None if adapters is None else self._learners(adapters)
        return None if learners is None else learners.index

    def _learners(self, adapters: _ActiveSet) -> _ActiveSet | None:
        """Those of the adapters that are not frozen; None if all are."""
        return self._adapters([name for name in adapters.names if self._blocks(name).weight.requires_grad])

    def _others(self, adapters: _ActiveSet, learning: _ActiveSet) -> _ActiveSet | None:
        """Those of the adapters that are not among the learning ones; None if all are."""
        return self._adapters([name for name in adapters.names if name not in learning.names])

    def share_input(self, shared: SharedInput | None) -> None:
        """Save the input's columns together with the layers of `shared`, of which this is one; None: alone."""
        self._shared = shared

    @property
    def block_size(self) -> int:
        """l, the same for all adapters of a layer."""
        return self._places()[0].grid.block_size

    def _hooked(
        self, y: Tensor, adapters: _ActiveSet | None, total: Tensor | None = None, deltas: Sequence[Tensor] = ()
    ) -> Tensor:
        """This layer's backward reads W: just before it, let the blocks of its forward's adapters stand there."""
        if not (y.requires_grad and self.resident):
            return y
        merged = [*self.merged_adapters]
        known = [] if torch.compiler.is_compiling() else [(delta, delta._version) for delta in deltas]

        def before_backward(grad_y: Tensor) -> None:
            is_gone = adapters is not None and (self._is_unloaded or not self._still_has(adapters))
            is_changed = any(delta._version != version for delta, version in known)
            if is_gone or is_changed or self.merged_adapters != merged:
                raise RuntimeError(
                    f"Expected the blocks of {self._name} as they were in the forward. They were changed since, by an "
                    "optimizer's step, a merge, an unmerge, an unload, or a deleted or swapped adapter: run the "
                    "backward first, or the forward again."
                )
            if self.merged or self._is_unloaded:
                return
            if adapters is None or total is None:
                self.restore()
            else:
                self._stand(adapters, total)

        y.register_hook(before_backward)
        return y

    def _still_has(self, adapters: _ActiveSet) -> bool:
        """Whether the adapters of a forward are there, with the blocks that they had."""
        now = self._adapters(adapters.names)
        if now is None or now is adapters:
            return now is adapters
        return now.names == adapters.names and now.index.pairs == adapters.index.pairs

    # Merging ----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the weight until `unmerge`. None: the active ones.

        A merged dense weight is the same, bit for bit, as the resident one. A quantised weight is dequantised,
        added to and quantised again, which rounds; `unmerge` puts the quantised original back.

        Adapters without blocks here count as merged too: those that are active act no more, as in the other layers.

        Raises:
            ValueError: as `check_merge`; the weight is then untouched.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        self.check_merge(safe_merge, names)
        adapters = self._adapters([*self.merged_adapters, *names])
        if adapters is not None and not set(names).isdisjoint(adapters.names):
            total = adapters.total(self._deltas(adapters))
            if self.is_dense:
                scatter_(self._weight_OI(), adapters.index, self._values(adapters, total))
            else:
                self._merge_quantised(adapters, total)
        self.merged_adapters.extend(names)

    def check_merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """What `merge` may fail at, without merging; resident blocks step out of the weight.

        Raises:
            InputError: a weight that is shared, not here as a whole, or quantised for good.
            ValueError: with `safe_merge`, if the result is not finite.
        """
        self.restore()
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.smt_blocks and name not in self.merged_adapters]
        if not names:
            return
        if self.is_shared:
            raise InputError(
                f"Expected a weight of its own to merge into. That of {self._name} is shared with another module, "
                "which would be changed too. Give it a copy of the weight before the adapter is made, and set "
                "`tie_word_embeddings=False` in the model's configuration; or keep the adapter unmerged."
            )
        weight: Any = getattr(self.base_layer, "weight", None)
        if (is_sharded(weight) or self.is_dense) and not _is_here(weight):
            raise InputError(
                f"Expected the whole weight to merge into. That of {self._name} is sharded or offloaded: save the "
                "adapter, load it in one process, and merge there."
            )
        backend = getattr(self, "quantization_backend", None)
        if not self.is_dense and (backend is None or not backend.supports_merge):
            raise InputError(
                f"Expected a base that can be quantised again. Got {type(self.base_layer).__name__} at {self._name}: "
                "make it dense with `smtune.dequantize(model)` first, or load the base in 16 or 32 bits."
            )
        if safe_merge and not self._is_finite([*self.merged_adapters, *names]):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: expected "
                f"finite weights at {self._name}, got NaN or infinity. Or is {self.base_layer.weight.dtype} too narrow "
                "for it?"
            )

    def _is_finite(self, names: Sequence[str]) -> bool:
        """Whether the weight would be, or of a quantised one the change, with these adapters merged."""
        adapters = self._adapters(names)
        assert adapters is not None
        values = adapters.total(self._deltas(adapters))
        if self.is_dense:
            values = self._values(adapters, values)
            if not self.resident and not self.merged:
                self.smt_originals = None  # the base may change until the merge
        return bool(torch.isfinite(values).all())

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._put_aside:
            self.base_layer = self._put_aside.pop()
        elif self.smt_originals is not None:
            self._write_originals()
            if not self.resident:
                self.smt_originals = None
        self.merged_adapters.clear()

    def _merge_quantised(self, adapters: _ActiveSet, total: Tensor) -> None:
        # Quantising anew changes a layer's private state beside its weight, so the layer is put aside whole.
        backend: Any = self.quantization_backend
        before = self.base_layer
        original = self._put_aside[0] if self._put_aside else before
        dense = dense_weight(original)
        scatter_(dense, adapters.index, gather(dense, adapters.index) + total.detach())
        self.base_layer = copy.deepcopy(original)
        try:
            backend.set_base_weight(self, dense)
        except BaseException:
            self.base_layer = before
            raise
        self._put_aside = [original]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, dense, shaped as the weight is stored, in the deltas' dtype."""
        blocks = self._blocks(adapter)
        dense = blocks.weight.new_zeros(self.out_features, self.in_features)
        return view_OI(scatter_(dense, blocks.places, blocks.weight.detach()), self._transposed)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with adapters merged, or as it is: the base, or what was merged before.

        PEFT's own would leave resident blocks in it.
        """
        self.restore()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self._is_unloaded = True
        return self.base_layer

    def extra_repr(self) -> str:
        return "resident" if self.resident else "additive"

    def __repr__(self) -> str:
        return "smt." + super().__repr__()


def is_dense(layer: nn.Module) -> bool:
    """Whether the layer's weight is an ordinary dense floating matrix that can be written in place."""
    weight: Any = getattr(layer, "weight", None)
    return (
        isinstance(layer, (nn.Linear, Conv1D))
        and layer._parameters.get("weight") is weight  # not the product of a parametrisation
        and type(weight) in (nn.Parameter, Tensor)
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and weight.dtype.itemsize > 1  # 8-bit floats have scales beside them
        and len(getattr(weight, "ds_shape", weight.shape)) == 2  # ZeRO-3 leaves an empty tensor
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is the product of `nn.Linear` or `Conv1D` and nothing else.

    DeepSpeed hooks every module under ZeRO-3, to gather its weight; that comes by reading it too.
    """
    forward = type(layer).forward
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    return (
        (forward is nn.Linear.forward or forward is Conv1D.forward)
        and "forward" not in layer.__dict__
        and "parametrizations" not in layer._modules
        and all((getattr(hook, "__module__", None) or "").startswith("deepspeed.") for hook in hooks)
    )


def _what_is_not_plain(layer: nn.Module) -> str:
    """Why a layer that looks like `nn.Linear` is none, for a message; "" where its type or weight says it."""
    if not is_dense(layer) or _is_plain(layer):
        return ""
    return ", with a forward that is hooked or replaced, as a device_map over several devices does"


def _is_converted(layer: Any) -> bool:
    """Whether something else stands in the place of a dense weight."""
    return not is_dense(layer) and not is_sharded(layer.weight)


def _is_here(weight: Tensor) -> bool:
    """Whether the whole weight is in memory: not offloaded, nor sharded outside its use."""
    return type(weight.data) is Tensor and weight.device.type != "meta" and weight.numel() > 0


def _narrowed(blocks: Tensor) -> Tensor:
    """The same values in 16 bits where those hold them all: most models are published in 16 bits and loaded in 32."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = blocks.to(dtype)
        if dtype.itemsize < blocks.itemsize and torch.equal(narrow.to(blocks.dtype), blocks):
            return narrow
    return blocks


def _take_originals(layer: SMTLinear, keys: Any) -> None:
    """After a state dict has been loaded; a merged weight keeps the originals it was merged onto."""
    if layer.resident and not layer.merged:
        layer.take_originals()


def _restore_base(layer: SMTLinear, prefix: str, keep_vars: bool) -> None:
    """A state dict holds the base's weights, not the resident ones: deltas on top of those would count twice."""
    layer.restore()


def _positions(index: BlockIndex, within: BlockIndex) -> _Positions | None:
    """Where the blocks of `index` stand in `within`; None if the two are the same."""
    return None if index.pairs == within.pairs else _Positions(index, within)


def _union(places: Sequence[BlockIndex]) -> BlockIndex:
    """All blocks of the indices, in order of row, then column."""
    pairs = sorted({pair for index in places for pair in index.pairs})
    return BlockIndex.from_pairs(places[0].grid, pairs)
