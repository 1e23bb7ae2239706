"""`smtune bench` as a person uses it: a quick run, going on with it, an arm that dies, faults told together."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from smtune import cli
from smtune.bench import single, suites
from smtune.bench.machine import describe
from smtune.bench.results import Results
from smtune.bench.run import How, run_series
from smtune.cli.bench import at_most_every

ARM_FIELDS = """kind suite load model dtype batch tokens layers arm label block_size blocks_per_layer blocks
    fraction_of_7b
    trained_params total_params rounds flops saved_bytes state_bytes peak_rss_bytes rss_before_bytes peak_tensor_bytes
    adapter error""".split()
STATE = {"trained", "gradients", "optimizer", "originals", "base"}
LIFE = {"bytes", "load_s", "switch_s", "merge_s", "unmerge_s", "restored_exactly"}
PHASES = {"forward", "backward", "optimizer"}


def bench(capsys, *arguments, code=0):
    """(standard output, error stream) of `smtune bench`, its exit code checked."""
    actual = cli.run(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    assert actual == code, captured.err
    return captured.out, captured.err


def test_quick_run_and_going_on_with_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = bench(capsys, "--quick", "--threads", 1, "--arms", "floor,smt-0.84")
    assert "smt" in out.lower()
    assert "bench.md" in err
    values = json.loads(Path("bench.json").read_text())
    assert values["format"] == 1
    assert values["machine"]["threads"] == 1
    assert {record["arm"] for record in values["records"]} == {"floor", "smt-0.84"}
    for record in values["records"]:
        assert set(ARM_FIELDS) <= set(record)
        assert record["error"] is None
        assert set(record["state_bytes"]) >= STATE
        assert set(record["flops"]) == {"forward", "backward"}
        assert len(record["load"]) == 2
        assert len(record["rounds"]) == (0 if record["arm"] == "floor" else 2)
        assert all(set(each["floor"]) == set(each["arm"]) == PHASES for each in record["rounds"])
        assert all(record["arm"] in each["order"] for each in record["rounds"])
        assert (record["adapter"] is None) == (record["arm"] == "floor")
        assert record["adapter"] is None or set(record["adapter"]) == LIFE
        assert record["peak_rss_bytes"] >= record["state_bytes"]["base"]
    smt = next(record for record in values["records"] if record["arm"] == "smt-0.84")
    assert smt["adapter"]["restored_exactly"]
    assert smt["flops"]["backward"] == smt["floor_flops"]["backward"] + 2 * smt["trained_params"] * smt["tokens"]

    written = Path("bench.json").read_bytes()
    bench(capsys, "--quick", "--threads", 1, "--arms", "floor,smt-0.84")
    assert Path("bench.json").read_bytes() == written  # nothing was measured again
    Path("bench.md").unlink()
    bench(capsys, "--report")
    assert Path("bench.md").is_file()
    _, err = bench(capsys, "--quick", "--threads", 2, code=2)
    assert "threads 1 not 2" in err


@pytest.mark.nightly
def test_arms_are_timed_anew_beside_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ("--quick", "--threads", 1, "--arms", "floor,smt-0.84,lora")
    bench(capsys, *quick)
    bench(capsys, *quick[:-1], "smt-0.84", "--anew")
    records = json.loads(Path("bench.json").read_text())["records"]
    assert sorted(record["arm"] for record in records) == ["floor", "lora", "smt-0.84", "smt-0.84"]
    first, second = (record for record in records if record["arm"] == "smt-0.84")
    assert first["control"] != second["control"]
    assert first["flops"] == second["flops"]


@pytest.mark.nightly
def test_an_arm_that_dies_is_recorded_and_the_others_go_on(tmp_path):
    rival = tmp_path / "rival.py"
    rival.write_text("import os\nNAME = LABEL = 'x'\ndef build(model, plan):\n    os.kill(os.getpid(), 9)\n")
    machine = describe(threads=1, device="cpu")
    results = Results(tmp_path / "bench.json", machine, "")
    series = suites.comparison("quick", "llama-64x2", "float32", 64, ["floor", "appendix-a", "smt-0.84"], str(rival))
    told = []
    run_series(series, results, How(rounds=1, threads=1, tell=told.append))
    by_arm = {record["arm"]: record for record in results.records}
    assert "signal 9" in by_arm["appendix-a"]["error"]
    assert by_arm["appendix-a"]["rounds"] == []
    assert by_arm["smt-0.84"]["error"] is None
    assert len(by_arm["smt-0.84"]["rounds"]) == 1
    assert by_arm["smt-0.84"]["timed_on"] == "shared weights"  # by which the page tells them from older records
    assert by_arm["floor"]["error"] is None
    assert any("cannot run" in line for line in told)

    again = Results(tmp_path / "bench.json", machine, "")
    started = []
    run_series(series, again, How(rounds=1, threads=1, say=started.append))
    assert not any("smt-0.84: building" in line for line in started)  # done
    assert any("appendix-a: building" in line for line in started)  # failures are tried again


@pytest.mark.nightly
def test_questions_of_their_own_kind_are_measured_and_shown(tmp_path, capsys, monkeypatch):
    """On a small model: what is kept is what the page reads."""
    monkeypatch.setattr(single, "KERNEL_SHAPES", ((256, 64, 2),))
    monkeypatch.setattr(single, "SCORING", (("abs_of_sum", "bfloat16"), ("net", "float32")))
    output = tmp_path / "bench.json"
    results, how = Results(output, describe(threads=1, device="cpu"), ""), How(rounds=5, threads=1)
    single.run_table1(suites.table1("llama-256x2", "float32", 64), results, how)
    single.run_scoring("llama-256x2", "float32", 64, results, how)
    single.run_kernels("float32", 64, results, how)
    kinds = Counter(record["kind"] for record in results.records)
    assert kinds["table1"] == 5
    assert kinds["scoring"] == 2
    assert kinds["kernel"] >= 5
    assert {record["arm"] for record in results.records if record.get("error")} <= {"full-cpuadam"}
    bench(capsys, "--report", "--output", output)
    page = output.with_suffix(".md").read_text()
    for shown in (
        "### table1-float32-64",
        "| abs_of_sum | bfloat16 |",
        "| net | float32 |",
        "| cpu | float32 | 64 | 256 | 64 | 2 |",
    ):
        assert shown in page, shown


@pytest.mark.nightly
@pytest.mark.real_model
def test_plans_held_to_a_cost_are_measured_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(single, "LIMITS", (1.0, 0.5))
    output = tmp_path / "bench.json"
    results = Results(output, describe(threads=1, device="cpu"), "")
    single.run_cost_aware("float32", results, How(rounds=5, threads=1))
    records = json.loads(output.read_text())["records"]
    assert [record["max_backward_cost"] for record in records] == [1.0, 0.5]
    assert all(record["backward_cost"] <= record["max_backward_cost"] for record in records)
    assert records[0]["score_kept"] > records[1]["score_kept"]
    bench(capsys, "--report", "--output", output)
    assert "| cost-aware-float32 | 0.5 |" in output.with_suffix(".md").read_text()


def test_faults_are_told_together_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    _, err = bench(
        capsys, "--suite", "layer7b", "--dtype", "float23", "--tokens", "513", "--arms", "lorra,appendix-a",
        "--rounds", 0, "--threads", 0, "--device", "cdua", "--output", "file/bench.json", code=2,
    )  # fmt: skip
    for word in ("layers7b", "float32", "513", "lora", "--rival", "round", "thread", "cuda", "file"):
        assert word in err, err
    assert err.count("Did you mean") == 4
    assert sorted(os.listdir()) == ["file"]
    _, err = bench(capsys, "--threads", 1 << 20, code=2)
    assert "threads, the cores here" in err
    _, err = bench(capsys, "--tokens", "many", code=2)
    assert "whole numbers" in err
    _, err = bench(capsys, "--rival", "nowhere.py", code=2)
    assert "nowhere.py" in err
    _, err = bench(capsys, "--report", code=2)
    assert "There are none" in err


@pytest.mark.real_model
def test_smollm2_is_a_subject():
    from smtune.bench.subjects import find_subject

    subject = find_subject("smollm2-135m")
    model = subject.load("bfloat16")
    assert sum(parameter.numel() for parameter in model.parameters()) == subject.params
    assert subject.inputs(model, 512)["input_ids"].shape == (4, 128)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_log_hears_what_goes_on_once_in_a_while():
    clock, heard = iter([100.0, 101.0, 159.9, 160.0, 161.0, 400.0]), []
    say = at_most_every(60.0, heard.append, lambda: next(clock))
    for number in range(6):
        say(str(number))
    assert heard == ["0", "3", "5"]
