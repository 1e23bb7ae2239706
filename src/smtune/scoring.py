"""Score every block of the targeted weights from warm-up batches (paper §3.2, appendix B).

A *tap* on each targeted linear layer sees its input X and the gradient dY of its output during an ordinary backward,
and folds `G = dYᵀ X`, the gradient of the weight, into that layer's accumulator; then G is gone. No weight needs
`requires_grad`, so the backward computes only what the scores need, ends at the lowest targeted layer, and works
on quantised weights and under activation checkpointing. Everything about the model is put back bit for bit.

Criteria (gₜ is the gradient of batch t; each is a mean over the block):

- `abs_of_sum`: |Σₜ gₜ| (the paper). One full accumulator per targeted weight.
- `net`: |mean of Σₜ gₜ| (the authors' released code). R×C accumulators, and no weight gradient: the sum over a block
  of dYᵀX is the product of the sums of dY over its rows and of X over its columns.
- `sum_of_abs`: Σₜ |gₜ|; `fisher`: Σₜ gₜ². R×C accumulators.
- `activation`: |w| · ‖x column‖₂ (Wanda's score). Forward only.
- `weight`: |w|; `random`: uniform noise from the seed. No data.

The accumulators of `abs_of_sum` may be bf16, half the memory. Every batch then rounds each sum Sₜ by at most u·|Sₜ|,
where u = 2⁻⁸ is the unit roundoff of bf16. Where the model's activations are bf16, their product gₜ is rounded too, by
at most u·|gₜ|, whatever the accumulators. So after T batches an entry is off by at most u·Σₜ|Sₜ| with bf16
accumulators, plus u·Σₜ|gₜ| with bf16 activations, and a block's score by at most the mean of that over the block. The
Sₜ are the sums that stand in the accumulator; left out are the fp32 rounding before (2⁻²⁴), roundings of what is
rounded already (2⁻⁷ of these bounds) and numbers below 2⁻¹²⁶. Ranks round once more when they add up.

Where weights are trained anyway, `GradientScores` gives the same scores from their gradients, without taps.

Shapes: O out, I in, R×C grid, N tokens, l block size.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smtune.blocks import BlockGrid, tile
from smtune.depth import backward_end
from smtune.errors import InputError, did_you_mean
from smtune.kernels import flatten
from smtune.sharded import is_sharded
from smtune.weights import is_transposed, view_OI

T = TypeVar("T")

DATA_FREE = ("weight", "random")
"""Criteria that need no batches."""

FORWARD_ONLY = (*DATA_FREE, "activation")
"""Criteria that need no backward."""

ACCUMULATOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """A linear layer whose blocks are scored.

    Attributes:
        weight: gives its (O, I) values as a dense tensor; called only by criteria that read weights.
        kinds: what each row of blocks computes; see `smtune.selection.ModulePlan`.
    """

    module: nn.Module
    grid: BlockGrid
    weight: Callable[[], Tensor]
    kinds: tuple[str, ...] = ()


class Scores(dict[str, Tensor]):
    """{module name: (R, C) fp32 scores on the CPU}, in model order, with how they came about.

    Attributes:
        block_size: l.
        criterion: the criterion's name.
        batches_seen: batches scored, over all ranks.
        model_name: where the model came from, or "".
        backward_costs: what a plan costs whose lowest module it is, by module name; None where not counted.
        kinds: what each row of a module's blocks computes; see `smtune.selection.ModulePlan`.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        block_size: int,
        criterion: str,
        batches_seen: int = 0,
        model_name: str = "",
        backward_costs: Mapping[str, float] | None = None,
        kinds: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        super().__init__(scores)
        self.block_size = block_size
        self.criterion = criterion
        self.batches_seen = batches_seen
        self.model_name = model_name
        self.backward_costs = backward_costs
        self.kinds = dict(kinds or {})


@dataclass
class _Accumulator:
    """One layer's running score: `fold` takes dY and X of one batch, `value` gives the (R, C) scores at the end.

    `total` is additive over batches and ranks; absolute values of sums are taken in `value` alone.
    """

    target: Target
    device: torch.device | None
    dtype: torch.dtype = torch.float32
    batch: int = 0
    total: Tensor | None = None
    last_batch: int = field(default=0, repr=False)

    needs_backward = True

    def fold(self, grad_y_NO: Tensor, x_NI: Tensor) -> None:
        raise NotImplementedError

    def fold_gradient(self, gradient_OI: Tensor) -> None:
        """`fold` of a batch whose dYᵀX is there already; it is left as it is."""
        raise NotImplementedError

    def value(self) -> Tensor:
        raise NotImplementedError

    def shape(self) -> tuple[int, ...]:
        """Of `total`."""
        return self.target.grid.shape

    @property
    def sum(self) -> Tensor:
        assert self.total is not None
        return self.total

    def _add(self, term: Tensor) -> None:
        term = term.to(self.device or term.device, torch.promote_types(term.dtype, torch.float32))
        self.total = term if self.total is None else self.total.add_(term)

    def _tiles(self, dense_OI: Tensor) -> Tensor:
        return tile(dense_OI, self.target.grid.block_size)

    def _means(self, dense_OI: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over each block of `measure` of its entries, (R, C), in fp32 or wider; some rows at a time."""
        dtype = torch.promote_types(dense_OI.dtype, torch.float32)
        size = self.target.grid.block_size
        some_rows = dense_OI.split(size * max(1, MEAN_ROWS // size))
        return torch.cat([self._tiles(measure(rows.to(dtype))).mean((-1, -2)) for rows in some_rows])


MEAN_ROWS = 256
"""Of a dense matrix, widened at a time where its blocks' means are taken, or those of one row of blocks."""


class _AbsOfSum(_Accumulator):
    """The gradient never exists: it is added by the product itself, or a few rows at a time to a sum of another dtype
    or on another device."""

    ROWS = 1024

    def shape(self) -> tuple[int, ...]:
        return self.target.grid.out_features, self.target.grid.in_features

    def fold(self, grad_y_NO: Tensor, x_NI: Tensor) -> None:
        total = self._total_for(x_NI)
        if total.device == x_NI.device and total.dtype == x_NI.dtype != torch.bfloat16:
            torch.addmm(total, grad_y_NO.T, x_NI, out=total)  # which FLOP counters know, unlike addmm_
            return
        for rows, grad_y in zip(total.split(self.ROWS), grad_y_NO.split(self.ROWS, dim=-1)):
            rows.add_((grad_y.T @ x_NI).to(rows.device))

    def fold_gradient(self, gradient_OI: Tensor) -> None:
        total = self._total_for(gradient_OI)
        total.add_(gradient_OI.to(total.device))

    def _total_for(self, term: Tensor) -> Tensor:
        if self.total is None:
            wide = torch.promote_types(term.dtype, torch.float32)
            dtype = wide if self.dtype == torch.float32 else self.dtype
            self.total = torch.zeros(self.shape(), dtype=dtype, device=self.device or term.device)
        return self.total

    def value(self) -> Tensor:
        return self._means(self.sum, torch.abs)


class _Net(_Accumulator):
    def fold(self, grad_y_NO: Tensor, x_NI: Tensor) -> None:
        size = self.target.grid.block_size
        dtype = torch.promote_types(x_NI.dtype, torch.float32)
        grad_y_NR = grad_y_NO.unflatten(-1, (-1, size)).sum(-1, dtype=dtype)
        x_NC = x_NI.unflatten(-1, (-1, size)).sum(-1, dtype=dtype)
        self._add(grad_y_NR.T @ x_NC)

    def fold_gradient(self, gradient_OI: Tensor) -> None:
        dtype = torch.promote_types(gradient_OI.dtype, torch.float32)
        self._add(self._tiles(gradient_OI).sum((-1, -2), dtype=dtype))

    def value(self) -> Tensor:
        return self.sum.abs() / self.target.grid.block_size**2


class _PerBatch(_Accumulator):
    """Criteria that are not linear in the gradient need a batch's whole."""

    def fold(self, grad_y_NO: Tensor, x_NI: Tensor) -> None:
        if self.last_batch == self.batch:
            raise InputError(
                "Expected every targeted layer to be used once in a forward, since this criterion is not a sum over "
                "uses. Got a layer used twice. Use the criterion abs_of_sum or net, or leave the layer out."
            )
        self.last_batch = self.batch
        self.fold_gradient(grad_y_NO.T @ x_NI)

    def fold_gradient(self, gradient_OI: Tensor) -> None:
        self._add(self._means(gradient_OI, self._measure))

    def _measure(self, gradient: Tensor) -> Tensor:
        """Of some entries, fp32 or wider: what a block's score is the mean of."""
        raise NotImplementedError

    def value(self) -> Tensor:
        return self.sum


class _SumOfAbs(_PerBatch):
    def _measure(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


class _Fisher(_PerBatch):
    def _measure(self, gradient: Tensor) -> Tensor:
        return gradient.square()


class _Activation(_Accumulator):
    needs_backward = False

    def shape(self) -> tuple[int, ...]:
        return (self.target.grid.in_features,)

    def fold(self, grad_y_NO: Tensor, x_NI: Tensor) -> None:
        self._add(x_NI.to(torch.promote_types(x_NI.dtype, torch.float32)).square().sum(0))

    def value(self) -> Tensor:
        weight = self.target.weight().abs()
        return self._tiles(weight * self.sum.sqrt().to(weight.device)).mean((-1, -2))


_ACCUMULATORS: dict[str, type[_Accumulator]] = {
    "abs_of_sum": _AbsOfSum,
    "net": _Net,
    "sum_of_abs": _SumOfAbs,
    "fisher": _Fisher,
    "activation": _Activation,
}

CRITERIA = (*_ACCUMULATORS, *DATA_FREE)
"""Every criterion by name; the first is the paper's."""


def check_criterion(criterion: str) -> None:
    """Raises InputError if there is no such criterion."""
    if criterion not in CRITERIA:
        raise InputError(
            f"Expected criterion to be one of {', '.join(CRITERIA)}. Got {criterion!r}."
            + did_you_mean(str(criterion), CRITERIA)
        )


def check_accumulator_dtype(dtype: str, criterion: str) -> None:
    """Raises InputError for an unknown dtype, or one that the criterion's accumulators cannot have."""
    if dtype not in ACCUMULATOR_DTYPES:
        raise InputError(
            f"Expected accumulator_dtype to be one of {', '.join(ACCUMULATOR_DTYPES)}. Got {dtype!r}."
            + did_you_mean(str(dtype), ACCUMULATOR_DTYPES)
        )
    if dtype != "float32" and criterion != "abs_of_sum":
        raise InputError(
            f'Expected accumulator_dtype {dtype!r} with the criterion "abs_of_sum" only. Got it with {criterion!r}, '
            "whose accumulators are small: leave it out."
        )


def score(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Mapping[str, object]] | None,
    *,
    criterion: str = "abs_of_sum",
    max_batches: int = 100,
    accumulator_device: torch.device | str | None = None,
    accumulator_dtype: str = "float32",
    seed: int = 0,
    on_batch: Callable[[int], object] | None = None,
) -> Scores:
    """Score the blocks of the targets; the model is left bit for bit as it was.

    Args:
        model: called as `model(**batch)`; its output must have a scalar `.loss`. Runs in train mode, as training
            will, with every random state restored afterwards.
        targets: the layers by name, in model order.
        batches: keyword dicts for the model; at most `max_batches` are drawn. May be None for `weight`, `random`.
        criterion: see the module's docstring.
        accumulator_device: where accumulators live; None: beside their gradient.
        accumulator_dtype: "float32" (fp64 for an fp64 model), or "bfloat16" for `abs_of_sum`; see the module's
            docstring for the error.
        seed: of `random`.
        on_batch: called after each batch with the number of batches done.
    Returns:
        The scores, the same on every rank of a process group: the signed accumulators are summed over ranks before
        any absolute value is taken, since |Σ| does not add up.
    Raises:
        InputError: no batch, a batch that is no dict, an output without a loss, a loss that is not finite.
    Cost of a batch: forward and dX above the lowest target; and the targets' dense gradients, 2·N·O·I FLOP each, but
        for `net` 2·N·R·C and for `activation` neither those nor a backward.
    Memory: the activations of a frozen backward and the targets' inputs; the accumulators; for `sum_of_abs` and
        `fisher` one gradient at a time, for `abs_of_sum` none, or a few rows of one where accumulators are bf16 or
        elsewhere.
    """
    check_criterion(criterion)
    check_accumulator_dtype(accumulator_dtype, criterion)
    if not targets:
        raise InputError("Expected at least one targeted layer. Got none.")
    block_size = next(iter(targets.values())).grid.block_size
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        noise = {
            name: torch.rand(target.grid.shape, generator=generator, device="cpu") for name, target in targets.items()
        }
        return Scores(noise, block_size=block_size, criterion=criterion)
    if criterion == "weight":
        magnitude = {
            name: _to_host(tile(target.weight().abs(), block_size).mean((-1, -2), dtype=torch.float32))
            for name, target in targets.items()
        }
        return Scores(magnitude, block_size=block_size, criterion=criterion)
    if batches is None:
        raise InputError(f"Expected batches for the criterion {criterion!r}. Got None.")

    device = device_here(accumulator_device)
    dtype = ACCUMULATOR_DTYPES[accumulator_dtype]
    accumulators = {name: _ACCUMULATORS[criterion](target, device, dtype) for name, target in targets.items()}
    seen = 0
    failure: Exception | None = None
    try:
        seen = _run(model, accumulators, itertools.islice(batches, max_batches), on_batch)
    except _FailedElsewhere:
        pass  # the rank that failed says with what, below
    except Exception as error:
        failure = error
    seen = _sum_over_ranks(accumulators, seen, failure)  # raises the failure, on every rank
    if seen == 0:
        raise InputError("Expected at least one batch to score with. Got an empty iterable.")
    missing = [name for name, accumulator in accumulators.items() if accumulator.total is None]
    if missing:
        raise InputError(
            f"Expected every targeted layer to take part in the forward. {missing[0]} did not"
            + (f", nor did {len(missing) - 1} more." if len(missing) > 1 else ".")
            + " Leave it out of target_modules."
        )
    scores = {name: _to_host(accumulator.value()) for name, accumulator in accumulators.items()}
    return Scores(scores, block_size=block_size, criterion=criterion, batches_seen=seen)


class GradientScores:
    """Scores from the gradients of weights that are being trained: `add` after a backward, `scores` at the end.

    As `score` gives them, where a batch is what one `add` sees; the weights may move in between. A weight that several
    uses share is scored by the sum of its gradients.

    Args:
        targets, criterion, accumulator_device, accumulator_dtype: as for `score`; a criterion that reads gradients.
    Raises:
        InputError: another criterion.
    Memory: as `score`, without taps.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        *,
        criterion: str = "abs_of_sum",
        accumulator_device: torch.device | str | None = None,
        accumulator_dtype: str = "float32",
    ) -> None:
        check_criterion(criterion)
        check_accumulator_dtype(accumulator_dtype, criterion)
        if criterion in FORWARD_ONLY:
            able = ", ".join(name for name in CRITERIA if name not in FORWARD_ONLY)
            raise InputError(f"Expected a criterion that reads gradients: {able}. Got {criterion!r}.")
        device, dtype = device_here(accumulator_device), ACCUMULATOR_DTYPES[accumulator_dtype]
        self._accumulators = {n: _ACCUMULATORS[criterion](target, device, dtype) for n, target in targets.items()}
        self._criterion = criterion
        self._seen = 0

    def add(self) -> None:
        """Take in what the targets' weights have for gradients now. Over ranks they must be the same: reduced.

        Raises:
            InputError: a target without a gradient.
        """
        self._seen += 1
        for name, accumulator in self._accumulators.items():
            module: Any = accumulator.target.module
            if module.weight.grad is None:
                raise InputError(
                    f"Expected a gradient of every targeted layer. {name} has none: leave it out of target_modules."
                )
            accumulator.fold_gradient(view_OI(module.weight.grad, is_transposed(module)))

    def scores(self) -> Scores:
        """The scores of all that was added, at least once."""
        scores = {name: _to_host(accumulator.value()) for name, accumulator in self._accumulators.items()}
        block_size = next(iter(self._accumulators.values())).target.grid.block_size
        return Scores(scores, block_size=block_size, criterion=self._criterion, batches_seen=self._seen)


def device_here(name: torch.device | str | None) -> torch.device | None:
    """The device of an accumulator by its name. Raises InputError for one that this machine does not have."""
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Expected accumulator_device to be a device here. Got {str(name)!r}: {reason}") from None


def _run(
    model: nn.Module,
    accumulators: Mapping[str, _Accumulator],
    batches: Iterable[Mapping[str, object]],
    on_batch: Callable[[int], object] | None,
) -> int:
    """Forward and backward over the batches with taps in place. Returns the number of batches."""
    needs_backward = next(iter(accumulators.values())).needs_backward
    device = next(model.parameters()).device
    together = _on_every_rank if any(map(is_sharded, model.parameters())) else _here
    if together is _on_every_rank:
        batches = _in_step(batches)
    seen = 0
    with _left_as_found(model), _taps(model, accumulators), torch.set_grad_enabled(needs_backward):
        for seen, batch in enumerate(batches, start=1):
            for accumulator in accumulators.values():
                accumulator.batch = seen
            loss = together(partial(_loss_to_score_by, model, batch, device, seen, needs_backward))
            if needs_backward:
                loss.backward()
            if on_batch is not None:
                on_batch(seen)
    return seen


def _loss_to_score_by(
    model: nn.Module, batch: object, device: torch.device, number: int, needs_backward: bool
) -> Tensor:
    loss = batch_loss(model, batch, device, number)
    if needs_backward and not loss.requires_grad:
        raise InputError(
            "Expected the loss to depend on a targeted layer. Got one that does not: is the forward run without "
            "gradients, or are the targets no part of it?"
        )
    return loss


class _FailedElsewhere(Exception):
    """Another rank cannot go on; `_sum_over_ranks` tells why."""


def _here(part: Callable[[], T]) -> T:
    return part()


def _on_every_rank(part: Callable[[], T]) -> T:
    """What `part` gives here, once it is done on every rank: where one has failed by its end, none goes on alone.

    A weight that is sharded over the ranks is gathered by all of them together; a rank that fails in the midst of a
    forward leaves the others waiting there, as in training.

    Raises:
        _FailedElsewhere: `part` failed on another rank alone.
    """
    result, failure = None, None
    try:
        result = part()
    except Exception as error:
        failure = error
    failures = torch.tensor([int(failure is not None)], device=_reduction_device())
    dist.all_reduce(failures)
    if failure is not None:
        raise failure
    if failures.item():
        raise _FailedElsewhere
    return cast(T, result)


def _in_step(batches: Iterable[Mapping[str, object]]) -> Iterator[Mapping[str, object]]:
    """The batches, as long as every rank has one.

    Raises InputError on every rank once one has run out before another.
    """
    iterator = iter(batches)
    for number in itertools.count(1):
        batch = _on_every_rank(partial(_next_batch, iterator, number))
        has_batch = torch.tensor([int(batch is not None)], device=_reduction_device())
        dist.all_reduce(has_batch)
        if not has_batch.item():
            return
        if has_batch.item() < dist.get_world_size():
            raise InputError(
                "Expected as many batches on every rank, since the model's weights are sharded over the ranks. Got "
                f"{'more' if batch is not None else 'fewer'} on rank {dist.get_rank()} than on another: cut them to "
                "the same number."
            )
        assert batch is not None
        yield batch


def _next_batch(iterator: Iterator[object], number: int) -> Mapping[str, object] | None:
    """The next batch, checked before any rank runs it; None after the last."""
    batch = next(iterator, None)
    return None if batch is None else _checked(batch, number)


def _checked(batch: object, number: int) -> Mapping[str, object]:
    if not isinstance(batch, Mapping):
        raise InputError(
            f"Expected batches of keyword dicts for the model's forward. Got {type(batch).__name__} at batch {number}."
        )
    return batch


def batch_loss(model: nn.Module, batch: object, device: torch.device, number: int, remedy: str = "") -> Tensor:
    """The loss of a batch, which is moved to `device`. Raises InputError where there is no finite one."""
    batch = _checked(batch, number)
    if device.type != "meta":  # offloaded models move their inputs themselves
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise InputError(
            f"Expected the model's output to have a loss. Got none at batch {number}: "
            "the batch must hold labels beside the inputs."
        )
    if not torch.isfinite(loss):
        raise InputError(
            f"Expected a finite loss. Got {loss.item()} at batch {number}: check that each row has labels that "
            f"are not masked, and the model's dtype{remedy}."
        )
    return loss


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward hands dY and the layer's input to `fold`.

    `anchor` requires a gradient, so that the tap is reached although no weight does.
    """

    @staticmethod
    def forward(ctx, y, x, anchor, fold):
        ctx.save_for_backward(x)
        ctx.fold = fold
        # The model may change the output in place, which autograd forbids for a view made by a custom function.
        if y._is_view():
            return y.clone()
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, *grads):
        (grad_y,) = grads
        (x,) = ctx.saved_tensors
        ctx.fold(flatten(grad_y), flatten(x.to(grad_y.device, grad_y.dtype)))
        return (grad_y if ctx.needs_input_grad[0] else None), None, None, None


@contextmanager
def _taps(model: nn.Module, accumulators: Mapping[str, _Accumulator]) -> Iterator[None]:
    """Place a tap behind each target, and let the backward end at the lowest, under checkpointing too."""
    with ExitStack() as stack:
        for accumulator in accumulators.values():
            hook = accumulator.target.module.register_forward_hook(_tap_hook(accumulator), with_kwargs=True)
            stack.callback(hook.remove)
        ends = stack.enter_context(backward_end(model, accumulators))
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if checkpointed and not ends and isinstance(embeddings, nn.Module):
            # Reentrant checkpointing runs a layer's backward only if an input of the layer requires a gradient.
            hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
            stack.callback(hook.remove)
        yield


def _tap_hook(accumulator: _Accumulator):
    grid = accumulator.target.grid

    def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor | None:
        x = (args[0] if args else kwargs["input"]).detach()
        if (y.shape[-1], x.shape[-1]) != (grid.out_features, grid.in_features):
            raise InputError(
                f"Expected a targeted layer to give all of its {grid.out_features} features of {grid.in_features}. Got "
                f"{y.shape[-1]} of {x.shape[-1]}: if tensor parallelism has split the model, load it without a tp_plan."
            )
        if not accumulator.needs_backward:
            with torch.no_grad():
                accumulator.fold(flatten(y), flatten(x))
            return None
        if not torch.is_grad_enabled():  # the first, gradient-free pass of reentrant checkpointing
            return None
        anchor = torch.zeros((), device=y.device, requires_grad=True)
        return _Tap.apply(y, x, anchor, accumulator.fold)

    return hook


@contextmanager
def modes_and_flags_kept(model: nn.Module) -> Iterator[None]:
    """Train or evaluation mode of every module and `requires_grad` of every parameter are afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Freeze the model in train mode; afterwards restore modes, flags, gradients, buffers and random states."""
    buffers = [
        (module, name, buffer, whole, whole.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (whole := _offloaded(module, name) if buffer.is_meta else buffer) is not None
    ]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator is not None else []
    kind = "cuda" if accelerator is None else accelerator.type
    with torch.random.fork_rng(devices=devices, device_type=kind), modes_and_flags_kept(model):
        try:
            model.train().requires_grad_(False)
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            for module, name, buffer, whole, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(whole, value):
                    whole.copy_(value)


def _offloaded(module: Any, name: str) -> Tensor | None:
    """The tensor that Accelerate keeps of an offloaded buffer in memory; on CPUs the forward has it itself."""
    weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return weights[name] if weights is not None and name in weights else None


def _sum_over_ranks(accumulators: Mapping[str, _Accumulator], seen: int, failure: Exception | None) -> int:
    """Add the accumulators of all ranks, one at a time; every rank ends with the same.

    Every rank takes part in every reduction, also for a layer that none of its batches reached, or ranks would add up
    different layers. A failure of one rank is raised on all, before any of them waits for it, and told by all: a
    launcher may end the rank before it can.

    Returns:
        Batches seen by all ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        if failure is not None:
            raise failure
        return seen
    device = _reduction_device()
    names = list(accumulators)
    reached = [int(accumulators[name].total is not None) for name in names]
    counts = torch.tensor([seen, int(failure is not None), *reached], device=device)
    dist.all_reduce(counts)
    seen, failures, *reached = counts.tolist()
    if failures:
        told: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(told, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
        raise InputError(
            f"Expected every rank to score its batches. Got {failures} that failed, first rank {rank} with {text}"
        )
    for name, ranks in zip(names, reached):
        accumulator = accumulators[name]
        if not ranks:
            continue
        total = accumulator.total
        is_double = any(p.dtype == torch.float64 for p in accumulator.target.module.parameters())
        dtype = torch.float64 if is_double else torch.float32
        moved = torch.zeros(accumulator.shape(), dtype=dtype) if total is None else total
        moved = moved.to(device, dtype)
        dist.all_reduce(moved)
        kept = dtype if accumulator.dtype == torch.float32 else accumulator.dtype
        accumulator.total = moved.to((accumulator.device or device) if total is None else total.device, kept)
    return seen


def _reduction_device() -> torch.device:
    """Where tensors must be for the default process group to add them up."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _to_host(scores: Tensor) -> Tensor:
    return scores.to("cpu", torch.float32)
