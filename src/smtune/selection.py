"""Select the best-scoring blocks within a parameter budget: scores in, a `Plan` out (paper §3.1, appendix B).

The choice is deterministic, of `sampled` for a seed: by score, ties by module order, then row, then column. Policies:

- `global`: the best blocks of all targeted matrices together (the paper).
- `per_module`: the same number from every matrix.
- `shares`: the budget split by given shares between groups of matrices (the paper's Table 4), then `global` in each.
- `sampled`: drawn without replacement from all targeted matrices together, each block with its score for a weight. The
  best blocks stand in few rows and columns of few matrices; a draw favours them and reaches the others too (ADR 0018).

A matrix may hold several projections, as GPT-2's `c_attn` does q, k and v. Its blocks stay blocks of the one matrix;
their *kind* says which projection their rows belong to, and shares and reports go by it.

Beside the parameters a plan may be held to a time: `max_backward_cost`, a fraction of the whole dX chain (see
`smtune.depth`). A plan costs what its lowest selected matrix does, so it keeps within the limit if and only if every
matrix it selects from would alone. The policy therefore chooses among those matrices only, and for `global` the result
has the highest score of all plans within both budgets.

A plan is JSON and self-contained. Shapes: R×C grid of blocks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smtune.blocks import BlockGrid, BlockIndex
from smtune.errors import InputError, did_you_mean
from smtune.files import write_text
from smtune.weights import shape_OI

POLICIES = ("global", "per_module", "shares", "sampled")
FORMAT_VERSION = 1
_SINCE_COSTS = ("max_backward_cost", "backward_cost", "score_kept")  # a plan made before they were has none of them

MIXED = "mixed"
"""The kind of a block whose rows are not all of one kind, or serve several."""

PROJECTION_GROUPS: dict[str, frozenset[str]] = {
    "attention": frozenset(
        {"q", "k", "v", "gate", MIXED}
        | {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value", "o"}
        | {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}
    ),
    "mlp": frozenset(
        {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc"}
        | {"dense_h_to_4h", "dense_4h_to_h", "wi", "wi_0", "wi_1", "wo"}
    ),
}
"""The groups that `shares` may name, beside a kind or a projection's own name."""


@dataclass(frozen=True)
class ModulePlan:
    """The selected blocks of one matrix.

    Attributes:
        shape: (O, I) of the weight.
        rows, cols: block k is (rows[k], cols[k]); both empty where the matrix stays frozen.
        score_mean, score_max: over all blocks of the matrix; None where nothing was scored.
        kinds: what each row of blocks computes, (R,) of "q", "k", "v", "gate" (of attention's output) and "mixed";
            empty where that is not known.
    """

    shape: tuple[int, int]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    score_mean: float | None = None
    score_max: float | None = None
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which blocks of a model are trained, and how that came about.

    Attributes:
        modules: every targeted matrix by module name, in model order, those without a selected block included.
        block_size: l.
        criterion, policy: how blocks were scored and chosen.
        budget: what was asked: a fraction of all parameters (float) or a number of blocks (int).
        total_params: parameters of the model, tied ones once.
        batches_seen: warm-up batches, over all ranks.
        model_name: where the model came from, or "".
        shares: the shares of the policy `shares`, or None.
        seed: of a random criterion, the policy `sampled` or a shuffled plan.
        max_backward_cost: the limit that was set on the cost of the backward, or None.
        backward_cost: what the plan costs, a fraction of the whole dX chain; None where it was not counted.
        score_kept: the share of the score that the same policy reaches without the limit, which a draw and "per_module"
            may exceed; None without a limit.
    """

    modules: dict[str, ModulePlan]
    block_size: int
    criterion: str
    policy: str
    budget: float | int
    total_params: int
    batches_seen: int = 0
    model_name: str = ""
    shares: dict[str, float] | None = None
    seed: int = 0
    max_backward_cost: float | None = None
    backward_cost: float | None = None
    score_kept: float | None = None

    def __post_init__(self) -> None:
        for name, module in self.modules.items():
            try:
                self._index(module)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    @property
    def n_blocks(self) -> int:
        return sum(len(module.rows) for module in self.modules.values())

    @property
    def n_params(self) -> int:
        """Parameters trained: m·l²."""
        return self.n_blocks * self.block_size**2

    @property
    def fraction(self) -> float:
        """Parameters trained over all parameters."""
        return self.n_params / self.total_params

    def by_kind(self, name: str) -> dict[str, tuple[int, int]]:
        """(selected, all) blocks of a matrix by kind, in order of rows; by its last name where kinds are not known."""
        module = self.modules[name]
        n_rows, n_cols = module.shape[0] // self.block_size, module.shape[1] // self.block_size
        kinds = module.kinds or (name.rpartition(".")[2],) * n_rows
        selected = [kinds[row] for row in module.rows]
        return {kind: (selected.count(kind), kinds.count(kind) * n_cols) for kind in dict.fromkeys(kinds)}

    def index(self, name: str) -> BlockIndex:
        """The selected blocks of a module as an index. Raises KeyError for a module that is not in the plan."""
        return self._index(self.modules[name])

    def _index(self, module: ModulePlan) -> BlockIndex:
        if len(module.rows) != len(module.cols):
            raise InputError(f"Expected a row and a column for each block. Got {module.rows} and {module.cols}.")
        grid = BlockGrid(*module.shape, self.block_size)
        if module.kinds and len(module.kinds) != grid.shape[0]:
            raise InputError(f"Expected a kind for each of {grid.shape[0]} rows of blocks. Got {len(module.kinds)}.")
        return BlockIndex.from_pairs(grid, list(zip(module.rows, module.cols)))

    def shuffled(self, seed: int) -> Plan:
        """A control: the same number of blocks in every matrix, of every kind, at uniformly random places."""
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for name, module in self.modules.items():
            grid = BlockGrid(*module.shape, self.block_size)
            kinds = module.kinds or ("",) * grid.shape[0]
            selected = [kinds[row] for row in module.rows]
            places = []
            for kind in dict.fromkeys(kinds):
                of_kind = torch.arange(grid.n_blocks, device="cpu").view(grid.shape)[_rows_of({kind}, kinds)].flatten()
                shuffled = of_kind[torch.randperm(len(of_kind), generator=generator, device="cpu")]
                places += shuffled[: selected.count(kind)].tolist()
            rows, cols = _split(sorted(places), grid)
            modules[name] = dataclasses.replace(module, rows=rows, cols=cols)
        criterion = f"{self.criterion}, shuffled"
        return dataclasses.replace(self, modules=modules, criterion=criterion, seed=seed, score_kept=None)

    def check(self, model: nn.Module) -> None:
        """Raises InputError unless every module of the plan is in `model` with the shape planned for."""
        present = dict(model.named_modules())
        faults = []
        for name, module in self.modules.items():
            layer = present.get(name)
            if layer is None:
                faults.append(f"{name}: not in the model.{did_you_mean(name, present)}")
                continue
            shape = shape_OI(layer)
            if shape != tuple(module.shape):
                faults.append(f"{name}: expected a weight of shape {tuple(module.shape)}, got {shape}.")
        if faults:
            shown = "\n  ".join(faults[:5]) + (f"\n  … and {len(faults) - 5} more." if len(faults) > 5 else "")
            made_for = f" It was made for {self.model_name!r}." if self.model_name else ""
            raise InputError(f"The plan does not fit this model.{made_for} Make a plan for it.\n  {shown}")

    def to_dict(self) -> dict:
        """Plain JSON values. Blocks are written as "row,col row,col …", kinds as "q:16 k:4 v:4", rows of each."""
        return {
            "format": FORMAT_VERSION,
            "model_name": self.model_name,
            "block_size": self.block_size,
            "criterion": self.criterion,
            "policy": self.policy,
            "shares": self.shares,
            "budget": self.budget,
            "seed": self.seed,
            "batches_seen": self.batches_seen,
            "total_params": self.total_params,
            "n_blocks": self.n_blocks,
            "n_params": self.n_params,
            **{name: getattr(self, name) for name in _SINCE_COSTS},
            "modules": [
                {
                    "name": name,
                    "shape": list(module.shape),
                    "blocks": " ".join(f"{row},{col}" for row, col in zip(module.rows, module.cols)),
                    "score_mean": module.score_mean,
                    "score_max": module.score_max,
                    "kinds": " ".join(f"{kind}:{len(list(run))}" for kind, run in groupby(module.kinds)),
                }
                for name, module in self.modules.items()
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> Plan:
        """The inverse of `to_dict`. Raises InputError for what is not a plan."""
        if not isinstance(values, Mapping) or "format" not in values:
            raise InputError("Expected a plan: a JSON object with a `format`. Got something else.")
        if values["format"] != FORMAT_VERSION:
            raise InputError(
                f"Expected a plan of format {FORMAT_VERSION}. Got {values['format']!r}: update smtune, or remake it."
            )
        try:
            modules = {}
            for module in values["modules"]:
                pairs = [tuple(map(int, pair.split(","))) for pair in module["blocks"].split()]
                modules[module["name"]] = ModulePlan(
                    shape=(int(module["shape"][0]), int(module["shape"][1])),
                    rows=tuple(row for row, _ in pairs),
                    cols=tuple(col for _, col in pairs),
                    score_mean=module["score_mean"],
                    score_max=module["score_max"],
                    kinds=tuple(_spelled_out(module.get("kinds", ""))),  # a plan made before they were has none
                )
            fields = {field.name for field in dataclasses.fields(cls)} - {"modules"}
            known: dict[str, Any] = dict.fromkeys(_SINCE_COSTS) | dict(values)
            return cls(modules=modules, **{name: known[name] for name in fields})
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"Expected a plan as `Plan.save` writes it. Got one that fails on {error!r}.") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read a plan. Raises InputError naming the file for a missing or faulty one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"Expected a plan at {os.fspath(path)}. There is no such file.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Expected a plan at {os.fspath(path)}. It cannot be read: {error}.") from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"Expected a plan at {os.fspath(path)}. Line {error.lineno} is not JSON: {error.msg}."
            ) from None
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{os.fspath(path)}: {error}") from None


def check_budget(budget: float | int) -> None:
    """Raises InputError unless the budget is a fraction in (0, 1] (float) or a positive number of blocks (int)."""
    is_count = isinstance(budget, int) and not isinstance(budget, bool)
    if (is_count and budget >= 1) or (isinstance(budget, float) and 0.0 < budget <= 1.0):
        return
    raise InputError(
        "Expected budget to be a fraction of all parameters, a float in (0, 1], or a number of blocks, an int ≥ 1. "
        f"Got {budget!r}."
    )


def check_policy(policy: str, shares: Mapping[str, float] | None) -> None:
    """Raises InputError for an unknown policy, or shares that are missing, out of place or more than the whole."""
    if policy not in POLICIES:
        raise InputError(
            f"Expected policy to be one of {', '.join(POLICIES)}. Got {policy!r}." + did_you_mean(str(policy), POLICIES)
        )
    if (policy == "shares") != bool(shares):
        raise InputError(
            'Expected `shares` with the policy "shares" and only with it, such as {"attention": 0.75, "mlp": 0.25}. '
            f"Got policy {policy!r} with shares {shares!r}."
        )
    if shares and not (min(shares.values()) >= 0 and sum(shares.values()) <= 1 + 1e-9):  # nan fails both
        raise InputError(f"Expected shares that are not negative and sum to at most 1. Got {dict(shares)}.")


def check_max_backward_cost(limit: float | None) -> None:
    """Raises InputError unless the limit is None or a fraction in (0, 1]."""
    if limit is None or (isinstance(limit, (int, float)) and not isinstance(limit, bool) and 0 < limit <= 1):
        return
    raise InputError(
        "Expected max_backward_cost to be a fraction of the whole dX chain, a float in (0, 1], or None for no limit. "
        f"Got {limit!r}."
    )


def backward_cost(chosen: Mapping[str, BlockIndex], costs: Mapping[str, float]) -> float:
    """What a choice costs: the cost of its lowest module that has blocks, a fraction of the whole dX chain."""
    return max((costs[name] for name, index in chosen.items() if len(index)), default=0.0)


def total_score(chosen: Mapping[str, BlockIndex], scores: Mapping[str, Tensor]) -> float:
    """The sum of the scores of the chosen blocks."""
    return sum(scores[name][index.rows, index.cols].sum(dtype=torch.float64).item() for name, index in chosen.items())


def select(
    scores: Mapping[str, Tensor],
    *,
    block_size: int,
    budget: float | int,
    total_params: int,
    policy: str = "global",
    shares: Mapping[str, float] | None = None,
    kinds: Mapping[str, Sequence[str]] | None = None,
    backward_costs: Mapping[str, float] | None = None,
    max_backward_cost: float | None = None,
    seed: int = 0,
) -> dict[str, BlockIndex]:
    """The blocks to train.

    Args:
        scores: (R, C) by module name, in model order.
        block_size: l.
        budget: a fraction of `total_params`, or a number of blocks.
        total_params: parameters of the model.
        policy, shares: see the module's docstring. Shares by group (`attention`, `mlp`), kind or projection name.
        kinds: by module name, what each row of blocks computes, (R,); see `ModulePlan`. Only shares ask for them.
        backward_costs: by module name, the cost of a plan whose lowest module it is, as `smtune.depth` counts it.
        max_backward_cost: the cost of the plan, at most; None for no limit. With one, the modules that cost more
            are left whole and the policy chooses among the others.
        seed: of the policy `sampled`.
    Returns:
        The index of every module, empty where nothing was selected; blocks ordered by row, then column. In all never
        more than the budget; fewer where the policy cannot spend it or fewer blocks exist.
    Raises:
        InputError: a score that is not finite, a budget below one block, shares that match no module, or a limit that
            leaves no module (of a group) to choose from.
    """
    check_budget(budget)
    check_policy(policy, shares)
    check_max_backward_cost(max_backward_cost)
    if not scores:
        raise InputError("Expected scores of at least one module. Got none.")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise InputError(f"Expected finite scores. Got one that is not in {name}: the gradients overflowed.")
    # The tolerance, far below one parameter, lets k·l²/total_params buy k blocks in spite of rounding.
    count = budget if isinstance(budget, int) else math.floor(budget * total_params / block_size**2 + 1e-9)
    if count < 1:
        raise InputError(
            f"Expected a budget of at least one block. Got {budget} of {total_params:,} parameters, less than one "
            f"block of {block_size}² = {block_size**2:,}: raise it to {_at_least(block_size**2 / total_params)} or "
            "more, or use smaller blocks."
        )
    names = _within(max_backward_cost, scores, backward_costs)
    if policy == "global":
        chosen = _best({name: scores[name] for name in names}, count)
    elif policy == "sampled":
        raced = _raced(scores, seed)  # of all, so that a limit of the cost leaves the draws as they are
        chosen = _best({name: raced[name] for name in names}, count)
    elif policy == "per_module":
        each = count // len(names)
        if each < 1:
            raise InputError(
                f"Expected a budget of at least one block per matrix, {len(names)} in all. Got {count} blocks."
            )
        chosen = {name: _best({name: scores[name]}, each)[name] for name in names}
    else:
        chosen = _by_shares(scores, names, count, shares or {}, kinds or {}, max_backward_cost, backward_costs)
    return {name: _to_index(scores[name], chosen.get(name, []), block_size) for name in scores}


def _by_shares(
    scores: Mapping[str, Tensor],
    names: Sequence[str],
    count: int,
    shares: Mapping[str, float],
    kinds: Mapping[str, Sequence[str]],
    limit: float | None,
    costs: Mapping[str, float] | None,
) -> dict[str, list[int]]:
    """The flat places of the best blocks of each group, its share of `count`, among the modules in `names`."""
    chosen: dict[str, list[int]] = {name: [] for name in names}
    grouped: set[tuple[str, int]] = set()
    for group, share in shares.items():
        rows = {name: _rows_in(group, name, len(score), kinds.get(name)) for name, score in scores.items()}
        targeted = [name for name in scores if rows[name]]
        members = [name for name in names if rows[name]]
        if targeted and not members:
            raise _too_strict(limit, targeted, costs, f"of {group}")
        if not members:
            known = sorted({name.rpartition(".")[2] for name in scores}.union(*kinds.values()))
            raise InputError(
                f"Expected shares of groups that are targeted. Got {group!r}, which none of "
                f"{', '.join(known)} belongs to." + did_you_mean(group, [*PROJECTION_GROUPS, *known])
            )
        places = {(name, row) for name in members for row in rows[name]}
        if grouped & places:
            raise InputError(f"Expected groups that do not overlap. Got {', '.join(shares)}.")
        grouped |= places
        best = _best({name: scores[name][rows[name]] for name in members}, math.floor(share * count + 1e-9))
        for name, found in best.items():
            n_cols = scores[name].shape[1]
            places_of_all = [rows[name][place // n_cols] * n_cols + place % n_cols for place in found]
            chosen[name] = sorted([*chosen[name], *places_of_all])
    if not any(chosen.values()):
        raise InputError(f"Expected shares that buy at least one block. Got {dict(shares)} of {count} blocks.")
    return chosen


def _at_least(value: float) -> str:
    """A positive number in four digits, rounded up."""
    scale = 10 ** (3 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale) / scale:.4g}"


def _within(limit: float | None, names: Iterable[str], costs: Mapping[str, float] | None) -> list[str]:
    """The modules that a plan may select from without costing more than the limit."""
    if limit is None:
        return list(names)
    if costs is None:
        raise InputError(
            "Expected backward_costs with max_backward_cost: without them no cost can be counted. Got None."
        )
    within = [name for name in names if costs[name] <= limit]
    if not within:
        raise _too_strict(limit, list(names), costs, "that is targeted")
    return within


def _too_strict(limit: float | None, names: Sequence[str], costs: Mapping[str, float] | None, which: str) -> InputError:
    least = math.ceil(min((costs or {})[name] for name in names) * 1e4) / 1e4
    return InputError(
        f"Expected max_backward_cost to leave a projection {which}. Got {limit}, below the cost of the highest one: "
        f"set it to {least} or more."
    )


def _raced(scores: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Scores of which the largest are a draw without replacement, by exponential races (Efraimidis & Spirakis 2006)."""
    generator = torch.Generator().manual_seed(seed)
    raced = {}
    for name, score in scores.items():
        if score.min() < 0:
            raise InputError(
                f'Expected scores of at least 0 with the policy "sampled". Got {score.min().item():g} in {name}.'
            )
        times = torch.empty(score.shape, device="cpu").exponential_(generator=generator)
        raced[name] = score / times.clamp_min_(torch.finfo(torch.float32).tiny).to(score.device)
    return raced


def _best(scores: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """The flat places of the `count` best blocks; ties go to the earlier module and place."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    order = torch.sort(flat, descending=True, stable=True).indices[:count].sort().values
    chosen, start = {}, 0
    for name, score in scores.items():
        end = start + score.numel()
        chosen[name] = (order[(order >= start) & (order < end)] - start).tolist()
        start = end
    return chosen


def _rows_in(group: str, name: str, n_rows: int, kinds: Sequence[str] | None) -> list[int]:
    """The rows of blocks of a module that belong to a group: all by its own last name, or each by its kind."""
    members = PROJECTION_GROUPS.get(group, {group})
    if name.rpartition(".")[2] in members:
        return list(range(n_rows))
    return _rows_of(members, kinds or ())


def _rows_of(wanted: Iterable[str], kinds: Sequence[str]) -> list[int]:
    return [row for row, kind in enumerate(kinds) if kind in wanted]


def _spelled_out(runs: str) -> Iterator[str]:
    """The kinds of "q:2 k:1", row by row."""
    for run in runs.split():
        kind, _, length = run.rpartition(":")
        yield from [kind] * int(length)


def _to_index(score: Tensor, places: list[int], block_size: int) -> BlockIndex:
    grid = BlockGrid(score.shape[0] * block_size, score.shape[1] * block_size, block_size)
    rows, cols = _split(places, grid)
    return BlockIndex.from_pairs(grid, list(zip(rows, cols)))


def _split(places: Sequence[int], grid: BlockGrid) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_cols = grid.shape[1]
    return tuple(place // n_cols for place in places), tuple(place % n_cols for place in places)
