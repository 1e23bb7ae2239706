"""A procedural task with two options: which of two numbers is larger, or smaller.

The counterpart of `arithmetic` for tasks with options, which stand as in LLM-Adapters' PIQA. The answer is preceded by
the number itself: a small model cannot find the number and its place at once. Blind guessing gets half of the
questions. Whether a question belongs to training or to testing is decided by its hash.
"""

from __future__ import annotations

import random

from smtune.data.arithmetic import MAX_NUMBER, Split, distinct

LARGEST = 3 * MAX_NUMBER
MAX_QUESTIONS = 1_000
"""There are 7,080, a fifth of them for testing."""


def comparison(n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`n` different questions, either option right with equal chance.

    Args:
        n: how many, 1 to `MAX_QUESTIONS`; of training four times as many.
        seed: draws them; the same arguments give the same questions.
        split: "train" or "test"; no question is in both, whatever the other arguments.
    Returns:
        Records of the instruction shape: `output` is the number and "the correct answer is answer1", `answer`
        "answer1", `task` "comparison".
    Raises:
        InputError: `n` or `split` is none of these.
    """
    most = MAX_QUESTIONS * (4 if split == "train" else 1)
    return distinct(_question, n, split, random.Random(f"comparison {split} {seed}"), "questions", most)


def _question(draw: random.Random) -> dict[str, str]:
    a, b = draw.sample(range(1, LARGEST + 1), 2)
    word = draw.choice(("larger", "smaller"))
    is_first = (a > b) == (word == "larger")
    answer = "answer1" if is_first else "answer2"
    return {
        "instruction": f"Which number is {word}, {a} or {b}?\n\n"
        f"Answer1: {a} Answer2: {b} Answer format: answer1/answer2",
        "input": "",
        "output": f"The answer is {a if is_first else b}.\nthe correct answer is {answer}",
        "answer": answer,
        "task": "comparison",
    }
