"""Scoring a model on a real GPU, with accumulators beside the gradients and on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import smtune
from smtune import SMTConfig, scoring

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

DEVICE = "cuda"


def scores_and_places(model, batches, monkeypatch, **changes):
    """The scores, and the kinds of devices where accumulators were."""
    places = set()

    def sum_over_ranks(accumulators, *rest, original=scoring._sum_over_ranks):
        places.update(accumulator.sum.device.type for accumulator in accumulators.values())
        return original(accumulators, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_sum_over_ranks", sum_over_ranks)
        return smtune.score_blocks(model, batches, SMTConfig(block_size=16, budget=8, **changes)), places


@pytest.mark.parametrize("criterion", ["abs_of_sum", "net", "sum_of_abs", "fisher", "activation"])
def test_accumulators_on_the_cpu_give_the_same_scores(tiny_llama, criterion, monkeypatch):
    model = tiny_llama.to(DEVICE)
    ids = torch.randint(0, 256, (3, 2, 12))
    batches = [{"input_ids": each, "labels": each} for each in ids]
    expected, places = scores_and_places(model, batches, monkeypatch, criterion=criterion)
    assert places == {DEVICE}
    scores, places = scores_and_places(model, batches, monkeypatch, criterion=criterion, accumulator_device="cpu")
    assert places == {"cpu"}
    assert scores.batches_seen == expected.batches_seen == 3
    assert list(scores) == list(expected)
    for name, score in expected.items():
        assert score.max() > 0
        torch.testing.assert_close(scores[name], score, rtol=1e-4, atol=1e-5 * score.max().item())
