"""benchmarks/gpu.py: refuses to run without a GPU, and its parts work (on a CPU, at sizes that say nothing)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu_benchmark():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.nightly
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path):
    output = tmp_path / "bench_gpu.json"
    result = subprocess.run(
        [sys.executable, str(FILE), "--output", str(output)], capture_output=True, text=True, cwd=FILE.parents[1]
    )
    assert result.returncode == 2
    assert "Expected a CUDA or ROCm GPU" in result.stderr
    assert not output.exists()


def test_a_layers_blocks_are_split_over_q_k_and_v(gpu_benchmark):
    assert [len(index) for index in gpu_benchmark.layer_indices(27, 4096, 256)] == [9, 9, 9]
    assert [len(index) for index in gpu_benchmark.layer_indices(158, 4096, 256)] == [53, 53, 52]


def test_kernels_are_timed_and_checked(gpu_benchmark, capsys):
    record = gpu_benchmark.time_kernels("float32", 12, 7, 2, CPU, features=64, block_size=16)
    json.dumps(record)
    assert record["triton_error"] < 1e-5
    gradients = {"triton", "loop", "fallback", "grouped", "bmm", "dense"}
    assert record["arms"].keys() == gradients | {"product_triton", "product_loop"}
    for times in record["arms"].values():
        assert len(times["gpu_ms"]) == len(times["host_ms"]) == 2
    gpu_benchmark.report(record, "gpu_ms", "dense")
    assert "float32, 12 tokens, 7 blocks: gpu_ms (of dense): triton" in capsys.readouterr().out


def test_steps_are_paired_with_the_floor(gpu_benchmark):
    record = gpu_benchmark.time_steps("llama-128x2", "float32", 16, 2, CPU, names=["smt-0.84", "lora"])
    json.dumps(record)
    assert record["labels"].keys() == {"floor", "smt-0.84", "lora"}
    assert len(record["arms"]["floor"]["step_ms"]) == 4
    for name in ("smt-0.84", "lora"):
        assert len(record["arms"][name]["of_floor"]) == 2
