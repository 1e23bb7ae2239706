"""The study's optimizers against torch's, and the state that blocks carry over."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smtune.reproduce.optimizers import BlockAdamW, BlockMuon, ColumnAdamW, carry, orthogonalised


def descend(optimizer, tensor, targets, steps):
    for step in range(steps):
        optimizer.zero_grad()
        (tensor - targets[step % len(targets)]).square().sum().backward()
        optimizer.step()


def blocks(m=3, size=4, seed=0):
    return nn.Parameter(torch.randn(m, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 12))
def test_blocks_of_one_age_are_trained_as_by_adamw(m, size, steps):
    ours, theirs = blocks(m, size), blocks(m, size)
    targets = [blocks(m, size, seed).detach() for seed in (1, 2)]
    descend(BlockAdamW([ours], lr=0.1), ours, targets, steps)
    descend(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0), theirs, targets, steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_steps_by_column_are_adams_times_a_factor_of_each_column(m, size, steps):
    ours, theirs = blocks(m, size), blocks(m, size)
    targets = [10.0 ** torch.arange(size) * blocks(m, size, seed).detach() for seed in (1, 2)]  # columns of all sizes
    by_column, adam = ColumnAdamW([ours], lr=0.1), BlockAdamW([theirs], lr=0.1)
    for step in range(steps):
        theirs.data.copy_(ours.data)
        before = ours.detach().clone()
        descend(by_column, ours, targets[step % 2 :], 1)
        descend(adam, theirs, targets[step % 2 :], 1)
        squares = by_column.state[ours]["square"]
        sizes = torch.tensor([[squares[k, :, j].mean().sqrt() for j in range(size)] for k in range(m)]).double()
        for k, j in itertools.product(range(m), range(size)):
            factor = 2 * sizes.mean() / (sizes[k, j] + sizes.mean())
            expected = before[k, :, j] + factor * (theirs.detach() - before)[k, :, j]
            torch.testing.assert_close(ours.detach()[k, :, j], expected, rtol=1e-6, atol=1e-9)


@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 6))
def test_every_block_is_trained_as_a_matrix_by_muon(m, size, steps):
    """torch's Muon orthogonalises in bf16, whose rounding its steps amplify, so it is held against ours loosely."""
    ours = blocks(m, size)
    targets = [blocks(m, size, seed).detach() for seed in (1, 2)]
    theirs = [block.detach().clone().requires_grad_(True) for block in ours]
    descend(BlockMuon([ours], lr=0.1), ours, targets, steps)
    for k, matrix in enumerate(theirs):
        optimizer = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        descend(optimizer, matrix, [target[k] for target in targets], steps)
    moved = 0.1 * 0.2 * size**0.5 * steps  # if every singular value were one
    assert torch.stack(theirs).sub(ours).abs().max() < 0.25 * moved


def test_orthogonalised_has_the_singular_vectors_and_values_near_one():
    matrices = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalised(matrices, steps=10)
    u, values, v = torch.linalg.svd(matrices)
    inner = u.mT @ found @ v.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-6
    large = values / values.norm(dim=1, keepdim=True) > 0.01
    assert inner.diagonal(dim1=-2, dim2=-1)[large].sub(1).abs().max() < 0.35


@pytest.mark.parametrize("kind", [BlockAdamW, BlockMuon])
def test_a_block_that_stays_goes_on_and_one_that_joins_starts_anew(kind):
    """Blocks 0 and 2 of three become blocks 1 and 0 of three: each must go on as if nothing had happened."""
    old, targets = blocks(), [blocks(seed=1).detach(), blocks(seed=2).detach()]
    first = kind([old], lr=0.1)
    descend(first, old, targets, 4)
    values = torch.stack([old[2], old[0], torch.zeros(4, 4, dtype=torch.float64)]).detach()
    new = nn.Parameter(values.clone())
    second = kind([new], lr=0.1)
    carry(first, second, {new: (old, torch.tensor([0, 2]), torch.tensor([1, 0]))})
    new_targets = [torch.stack([target[2], target[0], target[1]]) for target in targets]

    fresh = nn.Parameter(values[2:].clone())
    descend(first, old, targets, 4)
    descend(second, new, new_targets, 4)
    descend(kind([fresh], lr=0.1), fresh, [target[1:2] for target in targets], 4)
    torch.testing.assert_close(new, torch.stack([old[2], old[0], fresh[0]]), rtol=0, atol=0)
