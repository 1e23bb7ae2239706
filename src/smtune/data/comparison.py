"""A procedural choice task: who has the most, the fewest, more or fewer than another.

The counterpart of `arithmetic` for tasks with options, in the format of LLM-Adapters' commonsense sets: what has to be
learned is to compare the numbers and to name the option by its label. Whether a question belongs to training or to
testing is decided by its hash. Imports `smtune.errors` and, of this package, `arithmetic` and `overlap`.
"""

from __future__ import annotations

import random

from smtune.data.arithmetic import MAX_NUMBER, MAX_PROBLEMS, NAMES, THINGS, Split, split_of
from smtune.data.overlap import question_key
from smtune.errors import InputError

QUESTIONS = (
    ("most", "Who has the most {things}?"),
    ("fewest", "Who has the fewest {things}?"),
    ("more", "Who has more {things} than {other}?"),
    ("fewer", "Who has fewer {things} than {other}?"),
)
"""(what is asked, question). For "more" and "fewer" the other has the middle number, so that one answer is right."""


def comparison(n: int, seed: int = 0, split: Split = "train") -> list[dict[str, str]]:
    """`n` different questions with three options each.

    Args:
        n: how many, 1 to `MAX_PROBLEMS`.
        seed: draws them; the same arguments give the same questions.
        split: "train" or "test"; no question is in both, whatever the other arguments.
    Returns:
        Records of the instruction shape: `output` is "the correct answer is answer2", `answer` "answer2", `task`
        "comparison".
    Raises:
        InputError: `n` or `split` is none of these.
    """
    if not 1 <= n <= MAX_PROBLEMS:
        raise InputError(f"Expected 1 to {MAX_PROBLEMS:,} questions. Got {n:,}.")
    if split not in ("train", "test"):
        raise InputError(f'Expected a split among train, test. Got "{split}".')
    draw = random.Random(f"comparison {split} {seed}")
    questions: dict[str, dict[str, str]] = {}
    while len(questions) < n:
        question = _question(draw)
        key = question_key(question["instruction"])
        if split_of(key) == split:
            questions.setdefault(key, question)
    return list(questions.values())


def _question(draw: random.Random) -> dict[str, str]:
    asked, question = draw.choice(QUESTIONS)
    names = draw.sample(NAMES, 3)
    things = draw.choice(THINGS)
    numbers = draw.sample(range(2, MAX_NUMBER + 1), 3)
    fewest, middle, most = sorted(range(3), key=numbers.__getitem__)
    right = most if asked in ("most", "more") else fewest
    options = draw.sample(names, 3)
    label = f"answer{options.index(names[right]) + 1}"
    facts = "{} has {} {things}, {} has {} and {} has {}.".format(
        *(part for pair in zip(names, numbers) for part in pair), things=things
    )
    listed = " ".join(f"Answer{number}: {option}" for number, option in enumerate(options, 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {facts} "
        f"{question.format(things=things, other=names[middle])}\n\n{listed}\n\n"
        "Answer format: answer1/answer2/answer3",
        "input": "",
        "output": f"the correct answer is {label}",
        "answer": label,
        "task": "comparison",
    }
