"""Questions of their own kind: what scoring costs, which kernel, the paper's Table 1, plans held to a backward cost."""

from __future__ import annotations

from typing import Any

from smtune.bench import machine
from smtune.bench.measure import PHASES
from smtune.bench.process import Child, ChildError
from smtune.bench.results import Results
from smtune.bench.run import WARMUPS, How, build, run_series
from smtune.bench.suites import Case, Series

ITERATIONS = 10
"""Of our Table 1, after `WARMUPS`. The paper's (§3.3) averages every 10 of 1,000, after 500."""


def run_table1(series: Series, results: Results, how: How) -> None:
    """Each arm alone, without a floor: seconds by phase of 10 iterations after a warm-up."""
    for case in series.cases:
        record = series.record(case)
        if results.has(record):
            continue
        before = machine.load()
        try:
            with Child(how.threads) as child:
                how.say(f"{series.suite}: {case.name}: building")
                built = build(child, series, case, how)
                for number in range(WARMUPS):
                    how.say(f"{series.suite}: {case.name}: warm-up {number + 1} of {WARMUPS}")
                    child.ask("step")
                steps = []
                for number in range(ITERATIONS):
                    how.say(f"{series.suite}: {case.name}: iteration {number + 1} of {ITERATIONS}")
                    steps.append(child.ask("step"))
        except ChildError as error:
            record |= {"label": case.name, "iterations": ITERATIONS, "error": str(error)}
        else:
            record |= built | {"iterations": ITERATIONS, "error": None}
            record |= {f"{phase}_s": [step[phase] for step in steps] for phase in PHASES}
            record["trained_fraction"] = built["trained_params"] / built["total_params"]
        _keep(record | {"load": [before, machine.load()]}, results, how)


def run_scoring(model: str, dtype: str, tokens: int, results: Results, how: How) -> None:
    """One warm-up batch by every criterion and accumulator, against the floor and the floor with dense gradients."""
    for criterion, accumulator in SCORING:
        if accumulator == "cpu" and how.device == "cpu":
            continue
        record: dict[str, Any] = {"kind": "scoring", "suite": f"scoring-{dtype}-{tokens}", "model": model}
        record |= {"dtype": dtype, "tokens": tokens, "criterion": criterion, "accumulator": accumulator}
        if results.has(record):
            continue
        before = machine.load()
        try:
            with Child(how.threads) as child:
                how.say(f"{record['suite']}: {criterion}, {accumulator}")
                record |= child.ask(
                    "scoring",
                    model=model,
                    dtype=dtype,
                    tokens=tokens,
                    device=how.device,
                    threads=how.threads,
                    criterion=criterion,
                    accumulator=accumulator,
                    rounds=how.rounds,
                )
                record["error"] = None
        except ChildError as error:
            record["error"] = str(error)
        _keep(record | {"load": [before, machine.load()]}, results, how)


SCORING = (
    ("abs_of_sum", "float32"),
    ("abs_of_sum", "bfloat16"),
    ("abs_of_sum", "cpu"),
    ("net", "float32"),
    ("sum_of_abs", "float32"),
    ("fisher", "float32"),
)
"""(criterion, accumulator): the accumulator's dtype, or "cpu" for one kept there."""

KERNEL_SHAPES = ((4096, 256, 9), (4096, 256, 53), (4096, 128, 36), (4096, 64, 144))
"""(features, block size, blocks) of an (O, O) weight: LLaMA-7B's q, k or v at 0.84 and 4.91 %, and smaller blocks."""


def run_kernels(dtype: str, tokens: int, results: Results, how: How) -> None:
    """The candidates of every shape, in turn with each other and with the dense product."""
    for features, block_size, blocks in KERNEL_SHAPES:
        shape = {"dtype": dtype, "tokens": tokens, "features": features, "block_size": block_size, "blocks": blocks}
        base = {"kind": "kernel", "suite": f"kernels-{dtype}-{tokens}", "device": how.device, **shape}
        with Child(how.threads) as child:
            candidates = child.ask("candidates", dtype=dtype, device=how.device, threads=how.threads)
            if all(results.has(base | {"candidate": name}) for name in candidates):
                continue
            how.say(f"{base['suite']}: {blocks} blocks of {block_size}²")
            before = machine.load()
            try:
                found = child.ask("kernels", candidates=candidates, rounds=how.rounds, device=how.device, **shape)
            except ChildError as error:
                found = {name: {"error": str(error)} for name in candidates}
            for name in candidates:
                record = base | {"candidate": name} | found[name] | {"load": [before, machine.load()]}
                _keep(record, results, how)


LIMITS = (1.0, 0.75, 0.5, 0.25)
COST_MODEL, COST_TOKENS = "smollm2-135m", 512


def run_cost_aware(dtype: str, results: Results, how: How) -> None:
    """Plans of SmolLM2-135M held to shares of the backward's cost, scored on real text, against the whole floor."""
    series = Series("cost_aware", f"cost-aware-{dtype}", COST_MODEL, dtype, COST_TOKENS, ())
    empty = [Case(f"cost {limit:g}", "smt-0.84", {"max_backward_cost": limit}) for limit in LIMITS]
    if all(results.has(series.record(case)) for case in empty):
        return
    how.say(f"{series.suite}: scoring")
    with Child(how.threads) as child:
        planned = child.ask("plans", model=COST_MODEL, limits=LIMITS, threads=how.threads)
    cases = [
        Case(case.name, case.arm, case.fields | found["fields"], {"plan": found["plan"]})
        for case, found in zip(empty, planned)
    ]
    run_series(
        Series(series.kind, series.suite, COST_MODEL, dtype, COST_TOKENS, tuple(cases), block_ops=True), results, how
    )


def _keep(record: dict[str, Any], results: Results, how: How) -> None:
    results.add(record)
    what = record.get("label") or record.get("candidate") or f"{record.get('criterion')}, {record.get('accumulator')}"
    how.tell(f"{record['suite']}: {what}" + (f": cannot run: {record['error']}" if record["error"] else ": done"))
