"""The Markdown page of a benchmark, from its records alone.

It opens with what was measured and on what, step times in short, and the targets; then come the sections. One that has
nothing to show is left out, and the head of the page says which kinds of record are missing.
"""

from __future__ import annotations

from collections import Counter

from smtune.bench.suites import ARMS, is_for
from smtune.models import DTYPES
from smtune.report.benchmarks import words
from smtune.report.benchmarks.markdown import Pictures, verdict
from smtune.report.benchmarks.paper_sections import claims_section, table1_section
from smtune.report.benchmarks.question_sections import (
    cost_aware_section,
    growth_section,
    kernels_section,
    scoring_section,
    writing_section,
)
from smtune.report.benchmarks.records import (
    MIN_PAIRS,
    WIDE,
    Record,
    get,
    label,
    of_kind,
    spread,
    step_ratios,
    suites,
)
from smtune.report.benchmarks.suite_sections import memory_section, rivals_section, short_section, suite_section
from smtune.report.benchmarks.targets import ABSENT, ACROSS, HOLDS, MISSED, OPEN, PART, reasons, targets
from smtune.report.markdown import DASH, bullets, prose, section, table

KINDS = {
    "arm": "arms side by side",
    "sweep": "sweeps",
    "write": "writing at use against after the step",
    "scoring": "scoring",
    "kernel": "kernel candidates",
    "table1": "the paper's Table 1",
    "cost_aware": "cost-aware selection",
}
COMPARISONS = (("layers7b", 1024), ("layers7b", 512), ("layers7b", 2048), ("smollm2", 512))
"""Suite and tokens of what `make bench` compares, in every dtype of `DTYPES`."""
BUSY = 0.1
"""Cores that other processes keep busy, from which on it is said."""


def page(results: Record, pictures: Pictures) -> str:
    """The whole page, with links to the pictures that there are."""
    found = suites(results)
    sections = [
        _measured(results),
        short_section(found),
        _targets(results),
        _reading(),
        *(suite_section(suite, pictures) for suite in found),
        rivals_section(found),
        memory_section(found),
        claims_section(results),
        table1_section(results),
        growth_section(results, pictures),
        cost_aware_section(results, pictures),
        scoring_section(results),
        writing_section(results),
        kernels_section(results),
        _commands(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _measured(results: Record) -> str:
    machine = results.get("machine") or {}
    features = f" ({', '.join(machine['features'])})" if machine.get("features") else ""
    cores = f"{machine.get('cores', DASH)} cores, {machine.get('threads', DASH)} threads"
    packages = ("smtune", "torch", "transformers", "peft", "python")
    versions = ", ".join(f"{name} {machine[name]}" for name in packages if machine.get(name))
    memory = words.size(machine.get("memory_bytes"))
    rows = [
        ("started", results.get("started", DASH)),
        ("processor", f"{machine.get('cpu', DASH)}{features}, {cores}, {memory} of memory"),
        ("GPU", machine.get("gpu") or "none"),
        ("versions", versions or DASH),
        ("timed", _timed(results)),
        *[("counted", text) for text in _counted(results)],
        ("how busy", _load(results)),
        ("spread", _spreads(results)),
        ("not measured", _not_measured(results)),
    ]
    text = """This page is written by `smtune bench` from its records; no number and no verdict is typed in. What a step
    of SMT costs is held against the *floor*, and against what a user would pick instead. The floor is a frozen
    model's forward, and the gradient of its activations down to the lowest adapted layer: what any adapter pays."""
    return section("# Benchmarks", prose(text), table(("", ""), rows))


def _commands(results: Record) -> str:
    lines = results.get("command", "").splitlines()
    return section("## Commands", "```\n" + "\n".join(lines) + "\n```") if lines else ""


def _not_measured(results: Record) -> str:
    """What `make bench` would add: kinds by dtype, comparisons, and arms of those that there are."""
    texts = []
    for kind, name in KINDS.items():
        there = {record.get("dtype") for record in of_kind(results, kind)}
        texts += [name] if not there else []
        texts += [f"{name} in {dtype}" for dtype in DTYPES if there and kind != "arm" and dtype not in there]
    measured = {suite.name: suite for suite in suites(results)}
    wanted = [f"{model}-{dtype}-{tokens}" for model, tokens in COMPARISONS for dtype in DTYPES]
    texts += [name for name in wanted if measured and name not in measured]
    for name, suite in measured.items():
        missing = [arm for arm in ARMS if arm not in suite.arms and is_for(arm, suite.first.get("dtype", ""))]
        texts += [f"{name}: {', '.join(missing)}"] * bool(missing)
    uncounted = [record for record in results.get("records") or () if record.get("uncounted")]
    texts += [f"{record.get('suite')}: what is counted of {label(record)}" for record in uncounted]
    return "; ".join(texts) or "–"


def _timed(results: Record) -> str:
    """Whether what is compared lay in one place of memory."""
    timed = [record for record in results.get("records") or () if step_ratios(record).size]
    shared = sum(record.get("timed_on") == "shared weights" for record in timed)
    together = "arms in turn in one process, on the same weights"
    apart = """arms in turn, each in a process of its own: equal processes may differ by their place in memory, by more
        than the intervals say"""
    if timed and not shared:
        return prose(apart)
    numbers = {together: shared, apart: len(timed) - shared}
    said = [f"{prose(text)} ({number} of {len(timed)} records)" for text, number in numbers.items() if number]
    return "; ".join(said) or DASH


def _counted(results: Record) -> list[str]:
    """Of records that one run timed and another counted."""
    found = results.get("records") or ()
    runs = [run for record in found if (run := record.get("counted_run"))]
    of = "; ".join(dict.fromkeys(map(words.run, runs)))
    text = f"""{len(runs)} of {len(found)} records have what another run than their timing's counted of the same arm
        ({of})"""
    return [prose(text)] if runs else []


def _load(results: Record) -> str:
    """How busy the machine was, of itself and with others' work."""
    found = results.get("records") or ()
    loads = [value for record in found for value in record.get("load") or ()]
    others = [cores for record in found if (cores := record.get("others_cores")) is not None]
    threads = get(results, "machine", "threads")
    texts = []
    if loads:
        own = f" (the benchmark itself is {threads})" if threads else ""
        texts.append(f"1-minute load {min(loads):.1f} to {max(loads):.1f}{own}")
    if others:
        busy = sum(cores >= BUSY for cores in others)
        texts.append(
            f"other processes kept {min(others):.2f} to {max(others):.2f} cores busy, {BUSY:g} or more during {busy} "
            f"of {len(others)} records"
        )
    return "; ".join(texts) or "not recorded"


def _spreads(results: Record) -> str:
    found = [s for record in results.get("records") or () if (s := spread(step_ratios(record))) is not None]
    if not found:
        return "no pairs"
    widths = sorted((s.high - s.low) / s.median for s in found)
    wide = sum(s.wide for s in found)
    usual, worst = (words.percent(width) for width in (widths[len(widths) // 2], widths[-1]))
    return prose(f"""the middle half of the pairs is {usual} of their median wide in the median record, {worst} in the
    worst; **wide**, over {words.percent(WIDE, 0)}, in {wide} of {len(found)}, and marked there""")


def _targets(results: Record) -> str:
    rows = targets(results)
    counts = Counter(row.verdict for row in rows)
    judged = [word for word in (HOLDS, PART, MISSED, OPEN, ABSENT) if counts[word]]
    summary = ", ".join(f"{counts[word]} {verdict(word)}" for word in judged)
    text = f"""{sum(counts[word] for word in judged)} rows: {summary}. The first column: 1 step
    time, 2 FLOPs and saved bytes, 3 memory, 4 growth, 6 cost-aware plans, 7 an adapter's life (5, *The paper's cost
    claims*, is a section of its own); *design*: what the design promises in bytes. Step times and
    scoring are judged by the median of pairs. Two arms are told apart by the 95 % bootstrap interval of the difference
    of their medians of step / floor: where it holds zero, or either has fewer than {MIN_PAIRS} pairs, they are
    *{OPEN}*, and so are arms that were not timed in one process with their floor. Arms of two processes, each with a
    floor of its own, are told apart where the interval is beyond {words.percent(ACROSS, 0)} of the floor's step.
    An exponent holds, or is missed, with all of its interval. Counts are compared as they are, and so is memory, but
    for the process's: what differs by no more than floors do is not told apart. *{PART}*: some of the rivals were not
    measured."""
    heads = ("from", "target", "where", "measured", "verdict")
    shown = [(row.group, row.what, row.where, row.measured, verdict(row.verdict)) for row in rows]
    return section(
        "## Targets",
        prose(text),
        table(heads, shown),
        bullets("Why some are missed, or not told apart:", reasons(rows)),
    )


def _reading() -> str:
    items = (
        f"""**step / floor**: every step of an arm over the floor step beside it, or the mean of two. Median of these
        pairs, in brackets their middle half (25 to 75 %). *forward*, *backward*, *optimizer*: the median of that part
        over the whole floor step. **wide**: the middle half reaches over more than {words.percent(WIDE, 0)} of the
        median. *timed apart*: in a process of its own, in which equal arms may differ by a tenth.""",
        """**pairs**: arms of a suite that have different numbers of them are of different runs, those of the commands
        at the end, each over the floor of its own run. Of an arm that was measured in several, the one with the most
        pairs is shown, and *measured* is the day and commit of its timing; two arms are compared by the process that
        both took turns in, if there is one.""",
        """**SMT 0.43 % to 4.91 %** are shares of LLaMA-7B. On other models these arms train the same share of the
        blocks of q, k and v.""",
        """**FLOPs / floor**: counted; products of matrices only.""",
        """**saved beyond the floor**: bytes that a forward hands to autograd for the backward, each storage once,
        weights left out, less the floor's. **alive after forward**: bytes that a forward leaves alive, however they
        are kept, less the floor's; the listing of Appendix A keeps its inputs where the first does not see
        them.""",
        """**peak of the process**: resident memory over two steps after the first, in a process that holds this arm
        alone; one sample, which two equal floors differ in too. **counted peak**: bytes of tensors alive at once
        within a step.""",
        """The Llamas have the layers of LLaMA-7B, or smaller ones, with random weights that 16 bits hold exactly, as
        those of published models; SMT's copy of the base's blocks then takes 2 bytes each, in a model of fp32 too.""",
        """Blocks stand at random places, as many in every layer: the worst case for what is saved, since blocks
        chosen by score crowd in fewer columns.""",
        """Trained tensors are fp32 in all arms but *full, bfloat16 weights*. All but Table 1's CPUAdam train by
        torch's AdamW as it is by default, on CPUs a loop over tensors. A fused one, Trainer's default, takes half of it
        or less, which would make full fine-tuning cheaper by most of its optimizer's part.""",
        """There is no autocast but in the arms that say so. Beside bf16 weights PEFT multiplies LoRA's and DoRA's fp32
        factors in fp32, on inputs cast to it; under autocast these products are of bf16. Full fine-tuning under
        autocast has fp32 weights, gradients and states.""",
    )
    return section("## How to read the tables", "\n".join(f"- {prose(item)}" for item in items))
