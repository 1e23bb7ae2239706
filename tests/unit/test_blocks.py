from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smtune import InputError
from smtune.blocks import BlockColumns, BlockGrid, BlockIndex, gather, resolve_block_size, scatter_, tile


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(["contiguous", "transposed", "sliced"]),
    st.randoms(use_true_random=False),
)
def test_gather_and_scatter_agree_with_slicing(n_rows, n_cols, size, layout, random):
    grid = BlockGrid(n_rows * size, n_cols * size, size)
    places = [divmod(place, n_cols) for place in range(n_rows * n_cols)]
    index = BlockIndex.from_pairs(grid, random.sample(places, random.randint(0, len(places))))
    shape = (grid.out_features, grid.in_features)
    weight = {
        "contiguous": lambda: torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape),
        "transposed": lambda: torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape[::-1]).T,
        "sliced": lambda: torch.arange(1.0, 1 + 2 * shape[0] * shape[1]).view(shape[0], -1)[:, ::2],
    }[layout]()
    expected = [weight[r * size : (r + 1) * size, c * size : (c + 1) * size] for r, c in index.pairs]
    blocks = gather(weight, index)
    assert blocks.shape == (len(index), size, size)
    assert all(torch.equal(block, slice_) for block, slice_ in zip(blocks, expected))
    assert torch.equal(tile(weight, size)[0, 0], weight[:size, :size])

    before = weight.clone()
    scatter_(weight, index, -blocks)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, col in index.pairs:
        mask[row * size : (row + 1) * size, col * size : (col + 1) * size] = True
    assert torch.equal(weight, torch.where(mask, -before, before))


def test_tile_is_a_view():
    weight = torch.zeros(4, 6)
    tile(weight, 2)[1, 2] = 1
    assert weight.sum() == 4
    assert weight[2:, 4:].sum() == 4


def test_scatter_rounds_to_the_weights_dtype():
    index = BlockIndex.from_pairs(BlockGrid(2, 2, 2), [(0, 0)])
    weight = torch.zeros(2, 2, dtype=torch.bfloat16)
    scatter_(weight, index, torch.full((1, 2, 2), 1.001))
    assert (weight == 1).all()


def test_index_knows_its_columns():
    index = BlockIndex.from_pairs(BlockGrid(8, 16, 2), [(3, 7), (0, 2), (3, 2)])
    assert index.columns.cols == (2, 7)
    assert index.compact_sides == ((3, 0, 3), (1, 0, 0))
    assert not index.columns.is_all
    assert len(index) == 3


def test_index_keeps_more_columns_than_it_reads():
    index = BlockIndex.from_pairs(BlockGrid(8, 16, 2), [(3, 7), (0, 2)])
    columns = BlockColumns((0, 2, 5, 7), 8)
    kept = index.keeping(columns)
    assert kept.columns is columns
    assert kept.compact_sides == ((3, 0), (3, 1))
    assert kept.pairs == index.pairs
    assert index.compact_sides == ((3, 0), (1, 0))


def test_index_survives_copy_and_pickle():
    index = BlockIndex.from_pairs(BlockGrid(4, 4, 2), [(1, 0)])
    assert copy.deepcopy(index) is index
    assert pickle.loads(pickle.dumps(index)).pairs == index.pairs
    columns = BlockColumns((0, 1), 2)
    first, second = pickle.loads(pickle.dumps([index.keeping(columns), index.keeping(columns)]))
    assert first.compact_sides == ((1,), (0,))
    assert first.columns is second.columns


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([(2, 0)], r"inside the 2x3 grid.*Got \(2, 0\)"), ([(0, -1)], "inside"), ([(1, 1), (1, 1)], "more than once")],
)
def test_index_refuses_blocks_outside_or_repeated(pairs, message):
    with pytest.raises(InputError, match=message):
        BlockIndex.from_pairs(BlockGrid(4, 6, 2), pairs)


def test_auto_is_the_largest_common_divisor_up_to_256():
    assert resolve_block_size("auto", {"q": (4096, 4096)}) == 256
    assert resolve_block_size("auto", {"q": (576, 576), "k": (192, 576)}) == 192
    assert resolve_block_size("auto", {"q": (7, 13)}) == 1


def test_a_size_that_does_not_divide_names_module_shape_and_sizes():
    shapes = {"layers.0.q_proj": (576, 576), "layers.0.k_proj": (192, 576)}
    with pytest.raises(InputError) as error:
        resolve_block_size(128, shapes)
    message = str(error.value)
    assert "128" in message
    assert "layers.0.q_proj" in message
    assert "(576, 576)" in message
    assert "192, 96, 64, 48, 32" in message


@pytest.mark.parametrize("size", [0, -64, "big", 64.0, True])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InputError, match="block_size"):
        resolve_block_size(size, {"q": (64, 64)})
