"""The training configuration: every fault at once, each with its key, and what a sound one resolves to."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError

from smtune import InputError, SMTConfig
from smtune.training.config import LEARNING_RATES, SMTSection, TrainConfig, load_config, parse_config

LEAST = {"model": "tiny", "output": "runs/one", "data": {"train": "rows.jsonl"}}


def faults_of(tmp_path, values, overrides=()):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{path}: {len(lines)} fault")
    return [line.strip() for line in lines]


def with_value(key, value):
    """LEAST, and a dotted key with a value."""
    section, _, name = key.rpartition(".")
    if not section:
        return LEAST | {name: value}
    return LEAST | {section: LEAST.get(section, {}) | {name: value}}


def test_the_least_configuration():
    config = parse_config(LEAST).resolved()
    assert config.method == "smt"
    assert config.training.epochs == 3.0
    assert config.training.max_steps is None
    assert config.training.weight_decay == 0.0
    assert config.training.report_to == "none"
    assert config.smt.score_batch_size == config.training.batch_size


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_the_learning_rate_depends_on_the_method_until_it_is_given(method):
    assert parse_config(LEAST | {"method": method}).resolved().training.learning_rate == LEARNING_RATES[method]
    given = parse_config(LEAST | {"method": method, "training": {"learning_rate": 3e-5}})
    assert given.resolved().training.learning_rate == 3e-5


@pytest.mark.parametrize("method", LEARNING_RATES)
@pytest.mark.parametrize("more", [{}, {"smt": {"budget": 3, "shares": {"attention": 1.0}, "policy": "shares"}}])
def test_a_resolved_configuration_reads_back_the_same(tmp_path, method, more):
    config = parse_config(LEAST | more | {"method": method}).resolved()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path).resolved()
    assert again.to_yaml() == config.to_yaml()
    assert again.training == config.training


@pytest.mark.parametrize("text", ["3e-4", "1E5", "+2e-1", "1.0e-4", "2024-01-02", "10", "yes"])
def test_texts_read_back_as_texts(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(parse_config(LEAST | {"output": text}).to_yaml())
    assert load_config(path).output == text


def test_the_defaults_are_those_of_the_adapters_configuration(monkeypatch):
    """Of `SMTConfig`, here and in Axolotl's plug-in, which is imported with Axolotl stood in for."""
    axolotl, plugin = SimpleNamespace(AdapterCapabilities=object, BasePlugin=object), "smtune.integrations.axolotl"
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", axolotl)
    monkeypatch.setitem(sys.modules, plugin, None)  # to be as it was afterwards
    del sys.modules[plugin]
    defaults = {field.name: field.default for field in dataclasses.fields(SMTConfig)}
    for section in (SMTSection, importlib.import_module(plugin).SMTOptions):
        shared = {name: field.default for name, field in section.model_fields.items() if name in defaults}
        assert len(shared) >= 13
        assert shared == {name: defaults[name] for name in shared}


def test_a_plan_reads_back_without_what_it_has_decided(tmp_path):
    config = parse_config(LEAST | {"smt": {"plan": "plan.json", "mode": "additive"}}).resolved()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path).resolved() == config


def test_a_dense_warmup_reads_back_without_what_it_takes_the_place_of(tmp_path):
    config = parse_config(LEAST | {"smt": {"dense_warmup_steps": 3}, "training": {"learning_rate": 3e-5}}).resolved()
    assert config.smt.dense_warmup_learning_rate == 3e-5
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path).resolved() == config
    given = {"dense_warmup_steps": 3, "dense_warmup_learning_rate": 1e-6}
    assert parse_config(LEAST | {"smt": given}).resolved().smt.dense_warmup_learning_rate == 1e-6
    assert parse_config(LEAST).resolved().smt.dense_warmup_learning_rate is None


def test_every_fault_is_told_at_once(tmp_path):
    values = {
        "model": "tiny",
        "methd": "lora",
        "data": {"train": "rows.jsonl", "max_length": "512", "limit": True},
        "smt": {"budget": 1.5, "critereon": "net"},
        "training": {"epochs": 1, "max_steps": 10, "schedule": "cosin"},
    }
    found = faults_of(tmp_path, values, ["training.batch_size=0", "nonsense"])
    keys = sorted(line.partition(":")[0] for line in found)
    assert keys == sorted(
        [
            "'nonsense'",
            "data.limit",
            "data.max_length",
            "methd",
            "output",
            "smt.budget",
            "smt.critereon",
            "training.batch_size",
            "training.max_steps",
            "training.schedule",
        ]
    )


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("methd", "lora", 'methd: unknown key. Did you mean "method"?'),
        ("smt.budgt", 0.1, 'smt.budgt: unknown key. Did you mean "smt.budget"?'),
        ("learning_rate", 0.1, 'learning_rate: unknown key. Did you mean "training.learning_rate"?'),
        ("lr", 0.1, 'lr: unknown key. Did you mean "training.learning_rate"?'),
        ("training.lora_alpha", 8, 'training.lora_alpha: unknown key. Did you mean "lora.alpha"?'),
        ("training.bf16", True, 'training.bf16: unknown key. Did you mean "dtype"?'),
        ("training.xyzzy", 1, "training.xyzzy: unknown key."),
        ("method", "lor", "method: expected 'smt', 'lora', 'dora' or 'full'. Got 'lor'. Did you mean \"lora\"?"),
        ("model", "", "model: expected some text. Got ''."),
        ("model", None, "model: expected a string. Got null."),
        ("data.max_length", "512", "data.max_length: expected an integer. Got '512'."),
        ("data.max_length", 1, "data.max_length: expected at least 2. Got 1."),
        ("data.limit", True, "data.limit: expected an integer. Got true."),
        ("data.train", [], "data.train: expected a string or a list with at least 1 item. Got []."),
        ("lora", 8, "lora: expected keys with values. Got 8."),
        ("lora.dropout", 1.0, "lora.dropout: expected a number below 1. Got 1.0."),
        ("smt.budget", 1.5, "smt.budget: expected budget to be a fraction of all parameters"),
        ("smt.budget", 0, "smt.budget: expected budget to be a fraction of all parameters"),
        ("smt.budget", True, "smt.budget: expected budget to be a fraction of all parameters"),
        ("smt.budget", "0.1", "smt.budget: expected budget to be a fraction of all parameters"),
        ("smt.criterion", "abs_sum", "smt.criterion: expected criterion to be one of abs_of_sum, net"),
        ("smt.criterion", [1], "smt.criterion: expected criterion to be one of abs_of_sum, net"),
        ("smt.policy", "shares", "smt.policy: expected `shares` with the policy"),
        ("smt.policy", "globl", "smt.policy: expected policy to be one of global, per_module, shares, sampled."),
        ("smt.policy", 3, "smt.policy: expected a string. Got 3."),
        (
            "smt.accumulator_device",
            "gpu",
            "smt.accumulator_device: expected a device such as cpu or cuda:0. Got 'gpu'.",
        ),
        ("smt.dense_warmup_steps", 0, "smt.dense_warmup_steps: expected at least 1. Got 0."),
        ("smt.block_size", 0, "smt.block_size: expected at least 1 or 'auto'. Got 0."),
        ("smt.target_modules", 3, "smt.target_modules: expected a list or a string. Got 3."),
        ("smt.shares", {"attention": "much"}, "smt.shares: expected a number. Got 'much'."),
        ("training.learning_rate", 0, "training.learning_rate: expected a number above 0. Got 0."),
        ("training.learning_rate", float("nan"), "training.learning_rate: expected"),
        ("training.gradient_checkpointing", 1, "training.gradient_checkpointing: expected a boolean. Got 1."),
        ("training.seed", -1, "training.seed: expected at least 0. Got -1."),
        ("evaluation.tasks", "boolq", "evaluation.tasks: expected a list. Got 'boolq'."),
    ],
)
def test_one_fault_is_one_line(tmp_path, key, value, fault):
    (line,) = faults_of(tmp_path, with_value(key, value))
    assert line.startswith(fault)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"method": "lora", "smt": {"plan": "plan.json"}}, "smt.plan"),
        ({"smt": {"plan": "plan.json", "budget": 0.01}}, "smt.budget"),
        ({"training": {"epochs": 1, "max_steps": 10}}, "training.max_steps"),
        ({"training": {"warmup_ratio": 0.1, "warmup_steps": 10}}, "training.warmup_steps"),
        ({"smt": {"shares": {"attention": 0.5}}}, "smt.policy"),
        ({"smt": {"policy": "shares", "shares": {"attention": 0.9, "mlp": 0.2}}}, "smt.policy"),
        ({"method": "full", "smt": {"dense_warmup_steps": 3}}, "smt.dense_warmup_steps"),
        ({"smt": {"dense_warmup_steps": 3, "plan": "plan.json"}}, "smt.dense_warmup_steps"),
        ({"smt": {"dense_warmup_steps": 3, "warmup_steps": 3}}, "smt.warmup_steps"),
        ({"smt": {"dense_warmup_steps": 3, "score_batch_size": 3}}, "smt.score_batch_size"),
        ({"smt": {"dense_warmup_steps": 3, "criterion": "activation"}}, "smt.dense_warmup_steps"),
        ({"smt": {"dense_warmup_steps": 3}, "training": {"deepspeed": {}}}, "smt.dense_warmup_steps"),
        ({"smt": {"dense_warmup_steps": 3}, "training": {"fsdp": {}}}, "smt.dense_warmup_steps"),
        ({"smt": {"dense_warmup_learning_rate": 1e-4}}, "smt.dense_warmup_learning_rate"),
    ],
)
def test_faults_between_fields(tmp_path, values, key):
    (line,) = faults_of(tmp_path, LEAST | values)
    assert line.startswith(f"{key}: expected")
    with pytest.raises(ValidationError, match=key):
        TrainConfig(**(LEAST | values))


def test_the_method_is_one_word_beside_the_sections_of_all(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(LEAST | {"smt": {"budget": 3}, "lora": {"rank": 4}}))
    for method in LEARNING_RATES:
        config = load_config(path, [f"method={method}"]).resolved()
        assert config.method == method
        written = yaml.safe_load(config.to_yaml())
        assert ("smt" in written) == (method == "smt")
        assert ("lora" in written) == (method in ("lora", "dora"))


def test_overrides_are_yaml_and_the_last_one_holds(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(LEAST | {"lora": None}))
    overrides = [
        "training.learning_rate=1e-4",
        "training.learning_rate=2e-4",
        "smt.target_modules=[q_proj, v_proj]",
        "data.limit=null",
        "lora.rank=4",
        "training.gradient_checkpointing=true",
        "output=runs/a=b",
    ]
    config = load_config(path, overrides)
    assert config.training.learning_rate == 2e-4
    assert config.smt.target_modules == ["q_proj", "v_proj"]
    assert config.data.limit is None
    assert config.lora.rank == 4
    assert config.training.gradient_checkpointing is True
    assert config.output == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("budget", "'budget': expected an override as key=value"),
        ("=3", "'=3': expected an override as key=value"),
        ("a..b=3", "'a..b=3': expected an override as key=value"),
        ("model.size=3", "model.size: expected a section. Got model, which has a value."),
        ("data.limit=[", "data.limit: expected a value in YAML's notation. Got '['."),
        ("smt.budgt=3", 'smt.budgt: unknown key. Did you mean "smt.budget"?'),
    ],
)
def test_faulty_overrides(tmp_path, override, fault):
    (line,) = faults_of(tmp_path, LEAST, [override])
    assert line.startswith(fault)


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1E+2", 100.0), ("2.5e-5", 2.5e-5), ("1.0e-4", 1e-4)])
def test_powers_of_ten_are_numbers(tmp_path, text, value):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(LEAST) + f"training: {{learning_rate: {text}}}\n")
    assert load_config(path).training.learning_rate == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: tiny\n  output: x\n", r"config\.yaml, line 2: expected YAML"),
        ("model: tiny\noutput: x\nmodel: other\n", r"line 3: .*'model' is given twice, in lines 1 and 3"),
        ("model: [tiny\n", r"config\.yaml, line 2: expected YAML"),
        ("- model\n", r"config\.yaml: expected keys with values.* Got a list"),
        ("model: {{ name }}\n", r"line 1: .*a key that is a list or a mapping"),
        ("model: tiny\noutput: 2024-13-01\n", r"config\.yaml: expected YAML.*month must be"),
        ("model: !!python/name:os.system\n", r"line 1: expected YAML"),
        ("", r"3 faults"),
    ],
)
def test_what_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_the_example_names_every_key():
    text = (Path(__file__).parents[2] / "examples/smollm2-arithmetic.yaml").read_text(encoding="utf-8")
    parts = re.split(r"^(\w+):", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2]))
    assert set(sections) <= set(TrainConfig.model_fields)
    for section, field in TrainConfig.model_fields.items():
        assert re.search(rf"^(# )?{section}:", text, flags=re.MULTILINE), section
        for name in getattr(field.annotation, "model_fields", {}):
            assert re.search(rf"\b{name}\b", sections[section]), f"{section}.{name}"


def test_a_missing_file(tmp_path):
    (tmp_path / "arithmetic.yaml").touch()
    with pytest.raises(InputError, match=r'There is no such file\. Did you mean "arithmetic\.yaml"\?'):
        load_config(tmp_path / "arithmetik.yaml")
    with pytest.raises(InputError, match="There is no such file"):
        load_config(tmp_path / "nowhere" / "arithmetic.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(tmp_path)


RECIPES = [path for path in Path(__file__).parents[2].glob("examples/*.yaml") if path.name != "axolotl.yaml"]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: path.name)
def test_the_examples_are_sound_for_every_method(path):
    for method in LEARNING_RATES:
        assert load_config(path, [f"method={method}"]).method == method
