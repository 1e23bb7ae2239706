"""`SMTConfig`: everything that decides what is trained, saved as `adapter_config.json`.

It is complete: the block map of the plan is in it, so an adapter needs no other file beside its weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from smtune.blocks import BlockIndex
from smtune.errors import InputError, did_you_mean
from smtune.scoring import check_accumulator_dtype, check_criterion
from smtune.selection import Plan, check_budget, check_max_backward_cost, check_policy
from smtune.tuner.card import write_card
from smtune.tuner.register import peft_type

MODES = ("auto", "resident", "additive")


@dataclass
class SMTConfig(PeftConfig):
    """Configuration of Sparse Matrix Tuning. The defaults are the paper's setting, but for block size and policy.

    Args:
        target_modules: names, name endings or a regular expression of the linear layers to choose blocks from, or
            "all-linear". None: the architecture's q, k and v projections (paper §3.1).
        exclude_modules: taken out of the targets; names, endings or a regular expression.
        layers_to_transform: numbers of the decoder layers to choose blocks from. None: all.
        layers_pattern: name of the list that holds the decoder layers, where it cannot be told.
        block_size: l, a number that divides every targeted weight, or "auto": the largest common divisor, at most 256.
        budget: a fraction of all parameters (float in (0, 1]) or a number of blocks in all (int).
        criterion: how blocks are scored; see `smtune.scoring`.
        policy: how blocks are chosen from scores: "sampled", "global" (the paper), "per_module" or "shares"; see
            `smtune.selection`, and ADR 0017 for the default.
        shares: with policy "shares", the share of the budget by group, such as {"attention": 0.75, "mlp": 0.25}.
        max_backward_cost: how far down the backward may go, a fraction in (0, 1] of the chain of products dX = dY W
            that ends at the lowest target: the lowest layers are left whole to keep within it. None: no limit.
        warmup_steps: batches to score with, at most.
        accumulator_device: where scoring keeps its accumulators, such as "cpu". None: beside the gradients.
        accumulator_dtype: "float32", or "bfloat16": half the memory for the criterion "abs_of_sum", with an error that
            `smtune.scoring` bounds.
        mode: "resident" (blocks stand in the weight), "additive" (blocks act beside it) or "auto": resident for a
            dense weight, additive for a quantised or sharded one.
        seed: of the criterion "random" and the policy "sampled".
        init_weights: False starts the deltas from small noise instead of zero; for tests only.
        modules_to_save: further modules to train whole and save with the adapter.
        trainable_token_indices: further embedding rows to train.
        plan: the plan as a JSON value; set by `with_plan`.
    Raises:
        InputError: naming every faulty field at once.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Linear layers to choose from."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers taken out again."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Decoder layers to use."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    block_size: int | Literal["auto"] = field(default="auto", metadata={"help": 'l, or "auto".'})
    budget: float | int = field(default=0.0084, metadata={"help": "Fraction of all parameters, or blocks."})
    criterion: str = field(default="abs_of_sum", metadata={"help": "How blocks are scored."})
    policy: str = field(default="sampled", metadata={"help": "How blocks are chosen."})
    shares: dict[str, float] | None = field(default=None, metadata={"help": "Shares of the budget by group."})
    max_backward_cost: float | None = field(default=None, metadata={"help": "Fraction of the whole dX chain."})
    warmup_steps: int = field(default=100, metadata={"help": "Batches to score with."})
    accumulator_device: str | None = field(default=None, metadata={"help": "Where scoring accumulates."})
    accumulator_dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 for abs_of_sum."})
    mode: str = field(default="auto", metadata={"help": "auto, resident or additive."})
    seed: int = field(default=0, metadata={"help": "Seed of random criterion and draws."})
    init_weights: bool = field(default=True, metadata={"help": "False: noise instead of zero, for tests."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows trained beside."}
    )
    plan: dict[str, Any] | None = field(default=None, metadata={"help": "The plan; set by with_plan."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.accumulator_device is not None:
            self.accumulator_device = str(self.accumulator_device)  # a `torch.device` cannot be saved
        self._check()

    def _check(self) -> None:
        faults = []

        def collect(check, *args) -> None:
            try:
                check(*args)
            except InputError as error:
                faults.append(str(error))

        if self.block_size != "auto" and (type(self.block_size) is not int or self.block_size < 1):
            faults.append(f'Expected block_size to be "auto" or a positive integer. Got {self.block_size!r}.')
        if self.mode not in MODES:
            faults.append(
                f"Expected mode to be one of {', '.join(MODES)}. Got {self.mode!r}."
                + did_you_mean(str(self.mode), MODES)
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            faults.append(f"Expected seed to be an integer from 0 to 2**63 - 1. Got {self.seed!r}.")
        layers = self.layers_to_transform
        numbers = [] if layers is None else layers if isinstance(layers, (list, tuple, set, range)) else [layers]
        if not all(type(number) is int and number >= 0 for number in numbers):
            faults.append(f"Expected layers_to_transform to be numbers of decoder layers, from 0. Got {layers!r}.")
        if type(self.warmup_steps) is not int or self.warmup_steps < 1:
            faults.append(f"Expected warmup_steps to be a positive integer. Got {self.warmup_steps!r}.")
        collect(check_budget, self.budget)
        collect(check_criterion, self.criterion)
        collect(check_accumulator_dtype, self.accumulator_dtype, self.criterion)
        collect(check_policy, self.policy, self.shares)
        collect(check_max_backward_cost, self.max_backward_cost)
        if self.plan is not None:
            collect(Plan.from_dict, self.plan)
        if faults:
            raise InputError("\n".join(faults))
        if isinstance(layers, (tuple, set, range)):
            self.layers_to_transform = sorted(layers)  # as JSON has it

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's own; where a model saves its adapter, the model card gets its part about the blocks too."""
        super().save_pretrained(save_directory, **kwargs)
        if "auto_mapping_dict" in kwargs and self.plan is not None:  # passed by `PeftModel.save_pretrained` alone
            write_card(save_directory, self)

    @classmethod
    def paper(cls, **changes: Any) -> SMTConfig:
        """The paper's setting (§4.1): blocks of 256 of q, k, v by |Σ gradient| over 100 batches, 0.84 % trained."""
        setting: dict[str, Any] = {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "block_size": 256,
            "budget": 0.0084,
            "criterion": "abs_of_sum",
            "policy": "global",
            "warmup_steps": 100,
        }
        return cls(**(setting | changes))

    def with_plan(self, plan: Plan) -> SMTConfig:
        """A copy of this configuration that trains the plan's blocks."""
        config = copy.deepcopy(self)
        config.plan = plan.to_dict()
        config.block_size = plan.block_size
        return config

    def get_plan(self) -> Plan | None:
        """The plan as a `Plan`, or None where there is none yet."""
        return Plan.from_dict(self.plan) if self.plan is not None else None

    def block_map(self) -> dict[str, BlockIndex]:
        """The index of every module that has blocks to train; empty without a plan."""
        cached = self.__dict__.get("_block_map")
        if cached is None or cached[0] is not self.plan:
            plan = self.get_plan()
            planned = [] if plan is None else [(name, plan.index(name)) for name in plan.modules]
            cached = (self.plan, {name: index for name, index in planned if len(index)})
            self.__dict__["_block_map"] = cached
        return cached[1]
