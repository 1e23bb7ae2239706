"""A first look at the truth: SMT, LoRA, DoRA and full fine-tuning, three learning rates each, one seed, equal steps.

    python benchmarks/first_look.py MAWPS.jsonl TEST_FOLDER --output docs/results/first_look.jsonl

SmolLM2-135M learns MAWPS (LLM-Adapters' record format, free of the test questions). Every arm has the same template,
masking, rows, order and number of steps, and decodes greedily. LoRA and DoRA adapt q, k and v, as SMT
does, with as many parameters. Everything is fp32. Measured: the loss on answers of held-out rows, and accuracy on four
test sets.

One JSON line a cell, written as it is done; cells that are there are not run again. One seed and a few hundred items
decide nothing between arms that are close: this is a look, not the study.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from smtune.data import count_overlap, prepare
from smtune.evaluation import answer_loss, evaluate, load_items, resolve_tasks
from smtune.models import load_merged, load_model, load_tokenizer
from smtune.training import parse_config, train

MODEL = "smollm2-135m"
STEPS, BATCH, HELD_OUT, ITEMS = 40, 4, 69, 25
DTYPE = "float32"
TESTS = ["AddSub", "SingleEq", "MultiArith", "SVAMP"]
QKV = ["q_proj", "k_proj", "v_proj"]
RATES = {
    "smt": [3e-4, 1e-3, 3e-3],
    "lora": [3e-4, 1e-3, 3e-3],
    "dora": [3e-4, 1e-3, 3e-3],
    "full": [3e-5, 1e-4, 3e-4],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", default="0/1", help="k/n: run only every n-th cell, beginning with the k-th")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))

    raw = [json.loads(line) for line in arguments.train.read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(MODEL)
    items = [item for task in resolve_tasks(TESTS) for item in load_items(task, arguments.tests, ITEMS)]
    overlap = count_overlap([{"instruction": item.instruction} for item in items], raw)
    held_out, _ = prepare(raw[-HELD_OUT:], tokenizer, max_length=256)

    work = Path(tempfile.gettempdir()) / "smtune-first-look"
    work.mkdir(exist_ok=True)
    data = work / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in raw[:-HELD_OUT]), encoding="utf-8")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if arguments.output.is_file():
        rows = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        done = {(row["method"], row["learning_rate"]) for row in rows}
    cells = [("base", 0.0), *((method, rate) for method, rates in RATES.items() for rate in rates)]
    for number, (method, rate) in enumerate(cells):
        if (method, rate) in done or number % parts != part:
            continue
        row = run_cell(method, rate, data, work, tokenizer, items, held_out)
        row |= {"overlap": overlap, "machine": f"{platform.processor() or platform.machine()}, CPU"}
        row |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def run_cell(method, rate, data, work, tokenizer, items, held_out) -> dict:
    row: dict = {
        "method": method,
        "learning_rate": rate,
        "steps": STEPS,
        "batch_size": BATCH,
        "seed": 0,
        "dtype": DTYPE,
    }
    if method == "base":
        model = load_model(MODEL, DTYPE)
    else:
        folder = work / f"{method}-{rate:g}"
        config = parse_config(
            {
                "model": MODEL,
                "output": str(folder),
                "method": method,
                "dtype": DTYPE,
                "data": {"train": str(data), "max_length": 256},
                "smt": {"block_size": 64, "budget": 0.0084, "warmup_steps": 20},
                "lora": {"rank": 14, "target_modules": QKV},
                "training": {
                    "learning_rate": rate,
                    "max_steps": STEPS,
                    "batch_size": BATCH,
                    "warmup_ratio": 0.1,
                    "save_steps": 20,
                },
            }
        )
        result = train(config, resume=folder.exists(), console=Console(stderr=True))
        row |= {"trainable_parameters": result.trainable_parameters, "train_loss": result.loss}
        row |= {"seconds": result.seconds, "scoring_seconds": result.scoring_seconds}
        model = load_merged(str(folder), DTYPE)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    row["held_out_loss"] = answer_loss(model, tokenizer, held_out)
    evaluation = evaluate(model, tokenizer, items, model_id=f"{method} {rate:g}", batch_size=25, max_new_tokens=64)
    row["tests"] = {
        task.task: {"correct": task.correct, "items": task.n, "unparsed": task.unparsed}
        for task in evaluation.summary.tasks
    }
    row["correct"] = sum(task.correct for task in evaluation.summary.tasks)
    row["items"] = len(items)
    return row


if __name__ == "__main__":
    main()
