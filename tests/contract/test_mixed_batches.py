"""`adapter_names=`: every row of a batch with its own adapter, as if it had run alone."""

from __future__ import annotations

import copy
import threading

import peft
import pytest
import torch
from test_adapter import MODES, logits, make_base, make_config, make_trained, same, train, weights, with_two
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from smtune import InputError
from smtune.tuner import SMTLinear

IDS = torch.arange(5 * 12).view(5, 12) * 7 % 128
NAMES = ["default", "__base__", "other", "default", "other"]


def alone(model, name, ids, run):
    """The row by itself, with its adapter or none."""
    if name == "__base__":
        with model.disable_adapter():
            return run(model, ids)
    model.set_adapter(name)
    return run(model, ids)


def forward(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def each_alone(model, run=forward):
    return torch.cat([alone(model, name, IDS[k : k + 1], run) for k, name in enumerate(NAMES)])


@pytest.mark.support("PEFT", row="mixed batches (adapter_names=)", column="{mode}", against="every row run alone")
@pytest.mark.parametrize("mode", MODES)
def test_every_row_is_as_if_it_ran_alone(mode):
    model = with_two(mode)
    base = weights(make_base())
    expected = each_alone(model)
    one_for_all = [alone(model, name, IDS, forward) for name in ("__base__", "default", "other")]
    for others in one_for_all:  # no single adapter would do
        assert (others - expected).abs().max() > 1e-2
    model.set_adapter("default")
    before = logits(model)
    torch.testing.assert_close(forward(model, IDS, adapter_names=NAMES), expected, rtol=1e-5, atol=1e-5)
    assert same(weights(model), base)  # resident blocks stepped out
    assert torch.equal(logits(model), before)  # and back


@pytest.mark.parametrize("mode", MODES)
def test_modules_to_save_and_trained_tokens_of_some_adapters(mode):
    model = make_trained(mode=mode)
    other = make_config(seed=1, mode=mode, modules_to_save=["lm_head"], trainable_token_indices=[3, 7, 14])
    model.add_adapter("other", other)
    model.set_adapter("other")
    train(model)
    model.eval()
    expected = each_alone(model)
    for active in ("default", "other"):
        model.set_adapter(active)
        torch.testing.assert_close(forward(model, IDS, adapter_names=NAMES), expected, rtol=1e-5, atol=1e-5)


GENERATIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams, all returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
}


@pytest.mark.parametrize("how", GENERATIONS)
def test_generation(how):
    def generate(model, ids, **kwargs):
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **GENERATIONS[how], **kwargs)

    model = with_two("resident")
    model.generation_config.eos_token_id = None  # all rows of one length
    assert torch.equal(generate(model, IDS, adapter_names=NAMES), each_alone(model, generate))


def test_an_encoder_is_given_the_rows_before_beams_repeat_them():
    def generate(model, ids, **kwargs):
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=3, **kwargs)

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)).eval()
    targets = {"target_modules": ["q", "k", "v"], "block_size": 8, "budget": 90, "init_weights": False}
    model = peft.get_peft_model(base, make_config(**targets))
    model.add_adapter("other", make_config(seed=1, **targets))
    for layer in model.modules():
        if isinstance(layer, SMTLinear):
            for blocks in layer.smt_blocks.values():
                nn.init.normal_(blocks.weight)
    model.eval()
    assert torch.equal(generate(model, IDS, adapter_names=NAMES), each_alone(model, generate))


def test_beams_of_the_models_own_generation_config():
    def generate(**kwargs):
        mask = torch.ones_like(IDS)
        return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, adapter_names=NAMES, **kwargs)

    model = with_two("resident")
    model.generation_config.eos_token_id = None
    beams, greedy = generate(num_beams=3), generate()
    expected = forward(model, IDS, adapter_names=NAMES)
    model.generation_config.num_beams = 3
    assert torch.equal(generate(), beams)
    assert torch.equal(generate(num_beams=1), greedy)
    model.generation_config.num_beams = 1
    config = GenerationConfig(num_beams=3, max_new_tokens=6, pad_token_id=0)
    by_place = model.generate(IDS, config, attention_mask=torch.ones_like(IDS), adapter_names=NAMES)
    assert torch.equal(by_place, beams)
    model.generation_config.num_beams = 3
    assert torch.equal(forward(model, IDS, adapter_names=NAMES), expected)  # which repeats no rows


@pytest.mark.parametrize("mode", MODES)
def test_another_threads_call_has_its_own_names(mode):
    model = make_trained(mode=mode)
    model.add_adapter("other", make_config(seed=1, mode=mode, modules_to_save=["lm_head"], init_weights=False))
    model.set_adapter("other")
    train(model).eval()
    calls = [{"adapter_names": names} for names in (NAMES, ["other"] * 5)]
    if mode == "additive":  # resident blocks would be written into the weight meanwhile
        calls.append({})
    expected = [forward(model, IDS, **call) for call in calls]
    seen = []

    def interrupt(*_):
        handle.remove()
        for call in calls[1:]:
            thread = threading.Thread(target=lambda call=call: seen.append(forward(model, IDS, **call)))
            thread.start()
            thread.join()

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(interrupt)
    seen.append(forward(model, IDS, **calls[0]))
    assert len(seen) == len(calls)
    for actual, logits_alone in zip([seen[-1], *seen[:-1]], expected):
        assert torch.equal(actual, logits_alone)
    assert all(module.mixed_rows.names is None for module in model.modules() if isinstance(module, SMTLinear))


def test_disabled_adapters_are_disabled_for_every_row():
    model = with_two("resident")
    with model.disable_adapter():
        assert torch.equal(forward(model, IDS, adapter_names=NAMES), forward(make_base(), IDS))


def test_what_is_refused_leaves_nothing_behind():
    model = with_two("resident")
    model.set_adapter("default")
    before = forward(model, IDS)
    for names, message in (
        (["default", "othr", "other", "default", "other"], "non-existing.*: othr.* of default, other or.*Did you mean"),
        (NAMES[:3], r"got 3 and 5 respectively.* each row that model\.layers\.0\.self_attn"),
        ("default", "a list of names, one for each row of the batch. Got 'default'"),
        ([None] * 5, "a list of names"),
    ):
        with pytest.raises(InputError, match=message):
            forward(model, IDS, adapter_names=names)
        assert torch.equal(forward(model, IDS), before)
    with pytest.raises(InputError, match=r"in training mode. Call `model\.eval\(\)`"):
        forward(model.train(), IDS, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(InputError, match="call `unmerge_adapter` first. Merged: default"):
        forward(model, IDS, adapter_names=NAMES)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:.*dynamo_pgo.*:UserWarning")
@pytest.mark.parametrize(
    ("mode", "whole"),
    [
        ("resident", True),
        ("additive", False),
        pytest.param("resident", False, marks=pytest.mark.nightly),
        pytest.param("additive", True, marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_model_mixes_what_it_is_asked_to(mode, whole):
    """Also after a call without names, and after one with others: a graph is for the names it was made with."""
    torch._dynamo.reset()
    model = with_two(mode)
    compiled = copy.deepcopy(model)
    run = compiled
    if whole:
        run = torch.compile(compiled, backend="eager")
    else:
        for layer in compiled.base_model.model.model.layers:
            layer.compile(backend="eager")
    for names in (NAMES, None, NAMES[::-1], NAMES):
        kwargs = {} if names is None else {"adapter_names": names}
        torch.testing.assert_close(forward(run, IDS, **kwargs), forward(model, IDS, **kwargs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.filterwarnings("ignore:.*dynamo_pgo.*:UserWarning")
def test_a_compiled_mixed_batch_before_a_backward_does_no_harm():
    """It takes the blocks out of the weights; the backward writes them again."""

    def gradients(interrupt):
        model = with_two("resident")
        model.set_adapter("default")
        loss = model(input_ids=IDS, labels=IDS).loss
        interrupt(model)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def mixed(model):
        torch._dynamo.reset()
        model.eval()
        forward(torch.compile(model, backend="eager"), IDS, adapter_names=NAMES)

    expected = gradients(lambda model: None)
    assert expected
    assert same(gradients(mixed), expected)
