"""A tiny base model in a folder, and a file of rows to train it on."""

from __future__ import annotations

from functools import partial

import pytest
from rich.console import Console
from runs import write_config

from tiny_base import sums, write_lines, write_tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a tiny Llama of random weights and a tokenizer of bytes."""
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "sums.jsonl", sums(24))


@pytest.fixture
def configure(base, rows, tmp_path):
    """A function from overrides to a configuration of `smtune train` in a fresh folder."""
    return partial(write_config, tmp_path, base, rows)


@pytest.fixture
def quiet():
    return Console(quiet=True)
