"""Two gloo processes that each see some of the batches score and plan as one process that sees them all."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smtune
from smtune import InputError, SMTConfig

CRITERIA = ("abs_of_sum", "net", "sum_of_abs", "fisher", "activation")
WORLD_SIZE = 2


class Stack(nn.Module):
    """Small and plain, so that the processes start soon."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, labels):
        return SimpleNamespace(loss=(self.k_proj(self.q_proj(x).tanh()) - labels).square().mean())


class Branch(Stack):
    """k_proj takes part only for batches that say so, as an expert does."""

    def forward(self, x, labels, use_k=True):
        hidden = self.q_proj(x).tanh()
        return SimpleNamespace(loss=(self.k_proj(hidden) if use_k else hidden[..., :32] - labels).square().mean())


def make_model() -> Stack:
    torch.manual_seed(0)
    return Stack()


def make_batches() -> list[dict[str, torch.Tensor]]:
    """Five: the ranks see different ones, and not equally many."""
    generator = torch.Generator().manual_seed(1)
    return [{key: torch.randn(2, 6, 32, generator=generator) for key in ("x", "labels")} for _ in range(5)]


def make_config(criterion: str) -> SMTConfig:
    return SMTConfig(target_modules=["q_proj", "k_proj"], block_size=8, budget=11, criterion=criterion)


def score_and_plan(batches):
    """{criterion: (scores, batches seen, plan)}."""
    results = {}
    for criterion in CRITERIA:
        scores = smtune.score_blocks(make_model(), batches, make_config(criterion))
        plan = smtune.make_plan(make_model(), batches, make_config(criterion))
        results[criterion] = (dict(scores), scores.batches_seen, plan.to_dict())
    return results


def score_branch(batches):
    torch.manual_seed(0)
    return dict(smtune.score_blocks(Branch(), batches, make_config("abs_of_sum")))


def branch_batches():
    """Only the first of two uses k_proj; the second belongs to rank 1."""
    return [batch | {"use_k": k == 0} for k, batch in enumerate(make_batches()[:2])]


def failure_of(batches, model=None) -> str:
    with pytest.raises((InputError, OSError)) as error:
        smtune.score_blocks(model or make_model(), batches, make_config("net"))
    return str(error.value)


def make_sharded() -> nn.Module:
    model = make_model()
    for layer in (model.q_proj, model.k_proj, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    return model


def broken_batches(rank):
    """The second one of rank 1 has a loss that is not finite."""
    first, second = make_batches()[:2]
    return [first, {key: value / (1 - rank) for key, value in second.items()}]


def unreadable_batches(rank):
    yield make_batches()[0]
    if rank == 1:
        raise OSError("cannot read row 7")
    yield make_batches()[1]


def rank_main(rank: int, port: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    try:
        planned = score_and_plan(make_batches()[rank::WORLD_SIZE])
        branch = score_branch(branch_batches()[rank::WORLD_SIZE])
        few = dict(smtune.score_blocks(make_model(), make_batches()[:1][rank::WORLD_SIZE], make_config("net")))
        failures = failure_of([]), failure_of([make_batches()[0], None][rank::WORLD_SIZE])
        failures += (
            failure_of(broken_batches(rank), make_sharded()),
            failure_of(unreadable_batches(rank), make_sharded()),
        )
        torch.save((planned, branch, few, failures), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_ranks_score_and_plan_as_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(port, tmp_path), nprocs=WORLD_SIZE)
    (first, branch, few, failures), (second, second_branch, second_few, second_failures) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD_SIZE)
    )
    alone = score_and_plan(make_batches())
    partial = score_and_plan(make_batches()[::WORLD_SIZE])

    for criterion in CRITERIA:
        scores, seen, plan = first[criterion]
        expected, expected_seen, expected_plan = alone[criterion]
        assert seen == expected_seen == plan["batches_seen"] == 5
        assert list(scores) == list(expected)
        for name, score in scores.items():
            assert torch.equal(score, second[criterion][0][name])  # bit for bit the same on both ranks
            torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-6 * expected[name].max().item())
            # One rank's own batches score otherwise, so a sum over ranks that is left out cannot pass.
            assert not torch.allclose(score, partial[criterion][0][name], rtol=1e-2)
        assert plan == second[criterion][2]
        blocks, expected_blocks = ([each["blocks"] for each in p["modules"]] for p in (plan, expected_plan))
        assert blocks == expected_blocks

    # A layer that only one rank reaches is not mistaken for another.
    for name, score in score_branch(branch_batches()).items():
        torch.testing.assert_close(branch[name], score, rtol=1e-4, atol=1e-8)
        assert torch.equal(branch[name], second_branch[name])
    # One batch for two ranks is enough; a failure of either is told by both.
    for name, score in smtune.score_blocks(make_model(), make_batches()[:1], make_config("net")).items():
        torch.testing.assert_close(few[name], score, rtol=1e-4, atol=1e-8)
        assert torch.equal(few[name], second_few[name])
    assert "at least one batch" in failures[0]
    assert "at least one batch" in second_failures[0]
    assert "every rank to score its batches. Got 1 that failed, first rank 1 with InputError: Expected" in failures[1]
    for text in (failures[1], second_failures[1]):
        assert "NoneType at batch 1" in text
    # So it is where they hold a part of each weight, and would wait for one that does not come.
    assert failures[2].endswith("first rank 1 with InputError: " + second_failures[2])
    assert "Expected a finite loss. Got nan at batch 2" in second_failures[2]
    assert failures[3].endswith("first rank 1 with OSError: cannot read row 7")
    assert second_failures[3] == "cannot read row 7"
