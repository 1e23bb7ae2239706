"""Evaluation: the tasks, how an answer is read and scored, and intervals for the results.

    items = load_items(resolve_tasks(["boolq"])[0], "data/")
    evaluation = evaluate(model, tokenizer, items, protocol="likelihood", model_id="base", out_dir="results/")

The protocols are LLM-Adapters' (Hu et al. 2023, arXiv:2304.01933) and option likelihood.
"""

from smtune.evaluation.answers import extract_answer, is_correct
from smtune.evaluation.loss import answer_loss
from smtune.evaluation.results import (
    ItemResult,
    Summary,
    TaskSummary,
    compare,
    comparison_table,
    load_run,
    summarise,
    summary_table,
)
from smtune.evaluation.run import Evaluation, Protocol, check, check_folder, evaluate
from smtune.evaluation.statistics import (
    Estimate,
    PairedDifference,
    SeedsDifference,
    accuracy,
    accuracy_over_seeds,
    difference_over_seeds,
    paired_difference,
    verdict,
)
from smtune.evaluation.tasks import GROUPS, TASKS, Choice, Item, Task, choices, load_items, resolve_tasks

__all__ = [
    "GROUPS",
    "TASKS",
    "Choice",
    "Estimate",
    "Evaluation",
    "Item",
    "ItemResult",
    "PairedDifference",
    "Protocol",
    "SeedsDifference",
    "Summary",
    "Task",
    "TaskSummary",
    "accuracy",
    "accuracy_over_seeds",
    "answer_loss",
    "check",
    "check_folder",
    "choices",
    "compare",
    "comparison_table",
    "difference_over_seeds",
    "evaluate",
    "extract_answer",
    "is_correct",
    "load_items",
    "load_run",
    "paired_difference",
    "resolve_tasks",
    "summarise",
    "summary_table",
    "verdict",
]
