"""The model card of a saved adapter: it says how to load it, and doing so works in a process that knows nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from test_adapter import IDS, logits, make_base, make_config, train
from transformers import LlamaForCausalLM

import smtune
from smtune.tuner import card
from smtune.tuner.card import BEGIN, END, PICTURE

PROGRAM = """
import sys, warnings
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, expected = sys.argv[1:]
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
except KeyError as error:
    assert error.args == ("SMT",), error
else:
    raise AssertionError("PEFT knows SMT by itself now: the card and docs/adr/0009 can go")
assert "smtune" not in sys.modules

code = open(f"{adapter}/README.md").read().split("```python\\n")[1].split("```")[0]
exec(code.replace("path/to/this/adapter", adapter))
with torch.no_grad():
    logits = model.eval()(input_ids=torch.arange(24).view(2, 12)).logits
assert torch.equal(logits, torch.load(expected)), (logits - torch.load(expected)).abs().max()
"""


@pytest.fixture
def model(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    return train(peft.get_peft_model(base, make_config())).eval()


def test_doing_what_the_card_says_loads_the_adapter(tmp_path, model):
    """And without `import smtune` PEFT stops at it: docs/adr/0009."""
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    assert torch.equal(IDS, torch.arange(24).view(2, 12))
    command = [sys.executable, "-c", PROGRAM, tmp_path / "base", tmp_path / "adapter", tmp_path / "logits.pt"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_card_has_the_numbers_and_the_picture(tmp_path, model):
    model.save_pretrained(tmp_path)
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict()["library_name"] == "peft"
    plan = model.peft_config["default"].get_plan()
    assert read.text.index("# Model Card") < read.text.index(BEGIN) < read.text.index(END)
    part = read.text[read.text.index(BEGIN) : read.text.index(END)]
    assert "**`import smtune` before loading it**" in part
    trained = sum(bool(module.rows) for module in plan.modules.values())
    assert f"12 blocks of 16×16 in {trained} of 6 matrices: 3,072 parameters, {3072 / plan.total_params:.3%}" in part
    counts = {kind: sum(len(m.rows) for name, m in plan.modules.items() if f"{kind}_proj" in name) for kind in "qkv"}
    blocks = re.search(r"\| blocks \|(.*)\|", part).group(1).split("|")
    shares = re.search(r"\| share of the trained parameters \|(.*)\|", part).group(1).split("|")
    assert [int(value) for value in blocks] == list(counts.values())
    assert [value.strip() for value in shares] == [f"{count / 12:.1%}" for count in counts.values()]
    assert f"]({PICTURE})" in part  # relative, so that it shows on the hub
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_saving_again_replaces_the_part_and_nothing_else(tmp_path, model):
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    model.add_adapter("second", make_config(seed=1, budget=20))
    model.save_pretrained(tmp_path)
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == text.count("3,072 parameters") == 1
    assert "My own words." in text
    second = (tmp_path / "second" / "README.md").read_text()
    assert "20 blocks of 16×16" in second
    assert (tmp_path / "second" / PICTURE).is_file()
    assert ModelCard.load(tmp_path / "second" / "README.md").data.library_name == "peft"


def test_a_picture_that_fails_does_not_cost_the_save(tmp_path, model, monkeypatch):
    def fail(plan):
        raise OSError("no fonts")

    monkeypatch.setattr(card, "_picture", fail)
    with pytest.warns(UserWarning, match="picture of the adapter's blocks was not drawn: OSError"):
        model.save_pretrained(tmp_path)
    assert PICTURE not in (tmp_path / "README.md").read_text()
    assert "3,072 parameters" in (tmp_path / "README.md").read_text()
    peft.PeftModel.from_pretrained(make_base(), tmp_path)


def test_a_configuration_alone_is_saved_alone(tmp_path):
    plan = smtune.make_plan(make_base(), None, make_config())
    make_config().with_plan(plan).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("task_type", "base", "lines"),
    [
        ("SEQ_CLS", "org/name", ["from transformers import AutoModelForSequenceClassification"]),
        (None, "org/name", ["base = AutoModelForCausalLM.from_pretrained('org/name')"]),
        (None, None, ["base = ...  # the model that it was trained on"]),
    ],
)
def test_how_the_base_is_loaded(tmp_path, task_type, base, lines):
    config = make_config(task_type=task_type, base_model_name_or_path=base)
    card.write_card(tmp_path, config.with_plan(smtune.make_plan(make_base(), None, make_config())))
    text = (tmp_path / "README.md").read_text()
    assert all(f"\n{line}\n" in text for line in ["import smtune", *lines])
