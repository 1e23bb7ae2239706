"""What a completion answers: extraction by the LLM-Adapters protocol, and the comparison with the truth.

Follows `evaluate.py` and `commonsense_evaluate.py` of AGI-Edgerunners/LLM-Adapters, and departs where those
misread: case is ignored ("True."), a number or letter is the one stated where one is, and not the last number or the
first capital of the text, numbers keep their thousands and fractions, and "10-5" holds no minus five.
"""

from __future__ import annotations

import math
import re

from smtune.evaluation.tasks import Task

TOLERANCE = 1e-3
"""Numbers that differ by no more are the same answer (LLM-Adapters' `miss`)."""

Answer = str | float

# A number as it is written: a sign (not the minus of "10-5"), a currency, thousands, decimals, an exponent; then
# "/4" for a fraction, or " 3/4" for a mixed number. The trailing period of a sentence is not part of it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]])[-−])?[$€£]?"
    r"(?P<value>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)"
    r"(?:(?: +(?P<top>\d+))? ?/ ?(?P<bottom>\d+)(?![\d/]))?",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:choice|option))?\s*(?:is|would be|:|=)|\bans\s*[:=]|####|\\boxed\{",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
_OPERATOR = re.compile(r"\s*[-−+*×x÷/^]")
_SUM = re.compile(  # "20% of 50 =", "5 dollars + 3 dollars =", after the first number; and no new clause
    r"(?=[\s%(])(?![^=]*\b(?:and|as|because|but|for|has|is|not|since|so|was|which|with)\b)"
    r"[^=,;:]{0,20}?(?:[-−+*×÷/^%(]|\bof\b)[^=,;:]{0,40}="
)

# A letter right after "the answer is". A small one may be the article: it must be closed by punctuation.
_STATED_LETTER = re.compile(
    r"[\s:*]*(?:(?:option|choice)\s+)?(?:\(\s*([A-Ea-e])\s*\)|([A-E])(?![\w'’])|([a-e])(?=\s*(?:[).,:;*}]|$)))"
)
_MARKED_LETTER = re.compile(
    r"\(\s*([A-Ea-e])\s*\)|\b(?:[Oo]ption|[Cc]hoice)\s+([A-E])\b|^\s*([A-Ea-e])\s*(?:[).:]|$)", re.MULTILINE
)


def extract_answer(task: Task, completion: str) -> Answer | None:
    """The answer that a completion gives, or None where it gives none ("unparsed").

    - label: the first label in the text ("the correct answer is answer2").
    - number: the one stated ("The answer is 72."; also "####", "\\boxed{}"), else the last in the text.
    - letter: the one stated ("The answer is (C)"), else the last one marked as an option: "(C)", "option C", or
      a line that begins with "C)" or is "C".

    A new prompt that the model goes on to write is not its answer: the text ends at the next "### ".
    """
    text = re.split(r"\n\s*###\s", completion, maxsplit=1)[0].strip()
    return {"label": _label, "number": _number, "letter": _letter}[task.kind](task, text)


def is_correct(task: Task, prediction: Answer | None, answer: str) -> bool:
    """Whether a prediction equals the truth; numbers as numbers, within `TOLERANCE`."""
    if prediction is None:
        return False
    if task.kind == "number":
        return abs(float(prediction) - float(answer.replace(",", ""))) <= TOLERANCE
    return str(prediction).lower() == answer.lower()


def _label(task: Task, text: str) -> str | None:
    pattern = rf"\b{task.stem}[1-5]\b" if task.stem else r"\b(?:true|false)\b"
    found = re.search(pattern, text.lower())
    return found[0] if found else None


def _number(task: Task, text: str) -> float | None:
    for statement in reversed(_statements(text)):
        value = _stated_number(statement)
        if value is not None:
            return value
    values = [value for value in map(_value, _NUMBER.finditer(text)) if value is not None]
    return values[-1] if values else None


def _letter(task: Task, text: str) -> str | None:
    stated = [found for found in map(_STATED_LETTER.match, _statements(text)) if found]
    found = stated or list(_MARKED_LETTER.finditer(text))
    return next(group for group in found[-1].groups() if group).upper() if found else None


def _statements(text: str) -> list[str]:
    """What follows each "the answer is", to the end of its sentence."""
    ends = [found.end() for found in _STATED.finditer(text)]
    return [_SENTENCE_END.split(text[end:].lstrip(), maxsplit=1)[0] for end in ends]


def _stated_number(statement: str) -> float | None:
    found = _NUMBER.search(statement)
    if found and "=" in statement:
        # "2 + 3 = 5": the number stated is the result; but "7 = 3 + 4" begins with it.
        result = _NUMBER.search(statement, statement.rindex("=") + 1)
        is_sum = _SUM.match(statement, found.end()) and not (result and _OPERATOR.match(statement, result.end()))
        if _OPERATOR.match(statement, found.end()) or is_sum:
            found = result or found
    return _value(found) if found else None


def _value(found: re.Match[str]) -> float | None:
    value = float(found["value"].replace(",", ""))
    if found["bottom"]:
        bottom = float(found["bottom"])
        if bottom == 0:
            return None
        value = value + float(found["top"]) / bottom if found["top"] else value / bottom
    if not math.isfinite(value):
        return None
    return -value if found["sign"] else value
