"""The sections of the page that hold SMT against others: the control, what can be told, who wins, the claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from smtune.evaluation.statistics import SIGNIFICANT, TIE, Z_80, Z_95, Estimate
from smtune.report.markdown import DASH, minus, prose, section, table
from smtune.reproduce import numbers
from smtune.reproduce.evidence import words
from smtune.reproduce.evidence.claims import LORA, Claim
from smtune.reproduce.evidence.contrasts import Contrast, accuracy, contrast
from smtune.reproduce.evidence.control import GAIN, SOLVED, UNSEEN
from smtune.reproduce.evidence.judges import DOES_NOT, HOLDS, NOT_RUN, NOT_TESTABLE, UNDECIDED, Evidence
from smtune.reproduce.evidence.records import Found
from smtune.reproduce.evidence.tasks import LOOKED_AT, Task, adjusted, is_lost_to_holm, not_run
from smtune.reproduce.evidence.words import Links
from smtune.reproduce.layouts import accuracies, trained_share

OF_SMT = {"better": "wins", "worse": "loses", "tie": "ties", "undecided": "undecided"}
WINS = "#wins-ties-and-losses"


def in_short(tasks: Sequence[Task], links: Links) -> str:
    """For each task, against whom SMT wins, loses and ties."""
    lines = [f"- **{task.name}.** {_in_short(task, links)}" for task in tasks] or ["Nothing has been trained yet."]
    return section("## In short", "\n".join(lines))


def _in_short(task: Task, links: Links) -> str:
    if task.control.fault:
        cells = links.cells(task.results, _control_records(task))
        return f"Nothing may be concluded: {task.control.fault} ({cells})."
    if task.smt is None:
        return "SMT at 0.84 % has not been run."
    texts = [f"  - {text}" for text in _by_verdict(task.contrasts)]
    if not texts:
        return f"SMT at 0.84 % has nothing beside it yet ({links.cells(task.results, task.smt.records)})."
    cells = links.cells(task.results, task.smt.records)
    lead = f"SMT at 0.84 % ({cells}), points less the other, whose cells are in the [table]({WINS}):"
    missing = [f"  - not run: {words.listed(labels)}"] if (labels := not_run(task.rivals)) else []
    return "\n".join([lead, *texts, *missing, *_drawn_in_short(task, links)])


def _by_verdict(contrasts: Sequence[Contrast]) -> list[str]:
    """A line for each verdict on the first arms: who the others are, and by how much."""
    found: dict[str, list[str]] = {}
    for one, p in zip(contrasts, adjusted(contrasts)):
        after = ", not after Holm" * is_lost_to_holm(one, p)
        found.setdefault(one.verdict, []).append(f"{one.second.label}: {numbers.points(one.difference)}{after}")
    return [f"*{word}*: {words.listed(found[verdict])}" for verdict, word in OF_SMT.items() if verdict in found]


def _drawn_in_short(task: Task, links: Links) -> list[str]:
    """The same of SMT whose blocks are drawn, the best of the variants."""
    drawn = task.drawn
    if drawn is None:
        return []
    others = [*([task.smt] if task.smt else []), *(arm for arm in task.rivals if arm.label != drawn.label)]
    contrasts = [one for arm in others if (one := contrast(drawn, arm))]
    return [
        f"  - **{drawn.label}** ({links.cells(task.results, drawn.records)}), points less the other:",
        *[f"    - {text}" for text in _by_verdict(contrasts)],
        *_looked_at(task, contrasts),
        *_unseen(task, drawn.label),
    ]


def _looked_at(task: Task, contrasts: Sequence[Contrast]) -> list[str]:
    """That an arm was found by looking at a seed's tests, and what the other seeds say of it and LoRA."""
    seen = LOOKED_AT.get((task.results.tier.name, task.family))
    pair = next((one for one in contrasts if one.second.label == LORA), None)
    if seen is None or pair is None:
        return []
    unseen = contrast(*(_without(found, seen) for found in (pair.first, pair.second)))
    others = f"; over the other seeds, less {pair.second.label}: {numbers.points(unseen.difference)}" if unseen else ""
    return [f"    - found by looking at the tests of variants with seed {seen}, which is among these{others}"]


def _unseen(task: Task, label: str) -> list[str]:
    """The same arm less LoRA, on tests that nobody had looked at."""
    arms = {arm.label: arm for arm in task.results.arms(UNSEEN) if arm.arm.family == f"unseen-{task.family}"}
    one = contrast(arms[label], arms[LORA]) if {label, LORA} <= arms.keys() else None
    if one is None:
        return []
    where = "[tests that nobody has looked at](#tests-that-nobody-has-looked-at)"
    return [f"    - on {where}, less {LORA}: {numbers.points(one.difference)}, *{OF_SMT[one.verdict]}*"]


def _without(found: Found, seed: int) -> Found:
    return replace(found, records=[record for record in found.records if record["config"]["seed"] != seed])


# The control ----------------------------------------------------------------------------------------------------------


def control_section(tasks: Sequence[Task], links: Links) -> str:
    """Full fine-tuning against the untuned model, for each task."""
    text = f"""Full fine-tuning must gain {100 * GAIN:.0f} points or more over the untuned model and over blind
    guessing, and must leave the task unsolved, below {100 * SOLVED:.0f} %: else arms cannot differ by much, and nothing
    may be concluded from their differences."""
    heads = (
        "task",
        "chance, %",
        "untuned, %",
        "full, %",
        "gain, points (95 %)",
        "≥ 10",
        "unsolved",
        "control",
        "full's rate",
        "cells",
    )
    rows = []
    for task in tasks:
        control = task.control
        gain = control.gain
        row = [task.name, f"{100 * control.chance:.0f}", _accuracy(control.untuned), _accuracy(control.full)]
        if gain is None:
            rows.append([*row, DASH, DASH, DASH, "**missing**", _rate(control.full), _control_cells(task, links)])
            continue
        sure = "yes" if gain.difference.low >= GAIN else "yes, but not all of the interval"
        row += [numbers.points(gain.difference), sure if control.is_gain else "**no**"]
        row.append("**no**" if control.is_solved else "yes")
        row += ["**failed**" if control.fault else "passed", _rate(control.full), _control_cells(task, links)]
        rows.append(row)
    faults = [
        f"**Nothing below may be concluded for {task.name}: {task.control.fault}.**"
        for task in tasks
        if task.control.fault
    ]
    if not tasks:
        faults = ["**Missing: nothing has been trained, and nothing below may be concluded for any task.**"]
    return section("## The positive control", prose(text), table(heads, rows), *faults)


def _control_records(task: Task) -> list[dict]:
    return [*task.control.untuned.records, *task.control.full.records]


def _control_cells(task: Task, links: Links) -> str:
    return links.cells(task.results, _control_records(task))


def _accuracy(found: Found) -> str:
    if not found.records:
        return "not run"
    by_test = accuracies(found.records)
    if len(by_test) > 1:
        return f"{100 * accuracy(found):.1f}"
    (only,) = by_test.values()
    return f"{100 * only.value:.1f} ({100 * only.low:.1f} to {100 * only.high:.1f})"


def _rate(found: Found) -> str:
    """The learning rate, and what is to be said of it and of the seeds."""
    if not found.records:
        return DASH
    if found.arm.row.method == "base":
        return found.lacks or DASH
    edge = {"": "", "only": "the only one tried"}.get(found.edge, f"the {found.edge} tried: not bracketed")
    notes = [found.lacks, edge]
    return "; ".join([f"{found.rate:g}", *(note for note in notes if note)])


# What can be told -----------------------------------------------------------------------------------------------------


def design_section(tasks: Sequence[Task], links: Links) -> str:
    """The smallest difference that each task's items and seeds tell from zero."""
    text = f"""The smallest true difference that a comparison finds with 80 % power at two-sided 5 %: half of the 95 %
    interval, √((z·σ/√n)² + 2·(t·τ/√k)²) with z = {Z_95:.2f} and Student's t of k − 1 degrees of freedom, and
    {Z_80:.2f} standard errors, √(σ²/n + 2·τ²/k) (Bloom 1995, Evaluation Review 19, 547). σ: standard deviation over the
    n items of the paired difference, each the mean over seeds, root mean square over the comparisons below; τ: standard
    deviation of an arm's accuracy over its k seeds, pooled over the arms. Comparisons with one seed are left out where
    there are others. The cells are those of the
    [comparisons]({WINS}). A difference below the smallest may well exist and stay *undecided*."""
    heads = ("task", "items", "seeds", "σ", "τ, points", "smallest difference, points", "of the items alone", "cells")
    rows = []
    for task in tasks:
        found = task.design
        if found is None:
            continue
        deviation = DASH if found.seed_deviation is None else f"{100 * found.seed_deviation:.2f}"
        alone = (Z_95 + Z_80) * found.item_deviation / found.n_items**0.5
        rows.append(
            [
                task.name,
                found.n_items,
                f"{found.n_seeds}" + " (τ unknown, left out)" * (found.seed_deviation is None),
                f"{found.item_deviation:.3f}",
                deviation,
                f"**{100 * found.smallest:.1f}**",
                f"{100 * alone:.1f}",
                f"[{len({record['cell'] for record in found.records})}]({WINS})",
            ]
        )
    return section(
        "## What these runs can tell apart", prose(text), table(heads, rows) or "There is no comparison yet."
    )


# Who wins -------------------------------------------------------------------------------------------------------------


def wins_section(tasks: Sequence[Task], links: Links, pictures: dict[str, str]) -> str:
    """SMT less every other arm, a table for each task."""
    text = f"""SMT at 0.84 % of the parameters, blocks of q, k and v by abs_of_sum, less every other arm: accuracy
    in points, mean over seeds, 95 % interval over items (paired) and seeds. Each arm is at the best by held-out
    training rows of the learning rates it was tried at; *only* marks one that was tried at no other. *wins*,
    *loses*: the whole interval is on one side of zero, and p below {SIGNIFICANT}. *ties*: all of it lies within
    ±{100 * TIE:.0f} points. *undecided*: neither. p (Holm): adjusted for all comparisons of a table. Of an arm
    with one seed the interval knows the items alone, and is too narrow. Ranks are whole numbers, so LoRA's kin
    train somewhat more or less than SMT: *trained*."""
    parts = []
    for task in tasks:
        if task.smt is None:
            parts.append(f"### {task.name}\n\nSMT at 0.84 % has not been run.")
            continue
        smt = task.smt
        lead = (
            f"SMT: {_accuracy(smt)} % right, {trained_share(smt.records[0])} trained, rate {_rate(smt)}. "
            f"Cells: {links.cells(task.results, smt.records)}."
        )
        fault = f"**Nothing may be concluded here: {task.control.fault}.**" if task.control.fault else ""
        luck = _luck_of_sweeps(task)
        missing = not_run(task.rivals)
        left = f"Not run: {words.listed(missing)}." if missing else ""
        picture = f"differences {task.slug}"
        shown = f"![SMT less each arm, {task.name}]({pictures[picture]})" if picture in pictures else ""
        parts.append(
            section(f"### {task.name}", lead, fault, contrast_table(task, task.contrasts, links), luck, shown, left)
        )
    return section("## Wins, ties and losses", prose(text), *parts)


def _luck_of_sweeps(task: Task) -> str:
    """What the means of swept arms may owe to the choice of the rate by one of the runs in them; "" where none was."""
    swept, given = task.leads_of_first_seed
    if not swept:
        return ""

    def lead(leads: Sequence[float]) -> str:
        return f"{minus(f'{100 * fmean(leads):+.1f}')} points, the mean of {len(leads)}"

    beside = f", and in those tried at one rate {lead(given)}" if given else ""
    text = f"""The first seed's runs chose the rates of swept arms, so its luck may be in an arm's mean, a k-th of it
    among k seeds. Its accuracy less the other seeds' is in swept arms {lead(swept)} arms{beside}. The seed's own effect
    is in it too, which all arms share."""
    return prose(text)


def contrast_table(
    task: Task, contrasts: Sequence[Contrast], links: Links, less: str = "", given_rates: bool = False
) -> str:
    """A row for each comparison; "" without any.

    Args:
        task: whose.
        contrasts: SMT less others; or others less one, which is named by `less`.
        links: to the other arms' cells.
        less: with it verdicts are of the other arms: better, worse.
        given_rates: the learning rates are those of another experiment, so that none was tried here.
    """
    what = f"less {less}, points (95 %)" if less else "SMT less it, points (95 %)"
    heads = ("arm" if less else "against", "trained", what, "p", "p (Holm)", "verdict", "rate", "cells")
    rows = []
    for one, p in zip(contrasts, adjusted(contrasts)):
        other = one.first if less else one.second
        word = one.verdict if less else OF_SMT[one.verdict]
        verdict = f"*{word}*" + ", but not after Holm" * is_lost_to_holm(one, p)
        rows.append(
            [
                words.name(other),
                trained_share(other.records[0]),
                numbers.points(one.difference),
                numbers.p_text(one.p_value).removeprefix("p ").removeprefix("= "),
                numbers.p_text(p).removeprefix("p ").removeprefix("= "),
                DASH if task.control.fault else verdict,
                f"{other.rate:g}" if given_rates and other.arm.row.method != "base" else _rate(other),
                links.cells(task.results, other.records),
            ]
        )
    return table(heads, rows)


def loss_section(tasks: Sequence[Task], links: Links) -> str:
    """The same comparisons by the loss on held-out training rows."""
    text = """Loss in nats per answer token on held-out training rows, at the same cells: what few test items do not
    resolve. Differences are paired by seed, with Student's 95 % interval; of one seed there is none. *lower* is better
    for SMT. The learning rates were chosen on these rows, by accuracy first, in all arms alike: no test of its own."""
    parts = []
    for task in tasks:
        rows = []
        for one in task.contrasts:
            if one.loss is not None:
                both = [f"{fmean(arm.values('validation_loss').values()):.3f}" for arm in (one.first, one.second)]
                cells = links.cells(task.results, [*one.first.records, *one.second.records])
                rows.append([one.second.label, *both, numbers.loss(one.loss), _lower(one.loss), cells])
        heads = ("against", "SMT's loss", "its loss", "SMT less it (95 %)", "SMT's is", "cells")
        fault = f"**Nothing may be concluded here: {task.control.fault}.**" if rows and task.control.fault else ""
        parts.append(section(f"### {task.name}: loss", fault, table(heads, rows)))
    return section("## The same by held-out loss", *([prose(text)] if any(parts) else []), *parts)


def _lower(difference: Estimate) -> str:
    return "*lower*" if difference.high < 0 else "*higher*" if difference.low > 0 else "*undecided*"


# Claims ---------------------------------------------------------------------------------------------------------------


def claims_section(heading: str, text: str, claims: Sequence[Claim], evidence: Evidence, links: Links) -> str:
    """Every claim with a line for each test that could be made."""
    heads = ("claim", "from", "the paper's figures", "here", "effect (95 %)", "verdict", "cells")
    heads = heads if any(claim.published for claim in claims) else (*heads[:2], *heads[3:])
    rows, words_found = [], []
    for claim in claims:
        for number, judged in enumerate(claim.judge(evidence)):
            own = [claim.text, claim.source, *[claim.published or DASH] * (len(heads) == 7)]
            first = own if number == 0 else [""] * len(own)
            cells = links.bench if judged.where.startswith(words.BENCHMARKS) and judged.effect else DASH
            cells = cells if judged.results is None else links.cells(judged.results, judged.records)
            words_found.append(judged.verdict.partition(":")[0])
            rows.append([*first, judged.where or DASH, judged.effect or DASH, _verdict(judged.verdict), cells])
    counts = ", ".join(
        f"{words_found.count(word)} {word}"
        for word in (HOLDS, DOES_NOT, UNDECIDED, NOT_TESTABLE, NOT_RUN)
        if word in words_found
    )
    text += " Each line is judged by its own interval and p, not adjusted for the number of lines."
    return section(heading, prose(text), f"{len(claims)} claims, {len(rows)} lines: {counts}.", table(heads, rows))


def _verdict(verdict: str) -> str:
    word, colon, rest = verdict.partition(":")
    return (f"**{word}**" if word == DOES_NOT else f"*{word}*") + colon + rest
