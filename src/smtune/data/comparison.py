"""A procedural true-or-false task: whether a number given is what a sum in words comes to.

The counterpart of `arithmetic` for tasks with options, in the format of LLM-Adapters' BoolQ. Half of the numbers are
wrong: what the other of the two sums would give. Blind guessing gets half of the questions. The answer is preceded by
the sum: a small model cannot do both at once. Whether a question belongs to training or to testing is decided by its
hash. Imports, of this package, `arithmetic`.
"""

from __future__ import annotations

import random

from smtune.data.arithmetic import MAX_NUMBER, NAMES, OPERATIONS, THINGS, Split, distinct

STORIES = (
    ("+", "{p} has {a} {things} and gets {b} more."),
    ("+", "{p} found {a} {things} and bought {b}."),
    ("-", "{p} has {a} {things} and gives {b} of them to {q}."),
    ("-", "{p} had {a} {things} and lost {b} of them."),
)
"""(sum, what happened)."""


def comparison(n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`n` different questions, each true or false with equal chance.

    Args:
        n: how many, 1 to `MAX_PROBLEMS`.
        seed: draws them; the same arguments give the same questions.
        split: "train" or "test"; no question is in both, whatever the other arguments.
    Returns:
        Records of the instruction shape: `output` is the sum and "the correct answer is true", `answer` "true", `task`
        "comparison".
    Raises:
        InputError: `n` or `split` is none of these.
    """
    return distinct(_question, n, split, random.Random(f"comparison {split} {seed}"), "questions")


def _question(draw: random.Random) -> dict[str, str]:
    symbol, story = draw.choice(STORIES)
    p, q = draw.sample(NAMES, 2)
    things = draw.choice(THINGS)
    while True:
        a, b = draw.randint(2, MAX_NUMBER), draw.randint(2, MAX_NUMBER)
        result, other = OPERATIONS[symbol](a, b), OPERATIONS["-" if symbol == "+" else "+"](a, b)
        if result > 0 and other > 0:
            break
    holds = draw.random() < 0.5
    answer, asked = ("true", result) if holds else ("false", other)
    return {
        "instruction": "Please answer the following question with true or false, question: "
        f"{story.format(p=p, q=q, a=a, b=b, things=things)} Does {p} have {asked} {things} now?\n\n"
        "Answer format: true/false",
        "input": "",
        "output": f"{a} {symbol} {b} = {result}\nthe correct answer is {answer}",
        "answer": answer,
        "task": "comparison",
    }
