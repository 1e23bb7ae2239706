"""Plans for measuring: how many blocks, at random places.

Random places are the worst case for what a plan keeps for the backward: blocks chosen by score crowd in fewer columns.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from smtune.bench.subjects import LLAMA_7B_BLOCKS, LLAMA_7B_PARAMS, attention_inputs
from smtune.blocks import BlockGrid
from smtune.selection import ModulePlan, Plan


def paper_share(percent: float) -> float:
    """The share of a layer's q, k, v blocks that trains `percent` of LLaMA-7B, by whole blocks of 256² a layer.

    0.43, 0.84, 1.26, 2.5, 3.73 and 4.91 percent are 14, 27, 40, 80, 120 and 158 of 768 blocks.
    """
    return round(percent / 100 * LLAMA_7B_PARAMS / 256**2 / 32) / LLAMA_7B_BLOCKS


def used_columns(plan: Plan) -> int:
    """Columns of inputs that some block reads, in all: modules of one parent read the same input."""
    by_input: dict[str, set[int]] = {}
    for name, module in plan.modules.items():
        by_input.setdefault(name.rpartition(".")[0], set()).update(module.cols)
    return plan.block_size * sum(map(len, by_input.values()))


def random_plan(
    model: nn.Module, block_size: int, share: float, layers: Collection[int] | None = None, seed: int = 0
) -> Plan:
    """The same number of blocks in every layer, at random places of its q, k and v.

    Args:
        model: a decoder, not wrapped.
        block_size: l.
        share: of a layer's q, k, v blocks; at least one block.
        layers: numbers of the layers that have blocks. None: all.
        seed: of the places.
    """
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, ModulePlan] = {}
    for number, projections in enumerate(attention_inputs(model)):
        grids = {
            name: BlockGrid(module.out_features, module.in_features, block_size) for name, module in projections.items()
        }
        total = sum(grid.n_blocks for grid in grids.values())
        count = max(1, round(share * total)) if layers is None or number in layers else 0
        chosen = torch.randperm(total, generator=generator)[:count].sort().values.tolist()
        start = 0
        for name, grid in grids.items():
            places = [place - start for place in chosen if start <= place < start + grid.n_blocks]
            start += grid.n_blocks
            modules[name] = ModulePlan(
                shape=(grid.out_features, grid.in_features),
                rows=tuple(place // grid.shape[1] for place in places),
                cols=tuple(place % grid.shape[1] for place in places),
            )
    n_blocks = sum(len(module.rows) for module in modules.values())
    total_params = sum(parameter.numel() for parameter in model.parameters())
    return Plan(modules, block_size, "random", "per_module", budget=n_blocks, total_params=total_params, seed=seed)
