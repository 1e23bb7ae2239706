"""The contract on SmolLM2-135M, in fp32, with real text: nothing here is a toy shape."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import smtune
from smtune import SMTConfig
from smtune.blocks import gather, scatter_, tile
from smtune.data import Collator, batches, prepare

CONFIG = SMTConfig(block_size=64, budget=0.0084, policy="global", warmup_steps=2)


@pytest.fixture(scope="module")
def text(smollm2_tokenizer):
    """Three batches of two GSM8K problems, loss on the answers."""
    dataset, _ = prepare("mini/math", smollm2_tokenizer, max_length=192, limit=12)
    return list(batches(dataset, Collator(smollm2_tokenizer.pad_token_id), 2, n=3))


@pytest.fixture(scope="module")
def gradients(smollm2, text):
    """Dense gradients of q, k and v for each of the two scoring batches, by plain autograd."""
    model = copy.deepcopy(smollm2).train()
    targets = {n: m.weight for n, m in model.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    return {
        name: torch.stack(per_batch)
        for name, per_batch in zip(
            targets,
            zip(*(torch.autograd.grad(model(**batch).loss, list(targets.values())) for batch in text[:2])),
        )
    }


@pytest.fixture(scope="module")
def plan(smollm2, text):
    return smtune.make_plan(smollm2, text, CONFIG)


@pytest.fixture(scope="module")
def trained(smollm2, text, plan):
    """Three optimizer steps on the plan's blocks; and the logits they give."""
    model = peft.get_peft_model(copy.deepcopy(smollm2), CONFIG.with_plan(plan)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in text:
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def fingerprint(model):
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def logits(model, text):
    with torch.no_grad():
        return model(input_ids=text[0]["input_ids"], attention_mask=text[0]["attention_mask"]).logits


def base_weights(model):
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".smt_blocks." not in name
    }


@pytest.mark.parametrize("criterion", ["abs_of_sum", pytest.param("net", marks=pytest.mark.nightly)])
def test_scores_agree_with_stored_gradients(smollm2, text, gradients, criterion):
    before = fingerprint(smollm2)
    scores = smtune.score_blocks(smollm2, text, SMTConfig(block_size=64, budget=1, warmup_steps=2, criterion=criterion))
    assert fingerprint(smollm2) == before
    assert scores.keys() == gradients.keys()
    for name, score in scores.items():
        summed = tile(gradients[name].sum(0), 64)
        expected = summed.abs().mean((-1, -2)) if criterion == "abs_of_sum" else summed.mean((-1, -2)).abs()
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-4 * expected.max().item())


def test_the_plan_spends_the_budget_and_mostly_on_v(plan, smollm2):
    assert plan.total_params == smollm2.num_parameters() == 134_515_008
    assert plan.n_params <= 0.0084 * 134_515_008 < plan.n_params + 64**2
    in_v = sum(len(module.rows) for name, module in plan.modules.items() if name.endswith("v_proj"))
    assert in_v / plan.n_blocks > 0.5


def test_block_gradients_are_the_dense_ones_at_the_blocks(smollm2, text, plan, gradients):
    model = peft.get_peft_model(copy.deepcopy(smollm2), CONFIG.with_plan(plan)).train()
    model(**text[0]).loss.backward()
    compared = 0
    for name, module in plan.modules.items():
        if module.rows:
            layer = model.get_submodule(f"base_model.model.{name}")
            expected = gather(gradients[name][0], plan.index(name))
            actual = layer.smt_blocks["default"].weight.grad
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert layer.base_layer.weight.grad is None
            compared += 1
    assert compared >= 20


def test_every_unselected_weight_is_bit_identical(smollm2, trained, text):
    logits(trained, text)
    standing = base_weights(trained)
    block_map = trained.peft_config["default"].block_map()
    for name, base in smollm2.named_parameters():
        module = name.removesuffix(".weight")
        expected = base.detach()
        if module in block_map:
            blocks = trained.get_submodule(f"base_model.model.{module}").smt_blocks["default"].weight.detach()
            assert blocks.abs().amax((-1, -2)).min() > 0
            expected = scatter_(expected.clone(), block_map[module], gather(expected, block_map[module]) + blocks)
        assert torch.equal(standing[name], expected), name


def test_disabling_and_unmerging_give_the_base_back(smollm2, trained, text):
    tuned = logits(trained, text)
    base = dict(smollm2.named_parameters())
    with trained.disable_adapter():
        assert all(torch.equal(base_weights(trained)[name], base[name]) for name in base)
        assert torch.equal(logits(trained, text), logits(smollm2, text))
    trained.merge_adapter()
    assert torch.equal(logits(trained, text), tuned)
    trained.unmerge_adapter()
    assert all(torch.equal(base_weights(trained)[name], base[name]) for name in base)
    assert torch.equal(logits(trained, text), tuned)


def test_save_and_load_gives_bit_identical_logits(smollm2, trained, text, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(smollm2), tmp_path)
    assert torch.equal(logits(loaded, text), logits(trained, text))


def test_the_merged_checkpoint_is_a_plain_model(trained, text, tmp_path):
    expected = logits(trained, text)
    merged = copy.deepcopy(trained).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.save((text[0]["input_ids"], text[0]["attention_mask"]), tmp_path / "batch.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads({torch.get_num_threads()})
ids, mask = torch.load({str(tmp_path / "batch.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(input_ids=ids, attention_mask=mask).logits, {str(tmp_path / "logits.pt")!r})
assert "smtune" not in sys.modules and "peft" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")).__name__ == "LlamaForCausalLM"
