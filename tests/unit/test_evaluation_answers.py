"""Extraction of answers from completions, as tables of cases."""

import pytest

from smtune.evaluation import TASKS, extract_answer, is_correct


@pytest.mark.parametrize(
    ("task", "completion", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "True.", "true"),
        ("boolq", "FALSE, since it is untrue", "false"),
        ("boolq", "untrue", None),
        ("boolq", "yes", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("piqa", "Solution1: use a spoon", "solution1"),
        ("piqa", "use a spoon", None),
        ("ARC-Easy", "the correct answer is answer5", "answer5"),
        ("ARC-Easy", "answer12", None),
        ("openbookqa", "answer3 rather than answer1", "answer3"),
        ("hellaswag", "\n ending4\n", "ending4"),
        ("winogrande", "Option2", "option2"),
        ("winogrande", "answer2", None),
        ("social_i_qa", "", None),
        ("social_i_qa", "I do not know.\n\n### Instruction:\nanswer1 or answer2?", None),
    ],
)
def test_label_is_the_first_in_the_text(task, completion, expected):
    assert extract_answer(TASKS[task], completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("The answer is 72.", 72.0),
        ("48/2 = 24 clips. 48+24 = 72.\nThe answer is 72.", 72.0),
        ("the ANSWER is: 72", 72.0),
        ("The answer is\n72", 72.0),
        ("Answer: 72", 72.0),
        ("#### 72", 72.0),
        (r"so \boxed{72} it is, after 3 steps", 72.0),
        ("The answer is $1,234.50.", 1234.5),
        ("The answer is 1,234,567", 1234567.0),
        ("The answer is 50%.", 50.0),
        ("The answer is 12 apples and 3 pears.", 12.0),
        ("The answer is **7**", 7.0),
        ("The answer is -5.", -5.0),
        ("The answer is −5.", -5.0),  # U+2212
        ("The answer is -$5.", -5.0),
        ("The answer is $-5.", -5.0),
        ("The answer is .5", 0.5),
        ("The answer is 1/4.", 0.25),
        ("The answer is 2 1/2 hours.", 2.5),
        ("The answer is 2 + 3 = 5.", 5.0),
        ("The answer is 7 = 3 + 4.", 7.0),
        ("The answer is 10 / 4 = 2.5.", 2.5),
        ("The answer is 60 minutes − 15 minutes = 45 minutes.", 45.0),
        ("The answer is 20% of 50 = 10.", 10.0),
        ("The answer is 5 dollars + 3 dollars = 8 dollars.", 8.0),
        ("The answer is 2(3) + 4 = 10.", 10.0),
        ("The answer is 10.10.10 = 10.", 10.1),
        ("The answer is 18 dollars a day, because she has 16 - 3 - 4 = 9 eggs to sell.", 18.0),
        ("The answer is 12 because 4 × 3 = 12 and 2 + 1 = 3.", 12.0),
        ("The answer is 8, not 5 + 4 = 9.", 8.0),
        ("The answer is x = 5.", 5.0),
        ("The answer is 1.5e3", 1500.0),
        # Stated beats last; the last statement beats earlier ones.
        ("The answer is 72. There were 3 friends.", 72.0),
        ("The answer is 5. No: the answer is 6.", 6.0),
        ("The answer is 5.\nThe answer is unclear.", 5.0),
        # Nothing stated: the last number.
        ("He has 3 apples, then 8.", 8.0),
        ("10-5", 5.0),
        ("from 10 to -5", -5.0),
        ("3,4", 4.0),
        ("on 1,2,3", 3.0),
        ("72.", 72.0),
        # The model goes on with a prompt of its own.
        ("The answer is 5.\n\n### Instruction:\nAnd 7?\n\n### Response:\nThe answer is 9.", 5.0),
        ("", None),
        ("The answer is unknown.", None),
        ("The answer is 1/0.", None),
        ("9" * 400, None),
    ],
)
def test_number_is_the_one_stated_else_the_last(completion, expected):
    assert extract_answer(TASKS["gsm8k"], completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("A car travels 60 miles. Both legs are equal.\nThe answer is (C).", "C"),
        ("Average speed = D/T = 60/2.\nThe answer is (B).", "B"),
        ("The answer is C.", "C"),
        ("The answer is c.", "C"),
        ("the answer is (e)", "E"),
        ("Answer: D", "D"),
        ("The correct answer is: **B**", "B"),
        ("The answer is option (D).", "D"),
        ("The answer is A because 3 > 2", "A"),
        ("The correct option is E", "E"),
        ("Ans: B", "B"),
        (r"The answer is \boxed{C}", "C"),
        ("The answer is (A). No, the answer is (B).", "B"),
        # Stated as a value: the letter beside it, not a capital elsewhere.
        ("Adding up, the answer is $65, which is (B).", "B"),
        ("Both sides Cancel. The answer is 65.", None),
        ("The answer is a number between them.", None),
        # Nothing stated: the last one marked as an option.
        ("(A) is too small, so (D)", "D"),
        ("B", "B"),
        ("C) 45", "C"),
        ("It must be option E", "E"),
        ("A Big Car Drove East", None),
        ("", None),
    ],
)
def test_aqua_letter_is_the_one_stated(completion, expected):
    assert extract_answer(TASKS["AQuA"], completion) == expected


@pytest.mark.parametrize(
    ("task", "prediction", "answer", "expected"),
    [
        ("gsm8k", 72.0, "72.0", True),
        ("AddSub", 46.0, "46", True),
        ("SingleEq", 5.6666, "5.666666666666667", True),
        ("SingleEq", 5.67, "5.666666666666667", False),
        ("gsm8k", 1234.0, "1,234", True),
        ("gsm8k", None, "72.0", False),
        ("AQuA", "C", "C", True),
        ("AQuA", "C", "D", False),
        ("boolq", "true", "True", True),
    ],
)
def test_numbers_are_compared_as_numbers(task, prediction, answer, expected):
    assert is_correct(TASKS[task], prediction, answer) is expected
