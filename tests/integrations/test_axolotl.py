"""SMT through Axolotl's own plug-in manager, configuration and trainer, beside a loop written out on the same batches.

Runs in an environment of Axolotl's pins: `make test-axolotl`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import peft
import pytest
import torch
import yaml
from torch import nn

import smtune
from needs import needs
from smtune.data import Collator, batches
from smtune.errors import InputError
from smtune.models import load_model
from tiny_base import write_tiny_base

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

pytestmark = [
    needs("axolotl", "with its pins by make test-axolotl"),
    pytest.mark.filterwarnings("default"),  # axolotl's and its pins' are not ours to answer for
]

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama of random weights and a tokenizer of bytes."""
    return str(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
def configure(base, tmp_path):
    """A configuration as Axolotl's command line loads it, after its own checks."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    rows = [{"instruction": f"{k} + {k % 7}?", "input": "", "output": f"{k + k % 7}"} for k in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def configure(**changes):
        PluginManager.get_instance().plugins.clear()
        values = {
            "base_model": base,
            "plugins": ["smtune.integrations.axolotl.SMTPlugin"],
            "adapter": "smt",
            "smt": {"budget": 12, "block_size": 16, "warmup_steps": 3},
            "datasets": [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "alpaca"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "dataset_num_proc": 1,
            "output_dir": str(tmp_path / "run"),
            "sequence_len": 512,
            "val_set_size": 0,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": STEPS,
            "num_epochs": 1,
            "optimizer": "adamw_torch",
            "learning_rate": 1e-3,
            "lr_scheduler": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "attn_implementation": "sdpa",
            "bf16": False,
            "fp16": False,
            "seed": 0,
        }
        path = tmp_path / "axolotl.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return load_cfg(str(path))

    return configure


@pytest.fixture
def steps(monkeypatch):
    """(inputs, loss, learning rate, arguments) of every step that Trainer takes."""
    import transformers

    seen = []
    training_step = transformers.Trainer.training_step

    def recording_step(self, model, inputs, *args, **kwargs):
        inputs_before = dict(inputs)
        rate = self.lr_scheduler.get_last_lr()[0]
        loss = training_step(self, model, inputs, *args, **kwargs)
        seen.append((inputs_before, loss.item(), rate, self.args))
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", recording_step)
    return seen


def train(cfg):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.train import do_train

    do_train(cfg, TrainerCliArgs())


def blocks(model):
    return {name: p.detach() for name, p in model.named_parameters() if ".smt_blocks." in name}


@pytest.mark.support("Trainers", row="Axolotl", column="{mode}", against="plain loop, same batches")
@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_axolotl_trains_what_a_loop_trains(base, configure, steps, tmp_path, mode):
    train(configure(smt={"budget": 12, "block_size": 16, "warmup_steps": 3, "mode": mode}))
    plan = smtune.Plan.load(tmp_path / "run/plan.json")
    assert plan.n_blocks == 12
    assert plan.batches_seen == 3

    model = peft.get_peft_model(load_model(base), smtune.SMTConfig(task_type="CAUSAL_LM").with_plan(plan)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments = steps[0][-1]
    optimizer = torch.optim.AdamW(
        trained,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    losses = []
    for inputs, _, rate, _ in steps:
        optimizer.param_groups[0]["lr"] = rate
        names = ("input_ids", "attention_mask", "labels")
        loss = model(**{name: inputs[name] for name in names}).loss
        loss.backward()
        if arguments.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(steps) == STEPS
    assert [loss for _, loss, _, _ in steps] == pytest.approx(losses, rel=1e-6)

    from smtune.cli import run  # with Axolotl's typer, the import warns

    assert run(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    saved = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run")
    assert saved.peft_config["default"].mode == mode
    ours, theirs = blocks(saved), blocks(model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].abs().max() > 1e-4
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    merged = load_model(str(tmp_path / "merged")).state_dict()
    for name, weight in saved.merge_and_unload().state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_the_plan_is_that_of_the_training_rows(base, configure, tmp_path):
    cfg = configure(max_steps=1)
    train(cfg)
    from axolotl.common.datasets import load_datasets

    rows = load_datasets(cfg=cfg).train_dataset
    config = smtune.SMTConfig(budget=12, block_size=16, warmup_steps=3)
    plan = smtune.make_plan(load_model(base), batches(rows, Collator(0), 2, n=3), config)
    made = smtune.Plan.load(tmp_path / "run/plan.json")
    assert {name: made.index(name).pairs for name in made.modules} == {
        name: plan.index(name).pairs for name in plan.modules
    }


def test_a_plan_made_before_is_taken(base, configure, steps, tmp_path):
    config = smtune.SMTConfig(criterion="random", seed=5, budget=3, block_size=32)
    plan = smtune.make_plan(load_model(base), None, config)
    plan.save(tmp_path / "mine.json")
    train(configure(smt={"plan": str(tmp_path / "mine.json")}))
    saved = peft.PeftConfig.from_pretrained(tmp_path / "run").get_plan()
    assert saved.to_dict() == plan.to_dict()
    assert not (tmp_path / "run/plan.json").exists()
    assert len(steps) == STEPS


@pytest.mark.support("Trainers", row="Axolotl", column="resume", against="a run that was never stopped, bit for bit")
def test_a_resumed_run_ends_with_the_same_bits(base, configure, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "dataset_prepared_path": str(tmp_path / "prepared")}
    train(configure(output_dir=str(tmp_path / "whole"), **saving))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for name in ("checkpoint-2", "plan.json"):
        (tmp_path / "whole" / name).rename(stopped / name)
    train(configure(output_dir=str(stopped), resume_from_checkpoint=str(stopped / "checkpoint-2"), **saving))
    ours, theirs = (
        blocks(peft.PeftModel.from_pretrained(load_model(base), tmp_path / name)) for name in ("stopped", "whole")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_training_goes_on_from_an_adapter(base, configure, steps, tmp_path):
    train(configure())
    first = blocks(peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run"))
    last = steps[-1][1]
    train(configure(lora_model_dir=str(tmp_path / "run"), output_dir=str(tmp_path / "more")))
    second = blocks(peft.PeftModel.from_pretrained(load_model(base), tmp_path / "more"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert abs(steps[STEPS][1] - last) < 0.5


def test_the_example_is_accepted(base, tmp_path):
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().plugins.clear()
    values = yaml.safe_load((Path(__file__).parents[2] / "examples/axolotl.yaml").read_text())
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(values | {"base_model": base, "output_dir": str(tmp_path)}))
    cfg = load_cfg(str(tmp_path / "axolotl.yaml"))
    assert cfg.adapter == "smt"
    assert cfg.smt.budget == 0.0084
    assert cfg.smt.warmup_steps == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smt": {"budgte": 1}}, "budgte"),
        ({"smt": {"criterion": "abs_of_summ"}}, 'Did you mean "abs_of_sum"'),
        ({"load_in_4bit": True}, "Expected a base in 16 or 32 bits"),
    ],
)
def test_faults_are_told_before_anything_is_loaded(configure, changes, message):
    with pytest.raises(Exception, match=message):
        configure(**changes)


def test_dpo_with_a_plan_made_before(base, configure, steps, tmp_path):
    plan = smtune.make_plan(load_model(base), None, smtune.SMTConfig(criterion="random", budget=3, block_size=32))
    plan.save(tmp_path / "mine.json")
    pairs = [{"prompt": f"{k} + 2 =", "chosen": f" {k + 2}", "rejected": f" {k + 3}"} for k in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    fields = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    formats = {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
    train(
        configure(
            rl="dpo",
            smt={"plan": str(tmp_path / "mine.json")},
            datasets=[
                {"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": fields | formats}
            ],
        )
    )
    assert len(steps) == STEPS
    assert steps[0][1] == pytest.approx(math.log(2))  # the policy starts as its reference
    saved = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run")
    assert saved.peft_config["default"].get_plan().to_dict() == plan.to_dict()
    assert all(block.abs().max() > 1e-4 for block in blocks(saved).values())


def test_preference_training_needs_a_plan(base, configure, tmp_path):
    from axolotl.integrations.base import PluginManager

    cfg = configure()
    plugin = PluginManager.get_instance().plugins["smtune.integrations.axolotl.SMTPlugin"]
    cfg.rl = "dpo"
    assert plugin.load_datasets(cfg) is None
    with pytest.raises(InputError, match="Got no smt.plan"):
        plugin.load_adapter(load_model(base), cfg, config_only=True)
    plan = smtune.make_plan(load_model(base), None, smtune.SMTConfig(criterion="random", budget=3))
    plan.save(tmp_path / "mine.json")
    cfg.smt = {"plan": str(tmp_path / "mine.json")}
    model, config = plugin.load_adapter(load_model(base), cfg, config_only=True)
    assert model is None
    assert config.get_plan().to_dict() == plan.to_dict()


def test_a_plan_is_taken_from_a_run_that_is_resumed(base, configure, tmp_path):
    from axolotl.integrations.base import PluginManager

    def plan(**changes):
        smt = {"budget": 12, "block_size": 16, "criterion": "random", **changes}
        cfg = configure(smt=smt, auto_resume_from_checkpoints=True)
        plugin = PluginManager.get_instance().plugins["smtune.integrations.axolotl.SMTPlugin"]
        plugin.load_datasets(cfg)
        return plugin.load_adapter(load_model(base), cfg, config_only=True)[1].get_plan()

    assert plan(seed=1).n_blocks == 12
    first = plan(budget=5)  # without a checkpoint it is a new run
    assert first.n_blocks == 5
    (tmp_path / "run/checkpoint-2").mkdir()
    assert plan(budget=5, block_size="auto") == first
    with pytest.raises(InputError, match="Got budget 6, not 5; seed 3, not 0: put them back"):
        plan(budget=6, seed=3)
