"""Small random causal decoders of every architecture that has default targets, by a name for the support table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 48
TOKENS = 10

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_mtp_layers": 0,
}
_LATENT = _EXPERTS | {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
}
_FALCON: dict[str, Any] = {"head_dim": None}
_GPT2 = {"n_inner": 48, "head_dim": None, "num_key_value_heads": None, "intermediate_size": None}

_PER_LAYER = {"activation_sparsity_pattern", "attention_types", "layer_types"}
"""Settings with an entry for each layer; `DECODERS` has them for two."""

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AFMoE": ("afmoe", _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1}),
    "Apertus": ("apertus", {}),
    "Arcee": ("arcee", {}),
    "Bamba": ("bamba", _MAMBA | {"attn_layer_indices": [1, 3]}),
    "BitNet": ("bitnet", {}),
    "BLOOM": ("bloom", {}),
    "CodeGen": ("codegen", _GPT2 | {"rotary_dim": 4}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", {}),
    "CWM": ("cwm", {"layer_types": ["full_attention", "sliding_attention"]}),
    "DBRX": (
        "dbrx",
        {
            "d_model": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "DeepSeek V2": ("deepseek_v2", _LATENT),
    "DeepSeek V2 Lite": ("deepseek_v2", _LATENT | {"q_lora_rank": None}),
    "DeepSeek V3": ("deepseek_v3", _LATENT),
    "DiffLlama": ("diffllama", {}),
    "Doge": ("doge", {}),
    "dots1": ("dots1", _EXPERTS),
    "ERNIE 4.5": ("ernie4_5", {}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", _EXPERTS | {"moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}),
    "EXAONE 4": ("exaone4", {}),
    "Falcon": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, multi-query": ("falcon", _FALCON | {"multi_query": True}),
    "Falcon, multi-head": ("falcon", _FALCON | {"multi_query": False}),
    "Falcon-H1": ("falcon_h1", _MAMBA),
    "FlexOlmo": ("flex_olmo", _EXPERTS),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", {"query_pre_attn_scalar": 8}),
    "Gemma 3n": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Gemma 4": (
        "gemma4_text",
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "GLM": ("glm", {}),
    "GLM 4": ("glm4", {}),
    "GLM 4 MoE": ("glm4_moe", _EXPERTS),
    "GPT-2": ("gpt2", _GPT2),
    "GPTBigCode": ("gpt_bigcode", _GPT2),
    "GPTBigCode, multi-head": ("gpt_bigcode", _GPT2 | {"multi_query": False}),
    "GPT-J": ("gptj", _GPT2 | {"rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}),
    "GPT-NeoX": ("gpt_neox", {}),
    "gpt-oss": ("gpt_oss", _EXPERTS),
    "Granite": ("granite", {}),
    "GraniteMoE": ("granitemoe", _EXPERTS),
    "GraniteMoeHybrid": (
        "granitemoehybrid",
        _EXPERTS | _MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "Helium": ("helium", {}),
    "HunYuan V1": ("hunyuan_v1_dense", {}),
    "HunYuan V1 MoE": ("hunyuan_v1_moe", _EXPERTS | {"moe_topk": 2}),
    "Jais 2": ("jais2", {}),
    "Jamba": (
        "jamba",
        _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "Llama": ("llama", {}),
    "Llama 4": ("llama4_text", _EXPERTS | {"intermediate_size_mlp": 48}),
    "MiniCPM3": ("minicpm3", _LATENT | {"head_dim": None}),
    "MiniMax M2": ("minimax_m2", _EXPERTS),
    "Ministral": ("ministral", {}),
    "Ministral 3": ("ministral3", {}),
    "Mistral": ("mistral", {}),
    "Mixtral": ("mixtral", _EXPERTS),
    "MPT": ("mpt", {"expansion_ratio": 2, "max_seq_len": 64}),
    "nanochat": ("nanochat", {}),
    "Nemotron": ("nemotron", {}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "OLMo Hybrid": ("olmo_hybrid", _LINEAR_ATTENTION),
    "OLMoE": ("olmoe", _EXPERTS),
    "OpenAI GPT": ("openai-gpt", _GPT2),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Persimmon": ("persimmon", {}),
    "Phi": ("phi", {}),
    "Phi-3 and Phi-4": ("phi3", {}),
    "PhiMoE": ("phimoe", _EXPERTS),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", _EXPERTS),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", _EXPERTS),
    "Qwen3-Next": ("qwen3_next", _EXPERTS | _LINEAR_ATTENTION),
    "Qwen3.5": ("qwen3_5_text", _LINEAR_ATTENTION),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", _EXPERTS | _LINEAR_ATTENTION),
    "RecurrentGemma": ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 32}),
    "Seed-OSS": ("seed_oss", {}),
    "SmolLM3": ("smollm3", {}),
    "Solar Open": ("solar_open", _EXPERTS),
    "StableLM": ("stablelm", {}),
    "StarCoder2": ("starcoder2", {}),
    "VaultGemma": ("vaultgemma", {"query_pre_attn_scalar": 8}),
    "Youtu": ("youtu", _LATENT),
    "XGLM": ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
}
"""(model_type, what its configuration has beside `SMALL`) by name."""


def build(name: str, layers: int = 2, **changes: Any) -> torch.nn.Module:
    """A random fp32 model of the named architecture, the same every time, with weights large enough to matter."""
    model_type, own = DECODERS[name]
    settings = SMALL | own | {"num_hidden_layers": layers} | changes
    for key in _PER_LAYER & settings.keys():
        settings[key] = settings[key] * (layers // 2)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in settings.items() if value is not None})
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model.eval()


def batches(count: int = 2, vocabulary: int = VOCABULARY) -> Sequence[dict[str, torch.Tensor]]:
    """Batches of two rows of random tokens, labels included."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(3, vocabulary, (2, TOKENS), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made
