"""A tiny base model in a folder, and files of rows and of preferences."""

from __future__ import annotations

import pytest

from tiny_base import sums, write_lines, write_tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama of random weights and a tokenizer of bytes. 0.84 % of it are 6 blocks of 32²."""
    return str(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny", intermediate_size=2048))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return str(write_lines(tmp_path_factory.mktemp("data") / "rows.jsonl", sums(48)))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    records = [{"prompt": f"{k} + 2 =", "chosen": f" {k + 2}", "rejected": f" {k + 3}"} for k in range(24)]
    return str(write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", records))
