"""The dense warm-up as a function, and scores from gradients that a training has computed anyway."""

from __future__ import annotations

import peft
import pytest
import torch

import smtune
from smtune import InputError, SMTConfig
from smtune.scoring import CRITERIA, FORWARD_ONLY, GradientScores
from smtune.training import dense_warmup
from smtune.tuner.targets import find_targets

SIZE = 16


def make_batches(n=4, rows=2):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 256, (rows, 12), generator=generator)
        labels = ids.clone()
        labels[:, :4] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def config(**changes):
    return SMTConfig(**({"block_size": SIZE, "budget": 8} | changes))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


BY_GRADIENT = [name for name in CRITERIA if name not in FORWARD_ONLY]


@pytest.mark.parametrize(
    ("criterion", "dtype"), [*[(name, "float32") for name in BY_GRADIENT], ("abs_of_sum", "bfloat16")]
)
def test_scores_from_gradients_are_those_from_taps(tiny_llama, criterion, dtype):
    settings = config(criterion=criterion, accumulator_dtype=dtype)
    expected = smtune.score_blocks(tiny_llama, make_batches(), settings)
    scores = GradientScores(find_targets(tiny_llama, settings), criterion=criterion, accumulator_dtype=dtype)
    for batch in make_batches():
        tiny_llama.zero_grad()
        tiny_llama.train()(**batch).loss.backward()
        before = {name: p.grad.clone() for name, p in tiny_llama.named_parameters()}
        scores.add()
        assert all(torch.equal(p.grad, before[name]) for name, p in tiny_llama.named_parameters())
    found = scores.scores()
    assert list(found) == list(expected)
    assert (found.batches_seen, found.block_size, found.criterion) == (4, SIZE, criterion)
    for name, score in found.items():
        tolerance = 1e-4 if dtype == "float32" else 2e-2
        torch.testing.assert_close(score, expected[name], rtol=tolerance, atol=1e-6 * expected[name].max().item())


def test_scores_of_conv1d_speak_of_out_and_in():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=256, resid_pdrop=0.0, attn_pdrop=0.0))
    model.transformer.drop.p = 0.0
    settings = config(target_modules=["c_attn"])
    (batch,) = make_batches(1)
    expected = smtune.score_blocks(model, [batch], settings)
    model.train()(**batch).loss.backward()
    scores = GradientScores(find_targets(model, settings))
    scores.add()
    for name, score in scores.scores().items():
        assert score.shape == (6, 2)
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-7)


def test_scores_need_gradients(tiny_llama):
    targets = find_targets(tiny_llama, config())
    with pytest.raises(InputError, match="Expected a gradient of every targeted layer"):
        GradientScores(targets).add()
    with pytest.raises(InputError, match="reads gradients: abs_of_sum, net, sum_of_abs, fisher. Got 'activation'"):
        GradientScores(targets, criterion="activation")


def test_without_moving_it_is_make_plan(tiny_llama):
    before = snapshot(tiny_llama)
    plan, losses = dense_warmup(tiny_llama, make_batches(), config(), steps=4, learning_rate=0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())
    assert len(losses) == 4
    expected = smtune.make_plan(tiny_llama, make_batches(), config())
    assert {n: m.rows for n, m in plan.modules.items()} == {n: m.rows for n, m in expected.modules.items()}
    assert {n: m.cols for n, m in plan.modules.items()} == {n: m.cols for n, m in expected.modules.items()}
    same = ("block_size", "criterion", "budget", "total_params", "batches_seen", "backward_cost")
    assert [getattr(plan, name) for name in same] == [getattr(expected, name) for name in same]


def test_modes_and_flags_are_put_back_and_everything_is_trained(tiny_llama):
    model = tiny_llama.eval()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.train()
    before = snapshot(model)
    seen = []
    dense_warmup(
        model,
        make_batches(2),
        config(),
        steps=2,
        learning_rate=1e-3,
        on_step=lambda step, loss: seen.append(step),
    )
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.training
    assert not model.model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == [1, 2]


def test_a_step_of_several_batches_is_one_of_all_their_labels(tiny_llama):
    whole, parts = tiny_llama, type(tiny_llama)(tiny_llama.config)
    parts.load_state_dict(whole.state_dict())
    batches = make_batches(2)
    batches[0]["labels"][0] = -100  # the two have unlike numbers of labels
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    sgd = {"steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    _, (loss,) = dense_warmup(whole, [joined], config(), **sgd)
    _, (of_parts,) = dense_warmup(parts, batches, config(), gradient_accumulation_steps=2, **sgd)
    assert of_parts == pytest.approx(loss, rel=1e-6)
    with torch.no_grad():
        means = [parts(**batch).loss.item() for batch in batches]
    assert abs(sum(means) / 2 - parts(**joined).loss.item()) > 1e-4  # the mean of the means is another number


def test_norms_do_not_decay(tiny_llama):
    before = snapshot(tiny_llama)
    kept = {"weight_decay": 10.0, "learning_rate": 1e-2, "steps": 1}
    dense_warmup(tiny_llama, make_batches(1), config(), **kept)
    norm = "model.norm.weight"
    assert (tiny_llama.state_dict()[norm] - before[norm]).abs().max() < 1.1e-2
    weight = "lm_head.weight"
    torch.testing.assert_close(tiny_llama.state_dict()[weight], before[weight] * 0.9, rtol=0, atol=1.1e-2)


def test_products_in_16_bits_leave_the_weights_in_32(tiny_llama):
    dtypes = set()
    tiny_llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: dtypes.add(y.dtype))
    dense_warmup(tiny_llama, make_batches(1), config(), steps=1, learning_rate=1e-3, autocast_dtype=torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in tiny_llama.parameters()} == {torch.float32}


def test_what_is_refused_before_a_step(tiny_llama):
    before = snapshot(tiny_llama)

    def fault(model=tiny_llama, batches=(), settings=None, steps=1):
        with pytest.raises(InputError) as caught:
            dense_warmup(model, batches, settings or config(), steps=steps, learning_rate=1e-3)
        return str(caught.value)

    assert "a positive integer. Got 0" in fault(steps=0)
    assert "a positive integer. Got True" in fault(steps=True)
    assert "Expected 3 batches, 1 a step. Got 0." in fault(steps=3)
    assert "with labels. Got list" in fault(batches=[[1]])
    assert "with labels. Got dict with input_ids" in fault(batches=[{"input_ids": torch.zeros(1, 2)}])
    assert "Got 'activation'" in fault(settings=config(criterion="activation"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())
    half = type(tiny_llama)(tiny_llama.config).to(torch.bfloat16)
    assert "embed_tokens.weight is bfloat16: load the base in float32" in fault(half)
    wrapped = peft.get_peft_model(tiny_llama, config(criterion="random"))
    assert "warm up before wrapping" in fault(wrapped)


def test_a_quantised_layer_is_refused(tiny_llama):
    class Packed(torch.nn.Linear):
        """Has its weight in integers, as bitsandbytes and GPTQ do."""

        def __init__(self):
            super().__init__(64, 64)
            self.weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)

    tiny_llama.model.layers[1].self_attn.o_proj = Packed()
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj is quantised"):
        dense_warmup(tiny_llama, make_batches(1), config(), steps=1, learning_rate=1e-3)
