"""SMT on models of other shapes than a decoder's, against the same model trained whole with masked gradients."""

from __future__ import annotations

import copy
from functools import lru_cache

import peft
import pytest
import torch
import transformers
from decoders import TOKENS, VOCABULARY, batches
from dense_twin import check_targets, check_training, twin

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
_VIT = {"image_size": 8, "patch_size": 4, "num_channels": 3}
_DISTILBERT = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
_MODERNBERT = {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "reference_compile": False}

OTHERS = {
    "BART": ("bart", "Seq2SeqLM", _BART),
    "BERT": ("bert", "SequenceClassification", {}),
    "DistilBERT": ("distilbert", "SequenceClassification", _DISTILBERT),
    "ELECTRA": ("electra", "SequenceClassification", {"embedding_size": 16}),
    "ModernBERT": ("modernbert", "MaskedLM", _MODERNBERT),
    "RoBERTa": ("roberta", "MaskedLM", {}),
    "T5": ("t5", "Seq2SeqLM", _T5 | {"decoder_start_token_id": 0}),
    "ViT": ("vit", "ImageClassification", _VIT),
}
"""(model_type, the head's class, what its configuration has beside `_ENCODER`) by name."""


def build(name):
    model_type, head, own = OTHERS[name]
    common = (
        {} if model_type == "t5" else {k: v for k, v in _ENCODER.items() if k != "vocab_size" or model_type != "vit"}
    )
    config = transformers.AutoConfig.for_model(model_type, **(common | own))
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model.eval()


def batches_for(name):
    generator = torch.Generator().manual_seed(1)
    head = OTHERS[name][1]
    if head == "ImageClassification":
        images = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2)]
        return [{"pixel_values": image, "labels": torch.tensor([0, 1])} for image in images]
    made = batches()
    if head == "SequenceClassification":
        return [batch | {"labels": torch.tensor([0, 1])} for batch in made]
    if head == "Seq2SeqLM":
        return [
            batch | {"labels": torch.randint(3, VOCABULARY, (2, TOKENS - 3), generator=generator)} for batch in made
        ]
    return made


cached_twin = lru_cache(maxsize=1)(lambda name: twin(build(name), batches_for(name)))


@pytest.mark.support(
    "Architectures", row="{architecture}", column="{mode}", against="the dense model with masked gradients"
)
@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_other_shape(architecture, mode, tmp_path):
    expected = cached_twin(architecture)
    check_targets(expected.base, expected.plan)
    check_training(expected, mode, tmp_path)


def test_attention_and_cross_attention_are_both_targeted():
    names = [*cached_twin("T5").plan.modules]
    assert len(names) == 9  # q, k, v of the encoder's, the decoder's and the cross attention
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert any("EncDecAttention" in name for name in names)


def test_a_generated_sequence_is_the_merged_models():
    expected = cached_twin("T5")
    model = peft.get_peft_model(copy.deepcopy(expected.base), expected.config.with_plan(expected.plan)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "smt_blocks" in name:
                parameter.normal_(std=0.5)
    arguments = {"input_ids": expected.batches[0]["input_ids"], "max_new_tokens": 6, "do_sample": False}
    base = expected.base.generate(**arguments)
    tuned = model.generate(**arguments)
    assert not torch.equal(base, tuned)
    assert torch.equal(model.merge_and_unload().generate(**arguments), tuned)
