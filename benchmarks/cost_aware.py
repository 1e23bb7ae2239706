"""What cost-aware selection loses: plans held to a part of the backward's cost, trained alike and compared.

    python benchmarks/cost_aware.py --output docs/results/cost_aware.jsonl

SmolLM2-135M learns the demo's word problems. For each seed the blocks are scored once; from these scores one plan is
selected for each `max_backward_cost`, with the same budget of parameters, and trained on the same rows in the same
order for the same steps. Measured: the loss on answers of held-out problems, accuracy on the test problems, and the
share of the score that the plan keeps. The cost is counted, not timed: a fraction of the whole chain of dX products.

One JSON line a cell, written as it is done; cells that are there, of as many steps and items, are not run again. A few
seeds and 200 problems decide nothing between plans that are close.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import smtune
from smtune.cli.demo import BLOCK_SIZE, BUDGET, MODEL, SMT
from smtune.data import Collator, arithmetic, batches, prepare
from smtune.evaluation import answer_loss, evaluate, load_items, resolve_tasks
from smtune.files import write_json
from smtune.models import load_merged, load_model, load_tokenizer
from smtune.scoring import Scores
from smtune.training import parse_config, train
from smtune.tuner.targets import count_parameters

LIMITS = [1.0, 0.75, 0.5, 0.25]
STEPS, BATCH, SCORING_BATCHES, HELD_OUT, ITEMS = 40, 4, 10, 92, 200
MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--items", type=int, default=ITEMS)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--into", type=Path, help="a result of `smtune bench` whose page shall show these rows too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    tokenizer = load_tokenizer(MODEL)
    items = load_items(resolve_tasks(["arithmetic"])[0], None, arguments.items)
    held_out, _ = prepare(arithmetic(HELD_OUT, split="test"), tokenizer, max_length=MAX_LENGTH)
    work = Path(tempfile.gettempdir()) / "smtune-cost-aware"
    work.mkdir(exist_ok=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if arguments.output.is_file():
        rows = rows_of(arguments.output, arguments.steps, arguments.items)
        done = {(row["seed"], row["max_backward_cost"]) for row in rows}

    scores: dict[int, tuple[Scores, int]] = {}
    cells = [(None, None), *((seed, limit) for seed in range(arguments.seeds) for limit in LIMITS)]
    for seed, limit in cells:
        if (seed, limit) in done:
            continue
        row: dict[str, Any] = {"seed": seed, "max_backward_cost": limit}
        if seed is None or limit is None:
            model = load_model(MODEL, "float32")
        else:
            records = arithmetic(BATCH * arguments.steps, seed=seed)
            if seed not in scores:
                scores[seed] = score(records, tokenizer, seed)
            row |= {
                "steps": arguments.steps,
                "batch_size": BATCH,
                "learning_rate": SMT.learning_rate,
                "dtype": "float32",
            }
            model = run_cell(row, records, *scores[seed], work / f"{seed}-{limit:g}-{arguments.steps}")
        row["held_out_loss"] = answer_loss(model, tokenizer, held_out)
        name = f"seed {seed}, cost {limit}"
        (task,) = evaluate(model, tokenizer, items, model_id=name, batch_size=25, max_new_tokens=64).summary.tasks
        row |= {"right": task.correct, "of": task.n, "unparsed": task.unparsed}
        row |= {"interval": [task.accuracy.low, task.accuracy.high]}
        row |= {"machine": f"{platform.processor() or platform.machine()}, CPU", "threads": torch.get_num_threads()}
        row |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    if arguments.into is not None:
        put_into(arguments.into, rows_of(arguments.output, arguments.steps, arguments.items))


def rows_of(path: Path, steps: int, items: int) -> list[dict[str, Any]]:
    """The cells of these steps and items; the untuned model has no steps."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row.get("steps") in (None, steps) and row["of"] == items]


def put_into(results: Path, cells: list[dict[str, Any]]) -> None:
    """The trained cells as `quality` of a result of `smtune bench`."""
    values = json.loads(results.read_text(encoding="utf-8"))
    values["quality"] = [cell for cell in cells if cell["max_backward_cost"] is not None]
    write_json(results, values)


def score(records: list[dict[str, str]], tokenizer, seed: int) -> tuple[Scores, int]:
    """The scores from batches of the training rows, and the number of the model's parameters."""
    model = load_model(MODEL, "float32")
    rows, _ = prepare(records, tokenizer, max_length=MAX_LENGTH)
    warmup = batches(rows, Collator(tokenizer.pad_token_id), BATCH, seed=seed, n=SCORING_BATCHES)
    config = smtune.SMTConfig(block_size=BLOCK_SIZE, policy="global", warmup_steps=SCORING_BATCHES)
    return smtune.score_blocks(model, warmup, config), count_parameters(model)


def run_cell(row: dict[str, Any], records: list[dict[str, str]], scores: Scores, total: int, folder: Path):
    """Select within the row's limit, train, and return the merged model; what is known of both goes into the row."""
    limit = row["max_backward_cost"]
    config = smtune.SMTConfig(block_size=BLOCK_SIZE, budget=BUDGET, policy="global", max_backward_cost=limit)
    plan = smtune.select_blocks(scores, config, total)
    plan_file, data = (folder.parent / f"{folder.name}{end}" for end in (".plan.json", ".jsonl"))
    plan.save(plan_file)
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    training = {"learning_rate": row["learning_rate"], "max_steps": row["steps"], "batch_size": BATCH}
    run = parse_config(
        {
            "model": MODEL,
            "output": str(folder),
            "method": "smt",
            "data": {"train": str(data), "max_length": MAX_LENGTH},
            "smt": {"plan": str(plan_file)},
            "training": {**training, "seed": row["seed"]},
        }
    )
    result = train(run, resume=folder.exists(), console=Console(stderr=True))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    row |= {"backward_cost": plan.backward_cost, "score_kept": plan.score_kept, "blocks": plan.n_blocks}
    row |= {"trainable_parameters": result.trainable_parameters, "train_loss": result.loss}
    return load_merged(str(folder), "float32")


if __name__ == "__main__":
    main()
