"""Which layers of a model blocks are chosen from, and which of q, k and v their rows compute.

`ATTENTION` has an entry for every architecture that is tested (tests/architectures). To add one: its `model_type`, the
last names of its attention's input projections, and for a fused one how q, k and v lie in its rows. The names of
projections that read one input go into `smtune.depth.SHARED_INPUTS` too.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from smtune.blocks import BlockGrid, resolve_block_size
from smtune.errors import InputError, did_you_mean
from smtune.scoring import Target
from smtune.selection import MIXED
from smtune.sharded import is_of_adapter, whole
from smtune.tuner.layer import SMTLinear
from smtune.tuner.quantised import dense_weight, is_quantised
from smtune.weights import is_transposed, shape_OI, view_OI

if TYPE_CHECKING:
    from smtune.tuner.config import SMTConfig

Runs = list[tuple[str, int]]
"""(kind, rows) of a weight from its first row to its last."""
Layout = str | Callable[[Any, int], Runs]
"""The kind of all rows, or a function of the model's configuration and the number of rows, O."""


def _concatenated(heads: int, kv_heads: int, rows: int) -> Runs:
    """All of q, then all of k, then all of v."""
    size = rows // (heads + 2 * kv_heads)
    return [("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)]


def _interleaved(heads: int, kv_heads: int, rows: int) -> Runs:
    """For each head of k and v in turn: the heads of q that it serves, itself of k, itself of v."""
    return _concatenated(heads // kv_heads, 1, rows // kv_heads) * kv_heads


def _thirds(config: Any, rows: int) -> Runs:
    return _concatenated(1, 1, rows)


def _concatenated_groups(config: Any, rows: int) -> Runs:
    return _concatenated(config.num_attention_heads, config.num_key_value_heads, rows)


def _interleaved_heads(config: Any, rows: int) -> Runs:
    return _interleaved(config.num_attention_heads, config.num_attention_heads, rows)


def _gpt2(config: Any, rows: int) -> Runs:
    """In cross-attention q has a projection of its own."""
    if rows == 2 * config.hidden_size:
        return [("k", config.hidden_size), ("v", config.hidden_size)]
    return _thirds(config, rows)


def _gpt_bigcode(config: Any, rows: int) -> Runs:
    if config.multi_query:
        return _concatenated(config.num_attention_heads, 1, rows)
    return _interleaved_heads(config, rows)


def _falcon(config: Any, rows: int) -> Runs:
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        return _interleaved(heads, config.num_kv_heads, rows)
    return _interleaved(heads, 1 if config.multi_query else heads, rows)


def _codegen(config: Any, rows: int) -> Runs:
    """Four parts, one for each TPU core of the original, of q, v, k."""
    return [("q", rows // 12), ("v", rows // 12), ("k", rows // 12)] * 4


def _dbrx(config: Any, rows: int) -> Runs:
    return _concatenated(config.n_heads, config.attn_config.kv_n_heads, rows)


def _mla_down(config: Any, rows: int) -> Runs:
    """DeepSeek's kv_a_proj_with_mqa: the latent that k and v share, then the rotary part of k."""
    return [(MIXED, config.kv_lora_rank), ("k", config.qk_rope_head_dim)]


def _mla_up(config: Any, rows: int) -> Runs:
    """DeepSeek's kv_b_proj: for each head its k without the rotary part, then its v."""
    return [("k", config.qk_nope_head_dim), ("v", config.v_head_dim)] * config.num_attention_heads


def _gated_q(config: Any, rows: int) -> Runs:
    """Qwen3-Next's q_proj: for each head its q, then the gate of its output."""
    size = rows // (2 * config.num_attention_heads)
    return [("q", size), ("gate", size)] * config.num_attention_heads


_SPLIT: dict[str, Layout] = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
_GATED: dict[str, Layout] = _SPLIT | {"q_proj": _gated_q}
_BERT: dict[str, Layout] = {"query": "q", "key": "k", "value": "v"}
_T5: dict[str, Layout] = {"q": "q", "k": "k", "v": "v"}
_MLA: dict[str, Layout] = {
    "q_proj": "q",
    "q_a_proj": "q",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": _mla_down,
    "kv_b_proj": _mla_up,
}

ATTENTION: dict[str, Mapping[str, Layout]] = {
    **dict.fromkeys(
        "afmoe apertus arcee bamba bart bitnet cohere cohere2 cwm diffllama doge dots1 ernie4_5 ernie4_5_moe "
        "exaone4 falcon_h1 flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt_neo "
        "gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan_v1_dense hunyuan_v1_moe jais2 jamba lfm2 "
        "llama llama4_text minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 "
        "olmo_hybrid olmoe opt phi phimoe qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma seed_oss smollm3 "
        "solar_open stablelm starcoder2 vaultgemma vit xglm".split(),
        _SPLIT,
    ),
    "bert": _BERT,
    "bloom": {"query_key_value": _interleaved_heads},
    "codegen": {"qkv_proj": _codegen},
    "dbrx": {"Wqkv": _dbrx},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "distilbert": {"q_lin": "q", "k_lin": "k", "v_lin": "v"},
    "electra": _BERT,
    "falcon": {"query_key_value": _falcon},
    "gpt2": {"c_attn": _gpt2, "q_attn": "q"},
    "gpt_bigcode": {"c_attn": _gpt_bigcode},
    "gpt_neox": {"query_key_value": _interleaved_heads},
    "minicpm3": _MLA,
    "modernbert": {"Wqkv": _thirds},
    "mpt": {"Wqkv": _thirds},
    "openai-gpt": {"c_attn": _thirds},
    "persimmon": {"query_key_value": _interleaved_heads},
    "phi3": {"qkv_proj": _concatenated_groups},
    "qwen3_5_moe_text": _GATED,
    "qwen3_5_text": _GATED,
    "qwen3_next": _GATED,
    "roberta": _BERT,
    "t5": _T5,
    "youtu": _MLA,
}
"""By `model.config.model_type`, the projections that read an attention's input: the default targets (paper §3.1)."""

NO_ATTENTION: dict[str, str] = dict.fromkeys(
    ["falcon_mamba", "mamba", "mamba2"],
    "it has no attention: a state-space mixer reads the weights of some of its linear layers without calling them",
)
"""Architectures without default targets, and why."""

DEFAULT_TARGETS: dict[str, list[str]] = {model_type: list(names) for model_type, names in ATTENTION.items()}
"""Default targets by `model_type`, as PEFT's tuners keep theirs."""


HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""By PEFT's task type, the modules that its model for the task adds to `modules_to_save`."""


def heads(config: SMTConfig) -> tuple[str, ...]:
    """What PEFT's model for the configuration's task trains whole beside the adapter."""
    return HEADS.get(getattr(config.task_type, "value", config.task_type) or "", ())


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
        shape = shape_OI(modules[name])
        if shape is None:
            raise InputError(
                f"Expected target_modules to be linear layers. {name} is a {type(modules[name]).__name__}: "
                "leave it out of target_modules."
            )
        shapes[name] = shape
    block_size = resolve_block_size(config.block_size, shapes)
    return {
        name: Target(
            modules[name],
            BlockGrid(*shapes[name], block_size),
            _dense_weight_of(modules[name]),
            row_kinds(getattr(model, "config", None), name, shapes[name][0], block_size),
        )
        for name in names
    }


def row_kinds(model_config: Any, name: str, out_features: int, block_size: int) -> tuple[str, ...]:
    """What each row of blocks of an attention's projection computes.

    Args:
        model_config: of a transformers model; its `model_type` decides how a fused projection lies.
        name: of the module; its last component counts. In a model that is not in `ATTENTION`, `q_proj`, `k_proj` and
            `v_proj` are taken for what they say.
        out_features, block_size: O and l, of which l is a divisor.
    Returns:
        (R,) of "q", "k", "v", "gate", or "mixed" where a block's rows serve several; empty where that is not known.
    """
    last = name.rpartition(".")[2]
    layout = ATTENTION.get(getattr(model_config, "model_type", ""), _SPLIT).get(last)
    if layout is None:
        return ()
    runs = [(layout, out_features)] if isinstance(layout, str) else layout(model_config, out_features)
    kinds = [kind for kind, length in runs for _ in range(length)]
    if len(kinds) != out_features:  # an unforeseen variant: better no label than a wrong one
        return ()
    blocks = (set(kinds[start : start + block_size]) for start in range(0, out_features, block_size))
    return tuple(block.pop() if len(block) == 1 else MIXED for block in blocks)


def _dense_weight_of(module: Any) -> Callable[[], Tensor]:
    def weight() -> Tensor:
        base = module
        if isinstance(module, SMTLinear):
            module.restore()
            base = module.base_layer
        if is_quantised(base):
            return dense_weight(base)
        if base.weight.is_meta:  # offloaded: Accelerate brings it in
            with align_module_device(base):
                return view_OI(base.weight.detach().clone(), is_transposed(base))
        return view_OI(whole(base.weight), is_transposed(base))

    return weight


def _matches(model: nn.Module, config: SMTConfig) -> list[str]:
    config = copy.copy(config)
    given = [] if config.target_modules is None or isinstance(config.target_modules, str) else config.target_modules
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in NO_ATTENTION:
            raise InputError(
                f"Expected a model with attention. Got model type {model_type!r}: {NO_ATTENTION[model_type]}. Linear "
                f"layers of this model, should you know what to pass as target_modules: {_linear_endings(model)}."
            )
        if model_type not in DEFAULT_TARGETS:
            raise InputError(
                f"Expected target_modules: there is no default for model type {model_type!r}. Linear layers of this "
                f"model: {_linear_endings(model)}. Pass the names of the projections that read an attention's input, "
                f"such as target_modules={_likely_targets(model)}."
            )
        config.target_modules = set(DEFAULT_TARGETS[model_type])
    # PEFT's model for a task trains its head whole, and says so only when it wraps the model.
    config.modules_to_save = [*(config.modules_to_save or ()), *heads(config)] or None
    asked = config.target_modules
    _maybe_include_all_linear_layers(config, model)  # expands "all-linear" in place
    # Inside an adapted layer stand its base layer and its blocks; the layer itself is the target.
    inside = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or isinstance(module, AuxiliaryTrainingWrapper)
    )
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
    _warn_of_idle(matches, config, sorted(given))
    return matches


def _warn_of_idle(matches: list[str], config: SMTConfig, targets: list[str]) -> None:
    """Warn of names and numbers that no match comes from: they may be misspelt, while others hide it."""
    layers = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else layers or ()
    narrower = {f"{name!r} of target_modules": {"target_modules": {name}} for name in targets}
    narrower |= {f"{number} of layers_to_transform": {"layers_to_transform": [number]} for number in numbers}
    idle = []
    for words, changes in narrower.items():
        part = copy.copy(config)
        part.__dict__.update(changes)
        if not any(check_target_module_exists(part, name) for name in matches):
            idle.append(words)
    if idle:
        warnings.warn(f"No layer to choose blocks from matches {', '.join(idle)}. The others are used.", stacklevel=2)


def _linear_endings(model: nn.Module) -> str:
    """The distinct last names of the model's linear layers, in model order."""
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_transposed(module))
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _likely_targets(model: nn.Module) -> list[str]:
    """Linear layers that are an attention's in some architecture we know; the first ones if there are none."""
    known = {name for names in ATTENTION.values() for name in names}
    endings = _linear_endings(model).split(", ")
    return [name for name in endings if name in known] or endings[:3]


def count_parameters(model: nn.Module) -> int:
    """All parameters by logical shape: tied ones once, a quantised weight by its elements, adapters left out."""
    seen: set[int] = set()
    total = 0
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or is_of_adapter(f".{name}.{parameter_name}"):
                continue
            seen.add(id(parameter))
            if not (parameter_name == "weight" and is_quantised(module)):
                total += math.prod(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
        if is_quantised(module):  # packed, or in no parameter at all
            total += math.prod(shape_OI(module) or ())
    return total


def model_name(model: nn.Module) -> str:
    """Where the model came from, as transformers recorded it, or ""."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or ""
