"""`smtune train` on two processes: by --nproc, and by a launcher that its users have already."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import engines
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import ProcessFailure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from smtune import cli
from smtune.cli.launch import launch
from smtune.data import prepare
from smtune.evaluation import answer_loss
from smtune.models import load_model, load_tokenizer
from smtune.training import parse_config, read_metrics, train

SMTUNE = [sys.executable, "-m", "smtune"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    engines.write_base(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process."""
    train(parse_config(engines.recipe(folder, "alone")))
    return folder / "alone"


def write_recipe(folder, output, processes=2, **training) -> str:
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(engines.recipe(folder, output, processes, **training)))
    return str(path)


def assert_same_run(run: Path, expected: Path) -> None:
    """The same plan, losses and blocks. The recipe's AdamW takes its first steps by sign: see `engines.EPS`."""
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in expected.iterdir()}
    plans = [json.loads((path / "plan.json").read_text()) for path in (run, expected)]
    assert [m["blocks"] for m in plans[0]["modules"]] == [m["blocks"] for m in plans[1]["modules"]]
    metrics = [read_metrics(path / "metrics.jsonl") for path in (run, expected)]
    losses = [[event["loss"] for event in events if "loss" in event] for events in metrics]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    tensors, expected_tensors = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, expected))
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        apart = (tensor - expected_tensors[name]).abs().double()
        assert apart.median() < 1e-6, name
        assert (apart > 1e-4).double().mean() < 0.01, name
    results = [json.loads((path / "result.json").read_text()) for path in (run, expected)]
    for key in ("steps", "tokens", "trainable_parameters", "total_parameters"):
        assert results[0][key] == results[1][key], key


def assert_parts_by_zero(run: Path, *states: str) -> None:
    """Its checkpoint has both processes' parts of these states: DDP, to which Trainer may fall back, has none."""
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*")
    for name in states:
        assert len([*checkpoint.glob(f"global_step*/*zero_pp_rank_*_{name}_states.pt")]) == 2, name


@pytest.mark.support("Engines", row="DDP", column="smtune train --nproc", against="smtune train, one process")
def test_nproc_trains_as_one_process(folder, alone):
    recipe = write_recipe(folder, "two")
    held_out = f"data.validation={folder / 'rows.jsonl'}"
    done = engines.call([*SMTUNE, "train", recipe, held_out, "--nproc", "2"], folder)
    assert done.returncode == 0, done.stderr
    for text in ("Data: ", "Plan: ", "Training 2,304 of", "step 1/6", "Trained "):
        assert done.stderr.count(text) == 1, done.stderr  # the first process tells, the other is silent
    assert json.loads((folder / "two" / "environment.json").read_text())["processes"] == 2
    assert_same_run(folder / "two", alone)
    validated = [event["eval_loss"] for event in read_metrics(folder / "two" / "metrics.jsonl") if "eval_loss" in event]
    tokenizer = load_tokenizer(folder / "two")
    rows, _ = prepare(str(folder / "rows.jsonl"), tokenizer, max_length=64)
    loss = answer_loss(load_model(str(folder / "two")), tokenizer, rows, batch_size=2)
    assert validated[-1] == pytest.approx(loss, rel=0.05)  # not a process's share of it, which is half


@pytest.mark.nightly
def test_a_dense_warm_up_trains_as_one_process(folder):
    for output, processes in (("warm-alone", 1), ("warm-two", 2)):
        values = engines.recipe(folder, output, processes)
        values["smt"] = {"block_size": 16, "budget": 9, "dense_warmup_steps": 3}
        (folder / f"{output}.yaml").write_text(yaml.safe_dump(values))
    train(parse_config(yaml.safe_load((folder / "warm-alone.yaml").read_text())))
    done = engines.call([*SMTUNE, "train", str(folder / "warm-two.yaml"), "--nproc", "2"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("dense warm-up, step 3/3") == 1, done.stderr

    alone, two = folder / "warm-alone", folder / "warm-two"
    losses = [json.loads((run / "scoring.json").read_text())["dense_warmup"]["losses"] for run in (alone, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    plans = [json.loads((run / "plan.json").read_text()) for run in (alone, two)]
    assert [m["blocks"] for m in plans[0]["modules"]] == [m["blocks"] for m in plans[1]["modules"]]
    for part in ("checkpoints/dense-warm-up", "model"):
        expected, found = (load_file(run / part / "model.safetensors") for run in (alone, two))
        apart = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected]).double()
        assert apart.median() < 1e-6
        assert (apart > 1e-4).double().mean() < 0.01


@pytest.mark.nightly
def test_a_fault_is_told_once(folder):
    recipe = write_recipe(folder, "faulty")
    done = engines.call([*SMTUNE, "train", recipe, "smt.budget=1e-6", "--nproc", "2"], folder)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Expected a budget of at least one block") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "faulty").exists()


@pytest.mark.nightly
@pytest.mark.support("Engines", row="ZeRO-2", column="accelerate launch -m smtune", against="smtune train, one process")
def test_accelerate_launch_with_deepspeed(folder, alone):
    engines.need_deepspeed()
    config = json.loads((engines.EXAMPLES / "zero2.json").read_text())
    del config["optimizer"]  # FusedAdam, which would be compiled
    (folder / "zero2.json").write_text(json.dumps(config | {"zero_allow_untested_optimizer": True}))
    accelerate = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines", "1"]
    engine = ["--use_deepspeed", "--deepspeed_config_file", str(folder / "zero2.json"), "--num_processes", "2"]
    port = ["--main_process_port", str(engines.free_port())]
    command = [*accelerate, *engine, *port, *SMTUNE[1:], "train", write_recipe(folder, "accelerated")]
    done = engines.call(command, folder)
    assert done.returncode == 0, done.stderr
    assert_parts_by_zero(folder / "accelerated", "optim")
    assert_same_run(folder / "accelerated", alone)


@pytest.mark.nightly
def test_zero_3_trains_a_bf16_base_as_one_process_and_evaluates(folder, alone):
    """Its weights are split as they are read, since there is a plan. The first process then evaluates by itself."""
    engines.need_deepspeed()
    for output, processes, training in (
        ("bf16-alone", 1, {}),
        ("bf16-two", 2, {"deepspeed": str(engines.EXAMPLES / "zero3.json")}),
    ):
        values = engines.recipe(folder, output, processes, **training) | {"dtype": "bfloat16"}
        values["smt"] = {"plan": str(alone / "plan.json")}
        values["evaluation"] = {"tasks": ["arithmetic"], "limit": 2}
        (folder / f"{output}.yaml").write_text(yaml.safe_dump(values))
    assert cli.run(["train", str(folder / "bf16-alone.yaml")]) == 0
    done = engines.call([*SMTUNE, "train", str(folder / "bf16-two.yaml"), "--nproc", "2"], folder)
    assert done.returncode == 0, done.stderr

    runs = [folder / "bf16-alone", folder / "bf16-two"]
    assert_parts_by_zero(runs[1], "optim", "model")
    losses = [[event["loss"] for event in read_metrics(run / "metrics.jsonl")] for run in runs]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)  # with an fp32 base it is 6e-5 away
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    answers = [(run / "evaluation/generate-bfloat16/items.jsonl").read_text().splitlines() for run in runs]
    assert len(answers[1]) == len(answers[0]) == 3


READ_IN_BF16 = """
import sys
import deepspeed, torch
from transformers.integrations import HfDeepSpeedConfig
from smtune.models import load_model
from smtune.sharded import is_sharded, whole

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile for a minute
deepspeed.init_distributed("gloo")
expected = load_model(sys.argv[1], "bfloat16")
values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "bf16": {"enabled": False}}
zero = HfDeepSpeedConfig(values)
model = load_model(sys.argv[1], "bfloat16")
assert zero.config == values  # by which it trains
for name, parameter in expected.named_parameters():
    assert is_sharded(model.get_parameter(name))
    assert torch.equal(whole(model.get_parameter(name)), parameter), name
    assert model.get_parameter(name).dtype == torch.bfloat16, name
for name, buffer in expected.named_buffers():
    assert model.get_buffer(name).dtype == buffer.dtype and torch.equal(model.get_buffer(name), buffer), name
"""


@pytest.mark.nightly
def test_zero_3_splits_a_bf16_model_in_bf16(folder):
    engines.need_deepspeed()
    tools = str(Path(sys.executable).with_name("torchrun"))
    (folder / "read.py").write_text(READ_IN_BF16)
    done = engines.call([tools, "--standalone", "read.py", str(folder / "base")], folder)
    assert done.returncode == 0, done.stderr


def test_faults_found_before_any_process_is_started(folder, monkeypatch, capsys):
    recipe = write_recipe(folder, "never")

    def refuse(*arguments):
        pytest.fail("started processes")

    monkeypatch.setattr("torch.distributed.launcher.api.launch_agent", refuse)
    assert cli.run(["train", recipe, "training.lerning_rate=1", "--nproc", "2"]) == 2
    both = ["training.deepspeed={}", "training.fsdp={}"]
    assert cli.run(["train", recipe, *both, "--nproc", "2"]) == 2
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.run(["train", recipe, "--nproc", "2"]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert 'Did you mean "training.learning_rate"?' in errors
    assert "expected without training.deepspeed" in errors
    assert "--nproc without another launcher" in errors


def test_a_process_that_was_ended_by_a_signal_is_told(monkeypatch, capsys):
    def start(config, entrypoint):
        def run(*arguments):
            raise ChildFailedError("smtune", {1: ProcessFailure(1, pid=1, exitcode=-signal.SIGKILL, error_file="")})

        return run

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start)
    assert launch(["train"], 2) == 128 + signal.SIGKILL
    assert "Process 1 of 2 was ended by SIGKILL: the system may have run out of memory" in capsys.readouterr().err


def test_an_engine_that_cannot_be(folder, capsys):
    recipe = write_recipe(folder, "never")
    assert cli.run(["train", recipe, "training.fsdp={}"]) == 2
    assert cli.run(["train", recipe, "training.deepspeed=nothing.json"]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert "several processes to shard the model over" in errors
    assert "nothing.json" in errors or "deepspeed is not installed" in errors


def test_dry_run_counts_the_processes(folder, capsys):
    recipe = write_recipe(folder, "never")
    assert cli.run(["train", recipe, "--dry-run", "--nproc", "4"]) == 0
    assert "6 steps of 16 rows" in " ".join(capsys.readouterr().out.split())
    assert not torch.distributed.is_initialized()
