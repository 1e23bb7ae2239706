"""Liger's kernels beside blocks, in Triton's interpreter: this runs on CPUs.

Not tested: Liger's RMSNorm and SwiGLU, which its interpreter cannot run (liger-kernel 0.8.5, triton 3.7.1).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("liger_kernel")

PROGRAM = """
import sys

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

import smtune

KERNELS = ("rms_norm", "swiglu", "rope", "cross_entropy", "fused_linear_cross_entropy")
LAYERS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def gradients():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
    model = modeling_llama.LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=128, pad_token_id=0))
    config = smtune.SMTConfig(
        block_size=16, budget=20, criterion="random", target_modules=LAYERS, init_weights=False, mode=sys.argv[2]
    )
    model = smtune.get_smt_model(model.train(), config)
    ids = torch.arange(24).view(2, 12)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


expected = gradients()
apply_liger_kernel_to_llama(**dict.fromkeys(KERNELS, False) | {sys.argv[1]: True})
assert (modeling_llama.apply_rotary_pos_emb is liger_rotary_pos_emb) == (sys.argv[1] == "rope")
actual = gradients()
assert len(actual) > 3
for one, other in zip(actual, expected):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
print("agrees")
"""


@pytest.mark.support(
    "Compile and checkpointing",
    row="Liger {kernel}, Triton's interpreter",
    column="{mode}",
    against="the model without: loss and block gradients",
)
@pytest.mark.nightly
@pytest.mark.parametrize("kernel", ["rope", "cross_entropy", "fused_linear_cross_entropy"])
@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_a_step_with_liger(kernel, mode):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, kernel, mode],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip().endswith("agrees"), result.stderr
