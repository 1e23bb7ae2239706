"""Who may import whom: the layering, and a core that needs torch alone.

Every import counts, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smtune

LAYERS = [  # bottom first: a module may import only from the rows listed before its own
    ["errors", "files", "version", "weights"],
    ["blocks", "depth", "sharded"],
    ["kernels"],
    ["linear"],
    ["scoring", "selection"],
    ["maps"],
    ["tuner"],
    ["data", "models"],
    ["__init__"],
    ["training", "evaluation", "bench", "integrations"],
    ["report"],
    ["reproduce"],
    ["cli"],
    ["__main__"],
]
OUTSIDE = {  # what these import beside the standard library; the others are free
    "errors": set(),
    "files": set(),
    "version": set(),
    "weights": {"torch"},
    "blocks": {"torch"},
    "depth": {"torch"},
    "sharded": {"torch", "deepspeed"},
    "kernels": {"torch", "triton"},
    "linear": {"torch"},
    "scoring": {"torch"},
    "selection": {"torch"},
}
BLOCKED = ["transformers", "peft", "accelerate", "datasets", "safetensors", "pydantic", "rich", "typer", "matplotlib"]

SOURCE = Path(smtune.__file__).parent
FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def component(file):
    """The name in the table that a file of the package, such as tuner/layer.py, belongs to."""
    return file.parts[0].removesuffix(".py")


def imported(source, file):
    """(components of smtune, packages outside it) that a file's source imports."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["smtune", *file.parent.parts]
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for first, *rest in (name.split(".") for name in names):
            if first == "smtune":
                # `from smtune import Plan` asks __init__ for it; `from smtune import blocks` is the module's import.
                inside.add(rest[0] if rest and rest[0] in RANK else "__init__")
            elif first not in sys.stdlib_module_names:
                outside.add(first)
    return inside, outside


def faults(source, file):
    """What a file's imports break of the two tables, one sentence each."""
    own = component(file)
    inside, outside = imported(source, file)
    inside.discard(own)
    not_below = sorted(name for name in inside if RANK[name] >= RANK[own])
    not_allowed = sorted(outside - OUTSIDE.get(own, outside))
    return [f"{file} imports smtune's {name}, which does not stand below it." for name in not_below] + [
        f"{file} imports {name}. It may import {sorted(OUTSIDE[own])} and the standard library." for name in not_allowed
    ]


def test_every_module_has_its_layer():
    assert {component(file) for file in FILES} == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file):
    found = faults((SOURCE / file).read_text(encoding="utf-8"), file)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "n_faults"),
    [
        ("selection.py", "from smtune.blocks import BlockGrid", 0),
        ("tuner/layer.py", "from smtune.tuner.config import SMTConfig", 0),
        ("tuner/layer.py", "from .config import SMTConfig", 0),
        ("cli.py", "import smtune", 0),
        ("selection.py", "from smtune.scoring import score", 1),
        ("tuner/layer.py", "from ..training import train", 1),
        ("tuner/layer.py", "from smtune import Plan", 1),
        ("report/tables.py", "import smtune.reproduce.layouts", 1),
        ("linear.py", "def f():\n    import numpy", 1),
        ("errors.py", "import torch, smtune.blocks", 2),
    ],
)
def test_the_check_sees_what_it_should(file, source, n_faults):
    assert len(faults(source, Path(file))) == n_faults


def test_core_needs_torch_alone():
    program = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))
import smtune, smtune.blocks, smtune.kernels, smtune.linear, smtune.scoring, smtune.selection
assert callable(smtune.block_linear)
assert not hasattr(smtune, "SMTConfig")
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
