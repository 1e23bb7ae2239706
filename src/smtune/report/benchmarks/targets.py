"""What was promised and what was measured: every target a row, its verdict computed from the records.

A target without a record stays as *not measured*. Comparisons of two arms are three-valued: the 95 % bootstrap
interval of the difference of medians decides, or does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smtune.bench.suites import ARMS, AUTOCAST, is_for
from smtune.evaluation.statistics import Estimate
from smtune.report.benchmarks import sweeps, words
from smtune.report.benchmarks.records import (
    Record,
    Suite,
    beyond_floor,
    difference,
    get,
    label,
    median_interval,
    minus,
    of_floor,
    of_kind,
    over,
    process,
    ran,
    step_ratios,
    suites,
    timed_together,
)

HOLDS, MISSED, OPEN, ABSENT, NO_TARGET = "holds", "missed", "not told apart", "not measured", "no target here"
PART = "holds in part"
"""Of a row of several comparisons: no one is against it, and some were not measured."""

STEP_TARGETS = {"smt-0.84": 1.02, "smt-4.91": 1.06}
STEP_TOKENS = 1024
"""The step targets are for the layer shapes of LLaMA-7B and at least so many tokens."""
RIVALS = {
    "smt-0.84": {
        "lora": "LoRA",
        "lora-all": "LoRA on all linear layers",
        "dora": "DoRA",
        "shira": "SHiRA",
        "supertuning": "Super-tuning",
        "full": "full",
        "lora-autocast": "LoRA under autocast",
        "dora-autocast": "DoRA under autocast",
        "full-autocast": "full under autocast",
    },
    "smt-4.91": {
        "lora-4.91": "LoRA 4.91 %",
        "dora-4.91": "DoRA 4.91 %",
        "shira-4.91": "SHiRA 4.91 %",
        "supertuning-4.91": "Super-tuning 4.91 %",
        "full": "full",
        "lora-4.91-autocast": "LoRA 4.91 % under autocast",
        "full-autocast": "full under autocast",
    },
}
"""By arm of SMT, who has to be slower, and the name it has there. Those under autocast are of bf16 alone."""
SMALLER = {"smt-4.91": {"dora": "DoRA 0.84 %", "shira": "SHiRA 0.84 %", "supertuning": "Super-tuning 0.84 %"}}
"""Likewise, of a sixth of the parameters."""
OTHERS = {
    "smt-0.84": {"sift": "SIFT", "dense-v": "dense v_proj", "appendix-a": "the paper's listing"},
    "smt-4.91": {"dense-v": "dense v_proj"},
}
"""Who is compared without a target: of equal parameters, of a weaker contract, and a dense v_proj, which trains five
times as much as SMT 0.84 % and, on SmolLM2, as much as SMT 4.91 %."""
FULL = ("full", "full-autocast")
"""Full fine-tuning; over bf16 the first has bf16 weights and states."""
EQUAL = {"smt-0.84": {"LoRA": "lora", "DoRA": "dora"}, "smt-4.91": {"LoRA": "lora-4.91", "DoRA": "dora-4.91"}}
"""By arm of SMT, adapters that train as many parameters; `as_trained` says how they are run."""
ADDITIVE = {"smt-0.84": "smt-additive", "smt-4.91": "smt-additive-4.91"}
"""By arm of SMT, which is resident, the same in the additive mode."""
RESIDENT = ("smt-0.43", "smt-0.84", "smt-1.26", "smt-2.5", "smt-3.73", "smt-4.91")
ACROSS = 0.1
"""Of the floor's step: arms of two processes are told apart beyond it; equal ones differ by up to it (ADR 0021)."""
TIMED_APART, TWO_PROCESSES = ", timed apart", ", of two processes"
PROCESS_PEAK = "the process's peak memory at or below LoRA's of equal parameters"
CONTROL = 0.01
"""A second floor's median step is at most so far from the floor's."""
FAR_BELOW = 0.5
"""Peak memory "far below" full fine-tuning's is at most this share of it."""
MILLISECONDS = 0.1
"""A switch "in milliseconds" takes less than this many seconds."""
SCORING = 1.05
STATE = {"trained": 4, "gradients": 4, "optimizer": 8}
"""Bytes of state a trained parameter, by the contract; its original has the base's itemsize, or 2 if those hold it."""
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
HALF_RATE = 0.5


@dataclass(frozen=True)
class Row:
    """One target.

    Attributes:
        group: what it is about, as the page explains.
        what: is promised, with its target.
        where: suite or sweep; "" where none was measured.
        measured: in words.
        verdict: HOLDS, MISSED, OPEN, ABSENT or NO_TARGET.
    """

    group: str
    what: str
    where: str
    measured: str
    verdict: str


def targets(results: Record) -> list[Row]:
    """All target rows, those that nothing was measured for included."""
    found = suites(results)
    has_gpu = bool(get(results, "machine", "gpu"))  # whose memory the process's is not
    return [
        *_each(found, "control", f"a second floor among the arms: step / floor 1 to within {CONTROL}", _control),
        *_step(found),
        *_below_rivals(found),
        *_others(found),
        *_each(found, "2", "FLOPs = floor's + 2·(block parameters)·N, exactly", _flops),
        *_each(found, "2", "bytes saved beyond the floor = N·(used columns)·itemsize, exactly", _saved),
        *_each(
            found,
            "design",
            "bytes per trained parameter: delta 4 + gradient 4 + Adam 8 + original at most one item",
            _state,
        ),
        *_each(found, "3", "counted peak memory at or below LoRA's of equal parameters", _peak_counted),
        *_each(
            found,
            "3",
            "counted peak beyond the floor's = index + deltas + originals + Adam + what is saved, to the byte",
            _gap,
        ),
        *([] if has_gpu else _each(found, "3", PROCESS_PEAK, _peak_process)),
        *_each(found, "3", f"counted peak memory at most {words.percent(FAR_BELOW, 0)} of full's", _peak_full),
        *_growth(results),
        *_cost_aware(results),
        *_each(
            [suite for suite in found if _embedded(suite)],
            "7",
            f"adapter switch below {words.milliseconds(MILLISECONDS)}",
            _switch,
        ),
        *_each(found, "7", "merge and unmerge give the base back bit for bit", _exact),
        *_scoring(results),
        *_kernels(results),
    ]


REASONS = {
    ": step / floor at most": """Blocks are written into W in the forward and again in the backward, and AdamW goes
        over 16 bytes a trained parameter: memory traffic, which weighs more where products are fast beside it.""",
    "%: step below LoRA": """On a small model what a layer does beside its products, mostly in Python, weighs as
        much as they; the log has SMT's and LoRA's.""",
    "%: step below DoRA 0.84 %": """It trains six times the parameters of the rivals of 0.84 %.""",
    "counted peak memory at or below LoRA's": """The resident mode keeps a copy of the base's blocks, 2 bytes a trained
        parameter, to give the base back bit for bit; LoRA needs none, and its saved activations grow with tokens and
        not with rank. The additive mode keeps no copy.""",
    "of full's": """The activations of a small model outweigh its weights, and those the floor has too.""",
    "the process's peak memory": """As the counted peak, which has no noise.""",
    "above the floor against tokens": """Writing the blocks and AdamW do not depend on tokens: with few of them they are
        most of what SMT adds. The block operators alone grow linearly.""",
    "best of the measured layouts": """One layout is used for a block size and dtype, chosen on another day or
        processor; the log has the figures.""",
    "of the dense rate or more": """A product of 64² or 128² per block leaves units for bf16 products idle, and gathers
        as much as it multiplies; the log lists the layouts that were tried.""",
}
"""By a part of a target's words, why it is missed where it is."""
OPEN_REASONS = {
    "step below": """The steps of arms that are not told apart differ by less than the noise of as many pairs, or were
        timed apart or in two processes, which tells little. More pairs would tell.""",
}
"""Likewise why it is not told apart."""


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why targets are missed or not told apart, for those that are."""
    reasons = []
    for verdict, of_verdict in ((MISSED, REASONS), (OPEN, OPEN_REASONS)):
        found = [row.what for row in rows if row.verdict == verdict]
        for part, why in of_verdict.items():
            of = next((what for what in found if part in what), None)
            reasons += [f"*{of}*: {' '.join(why.split())}"] if of else []
    return reasons


def worst(verdicts: Iterable[str]) -> str:
    """The verdict of a row that several comparisons make up; those not measured do not count."""
    found = set(verdicts)
    return next((verdict for verdict in (MISSED, OPEN, PART, HOLDS) if verdict in found), ABSENT)


def compare(a: Record | None, b: Record | None) -> tuple[Estimate | None, str]:
    """Whether arm a's step is below arm b's: the difference of median step ratios, and a verdict.

    Arms that took turns in one process are told apart by the interval alone, those of two by one beyond `ACROSS`, and
    what was not timed together with its floor not at all.
    """
    if not step_ratios(a).size or not step_ratios(b).size:
        return None, ABSENT
    found = difference(step_ratios(a), step_ratios(b))
    apart = how_apart(a, b)
    return found, OPEN if apart == TIMED_APART else _below(found, 0, ACROSS if apart else 0.0)


def against(suite: Suite, name: str, rival: str) -> tuple[Estimate | None, str]:
    """`compare` of two arms of a suite; *no target here* of a rival that is none in its dtype."""
    if not is_for(rival, suite.first.get("dtype", "")):
        return None, NO_TARGET
    return compare(*suite.both(name, rival))


def as_trained(suite: Suite, name: str) -> str:
    """An arm of LoRA or DoRA as Hugging Face's Trainer runs it beside weights in bf16: under autocast.

    Itself where there is no such arm.
    """
    under = f"{name}{AUTOCAST}"
    return under if suite.first.get("dtype") == "bfloat16" and under in ARMS else name


def how_apart(a: Record | None, b: Record | None) -> str:
    """What keeps two arms that were timed from being compared as they are, or ""."""
    if not all(step_ratios(arm).size for arm in (a, b)):
        return ""
    if not (timed_together(a) and timed_together(b)):
        return TIMED_APART
    return "" if a and b and process(a) == process(b) else TWO_PROCESSES


def _below(interval: Estimate | None, bound: float, margin: float = 0.0) -> str:
    """Whether an interval is below a bound, by a margin, with all it holds; without one nothing can be told."""
    if interval is None:
        return OPEN
    return HOLDS if interval.high < bound - margin else MISSED if interval.low > bound + margin else OPEN


def _holds(condition: bool) -> str:
    return HOLDS if condition else MISSED


def _each(found: list[Suite], group: str, what: str, judge: Callable[[Suite], tuple[str, str]]) -> list[Row]:
    """A row for every suite that `judge` finds something in; if there is none, one row that says so."""
    judged = [(suite, *judge(suite)) for suite in found]
    rows = [Row(group, what, suite.name, text, verdict) for suite, text, verdict in judged if verdict != ABSENT]
    return rows or [Row(group, what, "", "", ABSENT)]


def _joined(parts: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """(text, verdict) of several comparisons by name."""
    return "; ".join(f"{name} {text}" for name, (text, _) in parts.items()), worst(v for _, v in parts.values())


# -- The method itself -----------------------------------------------------------------------------------------------


def _control(suite: Suite) -> tuple[str, str]:
    """Of every group of arms that was timed together with a second floor."""
    groups = dict.fromkeys(tuple(arm["control"]) for of in suite.turns for arm in of.values() if arm.get("control"))
    ratios = [np.array(group) for group in groups] or [step_ratios(suite.arms.get("control"))]
    judged = [_median(group)[1:] for group in ratios if group.size]
    verdicts = [_within(interval, 1 - CONTROL, 1 + CONTROL) for interval, _ in judged]
    return "; ".join(text for _, text in judged), worst(verdicts)


# -- 1: step time ----------------------------------------------------------------------------------------------------


def _step(found: list[Suite]) -> list[Row]:
    rows = []
    for name, target in STEP_TARGETS.items():
        what = f"{words.arm(name)}: step / floor at most {target}"
        measured = [suite for suite in found if step_ratios(suite.arms.get(name)).size]
        if not any(suite.is_7b(STEP_TOKENS) for suite in measured):
            rows.append(Row("1", what, "", "", ABSENT))
        for suite in measured:
            ratios = step_ratios(suite.arms[name])
            if suite.is_7b(STEP_TOKENS) and not timed_together(suite.arms[name]):
                rows.append(Row("1", what, suite.name, f"{_median(ratios)[2]}, timed apart from its floor", OPEN))
            elif suite.is_7b(STEP_TOKENS):
                rows.append(Row("1", what, suite.name, *_at_most(target, ratios)))
            else:
                rows.append(Row("1", what, suite.name, _median(ratios)[2], NO_TARGET))
    return rows


def _at_most(target: float, ratios: np.ndarray) -> tuple[str, str]:
    """The median in words, and whether it is at most the target."""
    value, interval, text = _median(ratios)
    if interval is not None and interval.low <= target < interval.high:
        text += ", the target is within the interval"
    return text, _holds(value <= target)


def _median(ratios: np.ndarray) -> tuple[float, Estimate | None, str]:
    """The median, its interval where there are values enough for one, and both in words."""
    value, interval = float(np.median(ratios)), median_interval(ratios)
    bounds = f"95 %: {words.interval(interval)}" if interval else f"no interval of {len(ratios)} values"
    return value, interval, f"{words.ratio(value)} ({bounds})"


def _below_rivals(found: list[Suite]) -> list[Row]:
    rows = []
    for name, rivals in (*RIVALS.items(), *SMALLER.items()):
        judged = []
        for suite in found:
            told = {shown: against(suite, name, rival)[1] for rival, shown in rivals.items()}
            verdicts = {shown: verdict for shown, verdict in told.items() if verdict != NO_TARGET}
            overall = worst(verdicts.values())
            if overall == HOLDS and ABSENT in verdicts.values():
                overall = PART
            if overall != ABSENT:
                judged.append(Row("1", _step_below(name, verdicts), suite.name, _by_verdict(verdicts), overall))
        rows += judged or [Row("1", _step_below(name, rivals.values()), "", "", ABSENT)]
    return rows


def _step_below(name: str, rivals: Iterable[str]) -> str:
    return f"{words.arm(name)}: step below {', '.join(rivals)}"


def _by_verdict(verdicts: Mapping[str, str]) -> str:
    """ "holds: LoRA, DoRA; not measured: full", from verdicts by name."""
    named = {v: [name for name, verdict in verdicts.items() if verdict == v] for v in verdicts.values()}
    order = [verdict for verdict in (MISSED, OPEN, HOLDS, ABSENT) if verdict in named]
    return "; ".join(f"{verdict}: {', '.join(named[verdict])}" for verdict in order)


def _others(found: list[Suite]) -> list[Row]:
    """SMT against what no target is about."""

    def judge(suite: Suite) -> tuple[str, str]:
        verdicts = {shown: against(suite, name, other)[1] for other, shown in others.items()}
        return _by_verdict(verdicts), ABSENT if worst(verdicts.values()) == ABSENT else NO_TARGET

    rows = []
    for name, others in OTHERS.items():
        what = f"{words.arm(name)} against {', '.join(others.values())}: a step below theirs"
        rows += [row for row in _each(found, "others", what, judge) if row.verdict != ABSENT]
    return rows


# -- the design's counts ---------------------------------------------------------------------------------------------


def _resident(suite: Suite) -> dict[str, Record]:
    return {name: suite.arms[name] for name in RESIDENT if ran(suite.arms.get(name))}


def _flops(suite: Suite) -> tuple[str, str]:
    parts = {}
    for name, arm in _resident(suite).items():
        over = [beyond_floor(suite, name, "flops", part) for part in ("forward", "backward")]
        params, tokens = arm.get("trained_params"), arm.get("tokens")
        if None in over or params is None or tokens is None:
            continue
        promised = 2 * params * tokens
        if over == [0, promised]:
            parts[words.arm(name)] = ("exact", HOLDS)
        else:
            parts[words.arm(name)] = (f"off by {over[0]:+,} forward, {over[1] - promised:+,} backward", MISSED)
    return _all_alike(parts)


def _saved(suite: Suite) -> tuple[str, str]:
    parts = {}
    for name, arm in _resident(suite).items():
        saved = beyond_floor(suite, name, "saved_bytes")
        columns, tokens, itemsize = arm.get("used_columns"), arm.get("tokens"), ITEMSIZE.get(arm.get("dtype", ""))
        if saved is None or columns is None or tokens is None or itemsize is None:
            continue
        promised = columns * tokens * itemsize
        off = f"{words.size(saved)}, {saved - promised:+,} bytes"
        parts[words.arm(name)] = ("exact", HOLDS) if saved == promised else (off, MISSED)
    return _all_alike(parts)


def _state(suite: Suite) -> tuple[str, str]:
    parts = {}
    for name, arm in _resident(suite).items():
        state, params = arm.get("state_bytes") or {}, arm.get("trained_params")
        itemsize = ITEMSIZE.get(arm.get("dtype", ""))
        keys = [*STATE, "originals"]
        if not params or itemsize is None or not state.keys() >= set(keys):
            continue
        more = {key: state[key] - STATE[key] * params for key in STATE}
        # AdamW also counts its steps: 4 bytes a tensor, of which there are no more than blocks.
        exact = 0 <= more.pop("optimizer") <= 4 * (arm.get("blocks") or 0) and not any(more.values())
        exact = exact and state["originals"] in (2 * params, itemsize * params)
        parts[words.arm(name)] = (" + ".join(f"{state[key] / params:.2f}" for key in keys), _holds(exact))
    return _all_alike(parts)


def _all_alike(parts: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """As `_joined`, in short where all say the same."""
    if len({text for text, _ in parts.values()}) == 1 and len(parts) > 1:
        text, verdict = next(iter(parts.values()))
        return f"{text} in all {len(parts)} budgets", verdict
    return _joined(parts)


# -- 3: memory -------------------------------------------------------------------------------------------------------


def _below_lora(suite: Suite, key: str, noise: float | None = None) -> tuple[str, str]:
    """SMT against LoRA; what differs by at most `noise` bytes is not told apart. None: what is counted has none."""
    parts = {}
    for smt, equal in EQUAL.items():
        lora = as_trained(suite, equal["LoRA"])
        mine, theirs = (get(suite.arms.get(arm), key) for arm in (smt, lora))
        if mine and not theirs:
            parts[words.arm(smt)] = (f"{words.size(mine)}, its rival is not measured", PART)
        if mine and theirs:
            text = f"{words.size(mine)} against {words.size(theirs)} ({words.signed_size(mine - theirs)})"
            is_told = noise is None or abs(mine - theirs) > noise
            verdict = _holds(mine <= theirs) if is_told else OPEN
            parts[words.arm(smt)] = (text, verdict)
    return _joined(parts)


def _peak_counted(suite: Suite) -> tuple[str, str]:
    """Of the resident mode, which is the default; where it misses, the additive one is named too: it keeps no copy."""
    text, verdict = _below_lora(suite, "peak_tensor_bytes")
    for resident, additive in ADDITIVE.items():
        lora = as_trained(suite, EQUAL[resident]["LoRA"])
        peaks = [get(suite.arms.get(arm), "peak_tensor_bytes") for arm in (resident, additive, lora)]
        if all(peaks) and peaks[0] > peaks[2]:
            text += f"; {label(suite.arms[additive])} {words.size(peaks[1])} ({words.signed_size(peaks[1] - peaks[2])})"
    return text, verdict


def _peak_process(suite: Suite) -> tuple[str, str]:
    """One sample each: what a suite's floors differ by, in all its runs, tells nothing; without two nothing tells."""
    of_runs = [arm.get("floor_peak_rss_bytes") for turns in suite.turns for arm in turns.values()]
    own = [get(suite.arms.get(name), "peak_rss_bytes") for name in ("floor", "control")]
    floors = {peak for peak in (*own, *of_runs) if peak}
    noise = max(floors) - min(floors) if len(floors) > 1 else math.inf
    text, verdict = _below_lora(suite, "peak_rss_bytes", noise)
    known = "no second floor" if noise == math.inf else f"{len(floors)} floors differ by up to {words.size(noise)}"
    return (f"{text}; {known}" if text else text), verdict


AT_PEAK = ("buffers", "trained", "originals", "optimizer", "saved")
"""Of `memory_parts`, those that are there at SMT's peak: at the loss, before the first gradient of a block."""


def _gap(suite: Suite) -> tuple[str, str]:
    parts = {}
    for name, arm in _resident(suite).items():
        gap = beyond_floor(suite, name, "peak_tensor_bytes")
        if gap is not None and arm.get("state_bytes"):
            found = memory_parts(suite, name, arm)
            off = gap - sum(found[part] for part in AT_PEAK)
            parts[words.arm(name)] = ("exact", HOLDS) if off == 0 else (f"off by {off:+,} bytes", MISSED)
    return _all_alike(parts)


def memory_parts(suite: Suite, name: str, arm: Record) -> dict[str, float]:
    """Bytes beyond the floor's by what they are for."""
    state = arm.get("state_bytes") or {}
    buffers = minus(state.get("base"), of_floor(arm, suite.floor, "state_bytes", "base"))
    return {
        "buffers": buffers or 0,
        **{key: state.get(key) or 0 for key in ("trained", "originals", "gradients", "optimizer")},
        "saved": beyond_floor(suite, name, "saved_bytes") or 0,
    }


def _peak_full(suite: Suite) -> tuple[str, str]:
    parts = {}
    for rival in FULL:
        full = get(suite.arms.get(rival), "peak_tensor_bytes")
        of = "" if rival == "full" else ", under autocast"
        for name in STEP_TARGETS:
            mine = get(suite.arms.get(name), "peak_tensor_bytes")
            if mine and full:
                parts[words.arm(name) + of] = (words.percent(mine / full), _holds(mine <= FAR_BELOW * full))
    text, verdict = _joined(parts)
    shares = [over(get(suite.floor, "peak_tensor_bytes"), get(suite.arms.get(of), "peak_tensor_bytes")) for of in FULL]
    floors = " and ".join(words.percent(share) for share in shares if share)
    return f"{text}; the floor itself {floors}" if verdict == MISSED and floors else text, verdict


# -- 4: growth -------------------------------------------------------------------------------------------------------


def judge_exponent(fitted: sweeps.Fit | None, target: float) -> str:
    """HOLDS or MISSED where the exponent's whole interval is within the tolerance, or outside it."""
    return _within(fitted, target - sweeps.TOLERANCE, target + sweeps.TOLERANCE)


def _within(interval: Estimate | sweeps.Fit | None, low: float, high: float) -> str:
    """Whether an interval is within these bounds with all it holds; without one nothing can be told."""
    if interval is None:
        return OPEN
    if low <= interval.low and interval.high <= high:
        return HOLDS
    return MISSED if interval.high < low or interval.low > high else OPEN


def _growth(results: Record) -> list[Row]:
    rows = []
    found = [series for series in sweeps.series(results) if series.arm.startswith("smt")]
    for sweep, axis in sweeps.AXES.items():
        for measure, target in axis.targets.items():
            growth = f"{'linear' if target else 'flat'}, exponent {target:g} ± {sweeps.TOLERANCE}"
            what = f"{sweeps.MEASURES[measure]} against {axis.name}: {growth}"
            of_sweep = [series for series in found if series.sweep == sweep and measure in series.measures]
            for series in of_sweep:
                fitted = sweeps.fit(series, measure)
                text, verdict = words.exponent(fitted), judge_exponent(fitted, target)
                if measure == "extra" and not series.together:
                    text, verdict = f"{text}, timed apart from its floor", OPEN
                rows.append(Row("4", what, f"sweep {sweep}, {series.dtype}", text, verdict))
            if not of_sweep:
                rows.append(Row("4", what, "", "", ABSENT))
    return rows


# -- 6 and 7 ---------------------------------------------------------------------------------------------------------


def _cost_aware(results: Record) -> list[Row]:
    what = "cost-aware plan at max_backward_cost 0.5: a step measurably under the floor"
    rows = []
    for record in of_kind(results, "cost_aware"):
        ratios = step_ratios(record)
        if record.get("max_backward_cost") == 0.5 and ratios.size:
            _, interval, text = _median(ratios)
            text += f", {words.percent(record.get('score_kept'))} of the score kept"
            verdict = _below(interval, 1) if timed_together(record) else OPEN
            rows.append(Row("6", what, record.get("suite", ""), text, verdict))
    return rows or [Row("6", what, "", "", ABSENT)]


def _embedded(suite: Suite) -> bool:
    return str(suite.first.get("model", "")).startswith("smollm2")


def _switch(suite: Suite) -> tuple[str, str]:
    parts = {}
    for arm in _resident(suite).values():
        seconds = get(arm, "adapter", "switch_s")
        if seconds is not None:
            parts[label(arm)] = (words.milliseconds(seconds), _holds(seconds < MILLISECONDS))
    return _joined(parts)


def _exact(suite: Suite) -> tuple[str, str]:
    parts = {}
    for arm in _resident(suite).values():
        exact = get(arm, "adapter", "restored_exactly")
        if arm.get("adapter_error"):
            parts[label(arm)] = (f"no result: {arm['adapter_error']}", MISSED)
        elif exact is not None:
            parts[label(arm)] = ("exactly" if exact else "not exactly", _holds(exact))
    return _all_alike(parts)


# -- scoring and kernels ---------------------------------------------------------------------------------------------


def scoring_ratios(record: Record) -> dict[str, np.ndarray]:
    """Of one "scoring" record, by round: score and dense over the floor, and score over dense."""
    rounds = [r for r in record.get("rounds") or () if all(r.get(key) for key in ("floor", "dense", "score"))]
    return {
        "score / floor": np.array([r["score"] / r["floor"] for r in rounds]),
        "dense / floor": np.array([r["dense"] / r["floor"] for r in rounds]),
        "score / dense": np.array([r["score"] / r["dense"] for r in rounds]),
    }


def _scoring(results: Record) -> list[Row]:
    what = f"one warm-up batch at most {SCORING} of floor + dense gradients of the targeted weights"
    rows = []
    for record in of_kind(results, "scoring"):
        ratios = scoring_ratios(record)["score / dense"]
        if ran(record) and ratios.size:
            where = ", ".join(record[key] for key in ("suite", "criterion", "accumulator") if record.get(key))
            rows.append(Row("scoring", what, where, *_at_most(SCORING, ratios)))
    return rows or [Row("scoring", what, "", "", ABSENT)]


def dense_rates(record: Record) -> np.ndarray:
    """A "kernel" record's speed as a share of that of the dense product beside it, by run."""
    return np.array([b / a for a, b in zip(record.get("seconds") or (), record.get("ideal_seconds") or ()) if a])


def kernel_cases(results: Record) -> dict[tuple, dict[str, Record]]:
    """The "kernel" records by case, then by candidate, those that failed included."""
    cases: dict[tuple, dict[str, Record]] = {}
    for record in of_kind(results, "kernel"):
        key = tuple(record.get(name) for name in ("device", "dtype", "tokens", "features", "block_size", "blocks"))
        cases.setdefault(key, {})[record.get("candidate", "")] = record
    return cases


def rates_of_case(candidates: Mapping[str, Record]) -> tuple[str | None, dict[str, np.ndarray]]:
    """The candidate that is used, whether it ran or not, and the `dense_rates` of those that ran."""
    used = next((name for name, record in candidates.items() if record.get("used")), None)
    ran_at = {name: dense_rates(record) for name, record in candidates.items() if ran(record)}
    return used, {name: rates for name, rates in ran_at.items() if rates.size}


def best_candidate(used: str, rates: Mapping[str, np.ndarray]) -> tuple[str, Estimate | None]:
    """The fastest candidate of a case, and the bounds of what it is faster by than the one that is used."""
    best = max(rates, key=lambda name: np.median(rates[name]))
    return best, None if best == used else difference(rates[best], rates[used])


def _kernels(results: Record) -> list[Row]:
    return [*_best_candidates(results), _half_rate(results)]


def _best_candidates(results: Record) -> list[Row]:
    what = "the block gradient by the best of the measured layouts, or one not told apart from it"
    missed: dict[str, list[str]] = {}
    for (device, dtype, _, _, size, blocks), candidates in kernel_cases(results).items():
        used, rates = rates_of_case(candidates)
        if used is None:
            continue
        of_dtype = missed.setdefault(", ".join(filter(None, ("kernels", device, dtype))), [])
        if used not in rates:
            of_dtype.append(f"{blocks} of {size}²: {used} has no result")
            continue
        best, estimate = best_candidate(used, rates)
        if estimate is not None and estimate.low > 0:
            of_dtype.append(f"{blocks} of {size}²: {best} faster by {100 * estimate.value:.0f} points")
    rows = [
        Row("kernels", what, where, "; ".join(of) or "in every case", _holds(not of)) for where, of in missed.items()
    ]
    return rows or [Row("kernels", what, "", "", ABSENT)]


def _half_rate(results: Record) -> Row:
    what = f"block gradient in bfloat16 at {words.percent(HALF_RATE, 0)} of the dense rate or more"
    found, failed = [], []
    for (_, dtype, _, _, size, blocks), candidates in kernel_cases(results).items():
        used, rates = rates_of_case(candidates)
        if dtype == "bfloat16" and used in rates:
            found.append(float(np.median(rates[used])))
        elif dtype == "bfloat16" and used is not None:
            failed.append(f"{blocks} of {size}²: {used} has no result")
    n_cases = len(found) + len(failed)
    if not n_cases:
        return Row("kernels", what, "", "", ABSENT)
    enough = sum(rate >= HALF_RATE for rate in found)
    texts = [f"{enough} of {n_cases} cases"]
    texts += [f"{words.percent(min(found))} to {words.percent(max(found))}"] if found else []
    return Row("kernels", what, "kernel records", "; ".join(texts + failed), _holds(enough == n_cases))
