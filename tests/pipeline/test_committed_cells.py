"""Cells of the committed results, run again: the same bits on the type of machine that they were run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smtune.reproduce.run import CELLS, check_cell
from smtune.reproduce.setting import Setting
from smtune.reproduce.store import Store

MINI = Path(__file__).parents[2] / "docs/results/reproduce/mini"


def is_their_machine() -> bool:
    """Whether the CPU takes the code paths of the results' own, an AMD EPYC with AVX-512."""
    cpus = Path("/proc/cpuinfo")
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cpus.is_file() and "AMD EPYC" in cpus.read_text()


@pytest.mark.nightly
@pytest.mark.skipif(
    not is_their_machine(), reason="the results are of an AMD EPYC with AVX-512: other CPUs round otherwise"
)
@pytest.mark.parametrize(
    "cell",
    [
        pytest.param("86116b2dcce6b8c8", id="SMT"),
        pytest.param("9931ecc99673c048", id="SMT, sampled, all linear layers"),
        pytest.param("dfc03e7002e43994", id="LoRA"),
        pytest.param("e4da797862406ab8", id="full"),
    ],
)
def test_a_committed_cell_comes_out_the_same(cell):
    assert check_cell(cell, Store(MINI / CELLS), Setting("mini"), threads=1) == []
