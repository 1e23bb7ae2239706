"""Arithmetic word problems by our own templates: endless, licence-free and with answers that can be checked.

Used by the demo: an untuned small model gets few of them right, and learns in minutes. Training and test questions
are kept apart by a hash of the question itself, so no seed of one can produce a question of the other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal

Record = dict[str, str]
Split = Literal["train", "test"]

_NAMES = [
    "Ada",
    "Amir",
    "Bela",
    "Chen",
    "Dana",
    "Emil",
    "Fatima",
    "Goran",
    "Hana",
    "Ivan",
    "Jana",
    "Kofi",
    "Lena",
    "Mina",
    "Nadia",
    "Omar",
    "Pavel",
    "Quinn",
    "Rosa",
    "Sami",
    "Tara",
    "Umar",
    "Vera",
    "Wanda",
    "Yara",
    "Zoe",
]
_THINGS = [
    "apples",
    "books",
    "coins",
    "pencils",
    "stickers",
    "marbles",
    "shells",
    "stamps",
    "buttons",
    "cards",
    "flowers",
    "candles",
    "stones",
    "tickets",
    "bottles",
]
_BOXES = ["boxes", "bags", "baskets", "crates", "shelves", "trays", "drawers", "jars"]
_PLACES = ("the market", "school", "the library", "the fair", "the harbour", "the office")

# Each template: text, the steps of its solution, and which of a, b, c it uses. Steps are (left, sign, right).
_Template = tuple[str, Callable[[int, int, int], list[tuple[int, str, int]]]]

_ADD: list[_Template] = [
    ("{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?", lambda a, b, c: [(a, "+", b)]),
    ("There are {a} {t} on the table and {b} {t} on the floor. How many {t} are there in all?",
     lambda a, b, c: [(a, "+", b)]),
    ("{n} found {a} {t} on Monday and {b} on Tuesday. How many {t} did {n} find in total?",
     lambda a, b, c: [(a, "+", b)]),
    ("{n} bought {a} {t} at {p}. {m} bought {b} {t} there. How many {t} did they buy together?",
     lambda a, b, c: [(a, "+", b)]),
    ("A shop sold {a} {t} in the morning and {b} {t} in the afternoon. How many {t} did it sell that day?",
     lambda a, b, c: [(a, "+", b)]),
    ("{n} is {a} years old. {m} is {b} years older than {n}. How old is {m}?", lambda a, b, c: [(a, "+", b)]),
]  # fmt: skip
_SUBTRACT: list[_Template] = [
    ("{n} had {s} {t} and gave {b} of them to {m}. How many {t} does {n} have left?", lambda a, b, c: [(a + b, "-", b)]),
    ("There were {s} {t} in the box. {n} took out {b}. How many {t} are still in the box?",
     lambda a, b, c: [(a + b, "-", b)]),
    ("{n} has {s} {t}. {m} has {b} {t} fewer than {n}. How many {t} does {m} have?", lambda a, b, c: [(a + b, "-", b)]),
    ("{n} needs {s} {t} and already has {b}. How many more {t} does {n} need?", lambda a, b, c: [(a + b, "-", b)]),
    ("After losing {b} {t} at {p}, how many of {n}'s {s} {t} remain?", lambda a, b, c: [(a + b, "-", b)]),
    ("{n} read {b} pages of a book with {s} pages. How many pages are left to read?", lambda a, b, c: [(a + b, "-", b)]),
]  # fmt: skip
_MULTIPLY: list[_Template] = [
    ("Each of {c} {x} holds {d} {t}. How many {t} are there in all?", lambda a, b, c: [(c, "*", a % 9 + 2)]),
    ("{n} buys {c} packs with {d} {t} in each pack. How many {t} does {n} buy?", lambda a, b, c: [(c, "*", a % 9 + 2)]),
    ("A ticket to {p} costs {d} euros. How many euros do {c} tickets cost?", lambda a, b, c: [(c, "*", a % 9 + 2)]),
    ("{n} saves {d} {t} every week. How many {t} has {n} saved after {c} weeks?", lambda a, b, c: [(c, "*", a % 9 + 2)]),
    ("There are {c} rows of {d} chairs at {p}. How many chairs are there?", lambda a, b, c: [(c, "*", a % 9 + 2)]),
]  # fmt: skip
_TWO_STEPS: list[_Template] = [
    ("{n} has {a} {t}, {m} has {b} {t} and their friend has {c} {t}. How many {t} do the three have?",
     lambda a, b, c: [(a, "+", b), (a + b, "+", c)]),
    ("{n} had {s} {t}, lost {b} of them and then found {c}. How many {t} does {n} have now?",
     lambda a, b, c: [(a + b, "-", b), (a, "+", c)]),
    ("{n} has {a} {t} and buys {b} more. Then {n} gives {c} to {m}. How many {t} does {n} have at the end?",
     lambda a, b, c: [(a, "+", b), (a + b, "-", c)]),
    ("{n} fills {c} {x} with {d} {t} each and has {b} {t} left over. How many {t} does {n} have?",
     lambda a, b, c: [(c, "*", a % 9 + 2), (c * (a % 9 + 2), "+", b)]),
    ("{n} buys {c} packs of {d} {t}. {m} has {b} {t}. How many {t} do they have together?",
     lambda a, b, c: [(c, "*", a % 9 + 2), (c * (a % 9 + 2), "+", b)]),
    ("At {p} there were {a} people. Then {b} came and {c} went home. How many people are at {p} now?",
     lambda a, b, c: [(a, "+", b), (a + b, "-", c)]),
    ("{n} walked {a} metres, rested, walked {b} metres and then {c} metres. How far did {n} walk in metres?",
     lambda a, b, c: [(a, "+", b), (a + b, "+", c)]),
    ("{m} has {b} {t} more than {n}, who has {a}. {m} then buys {c}. How many {t} does {m} have?",
     lambda a, b, c: [(a, "+", b), (a + b, "+", c)]),
]  # fmt: skip
TEMPLATES: tuple[_Template, ...] = (*_ADD, *_SUBTRACT, *_MULTIPLY, *_TWO_STEPS)

_RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


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
    records: dict[str, Record] = {}
    while len(records) < n:
        record = _draw(rng)
        if _split_of(record["instruction"]) == split:
            records.setdefault(record["instruction"], record)
    return list(records.values())


def _split_of(question: str) -> Split:
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 64 else "train"


def _draw(rng: random.Random) -> Record:
    text, solve = rng.choice(TEMPLATES)
    a, b, c = rng.randint(6, 60), rng.randint(3, 40), rng.randint(2, 8)
    n, m = rng.sample(_NAMES, 2)
    question = text.format(
        n=n, m=m, t=rng.choice(_THINGS), x=rng.choice(_BOXES), p=rng.choice(_PLACES),
        a=a, b=b, c=c, d=a % 9 + 2, s=a + b,
    )  # fmt: skip
    steps = [(left, sign, right, _RESULT[sign](left, right)) for left, sign, right in solve(a, b, c)]
    answer = str(steps[-1][-1])
    calculation = " ".join(f"{left} {sign} {right} = {result}." for left, sign, right, result in steps)
    output = f"{calculation} The answer is {answer}."
    return {"instruction": question, "input": "", "output": output, "answer": answer, "task": "arithmetic"}
