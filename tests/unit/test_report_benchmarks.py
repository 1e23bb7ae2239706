"""The report of a benchmark says what its records say: verdicts, ratios and fits are recomputed here by hand.

All records in this file are made up, by `made_up`, in the form that `smtune bench` writes; nothing here was measured.
"""

from __future__ import annotations

import copy
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from smtune.bench.suites import ARMS as DECLARED
from smtune.bench.suites import is_for
from smtune.models import DTYPES
from smtune.report.benchmarks import claims, figures, sweeps, terminal_tables, words, write_report
from smtune.report.benchmarks.page import COMPARISONS, KINDS, page
from smtune.report.benchmarks.records import difference, spread, step, step_ratios, suites
from smtune.report.benchmarks.targets import (
    ABSENT,
    ADDITIVE,
    HOLDS,
    MISSED,
    NO_TARGET,
    OPEN,
    OTHERS,
    PART,
    REASONS,
    RIVALS,
    SMALLER,
    TWO_PROCESSES,
    against,
    compare,
    how_apart,
    judge_exponent,
    reasons,
    targets,
)

DOCS = Path(__file__).parents[2] / "docs"
FLOOR = {"forward": 1.0, "backward": 1.5, "optimizer": 0.0}
P_LLAMA, LINEARS, TOKENS = 421_000_000, 404_750_336, 1024
QKV = 3 * 4096**2
BLOCK = 256**2
SAVED_BY_FLOOR = 800 * 2**20
ARMS = {  # label, trained parameters, forward, backward and optimizer beyond the floor's, in floor steps
    "floor": ("floor", 0, (0, 0, 0)),
    "smt-0.43": ("SMT 0.43 %", 28 * BLOCK, (0.001, 0.004, 0.001)),
    "smt-0.84": ("SMT 0.84 %", 54 * BLOCK, (0.002, 0.008, 0.002)),
    "smt-1.26": ("SMT 1.26 %", 80 * BLOCK, (0.002, 0.012, 0.003)),
    "smt-2.5": ("SMT 2.5 %", 160 * BLOCK, (0.003, 0.022, 0.006)),
    "smt-3.73": ("SMT 3.73 %", 240 * BLOCK, (0.003, 0.033, 0.009)),
    "smt-4.91": ("SMT 4.91 %", 316 * BLOCK, (0.004, 0.049, 0.012)),
    "smt-additive": ("SMT additive 0.84 %", 54 * BLOCK, (0.01, 0.03, 0.002)),
    "smt-additive-4.91": ("SMT additive 4.91 %", 316 * BLOCK, (0.02, 0.08, 0.012)),
    "lora": ("LoRA q,k,v r=72", 3_538_944, (0.02, 0.04, 0.002)),
    "lora-4.91": ("LoRA q,k,v r=421", 20_692_992, (0.05, 0.1, 0.012)),
    "lora-autocast": ("LoRA q,k,v r=72, autocast", 3_538_944, (0.02, 0.03, 0.002)),
    "lora-4.91-autocast": ("LoRA q,k,v r=421, autocast", 20_692_992, (0.04, 0.08, 0.012)),
    "dora-autocast": ("DoRA q,k,v r=71, autocast", 3_514_368, (0.09, 0.14, 0.002)),
    "lora-all": ("LoRA all linear r=22", 3_538_944, (0.03, 0.06, 0.002)),
    "dora": ("DoRA q,k,v r=71", 3_514_368, (0.1, 0.16, 0.002)),
    "dora-4.91": ("DoRA q,k,v r=420", 20_668_416, (0.14, 0.2, 0.012)),
    "shira": ("SHiRA", 3_538_944, (0.06, 0.2, 0.002)),
    "shira-4.91": ("SHiRA 4.91 %", 20_692_992, (0.08, 0.22, 0.012)),
    "supertuning": ("Super-tuning", 3_538_944, (0.06, 0.21, 0.002)),
    "supertuning-4.91": ("Super-tuning 4.91 %", 316 * BLOCK, (0.08, 0.23, 0.012)),
    "dense-v": ("dense v_proj", 2 * 4096**2, (0, 0.04, 0.01)),
    "sift": ("SIFT", 3_538_944, (0.002, 0.13, 0.03)),
    "appendix-a": ("paper's Appendix A listing", 54 * BLOCK, (0.01, 0.1, 0.002)),
    "full": ("full", P_LLAMA, (0, 0.42, 0.35)),
    "full-autocast": ("full, autocast", P_LLAMA, (0.02, 0.45, 0.4)),
}
TOGETHER = {"timed_on": "shared weights", "control": [1.0, 1.004, 0.996] * 4}


def rounds(extra, n=12, noise=0.003, seed=0):
    """Made-up pairs: the floor's step drifts, and the arm's beside it by the same factor."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        drift = 1 + 0.1 * rng.random()
        floor = {part: seconds * drift for part, seconds in FLOOR.items()}
        arm = {
            part: (seconds + 2.5 * more) * drift * (1 + noise * rng.standard_normal())
            for (part, seconds), more in zip(FLOOR.items(), extra)
        }
        found.append({"order": ["floor", "arm"], "floor": floor, "arm": arm})
    return found


def arm_record(
    suite, name, *, kind="arm", model="llama-7b-layers", dtype="float32", tokens=TOKENS, noise=0.003, **more
):
    label, trained, extra = ARMS[name]
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    adds = 0 if name == "floor" else 2 * trained * tokens
    forward, backward = 2 * LINEARS * tokens, 2 * LINEARS * tokens - 2 * QKV * tokens
    is_full = name.startswith("full")
    if is_full or name == "sift":
        adds = 2 * (LINEARS + QKV if is_full else 2 * QKV) * tokens
    is_lora = name.startswith(("lora", "dora"))
    used_columns = {0: 0}.get(trained, 8192)
    saved = SAVED_BY_FLOOR + (2000 * 2**20 if is_full else used_columns * tokens * itemsize + (2**20 if is_lora else 0))
    smt = name.startswith("smt")
    state = {
        "trained": trained * (itemsize if name == "full" else 4),
        "gradients": trained * (itemsize if name == "full" else 4),
        "optimizer": trained * (2 * itemsize if name == "full" else 8) + (4 if trained else 0),
        "originals": trained * itemsize if smt and "additive" not in name else 0,
        "base": 0 if is_full else P_LLAMA * itemsize,
    }
    return {
        "kind": kind,
        "suite": suite,
        "load": [1.9, 2.1],
        "model": model,
        "dtype": dtype,
        "batch": 1,
        "tokens": tokens,
        "layers": 2,
        "arm": name,
        "label": label,
        "block_size": 256 if smt else None,
        "blocks_per_layer": trained // BLOCK // 2 if smt else None,
        "blocks": trained // BLOCK if smt else None,
        "trained_params": trained,
        "total_params": P_LLAMA,
        "rounds": [] if name == "floor" else rounds(extra, noise=noise, seed=list(ARMS).index(name)),
        **TOGETHER,
        "flops": {"forward": forward + (adds // 2 if is_lora else 0), "backward": backward + adds},
        "saved_bytes": saved,
        "alive_after_forward_bytes": saved + (40 * 2**20 if name == "appendix-a" else 0),
        "others_cores": 0.03,
        "used_columns": used_columns,
        "state_bytes": state,
        "rss_before_bytes": 2 * 2**30,
        "peak_rss_bytes": 3 * 2**30 + sum(state.values()),
        "peak_tensor_bytes": sum(state.values()) + saved - (state["gradients"] if smt else 0),
        "adapter": {
            "bytes": trained * 4 + 2000,
            "load_s": 0.4,
            "switch_s": 0.012,
            "merge_s": 0.006,
            "unmerge_s": 0.004,
            "restored_exactly": smt,
        }
        if smt or is_lora
        else None,
        "error": None,
        **more,
    }


def sweep_record(
    sweep, value, extra_seconds, tokens=1024, layers=4, trained=54 * BLOCK, scale=1.0, noise=0.0005, dtype="float32"
):
    rng = np.random.default_rng(int(value * 1000))
    pairs = []
    for _ in range(9):
        floor = 0.5 * scale
        arm = (floor + extra_seconds) * (1 + noise * rng.standard_normal())
        pairs.append(
            {
                "order": ["floor", "arm"],
                "floor": {"forward": floor / 2, "backward": floor / 2, "optimizer": 0.0},
                "arm": {"forward": arm * 0.5, "backward": arm * 0.5, "optimizer": 0.0},
            }
        )
    return {
        "kind": "sweep",
        "suite": "sweep",
        "sweep": sweep,
        "value": value,
        "load": [2.0, 2.0],
        "model": f"llama-1024x{layers}",
        "dtype": dtype,
        "tokens": tokens,
        "layers": layers,
        "arm": "smt-0.84",
        "label": "SMT",
        "trained_params": trained,
        "rounds": pairs,
        "flops": {"forward": 10**9, "backward": 10**9 + 2 * trained * tokens},
        "floor_flops": {"forward": 10**9, "backward": 10**9},
        "block_ops_s": [extra_seconds * 0.7 * (1 + 0.01 * k) for k in range(7)],
        "error": None,
        **TOGETHER,
    }


def made_up():
    """A whole result file; made up."""
    records = []
    for dtype in ("float32", "bfloat16"):
        suite = f"layers7b-{dtype}-1024"
        names, noise = [name for name in ARMS if is_for(name, dtype)], 0.003 if dtype == "float32" else 0.04
        records += [arm_record(suite, name, dtype=dtype, noise=noise) for name in names]
    for name in (name for name in ARMS if is_for(name, "float32")):
        record = arm_record("smollm2-float32-1024", name, model="smollm2-135m")
        if name == "supertuning":
            record |= {
                "rounds": [],
                "error": "InputError: Expected a peft with Super-tuning, 0.21 or newer. Got 0.20.0.",
            }
            for key in ("flops", "saved_bytes", "state_bytes", "peak_rss_bytes", "peak_tensor_bytes"):
                del record[key]
        records.append(record)
    for dtype, slow in (("float32", 1.0), ("bfloat16", 0.6)):
        for tokens in (256, 512, 1024, 2048):
            records.append(
                sweep_record(
                    "tokens", tokens, tokens * slow * 3e-5, tokens=tokens, scale=slow * tokens / 1024, dtype=dtype
                )
            )
        for blocks in (14, 27, 54, 108):
            records.append(sweep_record("budget", blocks, blocks * 6e-4, trained=blocks * BLOCK, dtype=dtype))
        for layers in (4, 8, 16):
            records.append(
                sweep_record("layers", layers - 2, 0.02, layers=layers, scale=layers / 4, noise=0.002, dtype=dtype)
            )
        for depth in (0, 1, 2, 3):
            records.append(sweep_record("depth", depth, -0.1 * depth, dtype=dtype))
        for size in (64, 128, 256):
            records.append(sweep_record("block_size", size, 0.02 * (256 / size) ** 0.3, dtype=dtype))
    records.append(
        {
            "kind": "sweep",
            "suite": "sweep",
            "sweep": "tokens",
            "value": 4096,
            "dtype": "float32",
            "arm": "smt-0.84",
            "error": "MemoryError: no room",
        }
    )
    for when, extra in (("at use", (0.002, 0.008, 0.002)), ("after step", (0.001, 0.008, 0.003))):
        record = arm_record("layers7b-float32-1024", "smt-0.84", kind="write")
        records.append(record | {"when": when, "rounds": rounds(extra, seed=3)})
    for criterion, accumulator in (("abs_of_sum", "float32"), ("abs_of_sum", "bfloat16"), ("net", "")):
        records.append(
            {
                "kind": "scoring",
                "suite": "layers7b-float32-1024",
                "load": [2.0, 2.0],
                "criterion": criterion,
                "accumulator": accumulator,
                "rounds": [{"floor": 2.5, "dense": 2.8, "score": 2.9 + 0.01 * k} for k in range(6)],
                "flops": {"floor": 100, "dense": 112, "score": 112},
                "accumulator_bytes": QKV * 8,
                "peak_rss_bytes": 3 * 2**30,
            }
        )
    for dtype in ("float32", "bfloat16"):
        for blocks in (8, 32):
            for candidate, rate in (
                ("strided", 0.85 if dtype == "float32" else 0.04),
                ("widened", 0.7),
                ("copied", 0.6),
                ("bmm", 0.4),
            ):
                records.append(
                    {
                        "kind": "kernel",
                        "suite": f"kernels-{dtype}-2048",
                        "device": "cpu",
                        "load": [2.0, 2.0],
                        "dtype": dtype,
                        "tokens": 2048,
                        "features": 4096,
                        "block_size": 256,
                        "blocks": blocks,
                        "candidate": candidate,
                        "used": candidate == ("strided" if dtype == "float32" else "widened"),
                        "seconds": [0.012 / rate * (1 + 0.01 * k) for k in range(5)],
                        "ideal_seconds": [0.012] * 5,
                    }
                )
    for name, seconds in (("smt-1.26", 2.5), ("lora", 2.65), ("dora", 3.1), ("full", 4.4)):
        records.append(
            {
                "kind": "table1",
                "suite": "table1-float32-1024",
                "arm": name,
                "label": ARMS[name][0],
                "load": [2.0, 2.0],
                "iterations": 10,
                "forward_s": [seconds * 0.4] * 10,
                "backward_s": [seconds * 0.5] * 10,
                "optimizer_s": [seconds * 0.1] * 10,
                "trained_fraction": ARMS[name][1] / P_LLAMA,
            }
        )
    records.append(
        {
            "kind": "table1",
            "suite": "table1-float32-1024",
            "arm": "full-cpuadam",
            "label": "full, DeepSpeed CPUAdam",
            "iterations": 10,
            "error": "InputError: Expected DeepSpeed for its CPUAdam.",
        }
    )
    for cost, kept, extra in (
        (1.0, 1.0, (0.002, 0.01, 0.002)),
        (0.75, 0.97, (0, -0.14, 0.002)),
        (0.5, 0.9, (0, -0.27, 0.002)),
        (0.25, 0.71, (0, -0.41, 0.001)),
    ):
        record = arm_record("smollm2-float32-1024", "smt-0.84", kind="cost_aware", model="smollm2-135m")
        records.append(
            record
            | {
                "max_backward_cost": cost,
                "backward_cost": cost - 0.01,
                "score_kept": kept,
                "lowest_layer": int(30 * (1 - cost)),
                "rounds": rounds(extra, seed=7),
            }
        )
    return {
        "format": 1,
        "command": "smtune bench --output docs/results/bench.json",
        "started": "2026-11-24",
        "machine": {
            "cpu": "made-up processor",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 24 * 2**30,
            "gpu": None,
            "features": ["avx512_bf16"],
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "python": "3.11",
            "smtune": "0",
        },
        "records": records,
        "quality": [
            {"max_backward_cost": c, "held_out_loss": 0.5 + 0.1 * (1 - c), "right": int(60 - 20 * (1 - c)), "of": 100}
            for c in (1.0, 0.75, 0.5, 0.25)
        ],
    }


@pytest.fixture(scope="module")
def results():
    """As it comes out of the file. A test that changes it works on a copy."""
    return json.loads(json.dumps(made_up()))


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "docs" / "benchmarks.md"
    return path, write_report(results, path)


def tables(text, first):
    """The rows of every table whose first column has this heading, as dicts; of equal headings the last."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines()]
        if block.startswith(f"| {first} |"):
            found.append([dict(zip(lines[0], line)) for line in lines[2:]])
    return found


def arms(results, suite="layers7b-float32-1024"):
    return {r["arm"]: r for r in results["records"] if r["kind"] == "arm" and r["suite"] == suite}


def verdicts(results, what, where=None):
    return {row.where: row.verdict for row in targets(results) if what in row.what and where in (None, row.where)}


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", sorted(DOCS.glob("benchmarks*.md")), ids=lambda page: page.stem)
def test_the_committed_pages_are_those_of_their_records(page, tmp_path):
    records = DOCS / "results" / f"{page.stem.replace('benchmarks', 'bench')}.json"
    written, *pictures = write_report(json.loads(records.read_text(encoding="utf-8")), tmp_path / page.name)
    assert written.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert {path.name for path in pictures} == {path.name for path in page.with_suffix("").iterdir()}


@pytest.mark.parametrize("records", sorted((DOCS / "results").glob("bench*.json")), ids=lambda path: path.stem)
def test_what_is_counted_holds_in_the_committed_records(records):
    """Time is noise and may miss a target; FLOPs and bytes may not."""
    rows = targets(json.loads(records.read_text(encoding="utf-8")))
    counted = [
        row for row in rows if row.group in ("2", "design") or row.what.endswith((", to the byte", "bit for bit"))
    ]
    assert len({row.what for row in counted}) == 5
    assert {row.verdict for row in counted} - {ABSENT} == {HOLDS}
    assert all(row.verdict == HOLDS for row in counted if row.group == "2")


def test_every_picture_is_there_and_linked_relatively(written):
    path, files = written
    assert files[0] == path
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", path.read_text(encoding="utf-8"))
    assert sorted(path.parent / link for link in linked) == sorted(files[1:])
    assert {file.parent for file in files[1:]} == {path.parent / "benchmarks"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files[1:])
    names = {file.name.split("-")[0] for file in files[1:]}
    assert names == {"step", "memory", "sweep", "cost"}


def test_the_page_says_what_ran_where(written):
    text = written[0].read_text(encoding="utf-8")
    for said in (
        "```\nsmtune bench --output docs/results/bench.json\n```",
        "2026-11-24",
        "made-up processor (avx512_bf16), 2 cores, 2 threads",
        "1-minute load 1.9 to 2.1 (the benchmark itself is 2)",
        "other processes kept 0.03 to 0.03 cores busy, 0.1 or more during 0 of",
    ):
        assert said in text
    assert "nan" not in text
    assert "None" not in text


def test_counts_of_an_earlier_run_are_said(results):
    assert "| counted |" not in page(results, {})
    other = copy.deepcopy(results)
    arms(other)["dora"]["counted_run"] = {"commit": "abc1234" + 33 * "0", "date": "2026-11-29"}
    text = page(other, {})
    assert "| counted | 1 of " in text
    assert "(2026-11-29, abc1234)" in text


def test_the_table_of_arms_shows_medians_of_pairs(results, written):
    rows = {row["arm"]: row for row in tables(written[0].read_text(encoding="utf-8"), "arm")[0]}
    found = arms(results)
    assert list(rows) == [arm["label"] for arm in found.values()]
    arm = found["smt-4.91"]
    ratios = [step(pair["arm"]) / step(pair["floor"]) for pair in arm["rounds"]]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    row = rows["SMT 4.91 %"]
    assert row["step / floor"] == f"{middle:.3f} ({low:.3f}–{high:.3f})"
    backward = np.median([pair["arm"]["backward"] / step(pair["floor"]) for pair in arm["rounds"]])
    assert row["backward"] == f"{backward:.3f}"
    assert (row["trained"], row["share"], row["pairs"]) == ("20,709,376", "4.92 %", "12")
    flops = sum(arm["flops"].values()) / sum(found["floor"]["flops"].values())
    assert row["FLOPs / floor"] == f"{flops:.3f}"
    assert rows["floor"]["step / floor"] == "1 by definition"


def test_bytes_are_beyond_the_floors(results, written):
    rows = {row["arm"]: row for row in tables(written[0].read_text(encoding="utf-8"), "arm")[1]}
    row = rows["SMT 0.84 %"]
    assert row["saved beyond the floor"] == "32.0 MiB"  # 8192 columns of 1024 tokens in fp32
    assert row["optimizer state"] == "27.0 MiB"
    assert rows["paper's Appendix A listing"]["alive after forward"] == "72.0 MiB"
    (adapter,) = [
        r for r in tables(written[0].read_text(encoding="utf-8"), "adapter")[0] if r["adapter"] == "SMT 0.84 %"
    ]
    assert (adapter["switch"], adapter["base restored exactly"]) == ("12.0 ms", "yes")


def test_errors_are_shown_and_wide_spreads_are_marked(results):
    results = copy.deepcopy(results)
    arm = arms(results)["lora"]
    for number, pair in enumerate(arm["rounds"]):
        pair["arm"]["forward"] *= 1 + 0.03 * number
    text = page(results, {})
    first, _, third = (t for t in tables(text, "arm") if "pairs" in t[0])
    assert {row["arm"] for row in first if "**wide**" in row["step / floor"]} == {arm["label"]}
    assert "spread **wide** in 1 of 21 arms" in text
    (failed,) = [row for row in third if row["arm"] == "Super-tuning"]
    assert (
        failed["step / floor"] == "no result: InputError: Expected a peft with Super-tuning, 0.21 or newer. Got 0.20.0."
    )
    assert "- sweep tokens, value 4096, dtype float32: MemoryError: no room" in text


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_any_kind_may_be_missing_and_the_page_says_so(results, tmp_path, kind):
    few = {"arm": 0, "sweep": 0}
    kept = []
    for record in results["records"]:
        few[record["kind"]] = few.get(record["kind"], 0) + 1
        if record["kind"] == kind and few[kind] <= len(ARMS) + 1:
            kept.append(record)
    only = {"format": 1, "records": kept}
    files = write_report(only, tmp_path / "page.md")
    missing = next(row[""] for row in _facts(files[0].read_text(encoding="utf-8")) if row["what"] == "not measured")
    expected = {name for other, name in KINDS.items() if other != kind}
    if kind not in (None, "arm"):
        dtypes = {"float32", "bfloat16"} - {record.get("dtype") for record in kept}
        expected |= {f"{KINDS[kind]} in {dtype}" for dtype in dtypes}
    there = {(record["suite"], record["arm"]) for record in kept if kind == "arm"}
    by_suite = {
        suite: [arm for arm in DECLARED if (suite, arm) not in there and is_for(arm, suite.split("-")[1])]
        for suite in dict(there)
    }
    expected |= {f"{suite}: {', '.join(names)}" for suite, names in by_suite.items() if names}
    if kind == "arm":
        expected |= {f"{model}-{dtype}-{tokens}" for model, tokens in COMPARISONS for dtype in DTYPES} - {*by_suite}
    assert set(missing.split("; ")) == expected
    if kind is None:
        assert len(files) == 1
        assert {row.verdict for row in targets(only)} == {ABSENT}
    assert terminal_tables(only)


def _facts(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [{"what": line[0], "": " | ".join(line[1:])} for line in lines]


def test_any_field_may_be_missing(results, monkeypatch):
    """Of all records at once: nothing fails, and nothing missing is shown as a number."""
    keys = {key for record in results["records"] for key in record} - {"kind", "suite", "arm"}
    monkeypatch.setattr("smtune.report.benchmarks.records.RESAMPLES", 20)
    few = [record for record in results["records"] if record.get("dtype", "float32") == "float32"]
    few = [record for record in few if "smollm2" not in record["suite"] or record["kind"] == "cost_aware"]
    for key in sorted(keys):
        records = [{k: v for k, v in record.items() if k != key} for record in few]
        less = {**results, "records": records}
        assert "None" not in page(less, {}), key
        assert terminal_tables(less)


def terminal_text(results):
    console = Console(width=220, file=io.StringIO())
    for table in terminal_tables(results):
        console.print(table)
    return console.file.getvalue()


def test_the_tables_for_the_terminal(results):
    text = terminal_text(results)
    assert "layers7b-float32-1024: llama-7b-layers, 2 layers, float32, 1024 tokens" in text
    assert re.search(r"SMT 0.84 %\s+│ +0.84 % │ +1\.01\d \(1\.01\d–1\.01\d\) │ 1.005 │ \+32.0 MiB │ +27.0 MiB", text)
    assert re.search(r"SMT 4.91 %: step / floor at most 1.06\s+│ layers7b-float32-1024 .* missed", text)


def test_flops_are_over_those_of_the_floor_beside(results):
    other = copy.deepcopy(results)
    arm = arms(other)["smt-0.84"]
    arm["floor_flops"] = {part: 2 * flops for part, flops in arm["flops"].items()}
    rows = {row["arm"]: row for row in tables(page(other, {}), "arm")[0]}
    assert rows["SMT 0.84 %"]["FLOPs / floor"] == "0.500"
    assert re.search(r"SMT 0.84 %\s+│[^│]*│[^│]*│ +0\.500 │", terminal_text(other))


# -- targets -----------------------------------------------------------------------------------------------------------


def with_extra(results, arm, extra, noise=0.003, n=12, suite="layers7b-float32-1024"):
    """A copy in which the steps of one arm take so much more than the floor's."""
    results = copy.deepcopy(results)
    arms(results, suite)[arm]["rounds"] = rounds((0, extra, 0), noise=noise, n=n, seed=11)
    return results


@pytest.mark.parametrize(("extra", "verdict"), [(0.015, HOLDS), (0.025, MISSED)])
def test_step_target(results, extra, verdict):
    found = verdicts(with_extra(results, "smt-0.84", extra), "SMT 0.84 %: step / floor at most 1.02")
    assert found["layers7b-float32-1024"] == verdict
    assert found["smollm2-float32-1024"] == NO_TARGET


def test_step_target_wants_tokens_and_the_shapes_of_7b(results):
    few = copy.deepcopy(results)
    few["records"] = list(arms(few).values())
    for record in few["records"]:
        record["tokens"] = 512
    assert verdicts(few, "step / floor at most 1.02") == {"": ABSENT, "layers7b-float32-1024": NO_TARGET}


@pytest.mark.parametrize(
    ("extra", "noise", "n", "verdict"),
    [
        (0.055, 0.001, 12, HOLDS),  # LoRA is 0.062 above the floor
        (0.070, 0.001, 12, MISSED),
        (0.062, 0.02, 12, OPEN),
        (0.010, 0.001, 4, OPEN),
    ],
)
def test_two_arms_are_told_apart_or_not(results, extra, noise, n, verdict):
    found = arms(with_extra(results, "smt-0.84", extra, noise, n))
    estimate, decided = compare(found["smt-0.84"], found["lora"])
    assert decided == verdict
    assert (estimate is None) == (n < 5)


def test_what_was_timed_apart_tells_nothing_close_or_far(results):
    apart = with_extra(results, "smt-0.84", 0.001)
    for record in apart["records"]:
        record.pop("timed_on", None)
    found = arms(apart)
    assert compare(found["smt-0.84"], found["dora"])[1] == OPEN
    for what in ("step / floor at most 1.02", "SMT 0.84 %: step below LoRA", "step above the floor against tokens"):
        assert set(verdicts(apart, what).values()) <= {OPEN, NO_TARGET}, what
    assert verdicts(apart, "cost-aware plan") == {"smollm2-float32-1024": OPEN}


def test_arms_of_two_runs_are_told_apart_by_more_than_a_tenth(results):
    for extra, same, other in ((0.001, HOLDS, OPEN), (0.3, MISSED, MISSED), (0.13, MISSED, OPEN)):
        found = arms(with_extra(results, "smt-0.84", extra, noise=0.001))
        mine, theirs = found["smt-0.84"], found["lora"]  # LoRA is 0.062 above the floor
        assert compare(mine, theirs)[1] == same
        for of_two in ({"run": {"date": "another"}, "control": []}, {"control": [1.0, 1.01]}):
            assert compare(mine | of_two, theirs)[1] == other
            assert how_apart(mine | of_two, theirs) == TWO_PROCESSES


def test_two_arms_are_compared_by_the_run_that_both_were_in(results):
    """Here LoRA is 0.062 above the floor, with 12 pairs; in a second run, without DoRA, SMT and LoRA are equal."""
    results = with_extra(results, "smt-0.84", 0.001, noise=0.001)
    first = arms(results)
    for name in ("smt-0.84", "lora"):
        again = first[name] | {"control": [1.0, 1.002] * 10, "rounds": rounds((0, 0.001, 0), noise=0.001, n=20, seed=2)}
        results["records"].append(again)
    suite = next(suite for suite in suites(results) if suite.name == "layers7b-float32-1024")
    assert len(step_ratios(suite.arms["smt-0.84"])) == 20
    assert [len(step_ratios(record)) for record in suite.both("smt-0.84", "lora")] == [20, 20]
    assert [len(step_ratios(record)) for record in suite.both("smt-0.84", "dora")] == [12, 12]
    assert against(suite, "smt-0.84", "lora")[1] == OPEN
    assert against(suite, "smt-0.84", "dora")[1] == HOLDS
    (control,) = [row for row in targets(results) if row.group == "control" and row.where == suite.name]
    assert control.measured.count("95 %") == 2


def test_writes_are_told_apart_only_where_they_were_timed_together(results):
    def faster(results):
        (row,) = [row for rows in tables(page(results, {}), "suite") for row in rows if "which is faster" in row]
        return row["which is faster"]

    assert faster(results) == "*not told apart*"
    slower = copy.deepcopy(results)
    at_use, _ = [record for record in slower["records"] if record["kind"] == "write"]
    at_use["rounds"] = rounds((0.1, 0, 0), seed=3)
    assert faster(slower) == "after the step"
    del at_use["timed_on"]
    assert faster(slower) == "*not told apart*, timed apart"


def test_a_rival_that_was_not_measured_leaves_it_in_part(results):
    where, what = "layers7b-float32-1024", "SMT 0.84 %: step below LoRA"
    assert verdicts(results, what)[where] == HOLDS
    fewer = {**results, "records": [record for record in results["records"] if record.get("arm") != "shira"]}
    (row,) = [row for row in targets(fewer) if row.what.startswith(what) and row.where == where]
    assert (row.verdict, row.measured.endswith("; not measured: SHiRA")) == (PART, True)


def test_a_rival_of_another_dtype_is_none(results):
    of_dtype = {row.where: "autocast" in row.what for row in targets(results) if "%: step below LoRA" in row.what}
    assert of_dtype == {
        "layers7b-float32-1024": False,
        "layers7b-bfloat16-1024": True,
        "smollm2-float32-1024": False,
    }
    alone = [arms(results)[name] for name in ("floor", "smt-0.84", "smt-4.91")]
    assert verdicts({**results, "records": alone}, ": step below") == {"": ABSENT}


def test_what_has_no_target_is_compared_all_the_same(results):
    rows = [row for row in targets(results) if row.group == "others" and row.where == "layers7b-float32-1024"]
    assert {row.verdict for row in rows} == {NO_TARGET}
    assert [row.measured for row in rows] == ["holds: SIFT, dense v_proj, the paper's listing", "missed: dense v_proj"]


def test_every_arm_of_as_many_parameters_is_a_rival():
    """In the records too: SMT of a budget is compared with whatever trains as much, to a twentieth."""
    for path in (DOCS / "results").glob("bench*.json"):
        for suite in suites(json.loads(path.read_text(encoding="utf-8"))):
            for name, rivals in RIVALS.items():
                compared = {*rivals, *OTHERS[name], *SMALLER.get(name, {}), *ADDITIVE.values(), name}
                own = suite.arms.get(name, {}).get("trained_params", 0)
                trained = {arm: record.get("trained_params") or 0 for arm, record in suite.arms.items()}
                equal = {arm for arm, number in trained.items() if abs(number - own) < 0.05 * own}
                assert equal <= compared, suite.name


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_beside_bf16_weights_a_rival_is_as_the_trainer_runs_it(results, name):
    where = "layers7b-bfloat16-1024"
    other = copy.deepcopy(results)
    for arm in arms(other, where).values():
        if arm["arm"] == f"{name}-autocast":
            for each, mine in zip(arm["rounds"], arms(other, where)["smt-0.84"]["rounds"]):
                each["floor"], each["arm"] = mine["floor"], {part: 0.9 * s for part, s in mine["arm"].items()}
            arm["peak_tensor_bytes"] = 1
    rows = [row for row in claims.other_rows(other) if row.where == where]
    for what in ("× SMT's time", "counted peak at"):
        assert {row.verdict for row in rows if what in row.measured} == {claims.DOES_NOT}
    if name == "lora":
        assert verdicts(other, "counted peak memory at or below LoRA", where) == {where: MISSED}


def test_in_short_who_is_faster(results):
    def short(of):
        text = page(of, {})
        return tables(text[text.index("## In short") : text.index("## Targets")], "suite")

    usual, large = short(results)
    (row,) = [row for row in usual if row["suite"] == "layers7b-float32-1024"]
    medians = {arm: f"{np.median(step_ratios(record)):.3f}" for arm, record in arms(results).items() if arm != "floor"}
    assert (row["SMT 0.84 %"], row["LoRA"], row["LoRA, autocast"]) == (medians["smt-0.84"], medians["lora"], "–")
    assert large[0]["dense v_proj"] == f"**{medians['dense-v']}**"
    other = copy.deepcopy(results)
    del arms(other)["dora"]["timed_on"]
    assert short(other)[0][0]["DoRA"] == f"{medians['dora']} ≈"
    del arms(other)["smt-4.91"]["rounds"][:]
    assert "layers7b-float32-1024" not in [row["suite"] for row in short(other)[1]]


def test_an_arm_that_was_timed_apart_says_so(results):
    other = copy.deepcopy(results)
    del arms(other)["smt-0.84"]["timed_on"]
    (row,) = [row for row in tables(page(other, {}), "arm")[0] if row["arm"] == "SMT 0.84 %"]
    assert row["step / floor"].endswith(", timed apart")
    assert ", timed apart" not in tables(page(results, {}), "arm")[0][1]["step / floor"]


def test_what_is_missed_has_its_reason(results):
    slow = with_extra(results, "smt-0.84", 0.5)
    assert any(": step / floor at most 1.02*: " in line for line in reasons(targets(slow)))
    assert "Why some are missed, or not told apart:" in page(slow, {})
    missed = {row.what for row in targets(slow) if row.verdict == MISSED}
    assert all(any(part in what for part in REASONS) for what in missed)


def test_one_faster_rival_misses_the_target_of_the_suite(results):
    slow = with_extra(results, "smt-0.84", 0.075)
    (row,) = [
        r
        for r in targets(slow)
        if r.what.startswith("SMT 0.84 %: step below") and "float32-1024" in r.where and "7b" in r.where
    ]
    assert row.verdict == MISSED
    assert row.measured.startswith("missed: LoRA; holds: LoRA on all linear layers, DoRA")


@pytest.mark.parametrize(
    ("what", "change", "verdict"),
    [
        ("FLOPs", lambda arm: None, HOLDS),
        ("FLOPs", lambda arm: arm["flops"].update(backward=arm["flops"]["backward"] + 1), MISSED),
        ("FLOPs", lambda arm: arm["flops"].update(forward=arm["flops"]["forward"] + 1), MISSED),
        ("bytes saved", lambda arm: None, HOLDS),
        ("bytes saved", lambda arm: arm.update(saved_bytes=arm["saved_bytes"] + 1), MISSED),
        ("bytes per trained parameter", lambda arm: None, HOLDS),
        ("bytes per trained parameter", lambda arm: arm["state_bytes"].update(gradients=0), MISSED),
        ("bytes per trained parameter", lambda arm: arm["state_bytes"].update(originals=0), MISSED),
        ("counted peak memory at or below LoRA", lambda arm: None, HOLDS),
        ("counted peak memory at or below LoRA", lambda arm: arm.update(peak_tensor_bytes=2**33), MISSED),
        ("counted peak memory at most 50 %", lambda arm: None, HOLDS),
        ("counted peak memory at most 50 %", lambda arm: arm.update(peak_tensor_bytes=5 * 2**30), MISSED),
        ("give the base back", lambda arm: None, HOLDS),
        ("give the base back", lambda arm: arm["adapter"].update(restored_exactly=False), MISSED),
        ("give the base back", lambda arm: arm.update(adapter=None, adapter_error="no room"), MISSED),
    ],
)
def test_counts_are_compared_exactly(results, what, change, verdict):
    results = copy.deepcopy(results)
    change(arms(results)["smt-0.84"])
    assert verdicts(results, what)["layers7b-float32-1024"] == verdict


def test_memory_below_lora_holds_where_it_does(results):
    results = copy.deepcopy(results)
    for name in ("smt-0.84", "smt-4.91"):
        arms(results)[name]["peak_tensor_bytes"] = 2**30
    assert verdicts(results, "counted peak memory at or below LoRA")["layers7b-float32-1024"] == HOLDS


def test_a_missed_share_of_full_names_the_floors_own(results):
    results = copy.deepcopy(results)
    full = arms(results)["full"]["peak_tensor_bytes"]
    arms(results)["floor"]["peak_tensor_bytes"] = full * 0.55
    arms(results)["smt-0.84"]["peak_tensor_bytes"] = full * 0.6
    row = next(row for row in targets(results) if row.what.startswith("counted peak memory at most"))
    assert (row.where, row.verdict) == ("layers7b-float32-1024", MISSED)
    assert row.measured.startswith("SMT 0.84 % 60.0 %")
    assert row.measured.endswith("; the floor itself 55.0 %")


@pytest.mark.parametrize(("seconds", "verdict"), [(0.099, HOLDS), (0.101, MISSED)])
def test_switching_is_judged_on_the_embedded_model(results, seconds, verdict):
    results = copy.deepcopy(results)
    arms(results, "smollm2-float32-1024")["smt-2.5"]["adapter"]["switch_s"] = seconds
    assert verdicts(results, "adapter switch") == {"smollm2-float32-1024": verdict}


@pytest.mark.parametrize(("extra", "verdict"), [(-0.2, HOLDS), (0.05, MISSED), (0.0, OPEN)])
def test_cost_aware_target(results, extra, verdict):
    results = copy.deepcopy(results)
    (record,) = [r for r in results["records"] if r.get("max_backward_cost") == 0.5 and r["kind"] == "cost_aware"]
    record["rounds"] = rounds((0, extra, 0), noise=0.01, seed=5)
    assert verdicts(results, "cost-aware plan") == {"smollm2-float32-1024": verdict}


@pytest.mark.parametrize(("score", "verdict"), [(2.9, HOLDS), (3.0, MISSED)])
def test_scoring_target(score, verdict):
    record = {"kind": "scoring", "suite": "s", "criterion": "net", "accumulator": "float32"}
    record["rounds"] = [{"floor": 2.5, "dense": 2.8, "score": score}] * 5
    assert list(verdicts({"records": [record]}, "one warm-up batch").values()) == [verdict]


def test_a_target_within_the_interval_is_said_so():
    record = {"kind": "scoring", "suite": "s", "criterion": "net", "accumulator": "float32"}
    record["rounds"] = [{"floor": 1.0, "dense": 1.0, "score": score} for score in (0.9, 0.95, 1.0, 1.2, 1.3)]
    (row,) = [row for row in targets({"records": [record]}) if "one warm-up batch" in row.what]
    assert (row.verdict, "the target is within the interval" in row.measured) == (HOLDS, True)


def test_kernels_of_16_bits_are_held_to_half_the_dense_rate(results):
    what = "block gradient in bfloat16"
    assert verdicts(results, what) == {"kernel records": HOLDS}
    slower = copy.deepcopy(results)
    for record in slower["records"]:
        if record["kind"] == "kernel" and record["candidate"] == "widened":
            record["seconds"] = [2 * seconds for seconds in record["seconds"]]
    assert verdicts(slower, what) == {"kernel records": MISSED}
    (rows,) = tables(page(slower, {}), "device")
    assert [(row["dtype"], row["the used is best"]) for row in rows] == [
        *[("float32", "yes")] * 2,
        *[("bfloat16", "no: copied, by 25 (23 to 26) points")] * 2,
    ]
    assert rows[0]["strided"] == "**83 % (83–84)**"
    noisy = copy.deepcopy(results)
    for record in noisy["records"]:
        if record["kind"] == "kernel":
            record["seconds"] = [seconds * (1 + k) for k, seconds in enumerate(record["seconds"])]
    (rows,) = tables(page(noisy, {}), "device")
    assert rows[2]["the used is best"] == "yes"
    slower_too = copy.deepcopy(noisy)
    for record in slower_too["records"]:
        if record["kind"] == "kernel" and record["candidate"] == "widened":
            record["seconds"] = [1.3 * seconds for seconds in record["seconds"]]
    (rows,) = tables(page(slower_too, {}), "device")
    assert rows[2]["the used is best"] == "not told apart from copied"


def test_a_used_layout_that_failed_misses(results):
    failed, faults = copy.deepcopy(results), {"seconds": [], "ideal_seconds": [], "error": "RuntimeError: no room"}
    for record in failed["records"]:
        if record["kind"] == "kernel" and record["used"] and record["blocks"] == 32:
            record.update(faults)
    rows = {row.where: row for row in targets(failed) if row.group == "kernels"}
    assert {row.verdict for row in rows.values()} == {MISSED}
    assert rows["kernels, cpu, float32"].measured == "32 of 256²: strided has no result"
    assert rows["kernels, cpu, bfloat16"].measured == "32 of 256²: widened has no result"
    assert rows["kernel records"].measured == "1 of 2 cases; 68.6 % to 68.6 %; 32 of 256²: widened has no result"
    (shown,) = tables(page(failed, {}), "device")
    best = [row["the used is best"] for row in shown]
    assert best == ["yes", "no: strided has no result", "yes", "no: widened has no result"]


# -- the paper ---------------------------------------------------------------------------------------------------------


def test_the_papers_shares(results):
    found = {row.claim.measure: row for row in claims.share_rows(results)}
    of = {name: row.values["layers7b-float32-1024"]["smt-0.84"] for name, row in found.items()}
    trained = 54 * BLOCK
    assert of["counted FLOPs of the weight gradients"] == pytest.approx(trained / LINEARS)
    assert of["bytes saved for the weights of q, k, v, over ordinary autograd's (SIFT's)"] == 1
    assert of["gradients' bytes"] == trained / P_LLAMA
    assert of["optimizer state's bytes"] == pytest.approx(trained / P_LLAMA, rel=1e-6)
    assert found["counted FLOPs of the weight gradients"].to_share == HOLDS
    assert found["counted FLOPs of the weight gradients"].to_claimed == HOLDS
    assert found["all bytes that the forward saves"].to_share == claims.DOES_NOT
    # Beside bf16 weights it is full fine-tuning under autocast, of fp32 weights too.
    assert found["gradients' bytes"].values["layers7b-bfloat16-1024"]["smt-0.84"] == trained / P_LLAMA
    assert found["gradients' bytes"].to_share == HOLDS
    assert "smollm2-float32-1024" not in found["gradients' bytes"].values


def test_the_papers_speedup_is_against_full_fine_tuning_not_offloaded(results):
    rows = {row.where: row for row in claims.other_rows(results) if "as fast as full" in row.measured}
    assert rows["table1-float32-1024, full not offloaded"].measured == "SMT 1.26 %: 1.76× as fast as full"
    assert {row.verdict for row in rows.values()} == {claims.NOT_HERE}  # these are two layers
    on_gpu = copy.deepcopy(results)
    on_gpu["machine"]["gpu"] = "made-up GPU"
    rows = [row for row in claims.other_rows(on_gpu) if "as fast as full" in row.measured]
    assert {row.verdict for row in rows} == {claims.NOT_HERE}
    assert verdicts(results, "the process's peak")
    assert not verdicts(on_gpu, "the process's peak")


def test_faster_than_two_rivals_is_not_shown_by_one(results):
    def verdict(records):
        rows = claims.other_rows({**results, "records": records})
        (row,) = [row for row in rows if row.where == "layers7b-float32-1024" and "SMT's time" in row.measured]
        return row

    whole = verdict(results["records"])
    assert "DoRA takes" in whole.measured
    alone = verdict([record for record in results["records"] if record.get("arm") != "dora"])
    assert alone.verdict == PART
    assert "the other was not measured" in alone.measured


def test_table_1_as_ours(results, written):
    (rows,) = tables(written[0].read_text(encoding="utf-8"), "method")
    rows = {row["method"]: row for row in rows}
    assert rows["SMT 1.26 %"]["step / full's"] == f"{2.5 / 4.4:.3f}"
    assert rows["SMT 1.26 %"]["the paper's"] == "14.6× (16.68 s)"
    assert rows["full"]["speed-up"] == "1.00×"
    assert rows["full, DeepSpeed CPUAdam"]["step / full's"].startswith("no result")


def test_the_memory_gap_is_explained(results, written):
    text = written[0].read_text(encoding="utf-8")
    rows = [row for table in tables(text, "arm") for row in table if "remainder" in row]
    assert len(rows) == 3 * 11 + 2  # LoRA under autocast is of bf16 alone
    for row in rows:
        number = {head: int(cell.replace(",", "").replace("−", "-")) for head, cell in row.items() if head != "arm"}
        assert number["remainder"] == (-number["gradients"] if row["arm"].startswith("SMT") else 0)
    assert rows[1]["originals"] == f"{54 * BLOCK * 4:,}"


def test_a_byte_that_is_not_explained_misses(results):
    what, where = "to the byte", "layers7b-float32-1024"
    assert verdicts(results, what, where) == {where: HOLDS}
    other = copy.deepcopy(results)
    arms(other)["smt-1.26"]["peak_tensor_bytes"] += 1
    assert verdicts(other, what, where) == {where: MISSED}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([1.0, 1.005, 0.995] * 4, HOLDS), ([0.97, 1.0, 1.03, 1.06] * 2, OPEN), ([1.03, 1.031, 1.029] * 4, MISSED)],
)
def test_a_control_is_judged_by_its_interval_in_every_group(results, ratios, verdict):
    other, where = copy.deepcopy(results), "layers7b-float32-1024"
    for record in other["records"]:
        record.pop("control", None)
    assert verdicts(other, "second floor") == {"": ABSENT}
    for name in ("lora", "dora"):
        arms(other)[name]["control"] = ratios
    assert verdicts(other, "second floor") == {where: verdict}
    arms(other)["full"]["control"] = [1.2, 1.21] * 6  # of a group of its own
    assert verdicts(other, "second floor") == {where: MISSED}


def test_a_process_peak_is_not_told_apart_where_two_floors_are_not(results):
    what, where = "the process's peak", "layers7b-float32-1024"
    other = copy.deepcopy(results)
    floor = arms(other)["floor"]
    for smt, lora in (("smt-0.84", "lora"), ("smt-4.91", "lora-4.91")):
        arms(other)[smt]["peak_rss_bytes"] = arms(other)[lora]["peak_rss_bytes"] + 50 * 2**20
    assert verdicts(other, what, where) == {where: OPEN}  # nothing says what one sample tells
    control = arm_record(where, "floor") | {"arm": "control"}
    other["records"].append(control)
    for apart, verdict in ((70, OPEN), (30, MISSED)):
        control["peak_rss_bytes"] = floor["peak_rss_bytes"] + apart * 2**20
        assert verdicts(other, what, where) == {where: verdict}
    arms(other)["dora"]["floor_peak_rss_bytes"] = floor["peak_rss_bytes"] + 200 * 2**20  # of another run
    assert verdicts(other, what, where) == {where: OPEN}


def test_a_slower_layout_than_the_best_misses(results):
    what = "the best of the measured layouts"
    assert set(verdicts(results, what)) == {"kernels, cpu, float32", "kernels, cpu, bfloat16"}
    other = copy.deepcopy(results)
    for record in other["records"]:
        if record["kind"] == "kernel" and not record.get("used"):
            record["seconds"] = [second / 50 for second in record["seconds"]]
    assert set(verdicts(other, what).values()) == {MISSED}


def test_what_make_bench_would_add_is_said(results):
    text = page(results, {})
    (line,) = [line for line in text.splitlines() if line.startswith("| not measured |")]
    assert "layers7b-float32-2048" in line
    assert "layers7b-float32-1024;" not in line


# -- growth ------------------------------------------------------------------------------------------------------------


def sweep_of(extras, sweep="tokens", **kwargs):
    records = [sweep_record(sweep, x, extra, tokens=x, **kwargs) for x, extra in extras.items()]
    (series,) = sweeps.series({"records": records})
    return series


@pytest.mark.parametrize(
    ("power", "noise", "verdict"),
    [(1, 0.002, HOLDS), (1.5, 0.002, MISSED), (0.5, 0.002, MISSED), (1.13, 0.03, OPEN)],
)
def test_exponents(power, noise, verdict):
    series = sweep_of({x: 0.2 * (x / 256) ** power for x in (256, 512, 1024, 2048)}, noise=noise)
    found = sweeps.fit(series, "extra")
    assert found.exponent == pytest.approx(power, abs=0.05)
    assert found.low < found.exponent < found.high
    assert judge_exponent(found, 1) == verdict
    assert sweeps.flops_exponent(series) == pytest.approx(1)


def test_a_point_within_the_noise_of_zero_counts_for_as_much_as_is_known_of_it():
    """Its median is below zero, and has no logarithm; the larger ones tell the exponent."""
    extras = {x: 0.1 * x / 1024 for x in (512, 1024, 2048)}
    series = sweep_of(extras | {32: -0.004}, noise=0.006)
    found = sweeps.fit(series, "extra")
    assert series.points[0].median("extra") < 0
    assert found.exponent == pytest.approx(1, abs=0.15)
    assert found.high - found.low < 0.4


def test_a_point_of_which_little_is_known_counts_for_little():
    known = [sweep_record("tokens", x, 0.1 * x / 256, tokens=x) for x in (256, 512, 1024)]
    (series,) = sweeps.series({"records": [*known, sweep_record("tokens", 2048, 2.4, tokens=2048, noise=0.6)]})
    assert np.polyfit(*np.log([[point.x, point.median("extra")] for point in series.points]).T, 1)[0] > 1.2
    found = sweeps.fit(series, "extra")
    assert found.exponent == pytest.approx(1, abs=0.05)
    assert found.scale * 512**found.exponent == pytest.approx(0.2, rel=0.05)


def test_an_exponent_without_bounds():
    pairs_of_few = sweep_of({x: 0.2 * x / 256 for x in (256, 512, 1024)})
    for point in pairs_of_few.points:
        point.seconds["extra"] = point.seconds["extra"][:4]
    found = sweeps.fit(pairs_of_few, "extra")
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert words.exponent(found) == "1.00 (no bounds)"
    steep = sweeps.fit(sweep_of({256: 0.0001, 512: 0.01, 1024: 1.0}, noise=0.01), "extra")
    assert (steep.high, judge_exponent(steep, 1)) == (math.inf, MISSED)
    assert words.exponent(steep).endswith(f"(at least {words.hundredths(steep.low)})")


def test_a_loss_of_time_is_no_growth():
    assert sweeps.fit(sweep_of(dict.fromkeys((256, 512, 1024), -0.1)), "extra") is None
    assert sweeps.fit(sweep_of({256: 0.1, 512: 0.2}), "extra") is None
    assert judge_exponent(None, 1) == OPEN


def test_times_within_the_noise_leave_the_exponent_unbounded():
    series = sweep_of(dict.fromkeys((256, 512, 1024, 2048), 0.001), noise=0.05)
    found = sweeps.fit(series, "extra")
    assert found is None or found.low == -math.inf
    assert judge_exponent(found, 1) == OPEN


def test_depth_is_drawn_from_the_top(results):
    (series, _) = [series for series in sweeps.series(results) if series.sweep == "depth"]
    assert [point.x for point in series.points] == [1, 2, 3, 4]
    assert series.measures == ["backward", "step"]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_spread_and_interval():
    found = spread([1.0, 1.1, 1.2, 1.3, 2.0])
    assert (found.median, found.low, found.high, found.n, found.wide) == (1.2, 1.1, 1.3, 5, True)
    assert not spread([1.0, 1.01, 1.02]).wide
    assert spread([]) is None
    assert difference([1.0] * 4, [2.0] * 9) is None
    found = difference([1.0, 1.1, 0.9, 1.0, 1.05], [2.0, 2.1, 1.9, 2.0, 2.2])
    assert found.value == pytest.approx(-1.0)
    assert -1.3 <= found.low < -1.0 < found.high <= -0.8
    assert difference([1.0, 1.1, 0.9, 1.0, 1.05], [2.0, 2.1, 1.9, 2.0, 2.2]) == found


def test_the_interval_of_a_difference_covers_the_truth():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = difference(rng.normal(1.0, 0.02, 12), rng.normal(1.01, 0.02, 12))
        inside += found.low <= -0.01 <= found.high
    assert 180 <= inside <= 199  # 95 %; an interval that is too wide to tell anything would always hold it


# -- figures -----------------------------------------------------------------------------------------------------------


def test_step_times_are_drawn_as_measured(results, tmp_path):
    suite = suites(results)[0]
    parts, close = figures.step_times(suite, tmp_path / "step.png").axes
    names = [label.get_text() for label in parts.get_yticklabels()]
    assert names == [arm["label"] for arm in suite.others.values()]
    ends = [bar.get_x() + bar.get_width() for bar in parts.containers[-1]]
    medians = [np.median(step_ratios(arm)) for arm in suite.others.values()]
    np.testing.assert_allclose(ends, medians, rtol=0.02)  # medians of parts need not add up
    drawn = {
        round(line.get_ydata()[0]): line.get_xdata()[0]
        for line in close.lines
        if line.get_marker() == "o" and len(line.get_xdata())
    }
    assert drawn == {y: x for y, x in enumerate(medians) if x <= figures.CLOSE}
    marks = [line.get_xdata()[0] for line in close.lines if line.get_marker() == "|" and len(line.get_xdata())]
    assert marks == [1.02, 1.06]


def test_memory_bars_end_at_the_counted_peak(results, tmp_path):
    suite = suites(results)[0]
    whole, above = figures.memory(suite, tmp_path / "memory.png").axes
    ends = [bar.get_x() + bar.get_width() for bar in whole.containers[-1]]
    np.testing.assert_allclose(ends, [arm["peak_tensor_bytes"] / 2**30 for arm in suite.arms.values()])
    marks = [line.get_xdata()[0] for line in above.lines]
    floor = suite.floor["peak_tensor_bytes"]
    close = [arm for name, arm in suite.arms.items() if name.startswith(("smt", "lora"))]
    np.testing.assert_allclose(marks, [(arm["peak_tensor_bytes"] - floor) / 2**20 for arm in close])


def test_cost_aware_figure_puts_seeds_together(results, tmp_path):
    found = [record for record in results["records"] if record["kind"] == "cost_aware"]
    from smtune.report.benchmarks.records import quality

    rows = [
        {"max_backward_cost": 0.5, "held_out_loss": loss, "right": right, "of": 100}
        for loss, right in ((0.4, 50), (0.6, 70))
    ]
    measured = quality({"quality": [*rows, {"max_backward_cost": None, "held_out_loss": 3.0}]})
    axes = figures.cost_aware(found, measured, tmp_path / "cost.png").axes
    assert [each.get_ylabel() for each in axes] == [
        "score kept",
        "accuracy, with 95 % interval",
        "held-out loss (nats per token)",
    ]
    points = [[line.get_ydata()[0] for line in each.lines if line.get_marker() == "o"] for each in axes]
    assert points == [[1.0, 0.97, 0.9, 0.71], [0.6], [0.5]]
    assert len(figures.cost_aware(found, {}, tmp_path / "cost.png").axes) == 1
    assert figures.cost_aware([], {}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
