"""What `smtune bench` can measure: suites of series, each a floor and the cases that are paired with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from smtune.bench.arms import BUILDERS
from smtune.bench.plans import paper_share
from smtune.bench.subjects import find_subject

ARMS = list(BUILDERS)
"""The arms of a comparison, in the order of its table."""

AUTOCAST = "-autocast"
"""How arms end whose products are bf16 by autocast; they are of base weights in bf16 alone."""

SUITES = {
    "layers7b": "every arm on the layers of LLaMA-7B",
    "smollm2": "every arm on SmolLM2-135M",
    "sweeps": "time against tokens, block size, budget, depth and layers without blocks",
    "write": "blocks written at use against after the step",
    "scoring": "one batch of scoring against the floor and dense gradients",
    "kernels": "ways to compute the block gradient",
    "table1": "the paper's Table 1: means of ten iterations",
    "cost-aware": "plans held to a share of the backward's cost",
}

SWEEP_MODEL = "llama-1024x4"
SWEEP_SHARE = 1 / 2
"""Of q, k, v: enough for the blocks' part of a step to be seen in the difference of two steps."""
BUDGET_MODEL = "llama-2048x2"
"""Of the sweep of budgets: 1/32 of its matrices is still two blocks of 256²."""


@dataclass(frozen=True)
class Case:
    """One arm of a series.

    Attributes:
        name: its name within the series.
        arm: which builder makes it.
        fields: of its record, beside those of every record.
        options: for the builder; see `arms.Setting`.
    """

    name: str
    arm: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Cases of one model, dtype and batch that take turns with one floor.

    Attributes:
        kind, suite, model, dtype, tokens: of every record.
        floor: options of the floor's builder.
        block_ops: whether the time inside smtune's operators is measured too.
    """

    kind: str
    suite: str
    model: str
    dtype: str
    tokens: int
    cases: tuple[Case, ...]
    floor: dict[str, Any] = field(default_factory=dict)
    block_ops: bool = False

    def record(self, case: Case) -> dict[str, Any]:
        """The fields that are known before anything is measured."""
        return {
            "kind": self.kind,
            "suite": self.suite,
            "model": self.model,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "arm": case.arm,
            **case.fields,
        }


def is_for(arm: str, dtype: str) -> bool:
    """Whether an arm is one of base weights in this dtype."""
    return dtype == "bfloat16" or not arm.endswith(AUTOCAST)


def comparison(suite: str, model: str, dtype: str, tokens: int, arms: Sequence[str], rival: str | None) -> Series:
    """Every arm against the floor."""
    wanted = [arm for arm in arms if arm != "floor" and is_for(arm, dtype)]
    cases = [Case(arm, arm, options={"rival": rival} if arm == "appendix-a" else {}) for arm in wanted]
    return Series("arm", f"{suite}-{dtype}-{tokens}", model, dtype, tokens, tuple(cases))


def sweeps(dtype: str) -> list[Series]:
    """Five sweeps, each of one quantity with everything else fixed; equal blocks in every layer."""

    def series(sweep: str, model: str, tokens: int, values: dict[float, dict[str, Any]], **kwargs: Any) -> Series:
        cases = [
            Case(f"{sweep} {value:g}", "smt-0.84", {"sweep": sweep, "value": value}, {"share": SWEEP_SHARE} | options)
            for value, options in values.items()
        ]
        return Series("sweep", "sweep", model, dtype, tokens, tuple(cases), block_ops=True, **kwargs)

    tokens = [series("tokens", SWEEP_MODEL, number, {number: {}}) for number in (256, 512, 1024, 2048)]
    sizes: dict[float, dict[str, Any]] = {size: {"block_size": size} for size in (64, 128, 256)}
    shares: dict[float, dict[str, Any]] = {share: {"share": share} for share in _powers()}
    depths: dict[float, dict[str, Any]] = {low: {"layers": list(range(low, 4))} for low in range(4)}
    layers = [
        series("layers", f"llama-1024x{number}", 512, {number: {"layers": [number - 2, number - 1]}},
               floor={"floor_from": number - 2})
        for number in (2, 4, 6, 8)
    ]  # fmt: skip
    return [
        *tokens,
        series("block_size", SWEEP_MODEL, 512, sizes),
        series("budget", BUDGET_MODEL, 512, shares),
        series("depth", SWEEP_MODEL, 512, depths),
        *layers,
    ]


def _powers() -> list[float]:
    """1/32, 1/16, … 1."""
    return [2.0**power for power in range(-5, 1)]


def writes(model: str, dtype: str, tokens: int) -> Series:
    """The two times of writing resident blocks."""
    arms = {"at use": "smt-at-use", "after step": "smt-after-step"}
    cases = tuple(Case(when, arm, {"when": when}) for when, arm in arms.items())
    return Series("write", f"write-{dtype}-{tokens}", model, dtype, tokens, cases)


def table1(model: str, dtype: str, tokens: int) -> Series:
    """The paper's Table 1: arms of 1.26 % and full fine-tuning, without a floor."""
    equal = {"share": paper_share(1.26)}
    cases = [Case("smt-1.26", "smt-1.26"), Case("lora", "lora", options=equal), Case("dora", "dora", options=equal)]
    cases += [Case("full", "full"), Case("full-cpuadam", "full-cpuadam")]
    return Series("table1", f"table1-{dtype}-{tokens}", model, dtype, tokens, tuple(cases))


def needed_memory(series: Series, case: Case | None) -> int:
    """Bytes that a case needs, roughly, from shapes, beside the weights it shares; of the floor with them, without one.

    Activations are there one arm at a time, and counted with the floor.
    """
    subject = find_subject(series.model)
    itemsize = 4 if series.dtype == "float32" else 2
    base = subject.params * itemsize
    if case is None:
        return 2 * base + subject.activation_values(series.tokens) * itemsize + (1 << 29)
    share = {"full": 3.0, "full-autocast": 8.0, "full-cpuadam": 7.0, "control": 0.0}.get(case.arm, 0.4)
    if case.arm.startswith(("dora", "shira", "supertuning", "dense-v")):
        share = 0.6  # dense matrices of q, k, v beside the base's; measured at half the base's weights or less
    return round(base * share)
