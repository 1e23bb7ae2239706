"""Blocks beside quantised bases: what merging loses, and what a step costs, against the same model in bf16.

    python benchmarks/quantised.py --output docs/results/quantised.json

SmolLM2-135M, bf16 outside the quantised layers; 275 blocks of 64² of q, k and v at random places (0.84 % of the
parameters), the same in every base, trained for a few steps on one batch of random tokens. For every base:

- `merged`: how far the merged model's logits are from those of the adapter beside the weight, as a fraction of what
  training changed (Frobenius norms): `requantised` by `merge_and_unload`, `dequantised` by `smtune.dequantize` first,
  in bf16 and in fp32. `untrained` is what dequantising to fp32 alone changes: activations are rounded to bf16 no more,
  nor, with bitsandbytes int8, to 8 bits.
- `weights_bytes`: of the base. `kept_bytes`: what a forward leaves alive for its backward. Both counted.
- `step_seconds`: rounds in which every base takes a step, in turn; `step_ratio` compares with bf16 in the same round.

The file is written after every base and every round, and what is in it is not done again. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import smtune
from smtune.bench.arms import Arm
from smtune.bench.machine import describe, load
from smtune.bench.measure import alive_after_forward, step
from smtune.files import write_json
from smtune.models import quiet, resolve

MODEL, BLOCK_SIZE, BLOCKS = "smollm2-135m", 64, 275
BATCH, TOKENS, STEPS, LEARNING_RATE = 2, 128, 6, 3e-3


def four_bits(quant_type: str, double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def bases() -> dict[str, Any]:
    """The configuration of each base by name; None: not quantised."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    return {
        "bf16": None,
        "bitsandbytes nf4": four_bits("nf4"),
        "bitsandbytes nf4, double": four_bits("nf4", double=True),
        "bitsandbytes fp4": four_bits("fp4"),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao Int8WeightOnly": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao Float8WeightOnly": TorchAoConfig(Float8WeightOnlyConfig()),
        "torchao IntxWeightOnly int4": TorchAoConfig(
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"bases": {}}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    machine = describe(torch.get_num_threads(), "cpu")
    machine |= {package: metadata.version(package) for package in ("bitsandbytes", "torchao")}
    if record.setdefault("machine", machine) != machine:
        raise SystemExit(f"{arguments.output} is of another machine or of other versions: choose another --output.")
    record |= {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "setting": {
            "model": MODEL,
            "blocks": BLOCKS,
            "block_size": BLOCK_SIZE,
            "batch": BATCH,
            "tokens": TOKENS,
            "steps": STEPS,
            "learning_rate": LEARNING_RATE,
        },
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (BATCH, TOKENS), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    arms: dict[str, Arm] = {}
    for name, configuration in bases().items():
        row = record["bases"].setdefault(name, {"step_seconds": []})
        arms[name] = build(name, configuration, row, batch)
        write_json(arguments.output, record)
        print(name, {key: value for key, value in row.items() if key != "step_seconds"}, flush=True)
    done = min(len(row["step_seconds"]) for row in record["bases"].values())
    for round_ in range(done, arguments.rounds):
        order = [*arms][round_ % len(arms) :] + [*arms][: round_ % len(arms)]
        for name in order:
            if round_ == done:
                step(arms[name], batch)  # the first step after building is slower
        for name in order:
            record["bases"][name]["step_seconds"] = record["bases"][name]["step_seconds"][:round_]
            record["bases"][name]["step_seconds"].append(round(sum(step(arms[name], batch).values()), 4))
        for row in record["bases"].values():
            pairs = zip(row["step_seconds"], record["bases"]["bf16"]["step_seconds"])
            row["step_ratio"] = round(statistics.median(own / dense for own, dense in pairs), 3)
        record["load"] = load()
        write_json(arguments.output, record)
    for name, row in record["bases"].items():
        print(f"{name:30} step {row.get('step_ratio')} of bf16's, {row['weights_bytes'] / 1e6:.0f} MB of weights")


def build(name: str, configuration: Any, row: dict[str, Any], batch: dict[str, Tensor]) -> Arm:
    """A base with blocks, trained for a few steps; what is counted and what merging loses go into `row`."""

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve(MODEL), dtype=torch.bfloat16, quantization_config=configuration
        )
    base = model.train()
    model = copy.deepcopy(base)
    row["weights_bytes"] = weights_bytes(model)
    config = smtune.SMTConfig(
        block_size=BLOCK_SIZE, budget=BLOCKS, criterion="random", policy="global", mode="additive"
    )
    model = smtune.get_smt_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arm = Arm(name, name, model, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0), trained)
    if "change" in row and ("merged" in row or configuration is None):
        return arm
    before = logits(model, batch)
    for _ in range(STEPS):
        step(arm, batch)
    row["kept_bytes"] = alive_after_forward(arm, batch)
    beside = logits(model, batch)
    change = (beside - before).norm()
    row["change"] = round((change / before.norm()).item(), 4)
    if configuration is None:
        return arm
    state = peft.get_peft_model_state_dict(model)

    def error(dense: torch.dtype | None) -> float:
        tuned: Any = smtune.get_smt_model(copy.deepcopy(base), config)
        peft.set_peft_model_state_dict(tuned, state)
        if dense is not None:
            smtune.dequantize(tuned, dense)
        return round(((logits(tuned.merge_and_unload(), batch) - beside).norm() / change).item(), 5)

    dense_model: Any = smtune.dequantize(copy.deepcopy(base), torch.float32)
    untrained = (logits(dense_model, batch) - before).norm() / change
    row["merged"] = {
        "requantised": error(None),
        "dequantised, bf16": error(torch.bfloat16),
        "dequantised, fp32": error(torch.float32),
        "untrained": round(untrained.item(), 5),
    }
    return arm


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As the model serves, but without the packing of bitsandbytes, which rounds the scales."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        result = model(input_ids=batch["input_ids"]).logits.float()
    model.train()
    return result


def weights_bytes(model: Any) -> int:
    """Of the state dict, scales and the like included; every storage once."""
    storages = {}
    waiting = list(model.state_dict().values())
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, inner) for inner in tensor.__tensor_flatten__()[0]]
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
