"""What is compared: each arm takes a frozen model and makes it the trainable one that a user of that method would have.

The floor trains nothing: its backward computes dX from the loss down to the outputs of the lowest q, k and v, as every
adapter on all q, k, v must, and no more.

Arms have as many trained parameters as `smt-0.84` of the same model, but for those that name another share, and
`dense-v` and full fine-tuning. All trained tensors are fp32, whatever the base's dtype, as `smtune train` has them, but
for `full`, which trains the weights as they are. All train by torch's AdamW with its defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smtune import SMTConfig
from smtune.bench.floor import end_backward_at
from smtune.bench.parts import WeightPart
from smtune.bench.plans import paper_share, random_plan
from smtune.bench.sift import sift
from smtune.bench.subjects import QKV, Subject, attention_inputs
from smtune.bench.write import train_blocks
from smtune.errors import InputError
from smtune.models import wrapping
from smtune.selection import Plan

LEARNING_RATE = 1e-4
EQUAL = 0.84
"""Percent of LLaMA-7B whose number of blocks the arms of equal parameters follow."""

LINEARS = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
LLM_ADAPTERS = [*QKV, "up_proj", "down_proj"]
"""Where LLM-Adapters and DoRA's repository put adapters, and so the paper's baselines."""


@dataclass(frozen=True)
class Setting:
    """What an arm is built for.

    Attributes:
        subject: the model.
        dtype: of its base weights.
        device: "cpu" or "cuda".
        block_size: l. None: the subject's.
        share: of the q, k, v blocks, in place of what the arm's name says.
        layers: numbers of the layers with blocks. None: all.
        plan: the plan itself, in place of one at random.
        rival: the Python file that defines the arm `appendix-a`.
        floor_from: the number of the layer at which the floor's backward ends.
    """

    subject: Subject
    dtype: str
    device: str = "cpu"
    block_size: int | None = None
    share: float | None = None
    layers: tuple[int, ...] | None = None
    plan: Plan | None = None
    rival: str | None = None
    floor_from: int = 0


@dataclass
class Arm:
    """A model ready to be trained and timed.

    Attributes:
        name, label: for programs and for people.
        model: called with the batch.
        optimizer: None for the floor.
        trained: what the optimizer trains.
        plan: where the blocks are, for arms that have some.
        kept: tensors that the method holds beside the base, its trained tensors and the optimizer's state.
    """

    name: str
    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    trained: list[nn.Parameter] = field(default_factory=list)
    plan: Plan | None = None
    kept: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.trained and self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def after_step(self, actions: list[Callable[[], None]]) -> None:
        """Run these after every step of the optimizer."""

        def hook(*_: Any) -> None:
            for action in actions:
                action()

        assert self.optimizer is not None
        self.optimizer.register_step_post_hook(hook)

    @property
    def is_adapter(self) -> bool:
        """Whether it can be saved, switched and merged by PEFT."""
        return isinstance(self.model, peft.PeftModel)


Builder = Callable[[nn.Module, Setting, dict[str, Tensor]], Arm]


def build(name: str, setting: Setting, model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> Arm:
    """Make the arm of that name. Raises whatever the method itself raises: arms are recorded as not running, too."""
    torch.manual_seed(seed)
    arm = (BUILDERS | FURTHER)[name](model, setting, batch)
    arm.name = name
    arm.model.train()
    return arm


# SMT ----------------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, setting: Setting, percent: float) -> Plan:
    if setting.plan is not None:
        return setting.plan
    share = setting.share if setting.share is not None else paper_share(percent)
    return random_plan(model, setting.block_size or setting.subject.block_size, share, setting.layers)


def _label(method: str, plan: Plan, setting: Setting, percent: float) -> str:
    if setting.subject.name == "llama-7b-layers" and setting.plan is None and setting.share is None:
        return f"{method} {percent:g} %"
    places = sum(rows * cols for rows, cols in (module.shape for module in plan.modules.values()))
    return f"{method}, {plan.n_params / places:.1%} of q, k, v"


def _smt(percent: float, mode: str = "resident") -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        plan = _plan(model, setting, percent)
        label = _label("SMT" if mode == "resident" else "SMT additive", plan, setting, percent)
        config = SMTConfig(target_modules=list(QKV), mode=mode).with_plan(plan)
        return wrapped(model, config, label, plan)

    return builder


def _written(at_use: bool) -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        plan = _plan(model, setting, EQUAL)
        layers = train_blocks(model, plan, at_use)
        label = "written at use" if at_use else "written after the step"
        originals = [layer.originals for layer in layers]
        arm = Arm("", label, model, trained=[layer.delta for layer in layers], plan=plan, kept=originals)
        if not at_use:
            arm.after_step([layer.write for layer in layers])
        return arm

    return builder


def wrapped(model: Any, config: Any, label: str, plan: Plan | None = None) -> Arm:
    """The model under PEFT, with the originals of SMT's blocks as what is kept beside."""
    with wrapping():
        wrapped: Any = peft.get_peft_model(model, config)
    originals = [buffer for name, buffer in wrapped.named_buffers() if name.endswith("smt_originals")]
    return Arm("", label, wrapped, trained=_requiring(wrapped), plan=plan, kept=originals)


def _requiring(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# Rivals of equal parameters -----------------------------------------------------------------------------------------


def _shapes(model: nn.Module, kinds: list[str]) -> list[tuple[int, int]]:
    """(O, I) of every linear layer of these kinds."""
    layers = attention_inputs(model, tuple(kinds))
    return [(module.out_features, module.in_features) for layer in layers for module in layer.values()]


def _rank(model: nn.Module, setting: Setting, kinds: list[str], percent: float = EQUAL, per_row: int = 0) -> int:
    """The rank whose r·(I + O) parameters a matrix, with `per_row` more for each row, come closest to SMT's number."""
    shapes = _shapes(model, kinds)
    wanted = _plan(model, setting, percent).n_params - per_row * sum(rows for rows, _ in shapes)
    return max(1, round(wanted / sum(rows + cols for rows, cols in shapes)))


def _lora(label: str, kinds: list[str], percent: float = EQUAL, dora: bool = False, rslora: bool = False) -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        rank = _rank(model, setting, kinds, percent, per_row=int(dora))
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=kinds, lora_dropout=0.0, use_dora=dora, use_rslora=rslora
        )
        return wrapped(model, config, f"{label} r={rank}")

    return builder


def _autocast(builder: Builder) -> Builder:
    """As the Trainer runs it with `bf16=True`: PEFT multiplies its fp32 factors in fp32 otherwise."""

    def in_bf16(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        arm = builder(model, setting, batch)
        arm.model.forward = torch.autocast(setting.device, torch.bfloat16)(arm.model.forward)
        arm.label += ", autocast"
        return arm

    return in_bf16


def _shira(percent: float = EQUAL) -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        rank = _rank(model, setting, list(QKV), percent)
        # PEFT draws the places in each layer from this seed, so matrices of one shape have the same.
        config = peft.ShiraConfig(r=rank, target_modules=list(QKV), random_seed=torch.initial_seed())
        return wrapped(model, config, _rival_label("SHiRA", model, setting, percent))

    return builder


def _share(model: nn.Module, setting: Setting, percent: float = EQUAL) -> float:
    """SMT's parameters over those of the q, k, v weights."""
    return _plan(model, setting, percent).n_params / sum(rows * cols for rows, cols in _shapes(model, list(QKV)))


def _supertuning(percent: float = EQUAL) -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        if not hasattr(peft, "SupertuningConfig"):
            raise InputError(f"Expected a peft with Super-tuning, 0.21 or newer. Got {peft.__version__}.")
        sparsity = 1 - _share(model, setting, percent)
        config = peft.SupertuningConfig(sparsity=sparsity, target_modules=list(QKV))
        return wrapped(model, config, _rival_label("Super-tuning", model, setting, percent))

    return builder


def _rival_label(method: str, model: nn.Module, setting: Setting, percent: float) -> str:
    return method if percent == EQUAL else _label(method, _plan(model, setting, percent), setting, percent)


def _sift(model: Any, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    weights: dict[str, Any] = {
        name: module.weight for layer in attention_inputs(model) for name, module in layer.items()
    }
    entries = sift(weights, _share(model, setting), backward=lambda: model(**batch).loss.backward())
    return of_parts("", "SIFT", model, entries)


def of_parts(name: str, label: str, model: nn.Module, parts: Sequence[WeightPart]) -> Arm:
    """An arm that trains parts of weights apart from them and writes them after every step."""
    kept = [tensor for part in parts for tensor in part.kept]
    arm = Arm(name, label, model, trained=[part.values for part in parts], kept=kept)
    arm.after_step([part.write for part in parts])
    return arm


def _appendix_a(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    assert setting.rival is not None
    rival = load_rival(setting.rival)
    plan = _plan(model, setting, EQUAL)
    trained = rival.build(model, plan)
    return Arm("", rival.LABEL, model, trained=trained, plan=plan)


def load_rival(path: str) -> Any:
    """The module in a Python file that defines NAME, LABEL and `build(model, plan) -> trained parameters`."""
    spec = importlib.util.spec_from_file_location("smtune_bench_rival", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise InputError(f"Expected --rival to be a Python file. There is none at {path}.")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in ("NAME", "LABEL", "build") if not hasattr(module, name)]
    if missing:
        raise InputError(f"Expected --rival to define NAME, LABEL and build. {path} has no {', '.join(missing)}.")
    return module


# Others -------------------------------------------------------------------------------------------------------------


def _floor(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    end_backward_at(attention_inputs(model)[setting.floor_from].values())
    return Arm("floor", "floor", model)


def _control(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    arm = _floor(model, setting, batch)
    arm.label = "floor again (control)"
    return arm


class MasterLinear(nn.Module):
    """A 16-bit linear layer whose weight is trained in fp32: cast at each use, as under autocast."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().float())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def _dense(label: str, kinds: tuple[str, ...]) -> Builder:
    def builder(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
        for layer in attention_inputs(model, kinds):
            for name, module in layer.items():
                if module.weight.dtype == torch.float32:
                    module.weight.requires_grad_(True)
                else:
                    model.set_submodule(name, MasterLinear(module))
        return Arm("", label, model, trained=_requiring(model))

    return builder


def _full(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    model.requires_grad_(True)
    dtype = next(model.parameters()).dtype
    label = "full" if dtype == torch.float32 else f"full, {setting.dtype} weights"
    return Arm("", label, model, trained=_requiring(model))


def _full_autocast(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    return _autocast(_full)(model.float(), setting, batch)


def _full_offloaded(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Arm:
    if setting.device != "cpu":
        raise InputError("Expected --device cpu for full-cpuadam, which updates weights on CPUs. Got another.")
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("Expected DeepSpeed for its CPUAdam. It is not installed: pip install deepspeed.")
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    arm = _full(model, setting, batch)
    arm.optimizer = DeepSpeedCPUAdam(arm.trained, lr=LEARNING_RATE)
    arm.label += ", DeepSpeed CPUAdam"
    return arm


BUILDERS: dict[str, Builder] = {
    "floor": _floor,
    "control": _control,
    "smt-0.43": _smt(0.43),
    "smt-0.84": _smt(0.84),
    "smt-1.26": _smt(1.26),
    "smt-2.5": _smt(2.5),
    "smt-3.73": _smt(3.73),
    "smt-4.91": _smt(4.91),
    "smt-additive": _smt(EQUAL, mode="additive"),
    "smt-additive-4.91": _smt(4.91, mode="additive"),
    "lora": _lora("LoRA q,k,v", list(QKV)),
    "lora-4.91": _lora("LoRA q,k,v", list(QKV), percent=4.91),
    "lora-autocast": _autocast(_lora("LoRA q,k,v", list(QKV))),
    "lora-4.91-autocast": _autocast(_lora("LoRA q,k,v", list(QKV), percent=4.91)),
    "lora-all": _lora("LoRA all linear", LINEARS),
    "dora": _lora("DoRA q,k,v", list(QKV), dora=True),
    "dora-4.91": _lora("DoRA q,k,v", list(QKV), percent=4.91, dora=True),
    "dora-autocast": _autocast(_lora("DoRA q,k,v", list(QKV), dora=True)),
    "shira": _shira(),
    "shira-4.91": _shira(4.91),
    "supertuning": _supertuning(),
    "supertuning-4.91": _supertuning(4.91),
    "dense-v": _dense("dense v_proj", ("v_proj",)),
    "sift": _sift,
    "appendix-a": _appendix_a,
    "full": _full,
    "full-autocast": _full_autocast,
}
"""The arms by name, in the order of the table."""

FURTHER: dict[str, Builder] = {
    "smt-at-use": _written(at_use=True),
    "smt-after-step": _written(at_use=False),
    "full-cpuadam": _full_offloaded,
    "rslora": _lora("rsLoRA q,k,v", list(QKV), rslora=True),
    "lora-adapters": _lora("LoRA q,k,v,up,down", LLM_ADAPTERS),
    "dora-adapters": _lora("DoRA q,k,v,up,down", LLM_ADAPTERS, dora=True),
    "dense-qkv": _dense("dense q,k,v", QKV),
}
"""Arms of single questions, which have records of their own kind, and those of `smtune reproduce` alone."""
