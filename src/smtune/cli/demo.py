"""The newcomer's first command: SMT on a real model, with its accuracy before and after, in minutes on a laptop.

SmolLM2-135M learns word problems of our own making (`smtune.data.arithmetic`). Every number is computed here and now;
held-out questions are never among the training ones. The arms differ in nothing but what they train.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from smtune.data import arithmetic
from smtune.errors import InputError
from smtune.evaluation import Evaluation, compare, evaluate, load_items, resolve_tasks
from smtune.files import write_json, write_text
from smtune.models import fingerprint, load_merged, load_tokenizer
from smtune.report import accuracy_bars, block_map, loss_curve, projection_shares
from smtune.selection import Plan
from smtune.training import RunResult, TrainConfig, parse_config, read_metrics, train

MODEL = "smollm2-135m"
STEPS = 60
TEST_ITEMS = 200
BUDGET = 0.0084  # the paper's 0.84 %
BLOCK_SIZE = 64
LORA_RANK = 14  # 14 · 30 · (2·576 + 2·(576 + 192)) = 1.13 M parameters of q, k and v, as many as the budget buys
LORA_TARGETS = ["q_proj", "k_proj", "v_proj"]


@dataclass(frozen=True)
class Arm:
    """One way to train: a title, a training method, its learning rate, and whether its answers are shuffled."""

    title: str
    method: str
    learning_rate: float
    shuffled: bool = False


SMT = Arm("SMT", "smt", 3e-3)
LORA = Arm("LoRA of as many parameters", "lora", 3e-3)
CONTROL = Arm("SMT on shuffled answers", "smt", 3e-3, shuffled=True)


def run_demo(output: Path, *, compare: bool = False, control: bool = False, console: Console | None = None) -> None:
    """Evaluate, train, evaluate again; draw; say what changed and what to do next.

    Args:
        output: a folder for everything. An interrupted demo goes on in it where it stopped.
        compare: also LoRA with the same data, order and steps.
        control: also SMT on the same questions with the answers shuffled among them: what the format alone gives.
    """
    console = console or Console(highlight=False)
    arms = [SMT] + [LORA] * compare + [CONTROL] * control
    settings = {"steps": STEPS, "items": TEST_ITEMS, "budget": BUDGET}
    earlier: dict[str, Any] = {}
    if (output / "summary.json").is_file():
        earlier = json.loads((output / "summary.json").read_text(encoding="utf-8"))
        console.print(f"{output} holds an earlier demo. What it has computed is shown, not computed again.")
    started = time.perf_counter()
    console.print(
        f"SmolLM2-135M learns word problems: {STEPS} steps of 8 by Sparse Matrix Tuning, which trains "
        f"{100 * BUDGET:.2f} % of the parameters.\nBefore and after it answers {TEST_ITEMS} questions it has not seen."
    )
    output.mkdir(parents=True, exist_ok=True)
    before = _evaluate(MODEL, "before", output, console)
    results: dict[str, RunResult] = {}
    after: dict[str, Evaluation] = {}
    for arm in arms:
        folder = output / arm.title.split(" of ")[0].lower().replace(" ", "-")
        console.print(f"\n[bold]{arm.title}[/]")
        results[arm.title] = train(_config(arm, folder, output), resume=folder.exists(), console=console)
        after[arm.title] = _evaluate(str(folder), arm.title, output, console)

    summary = _summary(before, after, results)
    console.print()
    console.print(_table(summary))
    figures = _draw(output, before, after, results)
    elapsed = time.perf_counter() - started
    of_all = {"seconds": round(earlier.get("seconds", 0.0) + elapsed, 1), "arms": earlier.get("arms", {}) | summary}
    write_json(output / "summary.json", settings | of_all)
    _say_next(console, output, figures, results[SMT.title], elapsed)


def _config(arm: Arm, folder: Path, output: Path) -> TrainConfig:
    if arm.shuffled:
        data = output / "shuffled-answers.jsonl"
        _write_lines(data, _shuffle_answers(arithmetic(8 * STEPS)))
    else:
        data = output / "train.jsonl"
        _write_lines(data, arithmetic(8 * STEPS))
    return parse_config(
        {
            "model": MODEL,
            "output": str(folder),
            "method": arm.method,
            "data": {"train": str(data), "max_length": 256},
            "smt": {"block_size": BLOCK_SIZE, "budget": BUDGET, "warmup_steps": 10},
            "lora": {"rank": LORA_RANK, "target_modules": LORA_TARGETS},
            "training": {
                "learning_rate": arm.learning_rate,
                "max_steps": STEPS,
                "batch_size": 8,
                "logging_steps": 2,
                "save_steps": 20,
            },
        },
        where="demo",
    )


def _shuffle_answers(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same questions, each with the answer of another: the format is there to learn, the task is not."""
    places = list(range(len(records)))
    random.Random(0).shuffle(places)
    return [{**record, "output": records[place]["output"]} for record, place in zip(records, places)]


def _evaluate(model: str, title: str, output: Path, console: Console) -> Evaluation:
    (task,) = resolve_tasks(["arithmetic"])
    items = load_items(task, None, TEST_ITEMS)
    folder = (output / "before" if model == MODEL else Path(model)) / "evaluation" / "generate"
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        work = bar.add_task(f"Answering ({title})", total=len(items))
        evaluation = evaluate(
            load_merged(model),
            load_tokenizer(MODEL),
            items,
            model_id=fingerprint(model),
            out_dir=folder,
            batch_size=25,
            progress=lambda done, total: bar.update(work, completed=done),
        )
    result = evaluation.summary.tasks[0]
    console.print(
        f"  {title}: {result.correct} of {result.n} right, {result.unparsed} without a number", highlight=False
    )
    return evaluation


def _summary(before: Evaluation, after: dict[str, Evaluation], results: dict[str, RunResult]) -> dict[str, Any]:
    def numbers(evaluation: Evaluation) -> dict[str, Any]:
        task = evaluation.summary.tasks[0]
        interval = [task.accuracy.low, task.accuracy.high]
        return {"correct": task.correct, "items": task.n, "interval": interval, "unparsed": task.unparsed}

    summary: dict[str, Any] = {"before": numbers(before)}
    for title, evaluation in after.items():
        (gain,) = compare(evaluation.results, before.results).values()
        # The items that the untuned model answered readably: on these the format is no excuse.
        readable = {item.key for item in before.results if item.prediction is not None}
        result = results[title]
        summary[title] = numbers(evaluation) | {
            "gain": gain.difference.value,
            "gain_interval": [gain.difference.low, gain.difference.high],
            "mcnemar_p": gain.p_value,
            "readable_before": len(readable),
            "correct_of_readable_before": sum(item.correct for item in before.results if item.key in readable),
            "correct_of_readable_after": sum(item.correct for item in evaluation.results if item.key in readable),
            "trainable_parameters": result.trainable_parameters,
            "trainable_fraction": result.trainable_fraction,
            "loss": result.loss,
            "seconds": result.seconds,
            "scoring_seconds": result.scoring_seconds,
        }
    return summary


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['before']['items']} held-out word problems", box=box.SIMPLE)
    table.add_column("")
    for heading in ("right, %", "gain, points", "no number"):
        table.add_column(heading, justify="right")
    for title, row in summary.items():
        right = f"{100 * row['correct'] / row['items']:.1f} ({_span(row['interval'], '')})"
        gain = f"{100 * row['gain']:+.1f} ({_span(row['gain_interval'], '+')})" if "gain" in row else ""
        table.add_row(title, right, gain, str(row["unparsed"]))
    table.caption = "in parentheses: 95 % intervals; that of the gain is paired"
    return table


def _span(interval: list[float], sign: str) -> str:
    return " to ".join(f"{100 * end:{sign}.1f}" for end in interval)


def _draw(
    output: Path, before: Evaluation, after: dict[str, Evaluation], results: dict[str, RunResult]
) -> dict[str, Path]:
    folder = output / "figures"
    folder.mkdir(exist_ok=True)
    figures = {name: folder / f"{name}.png" for name in ("blocks", "shares", "loss", "accuracy")}
    plan = Plan.load(Path(results[SMT.title].folder) / "plan.json")
    block_map(plan, figures["blocks"])
    projection_shares(plan, figures["shares"])
    curves = {title: read_metrics(Path(result.folder) / "metrics.jsonl") for title, result in results.items()}
    loss_curve(curves, figures["loss"])
    bars = {"before": before, **after}
    accuracy_bars(
        {title: {"word problems": one.summary.tasks[0].accuracy} for title, one in bars.items()},
        figures["accuracy"],
        title="SmolLM2-135M on held-out word problems",
    )
    return figures


def _say_next(console: Console, output: Path, figures: dict[str, Path], result: RunResult, elapsed: float) -> None:
    run = Path(result.folder)
    console.print(
        f"\nDone in {elapsed / 60:.1f} minutes.\n"
        f"The adapter, {result.trainable_parameters:,} parameters: {run}/adapter\n"
        f"Which blocks were trained: {figures['blocks']}\nThe loss: {figures['loss']}\n"
        f"Every answer: {run}/evaluation/generate/items.jsonl\n"
        "\nTry next:\n"
        f"  smtune inspect {run}\n"
        f"  smtune merge {run} {output}/merged          # a plain checkpoint, loads without smtune\n"
        f"  smtune train {run}/config.yaml method=lora output={output}/lora-again "
        f"'lora={{rank: {LORA_RANK}, target_modules: [{', '.join(LORA_TARGETS)}]}}'     # as many parameters\n"
        f"  smtune demo --compare --control --output {output}\n",
        highlight=False,
        markup=False,  # the lists in brackets
        soft_wrap=True,
    )


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not path.is_file():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(f"Expected {path} as this demo writes it. Got another: choose another --output.")
