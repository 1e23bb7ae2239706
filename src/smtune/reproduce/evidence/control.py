"""The question before all others: does full fine-tuning gain enough on a task, and leave it unsolved?

Where it does not, arms cannot differ by much, and nothing may be concluded from their differences.
"""

from __future__ import annotations

from dataclasses import dataclass

from smtune.reproduce.evidence.contrasts import Contrast, accuracy, contrast
from smtune.reproduce.evidence.records import Found, Results

GAIN, SOLVED = 0.10, 0.95
EXPERIMENT = "study-control"


@dataclass(frozen=True)
class Control:
    """Full fine-tuning against the untuned model, on a task.

    Attributes:
        model, family: which.
        untuned, full: the two arms, run or not.
        gain: full less untuned; None where one has not been run.
    """

    model: str
    family: str
    untuned: Found
    full: Found
    gain: Contrast | None

    @property
    def has_passed(self) -> bool:
        return self.gain is not None and self.gain.difference.value >= GAIN and accuracy(self.full) < SOLVED

    @property
    def fault(self) -> str:
        """Why nothing may be concluded; "" where it may."""
        if self.gain is None:
            return "the positive control has not been run"
        if self.gain.difference.value < GAIN:
            return f"full fine-tuning gains less than {100 * GAIN:.0f} points"
        return "" if self.has_passed else f"full fine-tuning solves the task ({100 * SOLVED:.0f} % or more)"


def controls(results: Results) -> dict[tuple[str, str], Control]:
    """By model and family."""
    by_task: dict[tuple[str, str], dict[str, Found]] = {}
    for found in results.arms(EXPERIMENT):
        by_task.setdefault((found.arm.model, found.arm.family), {})[found.arm.row.method] = found
    return {
        (model, family): Control(model, family, of["base"], of["full"], contrast(of["full"], of["base"]))
        for (model, family), of in by_task.items()
    }
