"""The command line as a person uses it: exit codes, messages, files, and what a newcomer reads."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

import smtune
from smtune import cli, files, models, training
from smtune.models import adapter_base, load_model
from smtune.training import load_config, read_metrics

TASK_ITEMS = 6


@pytest.fixture
def config(base, rows, tmp_path, monkeypatch):
    """A configuration file for the tiny model, with an evaluation, in a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    records = [{"instruction": f"{k} + 1 =", "input": "", "answer": str(k + 1)} for k in range(TASK_ITEMS)]
    (tests / "AddSub.jsonl").write_text("\n".join(map(json.dumps, records)))
    values = {
        "model": str(base),
        "output": "run",
        "data": {"train": str(rows), "max_length": 64},
        "smt": {"block_size": 16, "budget": 12, "warmup_steps": 3},
        "training": {"learning_rate": 1e-2, "max_steps": 3, "batch_size": 2, "logging_steps": 1},
        "evaluation": {"tasks": ["AddSub"], "source": str(tests)},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(capsys, *arguments, code=0):
    """(standard output, error stream) of a command, its exit code checked."""
    actual = cli.run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert actual == code, captured.err
    return captured.out, captured.err


@pytest.fixture
def errors_to_stderr(monkeypatch):
    """The console was made when the module was imported; give it the stream that pytest captures."""
    from rich.console import Console

    monkeypatch.setattr(cli, "console", Console(stderr=True, highlight=False, width=200))


pytestmark = pytest.mark.usefixtures("errors_to_stderr")


def test_compare(config, capsys, tmp_path):
    def results(name, right, n=8, key="k", **header):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        items = [
            {"key": f"{key}{k}", "task": "AddSub", "index": k, "answer": "1", "prediction": 1.0, "correct": k in right}
            for k in range(n)
        ]
        lines = [{"run": {"protocol": "generate", "model": name, "dtype": "float32"} | header}, *items]
        (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    a = results("a/evaluation/generate-float32", {0, 1, 2, 3, 4, 5}).parent.parent
    b = results("b", {0, 1, 7})
    out, err = run(capsys, "compare", "a", b)
    row = next(line for line in out.splitlines() if "AddSub" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["8", "+0.375"]
    assert [cell.strip() for cell in row.split("│")[5:7]] == ["4", "1"]
    assert not err
    out, err = run(capsys, "compare", a, results("c", {0}, n=6, dtype="bfloat16"))
    assert "differ in dtype: float32 and bfloat16" in err
    assert "2 items that only one" in err

    _, err = run(capsys, "compare", "a", results("d", {0}, protocol="likelihood"), code=2)
    assert "by one protocol. Got generate and likelihood" in err
    results("a/evaluation/generate-bfloat16", {0})
    _, err = run(capsys, "compare", "a", "b", code=2)
    assert "Name one of a/evaluation/generate-bfloat16, a/evaluation/generate-float32" in err
    results("f/evaluation/generate-bfloat16", {0, 1})
    out, _ = run(capsys, "compare", "a", "f")  # by the one that both have
    assert "-0.125" in next(line for line in out.splitlines() if "AddSub" in line)
    _, err = run(capsys, "compare", "nowhere", "b", code=2)
    assert "smtune evaluate" in err
    _, err = run(capsys, "compare", results("e", {0}, key="other"), b, code=2)
    assert "none in common" in err


def test_train_evaluate_inspect_merge(config, capsys, tmp_path):
    out, _ = run(capsys, "train", config, "--dry-run")
    assert "12 blocks of 16²" in out
    assert not (tmp_path / "run").exists()

    out, err = run(capsys, "train", config)
    assert "Trained run/adapter" in err
    assert "AddSub" in out
    kept = (tmp_path / "run/evaluation/generate-float32/items.jsonl").read_text().splitlines()
    assert len(kept) == TASK_ITEMS + 1

    # evaluating again finds everything done, however the place is spelled
    for place in ("run", "run/", "./run", tmp_path / "run"):
        out, err = run(capsys, "evaluate", place, "--tasks", "addsub", "--source", tmp_path / "tests")
        assert (tmp_path / "run/evaluation/generate-float32/items.jsonl").read_text().splitlines() == kept

    out, err = run(capsys, "inspect", "run")
    assert {"│ q ", "│ k ", "│ v "} <= {line[:4] for line in out.splitlines()}
    for name in ("blocks", "shares", "loss"):
        assert (tmp_path / f"run/figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    run(capsys, "inspect", "run/plan.json", "--output", "from-plan")
    run(capsys, "inspect", "run/adapter", "--output", "from-adapter")
    assert (tmp_path / "from-plan/blocks.png").is_file()
    assert (tmp_path / "from-adapter/blocks.png").is_file()

    out, err = run(capsys, "merge", "run", "merged")
    assert "merged" in err
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T;"
        "T.from_pretrained('merged'); m = A.from_pretrained('merged', dtype=torch.float32).eval();"
        f"torch.set_num_threads({torch.get_num_threads()});"
        "torch.save(m(input_ids=torch.arange(12).view(1, 12)).logits, 'logits.pt');"
        "assert 'smtune' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    with torch.no_grad():
        expected = load_model("run")(input_ids=torch.arange(12).view(1, 12)).logits
    assert torch.equal(torch.load("logits.pt"), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".merged")] == []
    umask = os.umask(0)
    os.umask(umask)
    files = [path for folder in ("merged", "run/adapter") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def test_training_is_forgotten_before_the_evaluation_loads_a_model(config, capsys, monkeypatch):
    """Its weights are gone, and so is what has transformers split a model over ZeRO-3's processes, which have ended."""
    seen = []

    class ZeRO3:
        def is_zero3(self):
            return True

    def load_base(*args, original=training.run.load_base):
        model = original(*args)
        seen.append(weakref.ref(model.model.layers[0].self_attn.q_proj.weight))
        gc.disable()  # nor is it luck
        return model

    def train(*args, original=training.train, **options):
        result = original(*args, **options)
        set_hf_deepspeed_config(engine)
        return result

    def load_merged(*args, original=models.load_merged):
        seen.extend((seen.pop()() is None, is_deepspeed_zero3_enabled()))
        return original(*args)

    engine = ZeRO3()
    monkeypatch.setattr(training.run, "load_base", load_base)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(models, "load_merged", load_merged)
    try:
        run(capsys, "train", config)
    finally:
        gc.enable()
        unset_hf_deepspeed_config()
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda adapter: os.truncate(adapter / "adapter_model.safetensors", 100), "cannot be loaded: .*header"),
        (lambda adapter: forget_base(adapter), "the base model of the adapter run, '/gone/base'"),
    ],
)
def test_a_damaged_adapter_is_named(config, capsys, tmp_path, damage, message):
    run(capsys, "train", config, "evaluation.tasks=[]")
    damage(tmp_path / "run/adapter")
    _, err = run(capsys, "merge", "run", "merged", code=2)
    assert re.search(message, err)


def forget_base(adapter):
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": "/gone/base"}
    path.write_text(json.dumps(values))


def test_an_adapter_of_a_model_by_a_relative_path_works_from_anywhere(base, config, capsys, tmp_path, monkeypatch):
    shutil.copytree(base, "models/tiny")
    run(capsys, "train", config, "model=models/tiny", "evaluation.tasks=[]")
    assert adapter_base("run/adapter") == str(tmp_path / "models/tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(capsys, "merge", "../run", "merged")


def test_the_command_that_select_prints_keeps_the_mode(config, capsys):
    _, err = run(capsys, "select", config, "smt.mode=additive")
    (command,) = [line.strip() for line in err.splitlines() if "smtune train" in line]
    _, _, *arguments = shlex.split(command)
    assert load_config(arguments[0], arguments[1:]).smt.mode == "additive"


def test_the_recipe_of_the_papers_setting_is_the_papers():
    recipe = load_config(Path(__file__).parents[2] / "examples/llama-math.yaml").smt
    paper = smtune.SMTConfig.paper()
    for name in ("policy", "criterion", "block_size", "budget", "warmup_steps"):
        assert getattr(recipe, name) == getattr(paper, name), name
    assert set(recipe.target_modules) == set(paper.target_modules)


@pytest.mark.parametrize("place", ["plan.json", "p: 3 #x.json"])
def test_select_then_train_with_the_plan(config, capsys, tmp_path, place):
    _, err = run(capsys, "select", config, "--output", place)
    plan = smtune.Plan.load(place)
    assert plan.n_blocks == 12
    assert plan.batches_seen == 3
    printed = shlex.split(err[err.index("smtune train") :])
    run(capsys, *printed[1:])
    assert smtune.Plan.load("run/plan.json") == plan
    _, err = run(capsys, "select", config, "--output", place, code=2)
    assert f"{place} exists" in err


def test_a_finished_run_is_left_as_it_is(config, capsys):
    run(capsys, "train", config)
    _, err = run(capsys, "train", config, code=2)
    assert "--resume" in err
    _, err = run(capsys, "train", config, "--resume")
    assert "finished already" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "confg.yaml"], 'There is no such file. Did you mean "config.yaml"'),
        (["train", "config.yaml", "traning.max_steps=3"], 'Did you mean "training"'),
        (["train", "config.yaml", "smt.budget=0", "method=smtt", "smt.criterion=nett"], "3 faults"),
        (["train", "config.yaml", "smt.block_size=48"], "48, which does not divide"),
        (["train", "config.yaml", "evaluation.tasks=[bolq]"], 'Did you mean "boolq"'),
        (["train", "config.yaml", "evaluation.source=nowhere"], 'Got "nowhere"'),
        (["train", "config.yaml", "data.train=rows.jsonl"], "rows.jsonl"),
        (["evaluate", "no/where/at/all", "--tasks", "arithmetic"], "no such folder"),
        (["evaluate", "x", "--tasks", "arithmetic", "--limit", "0"], "at least 1 item"),
        (["merge", "no/where/at/all", "out"], "no such folder"),
        (["inspect", "nothing"], "There is nothing"),
        (["inspect", "tests"], "neither plan.json nor adapter_config.json"),
        (["inspect", "config.yaml"], "is not JSON"),
        (["inspect", "broken"], "is not a JSON object"),
        (["train", "config.yaml", "data.train=hub::test"], "without a name"),
        (["frobnicate"], "No such command"),
        (["train"], "Missing argument"),
    ],
)
def test_bad_input_is_code_2_without_a_traceback(config, capsys, tmp_path, arguments, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{")
    _, err = run(capsys, *arguments, code=2)
    assert message in err
    assert "Traceback" not in err


def test_results_of_other_weights_are_not_taken_for_these(config, capsys, tmp_path):
    run(capsys, "train", config, "evaluation.tasks=[]")
    run(capsys, "train", config, "evaluation.tasks=[]", "output=other", "training.seed=1")
    evaluate = ("evaluate", "run", "--tasks", "AddSub", "--source", "tests")
    run(capsys, *evaluate)
    shutil.copy("other/adapter/adapter_model.safetensors", "run/adapter/adapter_model.safetensors")
    shutil.copy("other/adapter/adapter_config.json", "run/adapter/adapter_config.json")
    _, err = run(capsys, *evaluate, code=2)
    assert "Got those of another: model" in err


def test_a_renamed_run_keeps_its_results(config, capsys, tmp_path):
    run(capsys, "train", config)
    (tmp_path / "run").rename(tmp_path / "renamed")
    items = tmp_path / "renamed/evaluation/generate-float32/items.jsonl"
    kept = items.read_text()
    run(capsys, "evaluate", "renamed", "--tasks", "AddSub", "--source", "tests")
    assert items.read_text() == kept


def test_results_of_another_run_are_refused_before_the_model_is_loaded(config, base, capsys, monkeypatch):
    evaluate = ("evaluate", base, "--tasks", "AddSub", "--source", "tests", "--output", "results")
    run(capsys, *evaluate)
    monkeypatch.setattr(models, "load_merged", lambda *args: pytest.fail("loaded"))
    for changes, difference in (
        (("--dtype", "bfloat16"), "dtype 'float32', not 'bfloat16'"),
        (("--beams", "2"), "beams None, not 2"),
    ):
        _, err = run(capsys, *evaluate, *changes, code=2)
        assert f"Got those of another: {difference}" in err


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_blocks_in_a_tied_head(config, base, capsys, tmp_path):
    """They cannot be merged: a dense warm-up, which ends so, is refused, and an evaluation takes the adapter."""
    shutil.copytree(base, "tied", ignore=shutil.ignore_patterns("*.safetensors"))
    tied = AutoConfig.from_pretrained(base, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(tied).save_pretrained("tied")
    smt = "block_size: 2, budget: 12, target_modules: [q_proj, lm_head]"
    dense = ("train", config, "model=tied", f"smt={{{smt}, dense_warmup_steps: 1}}")
    for flags in ([], ["--dry-run"]):
        _, err = run(capsys, *dense, *flags, code=2)
        assert "Got lm_head, whose weight another module shares: leave it out of smt.target_modules" in err
    assert not (tmp_path / "run").exists()
    run(capsys, *dense, "smt.target_modules=[q_proj]", "--dry-run")

    out, _ = run(capsys, "train", config, "model=tied", f"smt={{{smt}, warmup_steps: 1}}")
    assert smtune.Plan.load("run/plan.json").modules["lm_head"].rows
    assert "AddSub" in out


def test_what_evaluation_would_refuse_is_refused_before_training(config, capsys, tmp_path):
    for change, message in (
        ("evaluation.protocol=likelihood", "tasks with options"),
        ("evaluation.tasks=[AddSub, boolq]", "boolq"),
        ("evaluation={tasks: [boolq, gsm8k, piqa]}", "for boolq, piqa: the package carries"),
    ):
        _, err = run(capsys, "train", config, change, code=2)
        assert message in err
    (tmp_path / "tests/AddSub.jsonl").write_text('{"instruction": "1 + 1", "answer": "two"}')
    _, err = run(capsys, "train", config, "--dry-run", code=2)
    assert '"answer" to be a number' in err
    assert not (tmp_path / "run").exists()


def test_a_path_that_cannot_be_written_is_bad_input(config, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (
        ["inspect", "file", "--output", "x"],
        ["train", config, "output=file/run"],
        ["train", config, "output=file/run", "--dry-run"],
        ["evaluate", "x", "--tasks", "arithmetic", "--output", "file"],
    ):
        run(capsys, *arguments, code=2)


def test_a_plan_that_cannot_be_written_is_told_before_scoring(config, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "select_plan", lambda *args: pytest.fail("scored"))
    (tmp_path / "file").write_text("")
    _, err = run(capsys, "select", config, "--output", "file/plan.json", code=2)
    assert "--output: Expected a folder for file/plan.json" in err


def test_merging_a_whole_model_or_into_a_full_folder(config, base, capsys, tmp_path):
    _, err = run(capsys, "merge", base, "out", code=2)
    assert "whole model already" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    _, err = run(capsys, "merge", base, "full", code=2)
    assert "new or empty" in err


def test_a_place_for_a_merged_model_that_cannot_be_written_is_told_before_merging(capsys, tmp_path, monkeypatch):
    (tmp_path / "closed/out").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place).name != "closed" and access(place, mode))
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("loaded"))
    _, err = run(capsys, "merge", "run", tmp_path / "closed/out", code=2)
    assert "closed cannot" in err


def test_a_full_disk_while_merging_is_told_and_leaves_nothing(config, capsys, tmp_path, monkeypatch):
    def fail(model, folder):
        (folder / "model.safetensors").write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    run(capsys, "train", config, "evaluation.tasks=[]")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    _, err = run(capsys, "merge", "run", "merged", code=2)
    assert "Expected to write merged. Got I/O error: No space left on device (os error 28)" in err
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_merged_model_has_its_name_once_it_is_on_the_disk(config, capsys, tmp_path, monkeypatch):
    synced = []
    run(capsys, "train", config, "evaluation.tasks=[]")
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, Path("merged").exists())))
    Path("merged").mkdir()
    run(capsys, "merge", "run", "merged")
    before = {name for name, _ in synced[:-1]}
    assert before >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert synced[-1] == (tmp_path.name, True)


def test_a_killed_run_ends_with_the_same_bits(config, tmp_path, capsys):
    """SIGKILL at whatever the process is doing once a checkpoint is there."""
    changes = ["training.max_steps=200", "training.save_steps=10", "evaluation.tasks=[]", "output=killed"]
    command = [sys.executable, "-m", "smtune", "train", str(config), *changes]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/checkpoints/*/COMPLETE")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed/result.json").exists()
    _, err = run(capsys, *command[3:], "--resume")
    assert "Resuming from checkpoint-" in err
    run(capsys, *command[3:], "output=whole")
    ends = [load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("killed", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    steps = [[row["step"] for row in read_metrics(tmp_path / f"{name}/metrics.jsonl")] for name in ("killed", "whole")]
    assert steps[0] == steps[1]


def test_debug_shows_the_traceback(config, capsys, monkeypatch):
    for flag in ([], ["--debug"]):
        monkeypatch.setattr(sys, "argv", ["smtune", "inspect", "nothing", *flag])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert ("Traceback" in capsys.readouterr().err) == bool(flag)


def test_a_fault_of_ours_is_code_1(config, capsys, monkeypatch):
    from smtune import report

    def broken(plan, path):
        raise RuntimeError("ink is out")

    monkeypatch.setattr(report, "block_map", broken)
    run(capsys, "select", config)
    _, err = run(capsys, "inspect", "plan.json", code=1)
    assert "a fault of smtune or of a library: RuntimeError: ink is out" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_too_little_memory_is_told_with_what_to_do(config, capsys, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(training, "train", fail)
    _, err = run(capsys, "train", config, code=2)
    assert "smtune: CUDA out of memory. Tried to allocate 20.00 MiB." in err
    values, named = load_config(config), re.findall(r"(training|smt|evaluation)\.(\w+)", err)
    assert {section for section, _ in named} == {"training", "smt", "evaluation"}
    assert all(hasattr(getattr(values, section), key) for section, key in named), named


def test_of_several_processes_the_first_tells(config, capsys, monkeypatch):
    def fail(*args, **options):
        raise error

    waited = []
    monkeypatch.setattr(training, "train", fail)
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        for error in (
            smtune.InputError("no rows"),
            OSError(errno.EACCES, "Permission denied", "rows.jsonl"),
            torch.OutOfMemoryError("none left"),
        ):
            _, err = run(capsys, "train", config, code=2)
            assert f"smtune: {error}" in err
    assert len(waited) == 3


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version(word, capsys):
    out, _ = run(capsys, word)
    assert out.strip() == smtune.__version__


def test_the_merged_model_is_the_base_but_for_the_blocks(config, base, capsys):
    run(capsys, "train", config)
    run(capsys, "merge", "run", "merged")
    plan = smtune.Plan.load("run/plan.json")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, "merged"))
    for name, weight in before.named_parameters():
        module = name.removesuffix(".weight")
        changed = weight != after.get_parameter(name)
        assert changed.any() == (module in plan.modules and len(plan.modules[module].rows) > 0)
        assert changed.sum() <= (len(plan.index(module)) * 16**2 if module in plan.modules else 0)
