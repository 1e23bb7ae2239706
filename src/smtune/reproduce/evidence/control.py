"""The question before all others: does full fine-tuning gain enough on a task, and leave it unsolved?

Where it does not, arms cannot differ by much, and nothing may be concluded from their differences. A model that does
not answer in the format asked for falls below blind guessing; to learn the format is no gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from smtune.reproduce.evidence.contrasts import Contrast, accuracy, contrast
from smtune.reproduce.evidence.records import Found, Results

GAIN, SOLVED = 0.10, 0.95
EXPERIMENT = "study-control"
UNSEEN = "study-unseen"
"""Its tests are items that nothing was chosen by."""


@dataclass(frozen=True)
class Control:
    """Full fine-tuning against the untuned model, on a task.

    Attributes:
        model, family: which.
        untuned, full: the two arms, run or not.
        gain: full less untuned; None where one has not been run.
        chance: what blind guessing gets.
    """

    model: str
    family: str
    untuned: Found
    full: Found
    gain: Contrast | None
    chance: float

    @property
    def is_above_chance(self) -> bool:
        return accuracy(self.full) >= self.chance + GAIN

    @property
    def is_gain(self) -> bool:
        """Whether full fine-tuning gains enough, over the untuned model and over chance."""
        return self.gain is not None and self.gain.difference.value >= GAIN and self.is_above_chance

    @property
    def is_solved(self) -> bool:
        return accuracy(self.full) >= SOLVED

    @property
    def fault(self) -> str:
        """Why nothing may be concluded; "" where it may."""
        if self.gain is None:
            return "the positive control has not been run"
        if self.gain.difference.value < GAIN:
            return f"full fine-tuning gains less than {100 * GAIN:.0f} points"
        if not self.is_above_chance:
            return f"full fine-tuning is less than {100 * GAIN:.0f} points above chance ({100 * self.chance:.0f} %)"
        return f"full fine-tuning solves the task ({100 * SOLVED:.0f} % or more)" if self.is_solved else ""


def controls(results: Results) -> dict[tuple[str, str], Control]:
    """By model and family."""
    return _of_experiment(results, EXPERIMENT)


def unseen_controls(results: Results) -> dict[tuple[str, str], Control]:
    """The same, on the tests of `UNSEEN`."""
    return _of_experiment(results, UNSEEN)


def _of_experiment(results: Results, experiment: str) -> dict[tuple[str, str], Control]:
    by_task: dict[tuple[str, str], dict[str, Found]] = {}
    for found in results.arms(experiment):
        by_task.setdefault((found.arm.model, found.arm.family), {})[found.arm.row.method] = results.most_run(found)
    return {
        (model, family): Control(
            model,
            family,
            of["base"],
            of["full"],
            contrast(of["full"], of["base"]),
            results.tier.families[family].chance,
        )
        for (model, family), of in by_task.items()
    }
