"""Blocks of a weight matrix: the grid, the index of selected blocks, and three operations on them.

A weight `W` of shape (O, I) is cut into `l x l` blocks (paper §3.1: `N = d·k / l²` sub-matrices). `BlockGrid` is
the cut, `BlockIndex` a set of blocks in it, `tile` the weight seen as its blocks, `gather` and `scatter_` move the
values of the indexed blocks out of and into the weight. Everything above works on these two types.

Shapes: O out, I in, l block size, R×C grid (R = O/l, C = I/l), m blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smtune.errors import InputError

MAX_AUTO_BLOCK_SIZE = 256
"""`block_size="auto"` never exceeds this: the paper's l (§4.1)."""


@dataclass(frozen=True)
class BlockGrid:
    """The R×C grid of `block_size`² blocks of an (O, I) weight."""

    out_features: int
    in_features: int
    block_size: int

    def __post_init__(self) -> None:
        """Raises InputError if either side is not a multiple of the block size."""
        check_block_size(self.block_size, {"weight": (self.out_features, self.in_features)})

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C): rows and columns of blocks."""
        return self.out_features // self.block_size, self.in_features // self.block_size

    @property
    def n_blocks(self) -> int:
        rows, cols = self.shape
        return rows * cols


@dataclass(frozen=True, eq=False)
class BlockColumns:
    """Some of the C block columns of an input: the part of x that is kept for block gradients.

    Compared by identity: layers that share an input share one object, and so one gather.

    Args:
        cols: distinct, ascending.
        n_cols: C.
    """

    cols: tuple[int, ...]
    n_cols: int
    _on: dict[torch.device, Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def is_all(self) -> bool:
        return len(self.cols) == self.n_cols

    def on(self, device: torch.device) -> Tensor:
        """The columns as (U,) int64 on `device`; copied there once."""
        if device not in self._on:
            with torch.inference_mode(False):  # kept for later uses, which may be in training
                self._on[device] = torch.tensor(self.cols, dtype=torch.int64, device="cpu").to(device)
        return self._on[device]

    def __deepcopy__(self, memo: dict) -> BlockColumns:
        return self  # immutable

    def __reduce__(self):
        return BlockColumns, (self.cols, self.n_cols)


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """m distinct blocks of a grid, in a fixed order: block k is (rows[k], cols[k]).

    Args:
        grid: the grid the blocks belong to.
        rows, cols: (m,) int64 on the CPU. `on(device)` gives them elsewhere.
    Attributes:
        pairs: the blocks as (row, col) integers on the host, for loops that must not synchronise with a device.
        columns: the block columns of x that are kept for the block gradients: those that some block reads, or more of
            them after `keeping`.
        positions: of each block, where it stands in `pairs`.
        sides: `pairs` as all rows and all columns, as operators take them.
        compact_sides: the same, with each column replaced by its position in `columns`.
    Raises:
        InputError: unequal lengths, a block outside the grid, or a block named twice.
    """

    grid: BlockGrid
    rows: Tensor
    cols: Tensor
    pairs: tuple[tuple[int, int], ...] = field(init=False, repr=False)
    positions: dict[tuple[int, int], int] = field(init=False, repr=False)
    columns: BlockColumns = field(init=False, repr=False)
    sides: tuple[tuple[int, ...], tuple[int, ...]] = field(init=False, repr=False)
    compact_sides: tuple[tuple[int, ...], tuple[int, ...]] = field(init=False, repr=False)
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        n_rows, n_cols = self.grid.shape
        if self.rows.shape != self.cols.shape or self.rows.dim() != 1:
            raise InputError(
                f"Expected rows and cols of one length. Got {tuple(self.rows.shape)} and {tuple(self.cols.shape)}."
            )
        # Computed here and not on demand: compilers cannot trace through a lazy property.
        object.__setattr__(self, "sides", (tuple(self.rows.tolist()), tuple(self.cols.tolist())))
        object.__setattr__(self, "pairs", tuple(zip(*self.sides)))
        object.__setattr__(self, "positions", {pair: k for k, pair in enumerate(self.pairs)})
        object.__setattr__(self, "_on", {})
        self._keep(BlockColumns(tuple(sorted({col for _, col in self.pairs})), n_cols))
        for row, col in self.pairs:
            if not (0 <= row < n_rows and 0 <= col < n_cols):
                raise InputError(
                    f"Expected blocks inside the {n_rows}x{n_cols} grid of a ({self.grid.out_features}, "
                    f"{self.grid.in_features}) weight with block size {self.grid.block_size}. Got ({row}, {col})."
                )
        if len(self.positions) != len(self.pairs):
            repeated = next(pair for pair in self.pairs if self.pairs.count(pair) > 1)
            raise InputError(f"Expected distinct blocks. Got {repeated} more than once.")

    @classmethod
    def from_pairs(cls, grid: BlockGrid, pairs: Iterable[tuple[int, int]]) -> BlockIndex:
        """The index of the (row, col) pairs, in the order given."""
        pairs = list(pairs)
        rows = torch.tensor([row for row, _ in pairs], dtype=torch.int64, device="cpu")
        cols = torch.tensor([col for _, col in pairs], dtype=torch.int64, device="cpu")
        return cls(grid, rows, cols)

    def __len__(self) -> int:
        return self.rows.numel()

    def keeping(self, columns: BlockColumns) -> BlockIndex:
        """The same blocks, with `columns`, which hold all columns that they read, kept of x."""
        index = object.__new__(BlockIndex)
        index.__dict__.update(self.__dict__)
        index._keep(columns)
        return index

    def _keep(self, columns: BlockColumns) -> None:
        position = {col: k for k, col in enumerate(columns.cols)}
        object.__setattr__(self, "columns", columns)
        rows, cols = self.sides
        object.__setattr__(self, "compact_sides", (rows, tuple(position[col] for col in cols)))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, cols) as int64 on `device`; copied there once."""
        if device not in self._on:
            with torch.inference_mode(False):  # kept for later uses, which may be in training
                self._on[device] = (self.rows.to(device), self.cols.to(device))
        return self._on[device]

    def __deepcopy__(self, memo: dict) -> BlockIndex:
        return self  # immutable

    def __reduce__(self):
        return _rebuild_index, (self.grid, self.rows, self.cols, self.columns)


def _rebuild_index(grid: BlockGrid, rows: Tensor, cols: Tensor, columns: BlockColumns) -> BlockIndex:
    return BlockIndex(grid, rows, cols).keeping(columns)


def tile(weight: Tensor, block_size: int) -> Tensor:
    """The weight seen as its blocks.

    Args:
        weight: (O, I), any strides.
        block_size: l, divides O and I.
    Returns:
        (R, C, l, l), a view: writing to it writes to the weight.
    """
    rows, cols = weight.shape
    return weight.view(rows // block_size, block_size, cols // block_size, block_size).transpose(1, 2)


def gather(weight: Tensor, index: BlockIndex) -> Tensor:
    """A copy of the indexed blocks, (m, l, l), in index order and the weight's dtype."""
    rows, cols = index.on(weight.device)
    return tile(weight, index.grid.block_size)[rows, cols]


def scatter_(weight: Tensor, index: BlockIndex, blocks: Tensor) -> Tensor:
    """Write blocks (m, l, l) over the indexed places of `weight`, rounding to its dtype. Returns `weight`."""
    rows, cols = index.on(weight.device)
    tile(weight, index.grid.block_size).index_put_((rows, cols), blocks.to(weight.dtype))
    return weight


def resolve_block_size(block_size: int | str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The block size as a number, checked against the shapes of all targeted weights.

    Args:
        block_size: a positive number, or "auto": the largest common divisor of the shapes, at most 256 (paper §4.1).
        shapes: (O, I) by module name.
    Raises:
        InputError: not a size, or it does not divide some shape; names the module and the sizes that would do.
    """
    if block_size == "auto":
        common = math.gcd(*(side for shape in shapes.values() for side in shape))
        return max(divisor for divisor in _divisors(common) if divisor <= MAX_AUTO_BLOCK_SIZE)
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise InputError(f'Expected block_size to be "auto" or a positive integer. Got {block_size!r}.')
    check_block_size(block_size, shapes)
    return block_size


def check_block_size(block_size: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises InputError if `block_size` fails to divide a shape: names them, and the sizes that divide all."""
    faulty = {
        name: shape for name, shape in shapes.items() if block_size < 1 or any(side % block_size for side in shape)
    }
    if not faulty:
        return
    common = math.gcd(*(side for shape in shapes.values() for side in shape))
    sizes = [divisor for divisor in _divisors(common) if divisor <= 2 * MAX_AUTO_BLOCK_SIZE]
    name, shape = next(iter(faulty.items()))
    others = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
    raise InputError(
        f"Expected a block size that divides every targeted weight. Got {block_size}, which does not divide "
        f"{name} of shape {tuple(shape)}{others}. Sizes that would do: {', '.join(map(str, sizes[::-1]))}."
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
