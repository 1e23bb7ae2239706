"""A procedural task: word problems of one or two sums, made on the spot.

GSM8K and its like are beyond small models; this can be learned in minutes by a model of 135 M parameters that is
poor at it before, so it shows whether fine-tuning works at all. A problem is a template, names, things and numbers.
Whether it belongs to training or to testing is decided by a hash of its question, so no number of problems and no
choice of seeds can put one question into both.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable
from typing import Literal

from smtune.data.overlap import question_key
from smtune.errors import InputError

Split = Literal["train", "test"]

TEST_SHARE = 5
"""One question in so many is a test question."""

MAX_PROBLEMS = 20_000
"""With more, the narrowest templates run out of questions and the mix shifts to the others."""

MAX_NUMBER, MAX_FACTOR = 20, 9
"""Large enough that a small model errs, small enough that it can learn: with a few examples before it, the untuned
SmolLM2-135M gets 65 % of such bare additions, 18 % of the subtractions and 95 % of the products (40 of each)."""

NAMES = (
    "Ada", "Bruno", "Carla", "Dimitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kofi", "Lena",
    "Mateo", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tove", "Ugo", "Vera", "Wanda", "Yusuf",
)  # fmt: skip
THINGS = (
    "apples", "balloons", "bottles", "bricks", "buttons", "candles", "coins", "cookies", "cups", "eggs", "flowers",
    "keys", "lemons", "marbles", "nails", "notebooks", "onions", "pencils", "postcards", "seashells", "stamps",
    "stickers", "tickets", "walnuts",
)  # fmt: skip

TEMPLATES = (
    # one sum
    ("a + b", "{p} has {a} {things}. {q} gives {p} {b} more. How many {things} does {p} have now?"),
    ("a + b", "{p} bought {a} {things} on Monday and {b} {things} on Tuesday. How many {things} did {p} buy?"),
    ("a + b", "There are {a} {things} in one box and {b} in another. How many {things} are there in both boxes?"),
    ("a + b", "{p} found {a} {things} and {q} found {b}. How many {things} did they find together?"),
    ("a + b", "After {p} gave away {a} {things}, {b} were left. How many {things} did {p} have at first?"),
    ("a + b", "{p} has {a} {things}. {q} has {b} more than {p}. How many {things} does {q} have?"),
    ("a - b", "{p} had {a} {things} and lost {b} of them. How many {things} does {p} have left?"),
    ("a - b", "A shop had {a} {things}. It sold {b} of them. How many {things} are left in the shop?"),
    ("a - b", "{p} has {a} {things} and {q} has {b}. How many more {things} does {p} have than {q}?"),
    ("a - b", "{p} needs {a} {things} and has {b} so far. How many more {things} does {p} need?"),
    ("a - b", "{p} and {q} have {a} {things} together. {q} has {b} of them. How many {things} does {p} have?"),
    ("a * b", "{p} has {a} boxes with {b} {things} in each. How many {things} does {p} have?"),
    ("a * b", "Each of {a} children brings {b} {things}. How many {things} do they bring in all?"),
    ("a * b", "{p} uses {a} {things} a day. How many {things} does {p} use in {b} days?"),
    ("a * b", "{q} has {a} {things}. {p} has {b} times as many. How many {things} does {p} have?"),
    # two sums
    ("a + b + c", "{p} collected {a} {things}, {q} collected {b} and a friend {c}. How many {things} is that in all?"),
    ("a + b + a", "{p} has {a} {things}. {q} has {b} more than {p}. How many {things} do they have together?"),
    ("a + b - c", "{p} had {a} {things}, bought {b} more and then used {c}. How many {things} are left?"),
    ("a + b - c", "A drawer holds {a} {things} and a shelf {b}. {p} takes {c} of them. How many {things} remain?"),
    ("a - b + c", "{p} had {a} {things}, gave {b} to {q} and found {c}. How many {things} does {p} have now?"),
    ("a - b + c", "There were {a} {things} in a basket. {p} took {b} out and {q} put {c} in. How many are in it now?"),
    ("a - b - c", "{p} had {a} {things}. {b} broke and {c} were lost. How many {things} does {p} still have?"),
    ("a - b - c", "Of {a} {things}, {p} took {b} and {q} took {c}. How many {things} were left over?"),
    ("a * b + c", "{p} has {a} bags of {b} {things} and {c} loose ones. How many {things} does {p} have?"),
    ("a * b + c", "{p} packs {b} {things} into each of {a} crates. {c} do not fit. How many {things} are there?"),
    ("a * b - c", "{p} bought {a} packs of {b} {things} and gave {c} to {q}. How many {things} does {p} have left?"),
    ("a * b - c", "{a} shelves hold {b} {things} each. {p} takes {c} away. How many {things} are still on them?"),
    ("a - b * c", "{p} had {a} {things} and broke {b}. Then {q} brought enough to have {c} times as many as were "
                  "left. How many {things} are there now?"),
    ("a + b * c", "A pack holds {a} red and {b} blue {things}. {p} buys {c} packs. How many {things} does {p} have?"),
    ("a * b * c", "{p} has {a} bags. In each are {b} boxes with {c} {things} each. How many {things} does {p} have?"),
)  # fmt: skip
"""(sums, question). The sums are done from left to right, *without* precedence: "a + b * c" is (a + b) · c."""

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def arithmetic(n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`n` different word problems.

    Args:
        n: how many, 1 to `MAX_PROBLEMS`.
        seed: draws them; the same arguments give the same problems.
        split: "train" or "test"; no question is in both, whatever the other arguments.
    Returns:
        Records of the instruction shape: `output` has one sum a line and ends "The answer is X.", `answer` is X,
        `task` "arithmetic". All numbers are whole and positive.
    Raises:
        InputError: `n` or `split` is none of these.
    """
    return distinct(_problem, n, split, random.Random(f"{split} {seed}"), "problems", MAX_PROBLEMS)


def distinct(
    make: Callable[[random.Random], dict[str, str]], n: int, split: Split, draw: random.Random, what: str, most: int
) -> list[dict[str, str]]:
    """`n` records that `make` draws, of different questions and all of one split.

    Raises:
        InputError: `n`, of `what`, is not 1 to `most`, or `split` neither "train" nor "test".
    """
    if not 1 <= n <= most:
        raise InputError(f"Expected 1 to {most:,} {what}. Got {n:,}.")
    if split not in ("train", "test"):
        raise InputError(f'Expected a split among train, test. Got "{split}".')
    records: dict[str, dict[str, str]] = {}
    while len(records) < n:
        record = make(draw)
        key = question_key(record["instruction"])
        if split_of(key) == split:
            records.setdefault(key, record)
    return list(records.values())


def split_of(key: str) -> Split:
    """Where the question with this `question_key` belongs, by its hash."""
    return "test" if hashlib.sha256(key.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def _problem(draw: random.Random) -> dict[str, str]:
    sums, question = draw.choice(TEMPLATES)
    p, q = draw.sample(NAMES, 2)
    things = draw.choice(THINGS)
    while True:
        numbers = {name: draw.randint(2, MAX_NUMBER) for name in "abc"}
        steps = _steps(sums, numbers)
        if steps is not None:
            break
    answer = str(steps[-1][-1])
    lines = [f"{left} {symbol} {right} = {result}" for left, symbol, right, result in steps]
    return {
        "instruction": question.format(p=p, q=q, things=things, **numbers),
        "input": "",
        "output": "\n".join([*lines, f"The answer is {answer}."]),
        "answer": answer,
        "task": "arithmetic",
    }


def _steps(sums: str, numbers: dict[str, int]) -> list[tuple[int, str, int, int]] | None:
    """The sums as (left, symbol, right, result), or None if they are harder than intended.

    Results must be positive, and factors at most `MAX_FACTOR`.
    """
    first, *rest = sums.split()
    value = numbers[first]
    steps = []
    for symbol, name in zip(rest[::2], rest[1::2]):
        right = numbers[name]
        result = OPERATIONS[symbol](value, right)
        if result < 1 or (symbol == "*" and max(value, right) > MAX_FACTOR):
            return None
        steps.append((value, symbol, right, result))
        value = result
    return steps
