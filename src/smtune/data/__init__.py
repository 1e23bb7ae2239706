"""Data: from files, packaged names and the hub to masked batches.

    dataset, report = prepare("train.jsonl", tokenizer, max_length=512)
    trainer = Trainer(..., train_dataset=dataset, data_collator=Collator(tokenizer.pad_token_id))

Read in this order: `sources` (where rows come from), `formats` (the four shapes a row may have, the prompt),
`encoding` (tokens, masks, batches), `arithmetic` and `comparison` (procedural tasks), `overlap` (test questions among
the training ones).
"""

from smtune.data.arithmetic import arithmetic
from smtune.data.comparison import comparison
from smtune.data.encoding import Collator, EncodingReport, batches, encode, prepare
from smtune.data.formats import SHAPES, Example, Format, Record, Segment, alpaca_prompt, check_records, to_example
from smtune.data.overlap import count_overlap, question_key
from smtune.data.sources import PACKAGED, Source, packaged_tests, read_records, read_rows

__all__ = [
    "PACKAGED",
    "SHAPES",
    "Collator",
    "EncodingReport",
    "Example",
    "Format",
    "Record",
    "Segment",
    "Source",
    "alpaca_prompt",
    "arithmetic",
    "batches",
    "check_records",
    "comparison",
    "count_overlap",
    "encode",
    "packaged_tests",
    "prepare",
    "question_key",
    "read_records",
    "read_rows",
    "to_example",
]
