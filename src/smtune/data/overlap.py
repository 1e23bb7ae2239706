"""Whether test questions stand in the training data.

A comparison on leaked questions measures memory. The published Math10K training set, for one, holds test questions
of AddSub, MultiArith and SingleEq (LLM-Adapters' README).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def question_key(text: str) -> str:
    """The text's letters and digits in lower case: what stays of a question when its layout changes."""
    return "".join(character for character in text.lower() if character.isalnum())


def count_overlap(train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]) -> int:
    """How many test records ask a question that a training record asks too.

    Questions are compared by `question_key`: the instruction and input, the prompt, the text, or the user's turns
    of a conversation. A record without a question counts as no overlap.
    """
    seen = {_key(record) for record in train} - {""}
    return sum(_key(record) in seen for record in test)


def _key(record: Mapping[str, Any]) -> str:
    messages = record.get("messages") or ()
    parts = [message["content"] for message in messages if message["role"] == "user"]
    parts += [record.get(name) or "" for name in ("instruction", "input", "prompt", "text")]
    return question_key(" ".join(parts))
