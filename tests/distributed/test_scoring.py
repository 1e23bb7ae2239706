"""Two gloo processes that each see half of the batches score and plan as one process that sees them all."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import smtune
from smtune import SMTConfig

CRITERIA = ("abs_of_sum", "net", "sum_of_abs", "fisher", "activation")
WORLD_SIZE = 2


def make_config(criterion: str) -> SMTConfig:
    return SMTConfig(block_size=16, budget=8, criterion=criterion)


def rank_main(rank: int, port: int, model, batches, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    try:
        results = {}
        for criterion in CRITERIA:
            config = make_config(criterion)
            scores = smtune.score_blocks(model, batches[rank::WORLD_SIZE], config)
            plan = smtune.make_plan(model, batches[rank::WORLD_SIZE], config)
            results[criterion] = (dict(scores), scores.batches_seen, plan.to_dict())
        torch.save(results, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_score_and_plan_as_one_process(tiny_llama, tmp_path):
    # Five batches: the ranks see different ones, and not equally many.
    ids = torch.randint(0, 256, (5, 2, 12))
    batches = [{"input_ids": each, "labels": each} for each in ids]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(port, copy.deepcopy(tiny_llama), batches, tmp_path), nprocs=WORLD_SIZE)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE))

    for criterion in CRITERIA:
        config = make_config(criterion)
        expected = smtune.score_blocks(tiny_llama, batches, config)
        half = smtune.score_blocks(tiny_llama, batches[::WORLD_SIZE], config)
        scores, seen, plan = first[criterion]
        assert seen == expected.batches_seen == 5
        assert list(scores) == list(expected)
        for name, score in scores.items():
            assert torch.equal(score, second[criterion][0][name])  # bit for bit the same on both ranks
            scale = expected[name].max().item()
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-6 * scale)
        # One rank's own batches give other scores, so a sum that is left out cannot pass.
        assert any((scores[name] - half[name]).abs().max() > 0.01 * half[name].max() for name in half)
        assert plan == second[criterion][2]
        alone = smtune.make_plan(tiny_llama, batches, config).to_dict()
        assert [each["blocks"] for each in plan["modules"]] == [each["blocks"] for each in alone["modules"]]
        assert plan["batches_seen"] == 5
