"""What leaves smtune: a merged checkpoint, a GGUF file made of it, and the files that a push to the hub sends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import hub

import smtune
from smtune.cli import run
from smtune.models import load_model

CONVERTER = "SMTUNE_LLAMA_CPP"
"""Names a folder of llama.cpp with `convert_hf_to_gguf.py`; PyPI's source distribution of llama-cpp-python has one."""

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = (".safetensors", ".bin", ".pt")
IDS = torch.arange(24).view(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def make_adapter(model, folder, **options):
    """An adapter of that model with blocks that are not zero; returns what it computes."""
    base = load_model(str(model))
    config = smtune.SMTConfig(criterion="random", init_weights=False, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(folder)
    changed = logits(adapted)
    with adapted.disable_adapter():
        assert (changed - logits(adapted)).abs().max() > 1e-3
    return adapted, changed


@pytest.fixture
def adapter(base, tmp_path):
    """The folder of an adapter and what it computes."""
    _, changed = make_adapter(base, tmp_path / "adapter", budget=12)
    return tmp_path / "adapter", changed


@pytest.mark.support("Serving", row="transformers", column="merged, fp32", against="the adapter, bit for bit")
def test_a_merged_checkpoint_needs_neither_smtune_nor_peft(adapter, tmp_path):
    folder, changed = adapter
    merged = tmp_path / "merged"
    assert run(["merge", str(folder), str(merged)]) == 0
    assert {file.name for file in merged.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(merged.glob("adapter*"))
    program = (
        "import sys; sys.modules['smtune'] = sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"AutoTokenizer.from_pretrained({str(merged)!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(merged)!r}, dtype=torch.float32).eval()\n"
        f"with torch.no_grad(): logits = model(input_ids=torch.arange(24).view(2, 12)).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), changed)


@pytest.mark.support("Serving", row="transformers", column="merged, bf16", against="the blocks rounded to bf16")
def test_a_checkpoint_merged_in_16_bits_is_the_base_and_rounded_blocks(adapter, base, tmp_path):
    folder, _ = adapter
    assert run(["merge", str(folder), str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    expected = load_model(str(base), "bfloat16")
    blocks = load_model(str(folder), "bfloat16")
    touched = 0
    for name, index in blocks.peft_config["default"].block_map().items():
        weight, size = expected.get_submodule(name).weight.data, index.grid.block_size
        delta = blocks.base_model.model.get_submodule(name).get_delta_weight("default")
        for row, col in index.pairs:
            place = slice(row * size, (row + 1) * size), slice(col * size, (col + 1) * size)
            weight[place] = (weight[place].float() + delta[place]).bfloat16()
            touched += 1
    assert touched == 12
    for name, weight in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight), name


class Hub:
    """Stands in for `HfApi`: keeps what would be sent."""

    def __init__(self):
        self.files = {}

    def create_repo(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.fixture
def fake_hub(monkeypatch):
    fake = Hub()
    monkeypatch.setattr(hub, "_hf_api", fake)

    def no_card(*args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("none yet")

    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    return fake


def test_push_to_hub_sends_the_adapter_and_nothing_of_the_base(base, tmp_path, fake_hub):
    adapted, changed = make_adapter(base, tmp_path / "adapter", budget=12)
    adapted.push_to_hub("somebody/adapter")
    assert set(fake_hub.files) == {file.name for file in (tmp_path / "adapter").iterdir()} >= FILES
    assert [name for name in fake_hub.files if name.endswith(WEIGHTS)] == ["adapter_model.safetensors"]
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in fake_hub.files.items():
        (pushed / name).write_bytes(content)
    loaded = peft.PeftModel.from_pretrained(load_model(str(base)), pushed).eval()
    assert torch.equal(logits(loaded), changed)
    # transformers writes a card of its own over PEFT's, which is why docs/serving.md uploads the folder instead.
    assert fake_hub.files["README.md"] != (tmp_path / "adapter/README.md").read_bytes()


def test_a_saved_adapter_holds_what_to_upload(adapter):
    folder, _ = adapter
    files = {file.name for file in folder.iterdir()}
    assert files >= FILES
    assert [name for name in files if name.endswith(WEIGHTS)] == ["adapter_model.safetensors"]
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "import smtune" in card


@pytest.mark.nightly
@pytest.mark.real_model
@pytest.mark.skipif(CONVERTER not in os.environ, reason=f"needs llama.cpp's converter: {CONVERTER}=its folder")
@pytest.mark.support("Serving", row="GGUF (llama.cpp's converter)", column="merged, fp32", against="the adapter")
def test_gguf_of_a_merged_checkpoint(tmp_path):
    _, changed = make_adapter("smollm2-135m", tmp_path / "adapter", budget=0.0084, block_size=64)
    assert run(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    script = Path(os.environ[CONVERTER]) / "convert_hf_to_gguf.py"
    command = [sys.executable, script, tmp_path / "merged", "--outfile", tmp_path / "model.gguf", "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    torch.testing.assert_close(logits(model.eval()), changed, rtol=1e-5, atol=1e-4)
