"""Values with intervals, in panels."""

import pytest

from smtune.evaluation.statistics import Estimate
from smtune.report.forest import dots


def test_dots_stand_at_their_values_in_the_panel_of_their_task(tmp_path):
    panels = {
        "math": {"SMT": Estimate(0.2, 0.15, 0.3), "LoRA": Estimate(0.5, 0.4, 0.55)},
        "choice": {"SMT": Estimate(0.6, 0.5, 0.7)},
    }
    figure = dots(panels, tmp_path / "dots.png", x="accuracy, %", title="A title")
    assert (tmp_path / "dots.png").stat().st_size > 1000
    assert figure.get_suptitle() == "A title"
    for axes, (heading, values) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_title(loc="left") == heading
        assert [label.get_text() for label in axes.get_yticklabels()] == list(values)
        assert [text.get_text() for text in axes.texts] == [f"{100 * each.value:.1f}" for each in values.values()]
        for container, each in zip(axes.containers, values.values(), strict=True):
            (point, _, (bar,)) = container.lines
            assert point.get_xdata() == pytest.approx([100 * each.value])
            assert bar.get_segments()[0][:, 0] == pytest.approx([100 * each.low, 100 * each.high])
