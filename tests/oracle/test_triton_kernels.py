"""The Triton kernels without a GPU: right in the interpreter, and compiled for four kinds of GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from needs import lacks

if lacks("triton"):
    pytest.skip("needs triton, which is for Linux: pip install -e '.[test]'", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smtune.kernels import dispatch, triton_blocks
from smtune.kernels.triton_blocks import CONFIGS, block_grad_kernel, block_product_kernel, token_splits

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_UNIT = {"sm80": "mma.sync", "sm90": "wgmma.mma_async", "sm100": "tcgen05.mma", "gfx942": "v_mfma"}
SHARED_KIB = {"sm80": 163, "sm90": 227, "sm100": 227, "gfx942": 64}
"""What one program may have: CUDA's compute capabilities 8.0, 9.0 and 10.0, and the LDS of CDNA 3."""
UNIT_STRIDES = {
    block_grad_kernel: ["stride_go", "stride_xi"],
    block_product_kernel: ["stride_yf", "stride_xf", "stride_source"],
}
"""Of contiguous operands."""
BLOCK_SIZES = [32, 64, 128, 192, 256]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compiled(kernel, dtype, block_size, config, target, precision="ieee", unit_strides=()):
    """As a launch would compile `kernel` for contiguous operands; the strides named are 1."""
    depth = triton_blocks._depth(dtype) if kernel is block_grad_kernel else triton_blocks._depth(dtype, block_size)
    constants = {"L": block_size, "DEPTH": depth, "PRECISION": precision, **config.kwargs}
    constants |= dict.fromkeys(unit_strides, 1)
    pointers = dict.fromkeys(["grad_y", "x", "y", "blocks"], POINTERS[dtype])
    pointers |= {"sums": "*fp32", "places": "*i32", "groups": "*i32", "members": "*i32"}
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = [n for n in names if n in pointers or (n.startswith("stride") and n not in constants)]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def test_where_triton_does_not_start_the_loop_runs(monkeypatch):
    def start():
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    find = dispatch._triton_kernels_on.__wrapped__
    monkeypatch.setattr(triton_blocks, "start", start)
    with pytest.warns(UserWarning, match=r"gcc, python3-dev\)\. Got RuntimeError: Failed to find C compiler"):
        assert find(torch.device("cuda")) is None
    monkeypatch.setattr(triton_blocks, "start", lambda: None)
    assert find(torch.device("cuda")) is triton_blocks
    monkeypatch.setattr(dispatch, "import_module", lambda name: importlib.import_module("triton.nowhere"))
    with pytest.warns(UserWarning, match="Got ModuleNotFoundError"):
        assert find(torch.device("cuda")) is None


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="older than torch 2.8")
def test_a_cuda_graph_does_not_hold_the_operators():
    for operator in (torch.ops.smtune.block_grad.default, torch.ops.smtune.block_product_.default):
        assert {torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe} <= set(operator.tags)


OLDEST = "sm80", torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # bf16 for all by day, and for the oldest fp32, which takes many seconds.
        pytest.param(name, dtype, marks=[pytest.mark.nightly] * (dtype != torch.bfloat16 and (name, dtype) != OLDEST))
        for name in TARGETS
        for dtype in POINTERS
    ],
)
def test_compiles_ahead_of_time(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, unit_strides in UNIT_STRIDES.items():
        for block_size in BLOCK_SIZES:
            fitting = triton_blocks._fitting(CONFIGS, {}, block_size)
            # The largest tile at l = 256, the smallest elsewhere; in fp32, which takes seconds, the largest once.
            config = fitting[-1] if block_size == 256 and (dtype != torch.float32 or name == "sm80") else fitting[0]
            asm = compiled(kernel, dtype, block_size, config, TARGETS[name], unit_strides=unit_strides).asm
            assert asm["hsaco" if name == "gfx942" else "cubin"]
            if dtype != torch.float32 and block_size >= 64:
                assert MATRIX_UNIT[name] in asm["amdgcn" if name == "gfx942" else "ptx"]
    assert list(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", TARGETS)
def test_every_configuration_compiles_and_some_fits_the_shared_memory(name, block_size, dtype, tmp_path, monkeypatch):
    """The tuner passes over those that do not fit; without one that does, a layer could not run."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, unit_strides in UNIT_STRIDES.items():
        shared = [
            compiled(kernel, dtype, block_size, config, TARGETS[name], unit_strides=unit_strides).metadata.shared
            for config in triton_blocks._fitting(CONFIGS, {}, block_size)
        ]
        assert min(shared) <= SHARED_KIB[name] * 1024, shared


@pytest.mark.parametrize(
    ("kernel", "unit_strides", "precision"),
    [
        (block_grad_kernel, ["stride_go", "stride_xi"], "tf32"),
        (block_grad_kernel, ["stride_gn", "stride_xn"], "ieee"),  # operands that lie transposed
        (block_product_kernel, ["stride_yf", "stride_xf", "stride_target"], "tf32"),  # the input gradient
    ],
)
def test_compiles_for_other_layouts_and_tf32(kernel, unit_strides, precision, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (config, *_) = triton_blocks._fitting(CONFIGS, {}, 64)
    assert compiled(kernel, torch.float32, 64, config, TARGETS["sm90"], precision, unit_strides).asm["cubin"]


def test_right_in_the_interpreter():
    """interpreted_triton.py, in a process where the interpreter stands in for the GPU."""
    file = Path(__file__).with_name("interpreted_triton.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, cwd=file.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("block_size", [16, 48, 64, 192, 256])
@pytest.mark.parametrize("n_blocks", [1, 9, 53, 158, 1000])
@pytest.mark.parametrize("n_tokens", [1, 63, 256, 1000, 4096, 8193])
def test_splits_cover_the_tokens_once(n_tokens, n_blocks, block_size):
    n_splits, split_tokens = token_splits(n_tokens, n_blocks, block_size)
    assert split_tokens % 64 == 0
    assert (n_splits - 1) * split_tokens < n_tokens <= n_splits * split_tokens
    assert n_splits == 1 or split_tokens >= triton_blocks.LEAST_TOKENS


def test_few_blocks_are_split_and_many_are_not():
    assert token_splits(4096, 9, 256)[0] == 8
    assert token_splits(4096, 158, 256)[0] == 1


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 80, 96, 128, 192, 240, 256, 512])
def test_some_configuration_fits_every_block_size(block_size):
    configs = triton_blocks._fitting(CONFIGS, {}, block_size)
    assert configs
    assert all(block_size % config.kwargs["TILE"] == 0 for config in configs)


def test_tables_group_blocks_by_where_they_add():
    pairs, device = ((2, 1), (0, 3), (2, 0)), torch.device("cpu")
    groups, members = triton_blocks._groups(pairs, False, device)
    assert groups.tolist() == [[0, 2], [0, 1], [1, 3]]
    assert members.tolist() == [[3, 0, 1], [1, 2, 0]]
    groups, members = triton_blocks._groups(pairs, True, device)
    assert groups.tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]
    assert members.tolist() == [[2, 2, 0], [2, 0, 1]]
    assert triton_blocks._groups(pairs, True, device)[0] is groups
    assert triton_blocks._places(pairs, device).tolist() == [[2, 0, 2], [1, 3, 0]]


def test_fp32_is_multiplied_as_torch_multiplies_it(monkeypatch):
    class Matmul:
        allow_tf32 = True

    assert triton_blocks._precision() == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul)
    assert triton_blocks._precision() == "tf32"
    Matmul.fp32_precision = "ieee"
    assert triton_blocks._precision() == "ieee"
    Matmul.fp32_precision = "tf32"
    assert triton_blocks._precision() == "tf32"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton_blocks._precision() == "ieee"
