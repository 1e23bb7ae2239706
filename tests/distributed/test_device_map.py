"""Scoring a model that `device_map` has spread: here over memory and disk, elsewhere over GPUs."""

from __future__ import annotations

import accelerate
import engines
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import smtune
from smtune.tuner import layer as tuner_layer


@pytest.mark.support("Engines", row="device_map", column="scoring", against="the model in one place")
@pytest.mark.parametrize("criterion", ["abs_of_sum", "net", "activation", "weight"])
def test_the_plan_is_that_of_a_model_in_one_place(tmp_path, criterion):
    engines.write_base(tmp_path)
    expected = smtune.make_plan(engines.load_base(tmp_path), engines.warmup(), engines.smt_config(criterion=criterion))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=torch.float32,
        device_map={**places, "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    plan = smtune.make_plan(model, engines.warmup(), engines.smt_config(criterion=criterion))
    assert plan.to_dict()["modules"] == expected.to_dict()["modules"]
    assert plan.total_params == expected.total_params


def test_blocks_of_an_offloaded_weight_are_where_it_is_used(tmp_path, monkeypatch):
    engines.write_base(tmp_path)
    model = engines.load_base(tmp_path)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = torch.device("cuda", 0)  # as of a model that a GPU has no room for
    asked = []
    original = tuner_layer.Blocks.__init__

    def init(self, places, dtype, device, init_weights):
        asked.append(device)
        original(self, places, dtype, torch.device("cpu"), init_weights)

    monkeypatch.setattr(tuner_layer.Blocks, "__init__", init)
    config = engines.smt_config(criterion="random")
    peft.get_peft_model(model, config.with_plan(smtune.make_plan(model, None, config)))
    assert set(asked) == {torch.device("cuda", 0)}
