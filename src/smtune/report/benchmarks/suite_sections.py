"""Sections of the page that compare arms: each suite's tables, SMT against each rival, memory explained."""

from __future__ import annotations

from smtune.report.benchmarks import words
from smtune.report.benchmarks.markdown import Pictures, image, verdict
from smtune.report.benchmarks.records import (
    FLOOR,
    PARTS,
    Suite,
    all_flops,
    beyond_floor,
    floor_flops,
    get,
    label,
    median,
    minus,
    over,
    pairs,
    part_ratios,
    ran,
    spread,
    step,
    step_ratios,
    timed_together,
)
from smtune.report.benchmarks.targets import (
    ACROSS,
    HOLDS,
    MISSED,
    OTHERS,
    RIVALS,
    SMALLER,
    TIMED_APART,
    against,
    how_apart,
    memory_parts,
)
from smtune.report.markdown import DASH, prose, section, table

SHORT = {
    "smt-0.84": ("lora", "lora-autocast", "dora", "shira", "supertuning", "dense-v", "full", "full-autocast"),
    "smt-4.91": ("lora-4.91", "lora-4.91-autocast", "dora-4.91", "shira-4.91", "supertuning-4.91", "dense-v"),
}
"""By arm of SMT, whose steps stand beside its own in short."""


def short_section(found: list[Suite]) -> str:
    """For each suite the median steps of SMT and of those it is held against, with what may be said of the two."""
    names = {rival: shown for rivals in (*OTHERS.values(), *RIVALS.values()) for rival, shown in rivals.items()}
    tables = []
    for smt, rivals in SHORT.items():
        heads = ("suite", "control", words.arm(smt), *(names[rival].replace(" under ", ", ") for rival in rivals))
        rows = []
        for suite in found:
            own = [median(step_ratios(suite.arms.get(arm))) for arm in ("control", smt)]
            if own[1] is not None:
                rows.append((suite.name, *map(words.ratio, own), *(_beside(suite, smt, rival) for rival in rivals)))
        tables.append(table(heads, rows))
    text = """A step's time over the floor's, medians. *control* is a second floor: what it is off 1 is noise. A rival
    with nothing beside its number is slower than SMT; with ≈ the two are not told apart; in **bold** it is faster."""
    return section("## In short", prose(text), *tables) if any(tables) else ""


def _beside(suite: Suite, smt: str, rival: str) -> str:
    ratio = median(step_ratios(suite.arms.get(rival)))
    told = against(suite, smt, rival)[1]
    marks = {HOLDS: "{}", MISSED: "**{}**"}
    return DASH if ratio is None else marks.get(told, "{} ≈").format(words.ratio(ratio))


def suite_section(suite: Suite, pictures: Pictures) -> str:
    """What one suite measured: three tables and two figures."""
    return section(
        f"## {suite.name}",
        _notes(suite),
        image(pictures, f"step {suite.name}", f"Step time over the floor, {suite.name}"),
        _times(suite),
        image(pictures, f"memory {suite.name}", f"Memory of a step, {suite.name}"),
        _bytes(suite),
        _adapters(suite),
    )


def _notes(suite: Suite) -> str:
    """Setting, floor, spread and how busy the machine was, in a line."""
    floor_step = median(step(pair["floor"]) for arm in suite.others.values() for pair in pairs(arm))
    found = [s for arm in suite.others.values() if (s := spread(step_ratios(arm))) is not None]
    wide = sum(s.wide for s in found)
    loads = [value for arm in suite.arms.values() for value in arm.get("load") or ()]
    others = [cores for arm in suite.arms.values() if (cores := arm.get("others_cores")) is not None]
    notes = [
        suite.setting(),
        f"the floor's step takes {floor_step:.2f} s" if floor_step else "no step was timed",
        f"spread **wide** in {wide} of {len(found)} arms" if wide else f"no wide spread in {len(found)} arms",
        f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "load not recorded",
    ]
    if others:
        notes.append(f"other processes kept {min(others):.2f} to {max(others):.2f} cores busy")
    return "; ".join(notes) + "."


def _times(suite: Suite) -> str:
    rows = []
    for name, arm in suite.arms.items():
        trained = arm.get("trained_params")
        row = [label(arm), words.count(trained), words.percent(over(trained, arm.get("total_params")))]
        if not ran(arm):
            rows.append([*row, f"no result: {arm.get('error')}"])
            continue
        found = spread(step_ratios(arm))
        ratios = "1 by definition" if name == FLOOR else words.with_quartiles(found)
        apart = TIMED_APART if found and name != FLOOR and not timed_together(arm) else ""
        row.append(f"{ratios} **wide**{apart}" if found and found.wide else f"{ratios}{apart}")
        row += [words.ratio(median(part_ratios(arm, part))) for part in PARTS]
        row.append(words.ratio(over(all_flops(arm), floor_flops(arm, suite.floor))))
        row.append(words.count(found.n if found else None))
        rows.append([*row, words.run(arm.get("run"))])
    return table(("arm", "trained", "share", "step / floor", *PARTS, "FLOPs / floor", "pairs", "measured"), rows)


def _bytes(suite: Suite) -> str:
    rows = []
    for name, arm in suite.arms.items():
        row = [
            words.size(beyond_floor(suite, name, "saved_bytes")),
            words.size(minus(arm.get("alive_after_forward_bytes"), suite.floor.get("alive_after_forward_bytes"))),
            words.size(get(arm, "state_bytes", "optimizer")),
            words.size(arm.get("peak_rss_bytes")),
            words.signed_size(beyond_floor(suite, name, "peak_rss_bytes")),
            words.size(arm.get("peak_tensor_bytes")),
            words.signed_size(beyond_floor(suite, name, "peak_tensor_bytes")),
        ]
        if ran(arm) and any(cell != DASH for cell in row):
            rows.append([label(arm), *row])
    heads = ("arm", "saved beyond the floor", "alive after forward", "optimizer state", "peak of the process")
    return table((*heads, "above the floor's", "counted peak", "above the floor's"), rows)


def _adapters(suite: Suite) -> str:
    rows = []
    for arm in suite.arms.values():
        adapter = arm.get("adapter")
        if adapter:
            times = [words.milliseconds(adapter.get(f"{what}_s")) for what in ("load", "switch", "merge", "unmerge")]
            exact = {True: "yes", False: "**no**"}.get(adapter.get("restored_exactly"), DASH)
            rows.append([label(arm), words.size(adapter.get("bytes")), *times, exact])
        elif arm.get("adapter_error"):
            rows.append([label(arm), f"no result: {arm['adapter_error']}"])
    return table(("adapter", "on disk", "load", "switch", "merge", "unmerge", "base restored exactly"), rows)


def rivals_section(found: list[Suite]) -> str:
    """SMT's step less each rival's, in every suite."""
    tables = []
    for name, rivals in RIVALS.items():
        rivals = rivals | SMALLER.get(name, {}) | OTHERS.get(name, {})
        rows = []
        for suite in found:
            told = [against(suite, name, rival) for rival in rivals]
            if any(estimate for estimate, _ in told):
                cells = [
                    f"{words.signed(estimate)} {verdict(word)}" if estimate else verdict(word)
                    for estimate, word in told
                ]
                apart = [how_apart(*suite.both(name, rival)) for rival in rivals]
                rows.append((suite.name, *map("".join, zip(cells, apart))))
        of_name = table(("suite", *rivals.values()), rows)
        tables.append(section(f"{words.arm(name)} less …", of_name))
    if not any(tables):
        return ""
    text = f"""Difference of the medians of step / floor, with its 95 % bootstrap interval, of a process in which both
    took turns; of several that with the most pairs, which may be another than the table's above. Below zero SMT is
    faster; *holds*: all of the interval is below zero, and of *two processes*, with a floor each, below −{ACROSS}."""
    return section("## SMT against each rival", prose(text), *tables)


def memory_section(found: list[Suite]) -> str:
    """The counted peak above the floor's, byte by byte, of SMT and LoRA."""
    tables = [section(f"### {suite.name}", _memory(suite)) for suite in found]
    if not any(tables):
        return ""
    text = """Counted peak of a step less the floor's, in bytes, and what lives from step to step or is saved for the
    backward: buffers beside the base (the index), deltas, the originals that give the base back, their gradients,
    Adam's state, saved columns. The remainder is what these do not explain. SMT's is minus its gradients: the peak is
    at the loss, before the first of them. Of others, a positive one is temporaries."""
    return section("## Memory above the floor, explained", prose(text), *tables)


def _memory(suite: Suite) -> str:
    rows = []
    for name, arm in suite.others.items():
        gap = beyond_floor(suite, name, "peak_tensor_bytes")
        if name.startswith(("smt", "lora")) and gap is not None and arm.get("state_bytes"):
            parts = memory_parts(suite, name, arm)
            rows.append([label(arm), *map(words.count, (gap, *parts.values(), gap - sum(parts.values())))])
    heads = ("arm", "gap", "buffers", "deltas", "originals", "gradients", "Adam", "saved", "remainder")
    return table(heads, rows)
