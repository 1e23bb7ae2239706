"""A tiny base model in a folder, and a file of rows to train it on."""

from __future__ import annotations

import pytest

from tiny_base import sums, write_lines, write_tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama of random weights and a tokenizer of bytes."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(24))
