"""The cost claims of the paper (§3, Table 1, abstract), each held against what was measured.

The claims "to 0.5 %" say by how much SMT cuts a cost of full fine-tuning. What SMT can reach is the trained share of
the parameters, so two verdicts are given: whether the cost is cut to the trained share (within a tenth of it), and
whether it is at most 0.5 % at the smallest budget, 0.43 %, where that is possible at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from smtune.evaluation.statistics import Estimate
from smtune.report.benchmarks import words
from smtune.report.benchmarks.records import (
    PARTS,
    Record,
    Suite,
    above_floor,
    beyond_floor,
    get,
    median,
    of_kind,
    over,
    part_ratios,
    ran,
    ratio,
    step_ratios,
    suites,
    timed_together,
)
from smtune.report.benchmarks.targets import ABSENT, EQUAL, HOLDS, MISSED, OPEN, PART, as_trained, compare

DOES_NOT = "does not"
NOT_HERE = "not to be judged here"
"""Of claims about whole models on GPUs, of which two layers are none."""
SLACK = 1.1
"""Cut to the trained share means to at most this multiple of it."""
CLAIMED = 0.005
SMALLEST, USUAL = "smt-0.43", "smt-0.84"
TABLE1_ITERATIONS = 10


@dataclass(frozen=True)
class ShareClaim:
    """A claim that a cost of full fine-tuning is cut "to 0.5 %".

    Attributes:
        quote, source: the paper's words and where they stand.
        measure: how it was measured.
        value: SMT's cost over full fine-tuning's, of a suite and an arm.
        interval: the same with its 95 % bootstrap interval, of what is timed; the verdict is then by all of it.
    """

    quote: str
    source: str
    measure: str
    value: Callable[[Suite, str], float | None]
    interval: Callable[[Suite, str], Estimate | None] | None = None


@dataclass(frozen=True)
class ShareRow:
    """A claim "to 0.5 %" held against all suites that can judge it.

    Attributes:
        values: the measured value by suite and arm, where there is one.
        shares: the trained share likewise.
        to_share, to_claimed: HOLDS, DOES_NOT, OPEN or ABSENT.
    """

    claim: ShareClaim
    values: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float]]
    to_share: str
    to_claimed: str


# -- costs as shares of full fine-tuning's ----------------------------------------------------------------------------


def full_arm(suite: Suite) -> str:
    """Full fine-tuning with fp32 weights, as all arms train: over a model in bf16 that is the one under autocast."""
    return "full" if suite.first.get("dtype") == "float32" else "full-autocast"


def _weight_gradient_flops(suite: Suite, arm: str) -> float | None:
    full, sift = (beyond_floor(suite, name, "flops", "backward") for name in (full_arm(suite), "sift"))
    layers = suite.first.get("layers")
    if full is None or sift is None or not layers:
        return None
    # Full fine-tuning's backward also has the lowest layer's dX of q, k and v: as many FLOPs as their weight gradient,
    # which is all that SIFT has above the floor, in every layer.
    return over(beyond_floor(suite, arm, "flops", "backward"), full - sift / layers)


def _saved_of_qkv(suite: Suite, arm: str) -> float | None:
    return over(*(beyond_floor(suite, name, "saved_bytes") for name in (arm, "sift")))


def _saved_in_all(suite: Suite, arm: str) -> float | None:
    return over(*(get(suite.arms.get(name), "saved_bytes") for name in (arm, full_arm(suite))))


def _state(key: str) -> Callable[[Suite, str], float | None]:
    def value(suite: Suite, arm: str) -> float | None:
        return over(*(get(suite.arms.get(name), "state_bytes", key) for name in (arm, full_arm(suite))))

    return value


def _timed(
    of: Callable[[Record | None, str], np.ndarray], part: str
) -> tuple[Callable[[Suite, str], float | None], Callable[[Suite, str], Estimate | None]]:
    """`value` and `interval` of a part of the step: `of` an arm's record, its times by pairs."""

    def value(suite: Suite, arm: str) -> float | None:
        return over(*(median(of(suite.arms.get(name), part)) for name in (arm, full_arm(suite))))

    def interval(suite: Suite, arm: str) -> Estimate | None:
        mine, full = (suite.arms.get(name) for name in (arm, full_arm(suite)))
        return ratio(of(mine, part), of(full, part)) if timed_together(mine) and timed_together(full) else None

    return value, interval


WEIGHTS = (
    "SMT reduces the backward computation costs with respect to weight to 0.5% of those associated with Full "
    "Fine-tuning"
)
ACTIVATIONS = "SMT reduces the activation memory cost for the in forward pass to 0.5%"
GRADIENTS = "SMT reduces the memory cost of the optimizer gradients to 0.5%"
STEP = "SMT reduces the gradient step computation cost to 0.5%"

SHARE_CLAIMS = (
    ShareClaim(WEIGHTS, "§3.1", "counted FLOPs of the weight gradients", _weight_gradient_flops),
    ShareClaim(WEIGHTS, "§3.1", "time of the backward above the floor's", *_timed(above_floor, "backward")),
    ShareClaim(
        ACTIVATIONS, "§3.1", "bytes saved for the weights of q, k, v, over ordinary autograd's (SIFT's)", _saved_of_qkv
    ),
    ShareClaim(ACTIVATIONS, "§3.1", "all bytes that the forward saves", _saved_in_all),
    ShareClaim(GRADIENTS, "§3.1", "gradients' bytes", _state("gradients")),
    ShareClaim(
        "This approach significantly cuts the memory cost of the Adam optimizer to 0.5%",
        "§3.1",
        "optimizer state's bytes",
        _state("optimizer"),
    ),
    ShareClaim(STEP, "§3.1", "time of the optimizer step", *_timed(part_ratios, "optimizer")),
)


def share_rows(results: Record) -> list[ShareRow]:
    """The claims "to 0.5 %", over the suites of LLaMA-7B's layer shapes; over all suites where there are none."""
    found = suites(results)
    found = [suite for suite in found if suite.is_7b()] or found
    return [_share_row(claim, found) for claim in SHARE_CLAIMS]


def _share_row(claim: ShareClaim, found: list[Suite]) -> ShareRow:
    values: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    to_share: list[str] = []
    to_claimed: list[str] = []
    for suite in found:
        for name in (SMALLEST, USUAL):
            arm = suite.arms.get(name)
            value = claim.value(suite, name) if ran(arm) else None
            share = over(get(arm, "trained_params"), get(arm, "total_params"))
            if value is not None and share is not None:
                values.setdefault(suite.name, {})[name] = value
                shares.setdefault(suite.name, {})[name] = share
                interval = claim.interval(suite, name) if claim.interval else Estimate(value, value, value)
                to_share.append(_at_most(SLACK * share, interval))
                to_claimed += [_at_most(CLAIMED, interval)] * (name == SMALLEST)
    return ShareRow(claim, values, shares, _worst(to_share), _worst(to_claimed))


def _at_most(bound: float, interval: Estimate | None) -> str:
    """HOLDS or DOES_NOT where all of an interval is on its side of a bound."""
    if interval is None:
        return OPEN
    return HOLDS if interval.high <= bound else DOES_NOT if interval.low > bound else OPEN


def _verdict(conditions: list[bool]) -> str:
    return _worst([HOLDS if condition else DOES_NOT for condition in conditions])


def _worst(verdicts: list[str]) -> str:
    return next((verdict for verdict in (DOES_NOT, OPEN, PART, HOLDS) if verdict in verdicts), ABSENT)


# -- the other claims --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherRow:
    """A claim of another kind: its words, where they stand, where and what was measured, a verdict."""

    quote: str
    source: str
    where: str
    measured: str
    verdict: str


SPEED = "SMT achieves an 14.6× speedup compared to Full Fine-tuning and outperforms both LoRA and DoRA"
FORWARD = "the term BAx requires additional forward propagation calculation, which is cut off in SMT"
LOWER = "SMT can achieve lower memory cost than LoRA and DoRA under the same amount of trainable parameters"
CUT = "reducing the GPU memory footprint by 67% compared to FT"


def other_rows(results: Record) -> list[OtherRow]:
    """Speed, memory and forward cost, a row for every suite that can judge the claim."""
    found = [suite for suite in suites(results) if suite.is_7b()] or suites(results)
    claimed = (
        (SPEED, "§3.3", _speedup, _table1_speedups(results)),
        (SPEED, "§3.3", _faster, []),
        (FORWARD, "§3.3", _forward, []),
        (LOWER, "§3.3", _lower, []),
        (CUT, "abstract", _memory_cut, []),
    )
    rows = []
    for quote, source, judge, more in claimed:
        judged = [(suite.name, *judge(suite)) for suite in found] + more
        judged = [OtherRow(quote, source, *row) for row in judged if row[2] != ABSENT]
        rows += judged or [OtherRow(quote, source, "", "", ABSENT)]
    return rows


def _speedup(suite: Suite) -> tuple[str, str]:
    times = over(*(median(step_ratios(suite.arms.get(name))) for name in (full_arm(suite), "smt-1.26")))
    return ("", ABSENT) if times is None else _times_of_full(times)


def _times_of_full(times: float) -> tuple[str, str]:
    return f"SMT 1.26 %: {times:.2f}× as fast as full", NOT_HERE


def _table1_speedups(results: Record) -> list[tuple[str, str, str]]:
    rows = []
    for suite, arms in table1_suites(results).items():
        mine = table1_seconds(arms.get("smt-1.26"))
        for name, how in (("full", "not offloaded"), ("full-cpuadam", "DeepSpeed's CPUAdam")):
            times = over(table1_seconds(arms.get(name)), mine)
            if times is not None:
                rows.append((f"{suite}, full {how}", *_times_of_full(times)))
    return rows


def _faster(suite: Suite) -> tuple[str, str]:
    texts, verdicts = [], []
    for name, rival in (("LoRA", "lora"), ("DoRA", "dora")):
        smt, other = suite.both(USUAL, as_trained(suite, rival))
        mine, theirs = step_ratios(smt), step_ratios(other)
        if mine.size and theirs.size:
            texts.append(f"{name} takes {float(np.median(theirs) / np.median(mine)):.3f}× SMT's time")
            told = compare(smt, other)[1]
            verdicts.append(DOES_NOT if told == MISSED else told)
    if len(verdicts) < 2 and HOLDS in verdicts:
        return f"{texts[0]}; the other was not measured", PART
    return "; ".join(texts), _worst(verdicts)


def _forward(suite: Suite) -> tuple[str, str]:
    mine, lora = (beyond_floor(suite, name, "flops", "forward") for name in (USUAL, "lora"))
    if mine is None or lora is None:
        return "", ABSENT
    return f"FLOPs beyond the frozen forward: SMT {mine:,}, LoRA {lora:,}", _verdict([mine == 0 < lora])


def _lower(suite: Suite) -> tuple[str, str]:
    texts, lower = [], []
    measured = {
        name for equal in EQUAL.values() for name, arm in equal.items() if ran(suite.arms.get(as_trained(suite, arm)))
    }
    for smt, equal in EQUAL.items():
        arms = {"SMT": smt, **{name: as_trained(suite, arm) for name, arm in equal.items()}}
        peaks = {name: peak for name, arm in arms.items() if (peak := get(suite.arms.get(arm), "peak_tensor_bytes"))}
        if "SMT" in peaks and len(peaks) > 1:
            budget = words.arm(smt).removeprefix("SMT ")
            texts.append(f"{budget}: " + ", ".join(f"{name} {words.size(peak)}" for name, peak in peaks.items()))
            lower += [peaks["SMT"] < peak for name, peak in peaks.items() if name != "SMT"]
    if not texts:
        return "", ABSENT
    verdict = _verdict(lower)
    in_part = verdict == HOLDS and measured < {"LoRA", "DoRA"}
    return f"counted peak at {'; at '.join(texts)}", PART if in_part else verdict


def _memory_cut(suite: Suite) -> tuple[str, str]:
    kept = over(*(get(suite.arms.get(name), "peak_tensor_bytes") for name in (USUAL, full_arm(suite))))
    if kept is None:
        return "", ABSENT
    return f"by {words.percent(1 - kept)} (counted peak)", NOT_HERE


def table1_suites(results: Record) -> dict[str, dict[str, Record]]:
    """The "table1" records by suite, then by arm."""
    found: dict[str, dict[str, Record]] = {}
    for record in of_kind(results, "table1"):
        found.setdefault(record.get("suite") or "table1", {})[record.get("arm", "")] = record
    return found


def table1_seconds(record: Record | None) -> float | None:
    """Mean seconds of a step by the paper's protocol; None where the arm has no times."""
    parts = [get(record, f"{part}_s") for part in PARTS]
    if not ran(record) or not all(parts):
        return None
    return sum(float(np.mean(part)) for part in parts)
