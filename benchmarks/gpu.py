"""The block kernels on a GPU, and what a training step costs there: written to docs/results/bench_gpu.json.

    make bench-gpu        # or: python benchmarks/gpu.py --output docs/results/bench_gpu.json

Kernels: the block gradients of one layer of LLaMA-7B, q, k and v together (4096² each, blocks of 256²), at 27 and 158
blocks a layer (0.84 and 4.91 % of the model), by Triton, by the loop of GEMMs in the operands' dtype, by the loop as it
is used where there is no Triton (`fallback`), by gathering, and the dense dYᵀX; the additive forward by Triton and by
the loop. All take turns, round by round. Two times for each: the GPU's own, taken between events behind a kernel that
keeps it busy meanwhile, and the host's, to launch everything. In a step that keeps the GPU busy the first is what
counts, in one that waits for the host the second.

Steps: floor, a second floor as control, SMT and LoRA of as many parameters, in bf16 also under autocast, on two layers
of LLaMA-7B's shape, all on the same weights, a floor step beside each. The file is written after every record.

Without a GPU: says so, exit code 2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smtune import block_grad
from smtune.bench import machine, measure
from smtune.bench.arms import Setting, build
from smtune.bench.subjects import find_subject, same_weights
from smtune.bench.suites import is_for
from smtune.bench.turns import pair, turns
from smtune.blocks import BlockGrid, BlockIndex
from smtune.files import not_writable, write_json
from smtune.kernels import block_grad_reference, block_product_
from smtune.kernels.candidates import bmm, grouped
from smtune.kernels.loop import block_grad_loop, block_product_loop_

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BLOCKS = (27, 158)
KERNEL_TOKENS = (1024, 2048, 4096, 8192)
STEP_TOKENS = (1024, 4096)
ARMS = ("control", "smt-0.84", "smt-4.91", "smt-additive", "lora", "lora-4.91", "lora-autocast", "lora-4.91-autocast")
"""Autocast is for bf16 weights, as of Trainer with `bf16=True`: PEFT multiplies LoRA's factors in fp32 otherwise."""
BUSY_CYCLES = 10_000_000
"""Some milliseconds: longer than the host takes to launch what is timed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/results/bench_gpu.json"))
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "Expected a CUDA or ROCm GPU. PyTorch sees none here: check the driver, and that torch is not a CPU build.",
            file=sys.stderr,
        )
        return 2
    fault = not_writable(arguments.output)
    if arguments.output.exists():
        fault = f"Expected --output to be new. {arguments.output} is there: remove it, or give another name."
    if arguments.rounds < 2:
        fault = f"Expected at least two rounds. Got {arguments.rounds}."
    if fault is not None:
        print(fault, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/gpu.py --rounds {arguments.rounds}",
        "machine": describe(device),
        "kernels": [],
        "steps": [],
    }
    for dtype in DTYPES:
        for tokens in KERNEL_TOKENS:
            for n_blocks in BLOCKS:
                record = time_kernels(dtype, tokens, n_blocks, arguments.rounds, device)
                results["kernels"].append(record)
                write_json(arguments.output, results)
                report(record, "gpu_ms", "dense")
        for tokens in STEP_TOKENS:
            record = time_steps("llama-7b-layers", dtype, tokens, arguments.rounds, device)
            results["steps"].append(record)
            write_json(arguments.output, results)
            report(record, "step_ms", "floor")
    print(f"Wrote {arguments.output}")
    return 0


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, and what the kernels ran on and with."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return machine.describe(torch.get_num_threads(), device.type) | {
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton,
        "fp32_precision": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


# Kernels ------------------------------------------------------------------------------------------------------------


def layer_indices(n_blocks: int, features: int, block_size: int) -> list[BlockIndex]:
    """Random blocks for q, k and v, as nearly as many for each as can be."""
    generator = torch.Generator().manual_seed(0)
    grid = BlockGrid(features, features, block_size)
    counts = [n_blocks // 3 + (k < n_blocks % 3) for k in range(3)]
    chosen = [torch.randperm(grid.n_blocks, generator=generator)[:count].sort().values.tolist() for count in counts]
    return [BlockIndex.from_pairs(grid, [divmod(place, grid.shape[1]) for place in places]) for places in chosen]


def time_kernels(
    dtype: str,
    tokens: int,
    n_blocks: int,
    rounds: int,
    device: torch.device,
    features: int = 4096,
    block_size: int = 256,
) -> dict[str, Any]:
    """One layer's block gradients and products, every way, in turn; and how far Triton's are from the reference."""
    torch.manual_seed(0)
    indices = layer_indices(n_blocks, features, block_size)
    x = torch.randn(tokens, features, device=device).to(DTYPES[dtype])
    grads = [torch.randn(tokens, features, device=device).to(DTYPES[dtype]) for _ in indices]
    blocks = [torch.randn(len(index), block_size, block_size, device=device).to(DTYPES[dtype]) for index in indices]
    outputs = [torch.zeros(tokens, features, device=device, dtype=DTYPES[dtype]) for _ in indices]

    def gradients(function: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: [function(grad_y, x, index.pairs, block_size) for grad_y, index in zip(grads, indices)]

    def products(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: [function(y, x, values, index) for y, values, index in zip(outputs, blocks, indices)]

    runs: dict[str, Callable[[], Any]] = {
        "triton": lambda: [block_grad(grad_y, x, index) for grad_y, index in zip(grads, indices)],
        "loop": gradients(lambda *operands: block_grad_loop(*operands, "strided")),
        "fallback": gradients(block_grad_loop),
        "grouped": gradients(grouped),
        "bmm": gradients(bmm),
        "dense": lambda: [grad_y.T @ x for grad_y in grads],
        "product_triton": products(block_product_),
        "product_loop": products(lambda y, x, values, index: block_product_loop_(y, x, values, index.pairs)),
    }
    expected = [block_grad_reference(grad_y.double(), x.double(), index) for grad_y, index in zip(grads, indices)]
    errors = [
        ((actual - exact).abs().max() / exact.abs().max()).item() for actual, exact in zip(runs["triton"](), expected)
    ]
    return {
        "dtype": dtype,
        "tokens": tokens,
        "blocks": n_blocks,
        "features": features,
        "block_size": block_size,
        "triton_error": max(errors),
        "arms": interleaved(runs, rounds, device),
    }


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each, once a round, by the GPU's clock and by the host's."""
    times: dict[str, dict[str, list[float]]] = {name: {"gpu_ms": [], "host_ms": []} for name in runs}
    for _ in range(3):  # compile, tune, warm up
        for run in runs.values():
            run()
    for number in range(rounds):
        order = list(runs)[number % len(runs) :] + list(runs)[: number % len(runs)]
        for name in order:
            gpu, host = timed(runs[name], device)
            times[name]["gpu_ms"].append(gpu)
            times[name]["host_ms"].append(host)
    return times


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(milliseconds on the device, milliseconds to launch)."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (elapsed := 1e3 * (time.perf_counter() - start)), elapsed
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(BUSY_CYCLES)
    start_event.record()
    start = time.perf_counter()
    run()
    host = 1e3 * (time.perf_counter() - start)
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event), host


# Steps --------------------------------------------------------------------------------------------------------------


def time_steps(
    model: str, dtype: str, tokens: int, rounds: int, device: torch.device, names: Sequence[str] = ARMS
) -> dict[str, Any]:
    """Whole training steps, and each one's ratio to the floor steps beside it."""
    subject = find_subject(model)
    base = subject.load(dtype, device.type)
    batch = subject.inputs(base, tokens)
    setting = Setting(subject, dtype, device.type)
    names = [name for name in names if is_for(name, dtype)]
    arms = {name: build(name, setting, same_weights(base), batch) for name in ("floor", *names)}
    for arm in arms.values():
        for _ in range(3):
            measure.step(arm, batch)
    times: dict[str, dict[str, list[float]]] = {name: {"step_ms": [], "of_floor": []} for name in arms}
    for number in range(rounds):
        order = turns(list(names), number)
        seconds = [measure.step(arms[name], batch) for name in order]
        for place, name in enumerate(order):
            whole = sum(seconds[place].values())
            times[name]["step_ms"].append(1e3 * whole)
            if name != "floor":
                times[name]["of_floor"].append(whole / sum(pair(order, seconds, place).values()))
    labels = {name: arm.label for name, arm in arms.items()}
    return {"model": model, "dtype": dtype, "tokens": tokens, "labels": labels, "arms": times}


def report(record: dict[str, Any], field: str, base: str) -> None:
    """One line a record: medians, and their ratio to the base's."""
    medians = {name: statistics.median(times[field]) for name, times in record["arms"].items()}
    what = ", ".join(f"{name} {median:.3f} ({median / medians[base]:.3f})" for name, median in medians.items())
    blocks = f", {record['blocks']} blocks" if "blocks" in record else ""
    print(f"{record['dtype']}, {record['tokens']} tokens{blocks}: {field} (of {base}): {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
