"""From the files people have to masked batches: read, prompt, tokenise, collate.

`records` reads and checks sources in the shapes people have, `prompts` holds the one template that training and
evaluation share, `batches` turns examples into token ids with the loss on the answer, `arithmetic` makes word problems.
Imports torch, transformers, datasets and `smtune.errors` alone.
"""

from smtune.data.arithmetic import arithmetic
from smtune.data.batches import Preparation, make_collator, prepare, scoring_batches
from smtune.data.prompts import alpaca_prompt
from smtune.data.records import (
    FORMATS,
    PACKAGED,
    Example,
    Segment,
    count_overlap,
    load_examples,
    question_key,
    read_records,
)

__all__ = [
    "FORMATS",
    "PACKAGED",
    "Example",
    "Preparation",
    "Segment",
    "alpaca_prompt",
    "arithmetic",
    "count_overlap",
    "load_examples",
    "make_collator",
    "prepare",
    "question_key",
    "read_records",
    "scoring_batches",
]
