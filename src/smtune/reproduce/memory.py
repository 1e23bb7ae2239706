"""The memory of a training step, counted without the weights: every tensor has a shape and a dtype and no data.

What lives from step to step is summed by shape and dtype: the base, what is trained (fp32), its gradients, Adam's two
moments, SMT's copy of the base's blocks. What the forward keeps for the backward is counted by a forward of torch's
fake tensors, which are meta tensors that pass for the CPU's, each storage once. SMT's forward does not run on them (it
looks at values): of it the floor's is counted, that of a frozen model whose backward ends at the lowest layer with
blocks, plus one copy of the used columns for each input, which is what `smtune` keeps; a test holds both against
measured bytes. Temporaries of a step are not counted. Blocks are at random places, the worst case for the columns.

SHiRA, Super-tuning, SIFT and rows make the whole gradient of q, k and v: they keep what training those whole does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from smtune.bench.arms import LINEARS
from smtune.bench.floor import end_backward_at
from smtune.bench.measure import saved_bytes
from smtune.bench.plans import used_columns
from smtune.bench.subjects import attention_inputs
from smtune.models import DTYPES
from smtune.reproduce import arms
from smtune.reproduce.cells import UNBUDGETED
from smtune.selection import Plan

ADAM_MOMENTS = 2
FP32 = 4
SPARSE = ("shira", "supertuning", "sift", "rows", "smt-basis")


@dataclass(frozen=True)
class Memory:
    """Bytes of a step, and how many parameters are trained of how many.

    `activations` are those of training as `smtune reproduce` does it, in a bf16 tier under autocast where what is
    trained multiplies; `activations_in_paper_dtypes` those of a model that holds what is trained in the base's dtype.
    """

    base: int
    trained: int
    gradients: int
    optimizer: int
    originals: int
    activations: int
    activations_in_paper_dtypes: int
    trained_parameters: int
    total_parameters: int

    @property
    def total(self) -> int:
        return self.base + self.trained + self.gradients + self.optimizer + self.originals + self.activations

    @property
    def with_paper_dtypes(self) -> int:
        """The same where trained values, gradients and moments are bf16, as in the paper, and so products are."""
        state = self.trained + self.gradients + self.optimizer
        return self.total - state // 2 - self.activations + self.activations_in_paper_dtypes

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total, "with_paper_dtypes": self.with_paper_dtypes}


def prepared(model: Any) -> nn.Module:
    """Frozen, in training mode, without a cache of keys and values."""
    model.config.use_cache = False
    return model.requires_grad_(False).train()


def count(architecture: PreTrainedConfig, config: Mapping[str, Any], rows: int, tokens: int) -> Memory:
    """Count a step of a cell's arm.

    Args:
        architecture: of the model.
        config: of the cell: method, budget, block size, dtype.
        rows, tokens: of a micro batch.
    """
    method = config["method"]
    dtype = torch.float32 if arms.starts_in_fp32(method) else DTYPES[config["dtype"]]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    model.tie_weights()
    prepared(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    base = sum(parameter.nbytes for parameter in model.parameters())
    itemsize = next(model.parameters()).element_size()
    plan = None if method in UNBUDGETED else arms.count_plan(model, config)
    trained = originals = columns = 0
    if method == "smt" and plan is not None:
        lowest = next(filter(None, (_with_blocks(layer, plan) for layer in attention_inputs(model, tuple(LINEARS)))))
        end_backward_at(lowest)
        trained, originals = plan.n_params, plan.n_params * itemsize
        columns = rows * tokens * used_columns(plan) * itemsize
    elif method in SPARSE and plan is not None:
        trained = plan.n_params
        for layer in attention_inputs(model):
            for module in layer.values():
                module.weight.requires_grad_(True)
                originals += module.weight.nbytes if method == "smt-basis" else 0
    elif method != "base":
        with torch.device("meta"):
            arm = arms.build(model, config, None, plan)
        model, trained = arm.model, sum(parameter.numel() for parameter in arm.trained)
        base = 0 if arms.starts_in_fp32(method) else base
    activations = in_paper_dtypes = 0
    if trained:
        with torch.autocast("cpu", torch.bfloat16, enabled=arms.is_under_autocast(config)):
            activations = _saved_bytes(model, rows, tokens) + columns
        in_paper_dtypes = activations
        if config["dtype"] != "float32":
            in_paper_dtypes = _saved_bytes(model, rows, tokens, DTYPES[config["dtype"]]) + columns
    return Memory(
        base=base,
        trained=FP32 * trained,
        gradients=FP32 * trained,
        optimizer=FP32 * ADAM_MOMENTS * trained,
        originals=originals,
        activations=activations,
        activations_in_paper_dtypes=in_paper_dtypes,
        trained_parameters=trained,
        total_parameters=total,
    )


def _with_blocks(layer: Mapping[str, nn.Module], plan: Plan) -> list[nn.Module]:
    return [module for name, module in layer.items() if name in plan.modules and plan.modules[name].rows]


def _saved_bytes(model: nn.Module, rows: int, tokens: int, dtype: torch.dtype | None = None) -> int:
    """Bytes that a forward keeps for the backward, each storage once, parameters and buffers left out.

    Args:
        dtype: of all parameters. None: their own.
    """
    with FakeTensorMode():
        _make_fake(model, dtype)
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        return saved_bytes(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def _make_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace every tensor by a fake one, tied ones by the same, parameters by some of `dtype`; in a FakeTensorMode."""
    fakes: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in fakes:
            is_parameter = isinstance(tensor, nn.Parameter)
            empty = torch.empty(tensor.shape, dtype=dtype if dtype is not None and is_parameter else tensor.dtype)
            fakes[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
