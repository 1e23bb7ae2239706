"""Our option likelihood against lm-evaluation-harness's, item by item, on SmolLM2-135M in fp32.

    python benchmarks/lm_eval_agreement.py TEST_FOLDER --output docs/results/lm_eval.json

TEST_FOLDER holds `<task>.jsonl` in LLM-Adapters' format. The same items are answered by `smtune.evaluation` and, as
tasks of the harness, by `lm_eval` itself: its own tokenising, batching, log-probabilities and metrics.
`smtune.evaluation.harness.agreement` says what is compared. Needs `pip install -e '.[lm-eval]'`.

What the file holds of other tasks is kept. On one thread an item takes 1 (PIQA) to 5 seconds (HellaSwag).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from smtune.evaluation import evaluate, harness, load_items, resolve_tasks
from smtune.files import write_json
from smtune.models import fingerprint, identity, load_model, load_tokenizer

MODEL, DTYPE = "smollm2-135m", "float32"
PACKAGES = ["lm_eval", "smtune", "torch", "transformers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", type=Path)
    parser.add_argument("--tasks", default="ARC-Easy,piqa", help="with commas")
    parser.add_argument("--limit", type=int, default=200, help="items of a task")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    harness.require()
    tasks = resolve_tasks(arguments.tasks.split(","))
    items = {task.name: load_items(task, arguments.tests, arguments.limit) for task in tasks}
    model, tokenizer = load_model(MODEL, DTYPE), load_tokenizer(MODEL)
    written = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    found: dict[str, Any] = {
        "model": identity(MODEL),
        "dtype": DTYPE,
        "tasks": written.get("tasks", {}),
    }
    for name, asked in items.items():
        ours = evaluate(model, tokenizer, asked, protocol="likelihood", model_id=fingerprint(MODEL)).results
        with tempfile.TemporaryDirectory() as folder:
            task = harness.write_task(asked, folder)
            theirs = harness.run_tasks(harness.load(model, tokenizer, batch_size=16), folder, [task])[task]
        compared = harness.agreement(ours, theirs)
        found["tasks"][name] = {
            "command": f"python benchmarks/lm_eval_agreement.py TEST_FOLDER --tasks {name} --limit {arguments.limit}",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "versions": {package: metadata.version(package) for package in PACKAGES},
            "near_tie": harness.NEAR_TIE,
            "items_sha256": hashlib.sha256(" ".join(item.key for item in asked).encode()).hexdigest(),
            **compared,
        }
        write_json(arguments.output, found)
        print(f"{name}: {compared['agree']} of {compared['items']} agree, {len(compared['differ'])} differ")


if __name__ == "__main__":
    main()
