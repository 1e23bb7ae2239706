"""Tables of a plan for the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from smtune.maps import layout
from smtune.selection import Plan


def plan_table(plan: Plan) -> Table:
    """What a plan trains, by projection, under a header that says how it came about."""
    rows = layout.projections(plan)
    table = Table(title=_header(plan), title_justify="left", title_style="", show_footer=True)
    table.add_column("projection", "all")
    for heading, total in (
        ("matrices trained", sum(row.trained for row in rows)),
        ("frozen", sum(row.frozen for row in rows)),
        ("blocks", plan.n_blocks),
        ("parameters", plan.n_params),
    ):
        table.add_column(heading, f"{total:,}", justify="right")
    table.add_column("share", f"{float(plan.n_blocks > 0):.1%}", justify="right")
    for row in rows:
        counts = (row.trained, row.frozen, row.blocks, row.params)
        table.add_row(row.name, *(f"{count:,}" for count in counts), f"{row.share:.1%}")
    return table


def _header(plan: Plan) -> Text:
    size, asked = plan.block_size, plan.budget
    return Text.assemble(
        (f"Plan for {plan.model_name or 'a model'}", "bold"),
        f", {layout.in_short(plan.total_params)} parameters\n",
        f"criterion {plan.criterion} · policy {plan.policy} · {plan.batches_seen:,} batches seen\n",
        "budget asked   ",
        f"{asked:,} blocks\n" if isinstance(asked, int) else f"{asked:.4%} of the parameters\n",
        f"budget reached {plan.fraction:.4%}, {plan.n_blocks:,} blocks of {size}×{size}",
        _cost(plan),
    )


def _cost(plan: Plan) -> str:
    """A line on the backward's cost, or nothing where it was not counted."""
    if plan.backward_cost is None:
        return ""
    kept = f", score kept {100 * plan.score_kept:.0f} %" if plan.score_kept is not None else ""
    return f"\nbackward cost {plan.backward_cost:.2f} of the whole dX chain{kept}"
