"""The part of an adapter's model card that says how to load it, what it trains, and where.

PEFT writes README.md when a model is saved and then lets the configuration save itself; `SMTConfig` adds this part
there, so that every saved SMT adapter has it: by itself PEFT stops at one with a bare `KeyError: 'SMT'`
(docs/adr/0009).
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from peft import TaskType

from smtune.files import write_text
from smtune.maps import layout
from smtune.selection import Plan

if TYPE_CHECKING:
    from smtune.tuner.config import SMTConfig

PICTURE = "smt_blocks.png"
BEGIN, END = "<!-- begin smtune -->", "<!-- end smtune -->"

_LOADERS = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


def write_card(folder: str | os.PathLike, config: SMTConfig, load_base: str | None = None) -> None:
    """Put the part about an adapter's blocks into its README.md, in place of an earlier one, and the picture beside.

    Args:
        folder: of the adapter. Without a README.md there, one is made.
        config: of the adapter, with its plan.
        load_base: a Python expression that loads the base model. None: transformers' own for the configuration's base.
    """
    folder = Path(folder)
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else "---\nlibrary_name: peft\n---\n\n# SMT adapter\n"
    plan = config.get_plan()
    assert plan is not None
    try:
        (folder / PICTURE).write_bytes(_picture(json.dumps(config.plan)))
        picture = f"![Trained blocks by layer and projection]({PICTURE})\n\n"
    except Exception as error:  # a picture must not cost anyone the save at the end of a training
        warnings.warn(f"The picture of the adapter's blocks was not drawn: {error!r}.", stacklevel=2)
        picture = ""
    write_text(path, _with_part(card, _part(config, plan, load_base, picture)))


def _with_part(card: str, part: str) -> str:
    """The card with `part` in place of an earlier one, else after its first heading, else at its end."""
    begin, end = card.find(BEGIN), card.find(END)
    if 0 <= begin < end:
        return card[:begin] + part + card[end + len(END) :]
    lines = card.splitlines(keepends=True)
    front_ends = lines.index("---\n", 1) + 1 if lines[:1] == ["---\n"] and "---\n" in lines[1:] else 0
    heading = next((k for k in range(front_ends, len(lines)) if lines[k].startswith("# ")), len(lines) - 1)
    before, after = "".join(lines[: heading + 1]).rstrip("\n"), "".join(lines[heading + 1 :]).lstrip("\n")
    return f"{before}\n\n{part}\n\n{after}" if after else f"{before}\n\n{part}\n"


def _part(config: SMTConfig, plan: Plan, load_base: str | None, picture: str) -> str:
    size = plan.block_size
    matrices = sum(bool(module.rows) for module in plan.modules.values())
    batches = f" over {plan.batches_seen} batches" if plan.batches_seen else ""
    rows = layout.projections(plan)
    return (
        f"{BEGIN}\n"
        "An adapter of Sparse Matrix Tuning ([paper](https://arxiv.org/abs/2405.15525)). "
        "**`import smtune` before loading it**: that makes the method known to PEFT, which otherwise stops with "
        "`KeyError: 'SMT'`.\n\n"
        f"```python\n{_how_to_load(config, load_base)}```\n\n"
        f"It trains {plan.n_blocks:,} blocks of {size}×{size} in {matrices} of {len(plan.modules)} matrices: "
        f"{plan.n_params:,} parameters, {plan.fraction:.3%} of the model's {plan.total_params:,}. "
        f"Blocks were chosen by `{plan.criterion}`{batches}.\n\n"
        f"| | {' | '.join(row.name for row in rows)} |\n"
        f"|---{'|---' * len(rows)}|\n"
        f"| blocks | {' | '.join(f'{row.blocks:,}' for row in rows)} |\n"
        f"| share of the trained parameters | {' | '.join(f'{row.share:.1%}' for row in rows)} |\n\n"
        f"{picture}"
        f"{END}"
    )


def _how_to_load(config: SMTConfig, load_base: str | None) -> str:
    lines = ["import peft", "import smtune"]
    if load_base is None:
        base = config.base_model_name_or_path
        loader = _LOADERS.get(config.task_type, "AutoModelForCausalLM")  # type: ignore[arg-type]
        if base:
            lines.append(f"from transformers import {loader}")
        load_base = f"{loader}.from_pretrained({base!r})" if base else "...  # the model that it was trained on"
    elif "smtune.models" in load_base:
        lines[1] = "import smtune.models"
    return "\n".join(
        [*lines, "", f"base = {load_base}", 'model = peft.PeftModel.from_pretrained(base, "path/to/this/adapter")', ""]
    )


@lru_cache(maxsize=1)
def _picture(plan: str) -> bytes:
    """The block map as PNG, of a plan as JSON. Kept, since a training saves the same plan at every checkpoint."""
    from smtune.maps.picture import block_map  # matplotlib takes half a second to import

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        block_map(Plan.from_dict(json.loads(plan)), path)
        return path.read_bytes()
