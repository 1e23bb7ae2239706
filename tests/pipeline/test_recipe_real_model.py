"""The recipe on SmolLM2-135M: the four methods by one word, and a stopped run resumed."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from smtune.models import load_model
from smtune.training import parse_config, read_metrics, train

pytestmark = pytest.mark.real_model


def configure(folder, method, **training):
    return parse_config(
        {
            "model": "smollm2-135m",
            "output": str(folder),
            "method": method,
            "data": {"train": "arithmetic", "limit": 16, "max_length": 128},
            "smt": {"block_size": 64, "warmup_steps": 1},
            "lora": {"rank": 14, "target_modules": ["q_proj", "k_proj", "v_proj"]},
            "training": {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 2, "logging_steps": 1} | training,
        }
    )


@pytest.mark.parametrize(
    "method", ["smt", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("lora", "dora", "full"))]
)
def test_each_method_trains_by_one_word_in_fp32(method, tmp_path):
    class Seen(TrainerCallback):
        def __init__(self):
            self.dtypes = set()

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.dtypes = {p.dtype for p in model.parameters() if p.requires_grad}

    seen = Seen()
    result = train(configure(tmp_path / "run", method), console=Console(quiet=True), callbacks=[seen])
    assert seen.dtypes == {torch.float32}
    assert result.steps == 2
    assert result.total_parameters == 134_515_008
    of_lora, magnitudes = 14 * 80_640, 30 * (576 + 192 + 192)
    expected = {"smt": 275 * 64**2, "lora": of_lora, "dora": of_lora + magnitudes, "full": 134_515_008}
    assert result.trainable_parameters == expected[method]
    assert len(read_metrics(tmp_path / "run/metrics.jsonl")) == 2
    loaded = load_model(str(tmp_path / "run"))
    assert hasattr(loaded, "peft_config") == (method != "full")


@pytest.mark.nightly
def test_a_stopped_run_is_resumed_to_the_same_bits(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    quiet = Console(quiet=True)
    with pytest.raises(KeyboardInterrupt):
        train(configure(tmp_path / "stopped", "smt", save_steps=1), console=quiet, callbacks=[Stop()])
    train(configure(tmp_path / "stopped", "smt", save_steps=1), resume=True, console=quiet)
    train(configure(tmp_path / "whole", "smt", save_steps=1), console=quiet)
    ends = [load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("stopped", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.nightly
def test_a_dense_warm_up_ends_in_a_model_that_transformers_loads(tmp_path):
    """The embeddings are tied: one tensor, trained once and saved once."""
    values = configure(tmp_path / "run", "smt", max_steps=2).model_dump(exclude_unset=True)
    values["smt"] = {"block_size": 64, "dense_warmup_steps": 1, "dense_warmup_learning_rate": 1e-5}
    result = train(parse_config(values), console=Console(quiet=True))
    assert result.total_parameters == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(result.trained, dtype="float32")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    base = load_model("smollm2-135m").state_dict()
    warmed = load_model(str(tmp_path / "run/checkpoints/dense-warm-up")).state_dict()
    n_trained = 0
    for name, weight in model.state_dict().items():
        moved = (warmed[name] != base[name]).float().mean()
        assert moved > 0.4, name  # tokens that no row has do not move
        is_target = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        is_trained = bool((weight != warmed[name]).any())
        assert is_trained <= is_target, name
        n_trained += is_trained
    assert n_trained > 0
