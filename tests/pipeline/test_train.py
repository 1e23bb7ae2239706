"""Training end to end on a tiny model: the run folder, the methods, the order of rows, stopping and resuming."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import yaml
from rich.console import Console
from runs import STEPS, Stop, StopAt, same, trained_tensors, untimed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import smtune
from needs import needs
from smtune import InputError
from smtune.data import prepare
from smtune.evaluation import answer_loss
from smtune.models import load_model, load_tokenizer
from smtune.training import callbacks, dry_run, load_config, lock, read_metrics, run, select_plan, train, trainer
from smtune.training.data import load_data, read_data
from smtune.training.folder import COMPLETE, RunFolder
from smtune.training.lock import LOCK, locked
from smtune.training.model import check_trainable
from smtune.training.result import rename_base
from tiny_base import sums, write_lines

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = ["smt", "lora", "dora", "full"]


class Seen(TrainerCallback):
    """Records the token ids of every batch that the model is given."""

    def __init__(self):
        self.batches = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def hook(module, args, kwargs):
            self.batches.append(kwargs["input_ids"].clone())

        self.handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_everything_in_its_folder(configure, quiet, method):
    config = configure(method=method)
    result = train(config, console=quiet)
    folder = RunFolder(config.output)

    names = {path.name for path in folder.path.iterdir()}
    expected = {"config.yaml", "environment.json", "data.json", "metrics.jsonl", "checkpoints", "result.json"}
    expected |= {"adapter"} if method != "full" else {"model"}
    expected |= {"plan.json", "scoring.json"} if method == "smt" else set()
    assert names == expected
    assert [path.name for path in folder.checkpoints.iterdir()] == ["checkpoint-6"]
    assert (folder.checkpoints / "checkpoint-6" / COMPLETE).is_file()

    assert load_config(folder.config).resolved().to_yaml() == config.resolved().to_yaml()
    environment = json.loads(folder.environment.read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 0
    data = json.loads(folder.data.read_text())
    assert data["n_examples"] == 24
    assert all(len(digest) == 64 for digest in data["sources"].values())

    events = read_metrics(folder.metrics)
    assert [event["step"] for event in events] == [3, 6, 8]
    assert all(event["tokens_per_second"] > 0 for event in events)
    assert events[-1]["loss"] < events[0]["loss"]

    written = json.loads(folder.result.read_text())
    assert written["steps"] == result.steps == STEPS
    assert written["loss"] == events[-1]["loss"]
    assert written["tokens"] == events[-1]["tokens"] > 0
    assert written["trainable_parameters"] == sum(p.numel() for p in load_trainable(method, result, config).values())
    assert 0 < result.trainable_fraction <= 1
    assert result.peak_memory > 2**20


def load_trainable(method, result, config):
    tensors = trained_tensors(result)
    return {name: t for name, t in tensors.items() if method != "smt" or name.endswith("weight")}


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_loads_by_the_folder(configure, quiet, base, method):
    result = train(configure(method=method), console=quiet)
    ids = torch.arange(12).view(1, 12)
    model = load_model(result.folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        untrained = load_model(str(base))(input_ids=ids).logits
    assert isinstance(model, peft.PeftModel) == (method != "full")
    assert not torch.allclose(logits, untrained, atol=1e-3)
    assert load_tokenizer(result.folder).eos_token == "<end>"
    assert not os.path.exists(os.path.join(result.trained, "training_args.bin"))
    with torch.no_grad():
        if method == "full":
            plain = AutoModelForCausalLM.from_pretrained(result.trained, dtype="float32")
        else:
            plain = peft.PeftModel.from_pretrained(load_model(str(base)), result.trained)
        assert torch.equal(plain(input_ids=ids).logits, logits)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_method_sees_the_same_rows_in_the_same_order(configure, quiet, grouped, tmp_path):
    of_many_lengths = [{"prompt": f"{k} " + "+ 1 " * (k % 12), "completion": "= 1"} for k in range(24)]
    file = write_lines(tmp_path / "rows.jsonl", of_many_lengths)

    def batches(method, grouped=grouped):
        seen = Seen()
        overrides = ["training.epochs=2", "training.max_steps=null", f"training.group_by_length={grouped}"]
        overrides.append(f"data.train={file}")
        train(configure(*overrides, method=method, output=f"{method}-{grouped}"), console=quiet, callbacks=[seen])
        return seen.batches

    first = batches("smt")
    assert len(first) == 2 * 24 // 2
    assert not torch.equal(torch.cat([b.flatten() for b in first[:12]]), torch.cat([b.flatten() for b in first[12:]]))
    for method in ["lora", "dora", "full"]:
        other = batches(method)
        assert len(other) == len(first)
        assert all(torch.equal(left, right) for left, right in zip(first, other))
    if grouped:
        sizes = [sum(ids.numel() for ids in seen) for seen in (first, batches("lora", grouped=False))]
        assert sizes[0] < sizes[1]  # of the same rows: there is less padding


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_with_the_same_bits(configure, quiet, method):
    # Three epochs of six steps; stopped in the second. Dropout (LoRA, DoRA) draws from the random state.
    length = ["training.epochs=3", "training.max_steps=null", "training.save_steps=4"]
    whole = train(configure(*length, method=method, output="whole"), console=quiet)
    config = configure(*length, method=method, output="stopped")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(10)])
    folder = RunFolder(config.output)
    assert not folder.is_finished
    assert folder.last_checkpoint().name == "checkpoint-8"

    resumed = train(config, resume=True, console=quiet)
    assert same(trained_tensors(resumed), trained_tensors(whole))
    assert untimed(folder.metrics) == untimed(RunFolder(whole.folder).metrics)
    assert (resumed.steps, resumed.train_loss, resumed.tokens) == (whole.steps, whole.train_loss, whole.tokens)
    assert [part["step"] for part in json.loads(folder.environment.read_text())["resumed"]] == [8]


@pytest.mark.parametrize("method", ["smt", "full"])
def test_rows_held_out(configure, quiet, method):
    """Their loss stands beside the training's; they change nothing of what is trained but that they are not."""
    seen = Seen()
    options = ["data.validation=5", "training.epochs=2", "training.max_steps=null", "training.save_steps=4"]
    config = configure(*options, method=method, output="whole")
    whole = train(config, console=quiet, callbacks=[seen])
    folder = RunFolder(config.output)
    data = json.loads(folder.data.read_text())
    assert data["n_examples"] == 24 - 5
    losses = {event["step"]: event["eval_loss"] for event in read_metrics(folder.metrics) if "eval_loss" in event}
    assert [*losses] == [4, 8, 10]  # two epochs of five steps
    assert (whole.steps, whole.eval_loss) == (10, losses[10])
    assert losses[10] < losses[4]

    tokenizer = load_tokenizer(whole.folder)
    every = [tokenizer.decode(row[row != tokenizer.pad_token_id]) for batch in seen.batches for row in batch]
    counts = [every.count(text) for text in set(every)]
    assert sorted(counts) == [2] * 19 + [3] * 5  # in two epochs; after three steps

    stopped = configure(*options, method=method, output="stopped")
    with pytest.raises(Stop):
        train(stopped, console=quiet, callbacks=[StopAt(6)])
    resumed = train(stopped, resume=True, console=quiet)
    assert same(trained_tensors(resumed), trained_tensors(whole))
    assert untimed(RunFolder(stopped.output).metrics) == untimed(folder.metrics)


def test_a_file_of_rows_held_out(configure, quiet, tmp_path, base):
    file = write_lines(tmp_path / "held-out.jsonl", sums(7)[-4:])
    config = configure(f"data.validation={file}")
    result = train(config, console=quiet)
    model, tokenizer = load_model(result.folder), load_tokenizer(result.folder)
    rows, _ = prepare(str(file), tokenizer, max_length=64)
    assert result.eval_loss == pytest.approx(answer_loss(model, tokenizer, rows, batch_size=2), rel=0.05)
    assert str(file) in json.loads(RunFolder(config.output).data.read_text())["validation"]["sources"]
    assert "Held out: 4" in dry_run(configure(f"data.validation={file}", output="other")).data

    (tmp_path / "run/result.json").unlink()
    write_lines(file, sums(7)[:4])
    with pytest.raises(InputError, match="held-out.jsonl"):
        train(config, resume=True, console=quiet)


def test_pieces_of_a_text_are_not_held_out_from_each_other(configure, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": letter * 50} for letter in "abcdef"])
    overrides = [f"data.train={texts}", "data.validation=2", "data.max_length=16"]
    config = configure(*overrides, method="lora").resolved()
    data = load_data(config, read_data(config))
    trained, held_out = (
        {letter for row in rows["input_ids"] for letter in data.tokenizer.decode(row, skip_special_tokens=True)}
        for rows in (data.rows, data.held_out)
    )
    assert (len(trained), len(held_out)) == (4, 2)
    assert not trained & held_out
    assert len(data.held_out) > 2


def test_a_constant_rate_comes_after_the_warm_up(configure, quiet):
    options = ["training.schedule=constant", "training.warmup_steps=4", "training.warmup_ratio=null"]
    config = configure(*options, "training.learning_rate=0.01", "training.logging_steps=1", method="lora")
    train(config, console=quiet)
    rates = [event["learning_rate"] for event in read_metrics(RunFolder(config.output).metrics) if "loss" in event]
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, *[0.01] * (STEPS - 4)])


def test_not_all_rows_can_be_held_out(configure):
    assert dry_run(configure("data.validation=23")).rows == 1
    with pytest.raises(InputError, match=r"data\.validation: expected fewer rows.*24 of 24"):
        dry_run(configure("data.validation=24"))


def test_resume_with_grouped_rows(configure, quiet):
    options = ["training.epochs=3", "training.max_steps=null", "training.group_by_length=true"]
    whole = train(configure(*options, output="whole"), console=quiet)
    config = configure(*options, output="stopped")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(11)])
    assert same(trained_tensors(train(config, resume=True, console=quiet)), trained_tensors(whole))
    in_any_order = train(configure(*options[:2], output="ungrouped"), console=quiet)
    assert not same(trained_tensors(in_any_order), trained_tensors(whole))


def test_resume_from_any_remains(configure, quiet):
    config = configure()
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(7)])
    folder = RunFolder(config.output)
    plan = folder.plan.read_bytes()
    # A kill while a later checkpoint and a line of metrics are being written.
    torn = folder.checkpoints / "checkpoint-7"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"\0")
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "lo')
    result = train(config, resume=True, console=quiet)
    assert not torn.exists()
    assert folder.plan.read_bytes() == plan
    assert [event["step"] for event in read_metrics(folder.metrics)] == [3, 6, 8]
    assert same(trained_tensors(result), trained_tensors(train(configure(output="whole"), console=quiet)))


def stop(*args):
    raise Stop


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


DAMAGES = [
    ("optimizer.pt", remove, "optimizer.pt is missing"),
    ("optimizer.pt", truncate, "optimizer.pt has"),
    ("adapter_model.safetensors", truncate, "adapter_model.safetensors has"),
    ("trainer_state.json", truncate, "trainer_state.json has"),
    (COMPLETE, truncate, "COMPLETE cannot be read"),
    (COMPLETE, empty, "COMPLETE cannot be read"),  # as a full disk leaves it
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_not_resumed_from(configure, quiet, name, damage, message):
    config = configure(method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(7)])
    folder = RunFolder(config.output)
    checkpoint = folder.checkpoints / "checkpoint-6"
    files = json.loads((checkpoint / COMPLETE).read_text())["files"]
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {COMPLETE}
    damage(checkpoint / name)
    with pytest.raises(InputError, match=f"damaged ones alone:\n  .*checkpoint-6: {message}"):
        train(config, resume=True, console=quiet)
    assert checkpoint.is_dir()
    metrics = folder.metrics.read_text()
    assert [json.loads(line)["step"] for line in metrics.splitlines()] == [3, 6]


def test_an_older_sound_checkpoint_stands_in_for_a_damaged_one(configure, quiet, capsys):
    config = configure("training.keep_checkpoints=2")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(7)])
    folder = RunFolder(config.output)
    (folder.checkpoints / "checkpoint-6" / "optimizer.pt").unlink()
    (folder.checkpoints / "checkpoint-old").mkdir()  # a user's
    result = train(config, resume=True, console=Console(width=200))
    said = "checkpoint-6 is damaged (optimizer.pt is missing) and left out; checkpoint-3 is older and sound."
    assert said in capsys.readouterr().out
    assert same(trained_tensors(result), trained_tensors(train(configure(output="whole"), console=quiet)))
    assert (folder.checkpoints / "checkpoint-old").is_dir()


def test_a_torn_record_is_named(configure, quiet, monkeypatch):
    config = configure(method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    folder = RunFolder(config.output)
    for record, torn in [(folder.data, '{"rows_sha'), (folder.data, "{}"), (folder.environment, "")]:
        whole = record.read_text()
        record.write_text(torn)
        monkeypatch.setattr(run, "load_base", lambda *args: pytest.fail("read the weights first"))
        with pytest.raises(InputError, match=rf"{record.name} as smtune wrote it.*delete it and go on with --resume"):
            train(config, resume=True, console=quiet)
        record.write_text(whole)
        monkeypatch.undo()
    folder.data.unlink()
    folder.environment.unlink()
    result = train(config, resume=True, console=quiet)
    assert {"rows_sha256", "sources"} <= json.loads(folder.data.read_text()).keys()

    for torn in ("", "[]", '{"steps": 8}'):
        folder.result.write_text(torn)
        with pytest.raises(InputError, match=r"result\.json as smtune wrote it"):
            train(config, resume=True, console=quiet)
    folder.result.unlink()
    assert train(config, resume=True, console=quiet).loss == result.loss


def test_a_folder_in_which_another_process_trains_is_left_alone(configure, quiet):
    config = configure(method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(7)])
    folder = RunFolder(config.output)
    torn = folder.checkpoints / "checkpoint-7"  # the other process is writing it
    torn.mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    with locked(folder.path):
        for resume in (False, True):
            with pytest.raises(InputError, match=rf"One \(pid {os.getpid()}\) is at work in {folder.path}"):
                train(config, resume=resume, console=quiet)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    train(config, resume=True, console=quiet)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # since Python 3.12, in a process with threads
def test_the_lock_of_a_killed_process_locks_nobody_out(configure, quiet):
    config = configure(method="lora")
    folder = RunFolder(config.output).path
    process = os.fork()
    if process == 0:
        held = locked(folder)
        held.__enter__()
        os._exit(9)
    os.waitpid(process, 0)
    assert (folder / LOCK).is_file()
    train(config, console=quiet)
    assert not (folder / LOCK).exists()


def test_without_locks_a_run_still_runs(configure, quiet, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    train(configure(method="lora"), console=quiet)


def test_resume_before_the_first_checkpoint_starts_over_with_the_same_plan(configure, quiet, monkeypatch):
    config = configure()
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(2)])
    monkeypatch.setattr(smtune, "make_plan", lambda *args, **kwargs: pytest.fail("scored again"))
    result = train(config, resume=True, console=quiet)
    assert [event["step"] for event in read_metrics(RunFolder(result.folder).metrics)] == [3, 6, 8]


def test_resume_of_a_plan_whose_file_is_gone(configure, quiet, tmp_path):
    given = tmp_path / "plan.json"
    select_plan(configure(), quiet).save(given)
    config = configure(f"smt={{plan: {given}}}")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    given.unlink()
    assert dry_run(config, resume=True).blocks
    assert train(config, resume=True, console=quiet).steps == STEPS


def test_a_base_with_other_weights_is_another_run(configure, quiet, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "own")
    config = configure(f"model={own}", method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    tensors = load_file(own / "model.safetensors")
    next(iter(tensors.values()))[0] += 1
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    for start in (dry_run, partial(train, console=quiet)):
        with pytest.raises(InputError, match=r"run was started with, own \(\w+\)\. Got own \(\w+\): its files"):
            start(config, resume=True)


def test_another_number_of_processes_is_another_run(configure, quiet):
    config = configure()
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    folder = RunFolder(config.output)
    message = r"processes that made the checkpoints in .*run, 1: a step takes rows for each\. Got 2: start 1, or choose"
    with pytest.raises(InputError, match=message):
        dry_run(config, resume=True, processes=2)
    started = json.loads(folder.environment.read_text())
    folder.environment.write_text(json.dumps(started | {"processes": 2}))
    with pytest.raises(InputError, match=r"checkpoints in .*run, 2"):
        train(config, resume=True, console=quiet)
    # Started on two, stopped before there was a checkpoint, and resumed on one.
    folder.environment.write_text(json.dumps(started | {"processes": 2, "resumed": [started | {"step": 0}]}))
    with pytest.raises(InputError, match=message):
        dry_run(config, resume=True, processes=2)
    assert train(config, resume=True, console=quiet).steps == STEPS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bf16": {"enabled": True}}, r'bf16\.enabled of "auto", or False as the recipe has it. Got True'),
        ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu"),
        ({"gradient_clipping": 0.125}, "gradient_clipping"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.125}}}, r"optimizer\.params\.lr"),
        ({"gradient_clipping": "auto", "scheduler": {"type": "WarmupLR"}}, "expected no scheduler"),
    ],
)
def test_deepspeed_against_the_recipe_is_told_first(configure, monkeypatch, tmp_path, values, message):
    monkeypatch.setattr(trainer, "find_spec", lambda name: object())
    config = configure(f"training.deepspeed={json.dumps(values)}", method="lora").resolved()
    with pytest.raises(InputError, match=message):
        trainer.check_engine(config, processes=2)
    (tmp_path / "launcher.json").write_text(json.dumps(values))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "launcher.json"))
    with pytest.raises(InputError, match=message):
        trainer.check_engine(configure(method="lora").resolved())


def test_a_launchers_file_of_deepspeed_must_clip_as_the_recipe(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "launcher.json"))
    (tmp_path / "launcher.json").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(InputError, match=r'expected "gradient_clipping": "auto"'):
        trainer.check_engine(configure(method="lora").resolved())
    for example in sorted((EXAMPLES / "configs").glob("*.json")):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(example))
        trainer.check_engine(configure(method="lora").resolved())


@needs("deepspeed", "pip install -e '.[distributed]'")
def test_a_launchers_zero_3_is_there_again_after_weights_were_loaded_whole():
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    by_launcher = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    arguments = SimpleNamespace(deepspeed_plugin=SimpleNamespace(dschf=by_launcher))
    with trainer.whole_weights(arguments):
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()


def test_fsdp_is_heard_with_its_prefix(configure):
    for prefix in ("", "fsdp_"):
        config = configure(f"training.fsdp={{{prefix}cpu_ram_efficient_loading: true}}", method="lora")
        assert trainer.loads_on_first(config)
    assert not trainer.loads_on_first(configure(method="lora"))


def test_a_launchers_precision_is_refused(configure, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(InputError, match=r"launch with --mixed_precision no"):
        trainer.check_engine(configure(method="lora").resolved())
    trainer.check_engine(configure("dtype=bfloat16", method="full").resolved())
    trainer.check_engine(configure("dtype=bfloat16", method="lora").resolved())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # under which the frozen weights would be widened
    with pytest.raises(InputError, match=r"launch with --mixed_precision no"):
        trainer.check_engine(configure("dtype=bfloat16", method="lora").resolved())


def test_deepspeed_without_a_launcher_is_told_first(configure, quiet, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    config = configure("training.deepspeed={}", method="lora")
    assert dry_run(config, processes=1).steps == STEPS
    with monkeypatch.context() as patch:
        patch.setattr(run, "read_data", lambda config: pytest.fail("went on"))
        patch.setattr(run, "training_arguments", lambda *args: pytest.fail("went on"))
        for start in (dry_run, partial(train, console=quiet)):
            with pytest.raises(InputError, match=r"training\.deepspeed: expected a launcher.*Got none.*--nproc 1"):
                start(config)
        patch.setenv("LOCAL_RANK", "0")
        trainer.check_engine(config)
    result = train(configure(method="lora"), console=quiet)
    RunFolder(result.folder).config.write_text(config.resolved().to_yaml())
    assert train(config, resume=True, console=quiet) == result  # finished: nothing is to be started


def test_metrics_are_on_the_disk_before_their_checkpoint_is_complete(configure, quiet, monkeypatch):
    config = configure(method="lora")
    folder = RunFolder(config.output)
    on_disk, seen = {}, []

    def fsync(handle, original=os.fsync):
        original(handle)
        for path in (folder.metrics, folder.path):  # what is in the file, and its name
            if folder.metrics.is_file() and os.path.samestat(os.fstat(handle), path.stat()):
                on_disk[path] = [event["step"] for event in read_metrics(folder.metrics)]

    def mark_complete(checkpoint, original=callbacks.mark_complete):
        seen.append((checkpoint.name, on_disk.get(folder.metrics), on_disk.get(folder.path)))
        original(checkpoint)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(callbacks, "mark_complete", mark_complete)
    train(config, console=quiet)
    assert seen == [("checkpoint-3", [3], [3]), ("checkpoint-6", [3, 6], [3, 6])]
    assert on_disk[folder.metrics] == [3, 6, 8]


def test_metrics_that_are_lost_are_remarked(configure, capsys):
    config = configure(method="lora")
    console = Console(width=200)
    with pytest.raises(Stop):
        train(config, console=console, callbacks=[StopAt(7)])
    folder = RunFolder(config.output)
    folder.metrics.write_text(folder.metrics.read_text().splitlines(keepends=True)[0])
    assert train(config, resume=True, console=console).steps == STEPS
    assert "metrics.jsonl ends at step 3, and the checkpoint is of step 6: the losses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name", "from_call"),
    [
        (smtune.Plan, "save", 1),
        (Trainer, "_save_rng_state", 1),
        (Trainer, "_save_rng_state", 2),
        (run.RunResult, "__init__", 1),
        (PreTrainedTokenizerFast, "save_pretrained", 1),
    ],
    ids=["plan", "first checkpoint", "second checkpoint", "result", "adapter"],
)
def test_a_kill_while_writing_loses_nothing(configure, quiet, monkeypatch, owner, name, from_call):
    calls = 0

    def die(*args, **kwargs):
        nonlocal calls
        calls += 1
        return original(*args, **kwargs) if calls < from_call else stop()

    original = getattr(owner, name)
    config = configure()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Stop):
            train(config, console=quiet)
    result = train(config, resume=True, console=quiet)
    whole = train(configure(output="whole"), console=quiet)
    assert same(trained_tensors(result), trained_tensors(whole))
    assert untimed(RunFolder(result.folder).metrics) == untimed(RunFolder(whole.folder).metrics)
    assert not [path for path in RunFolder(result.folder).path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (Trainer, "_save_rng_state", OSError(errno.ENOSPC, "No space left on device")),
        (
            Trainer,
            "_save_rng_state",
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        ),
        (
            PreTrainedTokenizerFast,
            "save_pretrained",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        (
            PreTrainedTokenizerFast,
            "save_pretrained",
            SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
        ),
    ],
    ids=["system", "torch", "safetensors", "quota"],
)
def test_a_full_disk_is_told_and_half_written_folders_are_removed(configure, quiet, monkeypatch, owner, name, error):
    def fail(*args, **kwargs):
        raise error

    config = configure(method="lora")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(InputError, match=rf"room for {config.output}. The disk is full.*bytes left.*--resume"):
            train(config, console=quiet)
    folder = RunFolder(config.output)
    assert all((path / COMPLETE).is_file() for path in folder.checkpoints.iterdir())
    assert not list(folder.path.glob(".*"))
    assert train(config, resume=True, console=quiet).steps == STEPS


def test_shared_memory_is_no_disk(configure, quiet, monkeypatch):
    text = "Error while creating shared memory segment /dev/shm/nccl-1, error: No space left on device (28)"

    def fail(*args, **kwargs):
        raise RuntimeError(text)

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(RuntimeError, match="/dev/shm/nccl-1"):
        train(configure(method="lora"), console=quiet)


def test_resume_of_a_finished_run_does_nothing(configure, capsys):
    config = configure(method="lora")
    result = train(config, console=Console(quiet=True))
    again = train(config, resume=True, console=Console(width=200))
    assert again == result
    assert "finished already" in capsys.readouterr().out


def test_a_used_folder_is_refused(configure, quiet, tmp_path, rows):
    config = configure(method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    with pytest.raises(InputError, match=r"holds a run that was stopped: continue it with --resume"):
        train(config, console=quiet)
    changed = configure("training.learning_rate=1e-3", "data.max_length=32", method="lora")
    with pytest.raises(InputError) as caught:
        train(changed, resume=True, console=quiet)
    assert "training.learning_rate: 0.01 before, 0.001 now" in str(caught.value)
    assert "data.max_length: 64 before, 32 now" in str(caught.value)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        train(configure(output="other"), console=quiet)

    text = rows.read_text()
    try:
        rows.write_text(text.replace("1 + 1", "1 + 2"))
        with pytest.raises(InputError, match=r"other rows from .*sums\.jsonl"):
            train(config, resume=True, console=quiet)
    finally:
        rows.write_text(text)


def test_a_start_that_came_to_nothing_leaves_its_folder_free(configure, quiet, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "score", stop)
        with pytest.raises(Stop):
            train(configure("training.seed=1"), console=quiet)
    config = configure("data.limit=20")
    folder = RunFolder(config.output)
    assert folder.is_begun
    dry_run(config)
    result = train(config, console=quiet)
    assert load_config(folder.config).resolved().to_yaml() == config.resolved().to_yaml()
    assert json.loads(folder.data.read_text())["n_examples"] == 20
    assert "resumed" not in json.loads(folder.environment.read_text())
    assert same(
        trained_tensors(result), trained_tensors(train(configure("data.limit=20", output="new"), console=quiet))
    )


def test_faults_leave_no_folder(configure, quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_base", lambda *args: pytest.fail("read the weights first"))
    (tmp_path / "torn.json").write_text('{"format"')
    for overrides, message in [
        (["smt.block_size=48"], "48"),
        (["smt.budget=1e-4"], "at least one block"),
        (["smt.target_modules=[q_porj]"], "q_proj"),
        (["data.train=nothing.jsonl"], "nothing.jsonl"),
        (["training.report_to=tensorbord"], 'Did you mean "tensorboard"'),
        (["data.max_length=2"], "Raise max_length"),
        (["method=lora", "lora.target_modules=[q_porj]"], "q_porj"),
        (["smt.accumulator_device=cuda:77"], "Expected accumulator_device to be a device here"),
        (["smt={}", f"smt.plan={tmp_path}/torn.json"], "is not JSON"),
    ]:
        with pytest.raises(InputError, match=message):
            dry_run(configure(*overrides))
        with pytest.raises(InputError, match=message):
            train(configure(*overrides), console=quiet)
        if "smt.block_size=48" in overrides or "smt.budget=1e-4" in overrides:
            with pytest.raises(InputError, match=message):
                select_plan(configure(*overrides), quiet)
        assert not (tmp_path / "run").exists()


def test_a_file_of_rows_that_is_missing_is_told_before_the_model_is_asked_for(configure, quiet):
    config = configure("data.train=nothing.jsonl", "model=nobody/has-it")
    for start in (lambda: dry_run(config), lambda: train(config, console=quiet), lambda: select_plan(config, quiet)):
        with pytest.raises(InputError, match=r"nothing\.jsonl"):
            start()


def test_what_does_not_fit_the_model_is_told_before_rows_are_encoded(configure, quiet, monkeypatch):
    monkeypatch.setattr(run, "load_data", lambda *args: pytest.fail("went on"))
    config = configure("smt.block_size=48")
    for start in (lambda: dry_run(config), lambda: train(config, console=quiet), lambda: select_plan(config, quiet)):
        with pytest.raises(InputError, match="Expected a block size that divides"):
            start()


def test_an_output_that_cannot_be_written_is_told_first(configure, quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "read_data", lambda *args: pytest.fail("went on"))
    (tmp_path / "file").touch()
    in_the_way = configure(f"output={tmp_path}/file/run")
    with pytest.raises(InputError, match=r"output: Expected a folder for .*/file is a file"):
        dry_run(in_the_way)
    with pytest.raises(InputError, match=r"output that can be written.*/file.*choose another"):
        train(in_the_way, console=quiet)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for start in (dry_run, lambda config: train(config, console=quiet)):
        with pytest.raises(InputError, match="Expected a place that can be written"):
            start(configure())
    assert not (tmp_path / "run").exists()


def test_a_plan_made_before_is_used(configure, quiet, tmp_path, monkeypatch):
    first = train(configure(), console=quiet)
    plan = os.path.join(first.folder, "plan.json")
    config = configure("smt={}", f"smt.plan={plan}", output="second")
    monkeypatch.setattr(smtune, "make_plan", lambda *args, **kwargs: pytest.fail("scored"))
    second = train(config, console=quiet)
    assert second.scoring_seconds == 0.0 < first.scoring_seconds
    assert same(trained_tensors(first), trained_tensors(second))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_keeps_what_is_trained_in_fp32(configure, quiet, method):
    dtypes, products = set(), set()

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda module, args, y: products.add(y.dtype))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            dtypes.update(p.dtype for p in model.parameters() if p.requires_grad)
            assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}

    result = train(configure("dtype=bfloat16", method=method), console=quiet, callbacks=[Look()])
    assert dtypes == {torch.float32}
    assert products == {torch.bfloat16}  # LoRA's factors are multiplied in it too
    assert {t.dtype for t in trained_tensors(result).values() if t.is_floating_point()} == {torch.float32}


def test_a_trained_parameter_in_16_bits_is_refused():
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(InputError, match="2 that are not, such as weight"):
        check_trainable(model)
    with pytest.raises(InputError, match="every parameter frozen"):
        check_trainable(model.requires_grad_(False))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing_but_memory(configure, quiet, method, attention_runs):
    plain = train(configure(method=method, output="plain"), console=quiet)
    n_runs = len(attention_runs)
    saving = train(configure("training.gradient_checkpointing=true", method=method, output="saving"), console=quiet)
    assert len(attention_runs) - n_runs == 2 * n_runs  # in scoring and in training each is run again for its backward
    left, right = trained_tensors(plain), trained_tensors(saving)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name])


def test_a_loss_that_is_not_finite_stops_the_run(configure, quiet):
    overrides = ["training.learning_rate=1e30", "training.max_grad_norm=0", "training.logging_steps=1"]
    config = configure(*overrides, method="full")
    with pytest.raises(InputError, match="Expected a finite loss"):
        train(config, console=quiet)


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint_before_it(configure, quiet):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * math.nan)

    config = configure(method="lora")
    with pytest.raises(InputError, match=r"Expected a finite gradient\. Got nan at step 6"):
        train(config, console=quiet, callbacks=[Spoil()])
    assert RunFolder(config.output).last_checkpoint().name == "checkpoint-3"


def test_progress_without_a_terminal_is_a_line_per_event(configure, capsys):
    train(configure(method="lora"), console=Console(width=200))
    output = capsys.readouterr()
    assert [line.split()[1] for line in output.out.splitlines() if line.startswith("step ")] == ["3/8", "6/8", "8/8"]
    assert "tokens/s" in output.out
    assert output.err == ""


def test_progress_on_a_terminal_is_a_bar(configure):
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    train(configure(method="lora"), console=console)
    text = console.export_text()
    assert "8/8" in text
    assert "tokens/s" in text


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_foresees_the_run_and_writes_nothing(configure, quiet, tmp_path, method):
    config = configure(method=method)
    plan = dry_run(config)
    assert not (tmp_path / "run").exists()
    result = train(config, console=quiet)
    assert plan.trainable_parameters == result.trainable_parameters
    assert plan.total_parameters == result.total_parameters
    assert plan.steps == result.steps
    assert plan.rows == 24
    assert plan.checkpoints == 2
    assert {name.rstrip("/") for name in plan.writes} == {path.name for path in (tmp_path / "run").iterdir()}
    console = Console(width=200, file=io.StringIO())
    console.print(plan)
    text = console.file.getvalue()
    assert "24 examples" in text
    assert str(tmp_path / "run") in text


def test_what_is_hardly_meant_is_remarked(configure, capsys, monkeypatch):
    monkeypatch.setattr("smtune.training.model.cpu_is_slow_in_bf16", lambda: False)
    for overrides, remark in [
        ([], None),
        (["data.max_length=4096"], "data.max_length is 4,096, and the model was made for 2,048 positions"),
        (["smt.budget=1"], "smt.budget is a number of blocks, 1 for 6 matrices: for a fraction of all parameters "),
        (["smt.budget=1.0"], "64 will be trained, all that the targeted matrices have: a share of 0.153 of"),
        (["smt.budget=1000"], "smt.budget is 1000, 1,000 blocks, and 64 will be trained"),
        (["smt.budget=11", "smt.policy=per_module"], "11 blocks, and 6 will be trained, all that the policy can spend"),
        (["method=lora"], None),
        (["training.max_steps=1"], "the learning rate is zero in its only step: its warm-up takes 1 steps"),
        (["training.warmup_steps=9"], "the learning rate never gets to training.learning_rate: its warm-up takes 9"),
        (["training.max_steps=1", "training.warmup_steps=0"], None),
    ]:
        remarks = dry_run(configure(*overrides)).remarks
        assert len(remarks) == (remark is not None)
        assert remark is None or remark in remarks[0]
    monkeypatch.setattr("smtune.training.model.cpu_is_slow_in_bf16", lambda: True)
    assert dry_run(configure()).remarks == ()
    (remark,) = dry_run(configure("dtype=bfloat16")).remarks
    assert "dtype is bfloat16, which this CPU cannot multiply" in remark
    config = configure("smt.budget=1000", "training.max_steps=1", "training.warmup_steps=0")
    console = Console(width=400)
    console.print(dry_run(config))
    select_plan(config, console)
    train(config, console=console)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is 1000")[0].split() for line in lines if "is 1000" in line] == [
        ["warning", "smt.budget"],
        *[["Warning:", "smt.budget"]] * 2,
    ]


def test_a_run_of_other_products_is_not_gone_on_with(configure, quiet):
    """Runs of LoRA beside bf16 weights were not under autocast once, and their records do not say."""
    config = configure("dtype=bfloat16", "training.save_steps=2", method="lora")
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(5)])
    folder = RunFolder(config.output)
    record = json.loads(folder.environment.read_text())
    assert record.pop("autocast") is True
    folder.environment.write_text(json.dumps(record))
    with pytest.raises(InputError, match="made the checkpoints in .*, without autocast. Got in bf16 under autocast"):
        train(config, resume=True, console=quiet)
    folder.environment.write_text(json.dumps(record | {"autocast": True}))
    assert train(config, resume=True, console=quiet).steps == STEPS


def test_a_warm_up_as_long_as_the_run_is_told_when_it_trains(configure, capsys):
    train(configure("training.max_steps=1", method="lora"), console=Console(width=400))
    assert "Warning: the learning rate is zero in its only step" in capsys.readouterr().out


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_a_recipe_of_the_users_is_no_run(configure, quiet, tmp_path, resume):
    """Whatever its files are called: nothing of them may be replaced or removed."""
    output = tmp_path / "project"
    for name in (
        "model/model.safetensors",
        "checkpoints/checkpoint-500/weights",
        "metrics.jsonl",
        "data.json",
        "adapter/a",
    ):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("the user's own")
    config = configure(method="lora", output="project")
    recipe = "# the user's own\n" + yaml.safe_dump(config.model_dump(exclude_unset=True))
    (output / "config.yaml").write_text(recipe)
    before = {path: path.read_text() for path in output.rglob("*") if path.is_file()}
    for start in (lambda: dry_run(config), lambda: train(config, resume=resume, console=quiet)):
        with pytest.raises(InputError, match="project holds other files: choose another output"):
            start()
    assert {path: path.read_text() for path in output.rglob("*") if path.is_file()} == before


def test_a_run_whose_start_was_cut_is_begun(configure, tmp_path):
    config = configure(method="lora").resolved()
    folder = RunFolder(tmp_path / "cut")
    folder.path.mkdir()
    folder.config.write_text(config.to_yaml())
    assert folder.is_begun
    folder.config.write_text("# changed by hand\n" + config.to_yaml())
    assert not folder.is_begun
    folder.environment.write_text('{"smtune": "0.1.0"}')
    assert folder.is_begun
    folder.environment.unlink()  # as is advised where it is damaged
    (folder.checkpoints / "checkpoint-3").mkdir(parents=True)
    (folder.checkpoints / "checkpoint-3" / COMPLETE).touch()
    assert folder.is_begun


def test_steps_of_epochs(configure, quiet):
    config = configure("training.epochs=1.5", "training.max_steps=null", "training.batch_size=5", method="lora")
    assert dry_run(config).steps == train(config, console=quiet).steps


def test_ordinary_use_prints_no_warning(configure):
    """In a process of its own, as a user sees it: warnings are shown once, and loggers write to the error stream."""
    config = configure(method="smt")
    code = f"from smtune.training import load_config, train; train(load_config({config.output + '.yaml'!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Of bitsandbytes and torchao, which are installed by choice and loud on import.
    loud = ("kernels-community", "torchao", "_pytree.py")
    lines = [line for line in done.stderr.splitlines() if not any(word in line for word in loud)]
    assert all(line.startswith(("Data:", "Plan:", "Training ", "step ")) for line in lines), done.stderr


def test_an_alias_stands_for_its_folder_whatever_the_folder_is_called(tmp_path):
    here, file = "/home/j\u00fcrgen/.cache/smtune/it", tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": here, "plan": {"model_name": here}, "r": 8}))  # as peft does
    rename_base(file, here, "smollm2-135m")
    named = {"base_model_name_or_path": "smollm2-135m", "plan": {"model_name": "smollm2-135m"}, "r": 8}
    assert json.loads(file.read_text()) == named


def test_full_fine_tuning_saves_buffers_too(configure, quiet):
    class WithBuffers(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_buffer("counts", torch.arange(3))
            model.register_buffer("passing", torch.arange(3), persistent=False)

    tensors = trained_tensors(train(configure(method="full"), console=quiet, callbacks=[WithBuffers()]))
    assert torch.equal(tensors["counts"], torch.arange(3))
    assert "passing" not in tensors


def test_another_engine_is_another_run(configure, quiet, monkeypatch):
    config = configure()
    with pytest.raises(Stop):
        train(config, console=quiet, callbacks=[StopAt(4)])
    file = RunFolder(config.output).environment
    started = json.loads(file.read_text())
    assert started["engine"] == "none"
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(InputError, match=r"engine that made the checkpoints in .*run, none.*Got deepspeed: start"):
            dry_run(config, resume=True, processes=1)
    for engine in ("deepspeed", "fsdp"):
        file.write_text(json.dumps(started | {"engine": engine}))
        with pytest.raises(InputError, match=rf"run, {engine}, which alone.*Got none: start"):
            train(config, resume=True, console=quiet)
    del started["engine"]  # as older records
    file.write_text(json.dumps(started))
    assert train(config, resume=True, console=quiet).steps == STEPS
    assert json.loads(file.read_text())["resumed"][0]["engine"] == "none"


def test_what_renames_parameters_under_fsdp_is_refused(configure, monkeypatch):
    for keys, message in [
        ("activation_checkpointing: true", r"set training\.gradient_checkpointing instead"),
        ("fsdp_activation_checkpointing: true", r"set training\.gradient_checkpointing instead"),
        ("version: 1", "Got FSDP1"),
    ]:
        with pytest.raises(InputError, match=message):
            dry_run(configure(f"training.fsdp={{{keys}}}"), processes=2)
    assert dry_run(configure("training.fsdp={activation_checkpointing: false}"), processes=2).steps == STEPS
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    trainer.check_engine(configure())  # no FSDP
    with pytest.raises(InputError, match=r"training\.gradient_checkpointing"):
        dry_run(configure("training.fsdp={}"), processes=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="Got FSDP1"):
        trainer.check_engine(configure())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"training\.gradient_checkpointing"):
        trainer.check_engine(configure())
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "false")
    trainer.check_engine(configure())
