"""Every example runs as it stands, and trains what a loop written out here trains on the same batches."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import smtune
from needs import needs
from smtune.blocks import gather
from smtune.data import Collator, prepare
from smtune.errors import InputError
from smtune.models import load_model, load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 4
MODES = ["resident", "additive"]

pytestmark = [
    # Trainer pins memory unless told not to, which a CPU has no use for.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # TRL and Lightning use names that their dependencies are giving up.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.*"),
]


needs_trl, needs_lightning = (needs(package, f"pip install {package}") for package in ("trl", "lightning"))
needs_bitsandbytes = needs("bitsandbytes", "pip install -e '.[quant]'")


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """The plan an example made, the batches that its collator then made, and what went into and came out of Trainer's
    steps."""

    def __init__(self):
        self.plan = None
        self.collated, self.inputs, self.losses = [], [], []


@pytest.fixture
def record(monkeypatch):
    record = Recorder()
    make_plan, collate, training_step = smtune.make_plan, Collator.__call__, transformers.Trainer.training_step

    def recording_make_plan(*args, **kwargs):
        record.plan = make_plan(*args, **kwargs)
        record.collated.clear()  # what the blocks were scored with
        return record.plan

    def recording_collate(self, rows):
        record.collated.append(collate(self, rows))
        return record.collated[-1]

    def recording_step(self, model, inputs, *args, **kwargs):
        record.inputs.append(dict(inputs))
        loss = training_step(self, model, inputs, *args, **kwargs)
        record.losses.append(loss.item())
        return loss

    monkeypatch.setattr(smtune, "make_plan", recording_make_plan)
    monkeypatch.setattr(Collator, "__call__", recording_collate)
    monkeypatch.setattr(transformers.Trainer, "training_step", recording_step)
    return record


@pytest.fixture
def mode(request, monkeypatch):
    """The mode of every adapter that the example makes."""
    monkeypatch.setattr(smtune, "SMTConfig", partial(smtune.SMTConfig, mode=request.param))
    return request.param


def fresh(base, plan):
    """The base with a new adapter of the plan."""
    return peft.get_peft_model(load_model(base), smtune.SMTConfig(task_type="CAUSAL_LM").with_plan(plan))


def random_plan(base):
    return smtune.make_plan(load_model(base), None, smtune.SMTConfig(criterion="random", budget=6))


def blocks(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def language_loss(model, batch):
    return model(**batch).loss


def twin(model, groups, loss_of=language_loss, *, learning_rate=1e-3, decay=True):
    """AdamW and clipping written out: a step for each group of batches, on the mean of their losses."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step, group in enumerate(groups):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(groups) if decay else 1)
        for batch in group:
            loss = loss_of(model, batch)
            (loss / len(group)).backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(losses, model, twin_losses, twin_model, atol=1e-6):
    """The same losses and the same final blocks, each of which has moved."""
    assert len(losses) == len(twin_losses) >= STEPS
    assert losses == pytest.approx(twin_losses, rel=1e-6)
    ours, theirs = blocks(model), blocks(twin_model)
    assert ours.keys() == theirs.keys()
    for name, block in ours.items():
        assert block.abs().max() > 1e-4
        torch.testing.assert_close(block, theirs[name], rtol=0, atol=atol)


def assert_equal_blocks(model, other):
    ours, theirs = blocks(model), blocks(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# The loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.support("Trainers", row="plain loop", column="{mode}", against="dense training with a gradient mask")
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_plain_loop(base, rows, tmp_path, record, mode):
    smt, losses = load_example("plain_loop").main(base, rows, str(tmp_path), STEPS)

    dense = load_model(base).requires_grad_(False)
    before = {name: dense.get_submodule(name).weight.clone() for name in record.plan.modules}
    for name in record.plan.modules:
        weight = dense.get_submodule(name).weight.requires_grad_()
        mask = torch.zeros_like(weight)
        size = record.plan.block_size
        for row, col in record.plan.index(name).pairs:
            mask[row * size : (row + 1) * size, col * size : (col + 1) * size] = 1
        weight.register_hook(mask.mul)
    dense_losses = twin(dense, [[batch] for batch in record.collated])

    assert losses == pytest.approx(dense_losses, rel=1e-6)
    trained = blocks(smt)
    assert len(trained) == sum(len(record.plan.index(name)) > 0 for name in record.plan.modules)
    for key, block in trained.items():
        name = key.removeprefix("base_model.model.").removesuffix(".smt_blocks.default.weight")
        delta = dense.get_submodule(name).weight.detach() - before[name]
        assert block.abs().max() > 1e-4
        torch.testing.assert_close(block, gather(delta, record.plan.index(name)), rtol=0, atol=1e-6)


@pytest.mark.support("Trainers", row="Accelerate", column="{mode}", against="plain loop, same batches")
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_accelerate_loop(base, rows, tmp_path, record, mode):
    smt, losses = load_example("accelerate_loop").main(base, rows, str(tmp_path), STEPS)
    same = fresh(base, record.plan)
    seen = record.collated[: 2 * STEPS]  # Accelerate reads one batch ahead
    assert_same(losses, smt, twin(same, list(zip(seen[::2], seen[1::2])), decay=False), same)


@needs_lightning
@pytest.mark.support("Trainers", row="Lightning", column="{mode}", against="plain loop, same batches")
@pytest.mark.parametrize("mode", MODES, indirect=True)
@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tensorboardX.*:UserWarning")
def test_lightning(base, rows, tmp_path, record, mode):
    module = load_example("lightning_module")
    losses = []
    step = module.FineTuning.training_step

    def recording_step(self, batch, number):
        loss = step(self, batch, number)
        losses.append(loss.item())
        return loss

    module.FineTuning.training_step = recording_step
    smt, _ = module.main(base, rows, str(tmp_path), STEPS)
    same = fresh(base, record.plan)
    assert_same(losses, smt, twin(same, [[b] for b in record.collated[:STEPS]], decay=False), same)


@needs_lightning
@pytest.mark.support("Trainers", row="Lightning", column="resume", against="a run that was never stopped, bit for bit")
@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tensorboardX.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_lightning_resumes_to_the_same_bits(base, rows, tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    module = load_example("lightning_module")
    plan = random_plan(base)
    data, _ = prepare(rows, load_tokenizer(base), max_length=64, limit=16)  # two batches an epoch

    def fit(folder, checkpoint=None):
        smt = fresh(base, plan).train()
        saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=3, gradient_clip_val=1.0, callbacks=[saving], logger=False, enable_progress_bar=False
        )
        loader = torch.utils.data.DataLoader(data, batch_size=8, collate_fn=Collator(0))
        trainer.fit(module.FineTuning(smt), loader, ckpt_path=checkpoint)
        return smt

    whole = fit(tmp_path / "whole")
    resumed = fit(tmp_path / "resumed", tmp_path / "whole/epoch=1.ckpt")
    assert_equal_blocks(resumed, whole)
    assert all(block.abs().max() > 1e-4 for block in blocks(whole).values())


@needs_lightning
@pytest.mark.filterwarnings("ignore:.*tensorboardX.*:UserWarning")
def test_the_lightning_example_takes_one_device_of_several(base, rows, tmp_path, monkeypatch):
    import lightning
    from lightning.pytorch.accelerators import CPUAccelerator

    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 2))
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *args: None)
    _, trainer = load_example("lightning_module").main(base, rows, str(tmp_path), STEPS)
    assert trainer.num_devices == 1


# Hugging Face's Trainer -----------------------------------------------------------------------------------------------


@pytest.mark.support("Trainers", row="Trainer", column="{mode}", against="plain loop, same batches")
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_hf_trainer(base, rows, tmp_path, record, mode):
    trainer = load_example("hf_trainer").main(base, rows, str(tmp_path), STEPS)
    same = fresh(base, record.plan)
    assert_same(record.losses, trainer.model, twin(same, [[b] for b in record.inputs]), same)


@pytest.mark.support("Trainers", row="Trainer", column="resume", against="a run that was never stopped, bit for bit")
def test_hf_trainer_resumes_to_the_same_bits(base, rows, tmp_path, record):
    main = load_example("hf_trainer").main
    whole = main(base, rows, str(tmp_path / "whole"), STEPS)
    losses, record.losses = record.losses, []

    stopped = tmp_path / "stopped"  # as it stood after the first checkpoint
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{STEPS // 2}", stopped / f"checkpoint-{STEPS // 2}")
    shutil.copy(tmp_path / "whole" / "plan.json", stopped)
    resumed = main(base, rows, str(stopped), STEPS, resume=True)

    assert record.losses == losses[STEPS // 2 :]
    assert_equal_blocks(resumed.model, whole.model)


# TRL ------------------------------------------------------------------------------------------------------------------


@needs_trl
@pytest.mark.support("Trainers", row="SFTTrainer", column="{mode}", against="plain loop, same batches")
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_trl_sft(base, rows, tmp_path, record, mode):
    trainer = load_example("trl_sft").main(base, rows, str(tmp_path), STEPS)
    same = fresh(base, record.plan)
    assert_same(record.losses, trainer.model, twin(same, [[b] for b in record.inputs]), same)


@needs_trl
@pytest.mark.support("Trainers", row="SFTTrainer", column="ready PeftModel", against="SMTConfig passed to it")
def test_sft_trainer_takes_a_ready_model_as_it_takes_a_configuration(base, rows, tmp_path, record):
    import trl
    from datasets import Dataset

    given = load_example("trl_sft").main(base, rows, str(tmp_path / "config"), STEPS)
    arguments = given.args
    ready = trl.SFTTrainer(fresh(base, record.plan), args=arguments, train_dataset=Dataset.from_json(rows))
    losses, record.losses = record.losses, []
    ready.train()
    assert record.losses == losses
    assert_equal_blocks(ready.model, given.model)


@needs_trl
@needs_bitsandbytes
@pytest.mark.parametrize("name", ["trl_sft", "trl_dpo"])
def test_trl_trains_fp32_blocks_on_a_base_of_bitsandbytes(base, rows, pairs, tmp_path, record, name):
    quantised = str(tmp_path / "base")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bits, dtype=torch.float32
    ).save_pretrained(quantised)
    load_tokenizer(base).save_pretrained(quantised)

    example = load_example(name)
    cast, before = example.cast_adapter_dtype, set()

    def recording_cast(model, adapter_name):
        before.update(block.dtype for block in blocks(model).values())
        cast(model, adapter_name)

    example.cast_adapter_dtype = recording_cast
    given = [rows] if name == "trl_sft" else [pairs, None]
    trainer = example.main(quantised, *given, str(tmp_path / "out"), STEPS)
    assert before == {torch.bfloat16}  # if TRL leaves them alone, docs/trainers.md has a section too many
    assert {block.dtype for block in blocks(trainer.model).values()} == {torch.float32}

    same = fresh(quantised, record.plan)
    reference = fresh(quantised, record.plan)  # blocks of zero: the base, which packs no weights beside them
    loss_of = language_loss if name == "trl_sft" else partial(preference_loss, reference)
    losses = twin(same, [[batch] for batch in record.inputs], loss_of)
    assert_same(record.losses, trainer.model, losses, same, NEAR_EPSILON)


@needs_trl
def test_sft_trainer_says_that_the_plan_comes_first(base, rows, tmp_path):
    import trl
    from datasets import Dataset

    with pytest.raises(InputError, match=r"smtune\.make_plan\(model, batches, config\)"):
        trl.SFTTrainer(
            load_model(base),
            args=trl.SFTConfig(str(tmp_path), bf16=False),
            train_dataset=Dataset.from_json(rows),
            peft_config=smtune.SMTConfig(task_type="CAUSAL_LM"),
        )


@needs_trl
@pytest.mark.support("Trainers", row="{name}", column="resume", against="a run that was never stopped, bit for bit")
@pytest.mark.parametrize("name", ["SFTTrainer", "DPOTrainer"])
def test_trl_resumes_to_the_same_bits(base, rows, pairs, tmp_path, record, name):
    import trl
    from datasets import Dataset

    plan = random_plan(base)

    def train(output, resume=False):
        arguments = getattr(trl, name.replace("Trainer", "Config"))(
            str(output), max_steps=STEPS, save_steps=STEPS // 2, learning_rate=1e-3, bf16=False
        )
        trainer = getattr(trl, name)(
            load_model(base),
            args=arguments,
            train_dataset=Dataset.from_json(pairs if name == "DPOTrainer" else rows),
            peft_config=smtune.SMTConfig(task_type="CAUSAL_LM").with_plan(plan),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = train(tmp_path / "whole")
    losses, record.losses = record.losses, []
    checkpoint = f"checkpoint-{STEPS // 2}"
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "stopped" / checkpoint)
    resumed = train(tmp_path / "stopped", resume=True)
    assert record.losses == losses[STEPS // 2 :]
    assert_equal_blocks(resumed, whole)


def log_probabilities(model, batch):
    """Σ log p over each completion, (2B,): the chosen ones, then the rejected."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens = F.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (tokens * batch["completion_mask"][:, 1:]).sum(-1)


def preference_loss(reference, model, batch, beta=0.1):
    """DPO (Rafailov et al. 2023, equation 7)."""
    with torch.no_grad():
        before = log_probabilities(reference, batch)
    chosen, rejected = (log_probabilities(model, batch) - before).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@needs_trl
@pytest.mark.support("Trainers", row="DPOTrainer", column="{mode}", against="DPO written out, the base as reference")
@pytest.mark.parametrize("mode", MODES, indirect=True)
def test_trl_dpo_refers_a_new_adapter_to_the_base(base, pairs, tmp_path, record, mode):
    trainer = load_example("trl_dpo").main(base, pairs, None, str(tmp_path), STEPS)
    reference = load_model(base)
    same = fresh(base, record.plan)
    losses = twin(same, [[b] for b in record.inputs], partial(preference_loss, reference))
    assert_same(record.losses, trainer.model, losses, same, NEAR_EPSILON)
    check_reference(trainer, reference, record.inputs[-1])


@needs_trl
@pytest.mark.support(
    "Trainers", row="DPOTrainer", column="loaded adapter", against="DPO written out, a copy as reference"
)
def test_trl_dpo_refers_a_loaded_adapter_to_its_copy(base, rows, pairs, tmp_path, record):
    load_example("trl_sft").main(base, rows, str(tmp_path / "sft"), STEPS)
    record.inputs.clear()
    record.losses.clear()
    trainer = load_example("trl_dpo").main(base, pairs, str(tmp_path / "sft"), str(tmp_path / "dpo"), STEPS)

    def load(trainable):
        return peft.PeftModel.from_pretrained(load_model(base), tmp_path / "sft", is_trainable=trainable)

    reference, same = load(False), load(True)
    losses = twin(same, [[b] for b in record.inputs], partial(preference_loss, reference))
    assert_same(record.losses, trainer.model, losses, same, NEAR_EPSILON)
    check_reference(trainer, reference, record.inputs[-1])
    with torch.no_grad(), reference.disable_adapter():  # the copy is not the base
        off = log_probabilities(reference, record.inputs[-1])
    assert not torch.allclose(
        off, torch.cat(trainer.compute_ref_log_probs(trainer.model, record.inputs[-1])), atol=1e-3
    )
    saved = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "dpo", is_trainable=True)
    assert_equal_blocks(saved, trainer.model)


NEAR_EPSILON = 2e-5
"""Where DPO's blocks have moved by 4e-3: single gradients are as small as Adam's epsilon, which magnifies rounding. One
of 2,048 entries differs by 1.2e-5 on a Xeon with AMX, less on others."""


def check_reference(trainer, reference, batch):
    """After training, TRL's reference still is what it should be, and the policy is not."""
    with torch.no_grad():
        expected = log_probabilities(reference, batch)
        policy = log_probabilities(trainer.model, batch)
    got = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(policy, expected, atol=1e-3)


# What all have in common ----------------------------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.real_model
@pytest.mark.parametrize(
    "name",
    [
        "plain_loop",
        "hf_trainer",
        pytest.param("trl_sft", marks=needs_trl),
        pytest.param("trl_dpo", marks=needs_trl),
        "accelerate_loop",
        pytest.param("lightning_module", marks=needs_lightning),
    ],
)
def test_the_defaults_run_from_the_command_line(name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--steps", "2", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / ("adapter" if name == "hf_trainer" else "")
    assert "Wrote out" in done.stdout
    moved = [block for key, block in load_model(str(folder)).named_parameters() if ".smt_blocks.default." in key]
    assert sum(block.numel() for block in moved) == 30 * 192**2  # 0.84 % of 134.5 M parameters, in whole blocks
    assert all(block.abs().max() > 0 for block in moved)


@pytest.mark.nightly
def test_accelerate_loop_over_two_processes(base, rows, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = {"model": base, "data": rows, "steps": "2", "output": str(tmp_path / "out")}
    command = [*launch, EXAMPLES / "accelerate_loop.py", *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1  # by the main process
    moved = [block for key, block in load_model(options["output"]).named_parameters() if ".smt_blocks." in key]
    assert sum(len(block) for block in moved) == 6
    assert all(block.abs().max() > 1e-4 for block in moved)


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
