"""Arithmetic word problems by our own templates: endless, licence-free and with answers that can be checked.

Used by the demo: an untuned small model gets few of them right, and learns in minutes. Training and test questions
are kept apart by a hash of the question itself, so no seed of one can produce a question of the other.
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

Record = dict[str, str]
Split = Literal["train", "test"]

_NAMES = """Ada Amir Bela Chen Dana Emil Fatima Goran Hana Ivan Jana Kofi Lena
Mina Nadia Omar Pavel Quinn Rosa Sami Tara Umar Vera Wanda Yara Zoe""".split()
_THINGS = """apples books bottles buttons candles cards coins
flowers marbles pencils shells stamps stones tickets""".split()
_BOXES = "bags baskets boxes crates drawers jars shelves trays".split()
_PLACES = ("the market", "school", "the library", "the fair", "the harbour", "the office")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "a + b": (
        "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?",
        "There are {a} {t} on the table and {b} {t} on the floor. How many {t} are there in all?",
        "{n} found {a} {t} on Monday and {b} on Tuesday. How many {t} did {n} find in total?",
        "{n} bought {a} {t} at {p}. {m} bought {b} {t} there. How many {t} did they buy together?",
        "A shop sold {a} {t} in the morning and {b} {t} in the afternoon. How many {t} did it sell that day?",
        "{n} is {a} years old. {m} is {b} years older than {n}. How old is {m}?",
    ),
    "s - b": (
        "{n} had {s} {t} and gave {b} of them to {m}. How many {t} does {n} have left?",
        "There were {s} {t} in the box. {n} took out {b}. How many {t} are still in the box?",
        "{n} has {s} {t}. {m} has {b} {t} fewer than {n}. How many {t} does {m} have?",
        "{n} needs {s} {t} and already has {b}. How many more {t} does {n} need?",
        "After losing {b} {t} at {p}, how many of {n}'s {s} {t} remain?",
        "{n} read {b} pages of a book with {s} pages. How many pages are left to read?",
    ),
    "c * d": (
        "Each of {c} {x} holds {d} {t}. How many {t} are there in all?",
        "{n} buys {c} packs with {d} {t} in each pack. How many {t} does {n} buy?",
        "A ticket to {p} costs {d} euros. How many euros do {c} tickets cost?",
        "{n} saves {d} {t} every week. How many {t} has {n} saved after {c} weeks?",
        "There are {c} rows of {d} chairs at {p}. How many chairs are there?",
    ),
    "a + b + c": (
        "{n} has {a} {t}, {m} has {b} {t} and their friend has {c} {t}. How many {t} do the three have?",
        "{n} walked {a} metres, rested, walked {b} metres and then {c} metres. How far did {n} walk in metres?",
        "{n} has {a} {t}. {m} has {b} {t} more than {n} and then buys {c}. How many {t} does {m} have?",
    ),
    "a + b - c": (
        "{n} has {a} {t} and buys {b} more. Then {n} gives {c} to {m}. How many {t} does {n} have at the end?",
        "At {p} there were {a} people. Then {b} came and {c} went home. How many people are at {p} now?",
    ),
    "s - b + c": ("{n} had {s} {t}, lost {b} of them and then found {c}. How many {t} does {n} have now?",),
    "c * d + b": (
        "{n} fills {c} {x} with {d} {t} each and has {b} {t} left over. How many {t} does {n} have?",
        "{n} buys {c} packs of {d} {t}. {m} has {b} {t}. How many {t} do they have together?",
    ),
}
"""Questions by the calculation that answers them, done from left to right."""

_RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def arithmetic(n: int, split: Split = "train", seed: int = 0) -> list[Record]:
    """n distinct word problems as records with `instruction`, `input`, `output`, `answer` and `task`.

    Args:
        n: how many.
        split: "train" or "test"; the two never share a question, whatever their seeds.
        seed: of the draw.
    Returns:
        `output` is the calculation, a step a sentence, then "The answer is X."; `answer` is X.
    """
    rng = random.Random(f"{split} {seed}")
    questions = [(calculation, text) for calculation, texts in TEMPLATES.items() for text in texts]
    records: dict[str, Record] = {}
    while len(records) < n:
        record = _draw(rng, *rng.choice(questions))
        if _split_of(record["instruction"]) == split:
            records.setdefault(record["instruction"], record)
    return list(records.values())


def _split_of(question: str) -> Split:
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 64 else "train"


def _draw(rng: random.Random, calculation: str, text: str) -> Record:
    numbers = {"a": rng.randint(6, 60), "b": rng.randint(3, 40), "c": rng.randint(2, 6), "d": rng.randint(2, 12)}
    numbers["s"] = numbers["a"] + numbers["b"]
    n, m = rng.sample(_NAMES, 2)
    things, boxes, place = rng.choice(_THINGS), rng.choice(_BOXES), rng.choice(_PLACES)
    question = text.format(n=n, m=m, t=things, x=boxes, p=place, **numbers)

    first, *rest = calculation.split()
    result, steps = numbers[first], []
    for sign, operand in zip(rest[::2], rest[1::2]):
        left, right = result, numbers[operand]
        result = _RESULT[sign](left, right)
        steps.append(f"{left} {sign} {right} = {result}.")
    output = f"{' '.join(steps)} The answer is {result}."
    return {"instruction": question, "input": "", "output": output, "answer": str(result), "task": "arithmetic"}
