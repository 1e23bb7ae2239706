"""Beams of a tier: LLM-Adapters' four at the paper's scale; a cell is named by them only where they are not one."""

from __future__ import annotations

import types

import pytest

from smtune.reproduce import declared, setting, work
from smtune.reproduce.declared import load_tier
from smtune.reproduce.setting import Setting


@pytest.fixture
def without_data(monkeypatch):
    monkeypatch.setattr(setting, "load_data", lambda *_: types.SimpleNamespace(identity={}))
    monkeypatch.setattr(setting, "weights", lambda *_: "weights")


@pytest.mark.parametrize(("tier", "model", "beams"), [("mini", "mini", None), ("paper", "llama-7b", 4)])
def test_a_cell_names_beams_where_they_are_not_one(without_data, tier, model, beams):
    assert load_tier(tier).evaluation.beams == (beams or 1)
    evaluation = Setting(tier).base(model, "choice")["evaluation"]
    assert evaluation.get("beams") == beams
    # Nothing else was added to what cells are named by.
    assert evaluation.keys() - {"beams"} == {"protocol", "validation_rows", "batch_size"}


@pytest.mark.parametrize("beams", [None, 4])
def test_beams_reach_the_evaluation(monkeypatch, beams):
    asked = []

    def answer(*_, **kwargs):
        asked.append(kwargs["beams"])
        return types.SimpleNamespace(results=[], summary=types.SimpleNamespace(tasks=[]))

    monkeypatch.setattr(work, "evaluate", answer)
    monkeypatch.setattr(work, "_loss", lambda *_: None)
    evaluation = {"protocol": "generate", "batch_size": 2} | ({} if beams is None else {"beams": beams})
    data = types.SimpleNamespace(validation_items=["item"], tests=["item"], validation=[], other_text=[])
    model = types.SimpleNamespace(config=types.SimpleNamespace())
    work._evaluate(model, None, [data], {"evaluation": evaluation, "weights": "w"}, {})
    assert asked == [beams or 1] * 2


def test_likelihood_has_no_beams():
    with pytest.raises(ValueError, match="generated"):
        declared.Evaluation(protocol="likelihood", beams=4)
