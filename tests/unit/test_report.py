"""Figures and tables show the numbers of the plan: read back from the artists, not from the pixels."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from smtune import Plan
from smtune.evaluation import accuracy
from smtune.maps import layout
from smtune.maps.picture import LAYERS_PER_BAND
from smtune.report import accuracy_bars, block_map, loss_curve, plan_table, projection_shares
from smtune.report.curves import curves
from smtune.selection import ModulePlan

SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}  # of 16² blocks: 16, 8, 8


def make_plan(counts, budget=0.1, name="tiny"):
    """A plan with the given number of blocks by (layer, projection)."""
    modules = {}
    for (layer, projection), count in counts.items():
        shape = SHAPES[projection]
        rows, cols = zip(*[divmod(place, shape[1] // 16) for place in range(count)]) if count else ((), ())
        modules[f"model.layers.{layer}.self_attn.{projection}"] = ModulePlan(shape, tuple(rows), tuple(cols))
    return Plan(modules, 16, "abs_of_sum", "global", budget, 100_000, 100, name)


def grid(n_layers, count=lambda layer, projection: layer % 3):
    return {(layer, projection): count(layer, projection) for layer in range(n_layers) for projection in SHAPES}


def drawn(figure):
    """(shares, texts) by (projection, layer) as the cells of a block map have them; a masked share is None."""
    shares, texts = {}, {}
    for axes in figure.axes:
        if not axes.collections or axes.get_label() == "<colorbar>":
            continue
        lanes = [label.get_text() for label in axes.get_yticklabels()]
        layers = [label.get_text() for label in axes.get_xticklabels()]
        array = axes.collections[0].get_array()
        for y, lane in enumerate(lanes):
            for x, layer in enumerate(layers):
                shares[lane, layer] = None if np.ma.getmaskarray(array)[y, x] else float(array[y, x])
        for text in axes.texts:
            x, y = text.get_position()
            if text.get_text().isdecimal():
                texts[lanes[math.floor(y)], layers[math.floor(x)]] = int(text.get_text())
    return shares, texts


@pytest.mark.parametrize("n_layers", [1, 2, 30, LAYERS_PER_BAND, LAYERS_PER_BAND + 1, 80])
def test_block_map_shows_every_count_and_share(tmp_path, n_layers):
    counts = grid(n_layers, lambda layer, projection: 0 if projection == "k_proj" else (layer * 3 + 1) % 5)
    figure = block_map(make_plan(counts), tmp_path / "map.png")
    shares, texts = drawn(figure)
    assert texts == {(projection, str(layer)): count for (layer, projection), count in counts.items() if count}
    n_blocks = {projection: shape[0] * shape[1] // 256 for projection, shape in SHAPES.items()}
    assert shares == {
        (projection, str(layer)): count / n_blocks[projection] for (layer, projection), count in counts.items()
    }
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_block_map_tells_frozen_from_not_targeted(tmp_path):
    counts = {(0, "q_proj"): 2, (0, "v_proj"): 0, (2, "q_proj"): 0, (2, "v_proj"): 8}
    figure = block_map(make_plan(counts), tmp_path / "map.png")
    shares, _ = drawn(figure)
    assert shares == {
        ("q_proj", "0"): 2 / 16,
        ("q_proj", "1"): None,
        ("q_proj", "2"): 0,
        ("v_proj", "0"): 0,
        ("v_proj", "1"): None,
        ("v_proj", "2"): 1,
    }
    mesh = figure.axes[0].collections[0]
    assert mesh.cmap(mesh.norm(0.0)) == (1, 1, 1, 1)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["frozen", "not targeted"]


def test_block_map_states_the_totals(tmp_path):
    figure = block_map(make_plan({(0, "q_proj"): 3, (0, "v_proj"): 0}), tmp_path / "map.png")
    assert figure.axes[0].get_title(loc="left") == "Trained blocks of tiny"
    subtitle = "1 of 2 matrices · 3 blocks of 16×16 · 768 parameters · 0.77% of the model"
    assert subtitle in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("counts", [{}, grid(3, lambda layer, projection: 0)], ids=["no module", "all frozen"])
def test_a_plan_without_blocks_can_be_shown(tmp_path, counts):
    plan = make_plan(counts)
    _, texts = drawn(block_map(plan, tmp_path / "map.png"))
    assert texts == {}
    bars = projection_shares(plan, tmp_path / "shares.png").axes[0].patches
    assert [bar.get_width() for bar in bars] == [0] * len({projection for _, projection in counts})
    assert plan_table(plan).row_count == len(bars)


def test_matrices_outside_the_layers_and_doubles(tmp_path):
    one = ModulePlan((32, 32), (0,), (1,))
    plan = Plan(
        {"layers.0.self_attn.q_proj": one, "layers.0.cross_attn.q_proj": one, "lm_head": one},
        16,
        "weight",
        "global",
        3,
        10_000,
    )
    shares, texts = drawn(block_map(plan, tmp_path / "map.png"))
    assert texts == {("q_proj", "0"): 2, ("lm_head", layout.NO_LAYER): 1}
    assert shares["q_proj", "0"] == 2 / 8
    assert shares["q_proj", layout.NO_LAYER] is None


def test_a_fused_matrix_is_shown_as_its_projections(tmp_path):
    fused = ModulePlan((64, 64), (0, 1, 1, 3), (1, 0, 1, 0), kinds=("q", "q", "mixed", "v"))
    plan = Plan({"h.0.c_attn": fused, "h.1.c_attn": fused}, 16, "weight", "global", 8, 100_000)
    figure = block_map(plan, tmp_path / "map.png")
    shares, texts = drawn(figure)
    assert texts == {(kind, layer): count for layer in "01" for kind, count in {"q": 3, "v": 1}.items()}
    assert [shares[kind, "1"] for kind in ("q", "mixed", "v")] == [3 / 8, 0, 1 / 4]
    axes = projection_shares(plan, tmp_path / "shares.png").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "mixed", "v"]
    assert [bar.get_width() for bar in axes.patches] == [6 / 8, 0, 2 / 8]
    assert [row.frozen for row in layout.projections(plan)] == [0, 2, 0]


def test_projection_shares(tmp_path):
    plan = make_plan(grid(4, lambda layer, projection: {"q_proj": 1, "k_proj": 0, "v_proj": 3}[projection]))
    axes = projection_shares(plan, tmp_path / "shares.png").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "k_proj", "v_proj"]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 0, 0.75]
    assert "75.00% · 12 blocks · 4 of 4 matrices" in [text.get_text() for text in axes.texts]


def test_loss_curve_reads_what_trainer_logs(tmp_path):
    log = [
        {"step": 2, "loss": 9.0},  # before the run was resumed
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.5},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": 1.0},
        {"step": 4, "train_loss": 2.0, "train_runtime": 1.0},
    ]
    dots, line, held_out, _key = loss_curve(log, tmp_path / "loss.png").axes[0].lines
    assert dots.get_xydata().tolist() == [[1, 3], [2, 2], [4, 1]]
    assert line.get_ydata().tolist() == [3, 2, 1]
    assert held_out.get_xydata().tolist() == [[2, 2.5]]


def test_loss_curve_smooths_without_lag(tmp_path):
    log = [{"step": step, "loss": 100.0 - step} for step in range(90)]
    line = loss_curve(log, tmp_path / "loss.png").axes[0].lines[1]
    np.testing.assert_allclose(line.get_ydata()[3:-3], [100.0 - step for step in range(3, 87)])


def test_loss_curve_labels_runs(tmp_path):
    runs = {f"run {k}": [{"step": 1, "loss": float(k)}] for k in range(9)}
    axes = loss_curve(runs, tmp_path / "loss.png").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(runs)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines[1::2]}) == 9
    assert loss_curve([], tmp_path / "empty.png").axes[0].lines[0].get_xydata().size == 0


@pytest.mark.parametrize("labels", [["full"], ["full", "LoRA"]])
def test_every_curve_is_named(tmp_path, labels):
    points = [(1e-4, accuracy(3, 10)), (1e-5, accuracy(1, 10))]
    figure = curves(dict.fromkeys(labels, points), tmp_path / "c.png", x="rate", y="right", title="", log=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1e-05", "0.0001"]


def test_accuracy_bars(tmp_path):
    before = {"boolq": accuracy(1, 10), "sum": accuracy(0, 10)}
    after = {"boolq": accuracy(7, 10), "sum": accuracy(5, 10)}
    compared = {"sum": accuracy(10, 10)}
    figure = accuracy_bars({"before": before, "after": after, "LoRA": compared}, tmp_path / "bars.png")
    axes = figure.axes[0]
    bars, intervals = axes.containers[::2], axes.containers[1::2]
    assert [[bar.get_height() for bar in arm] for arm in bars] == [[0.1, 0], [0.7, 0.5], [1]]
    ends = intervals[1].lines[2][0].get_segments()
    np.testing.assert_allclose(
        [(low[1], high[1]) for low, high in ends], [(task.low, task.high) for task in after.values()]
    )
    # the arm that lacks boolq stands in the group of sum
    assert round(bars[2][0].get_x() + bars[2][0].get_width() / 2) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "after", "LoRA"]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["10.0", "0.0", "70.0", "50.0", "100.0"]


def test_the_suffix_is_the_format_and_folders_are_made(tmp_path):
    loss_curve([{"step": 1, "loss": 1.0}], tmp_path / "new" / "loss.svg")
    assert (tmp_path / "new" / "loss.svg").read_text().startswith("<?xml")


def rendered(table):
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("budget", "asked"), [(0.0084, "budget asked   0.8400% of the parameters"), (1200, "budget asked   1,200 blocks")]
)
def test_plan_table(budget, asked):
    counts = grid(4, lambda layer, projection: {"q_proj": int(layer == 1), "k_proj": 0, "v_proj": 3}[projection])
    text = rendered(plan_table(make_plan(counts, budget=budget, name="org/model[v2]")))
    assert "Plan for org/model[v2], 100 k parameters" in text
    assert "criterion abs_of_sum · policy global · 100 batches seen" in text
    assert asked in text
    assert "budget reached 3.3280%, 13 blocks of 16×16" in text
    cells = {line.split()[1]: line.replace("│", " ").split()[1:] for line in text.splitlines() if line.startswith("│")}
    assert cells == {
        "q_proj": ["1", "3", "1", "256", "7.7%"],
        "k_proj": ["0", "4", "0", "0", "0.0%"],
        "v_proj": ["4", "0", "12", "3,072", "92.3%"],
        "all": ["5", "7", "13", "3,328", "100.0%"],
    }


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (56_623_104, "56.6 M"), (99_960, "100 k"), (6_738_415_616, "6.74 B")],
)
def test_in_short(number, text):
    assert layout.in_short(number) == text
