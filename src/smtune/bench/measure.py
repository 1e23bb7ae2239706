"""What is measured of one arm: time by phase, FLOPs, what is kept for the backward, memory, an adapter's life.

What is counted (FLOPs, bytes) is counted on steps of its own, since counting slows a step down and keeps tensors alive.
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from smtune.bench.arms import Arm
from smtune.models import wrapping

Batch = Mapping[str, Tensor]
PHASES = ("forward", "backward", "optimizer")


def now(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_of(arm: Arm) -> torch.device:
    return next(arm.model.parameters()).device


def step(arm: Arm, batch: Batch, update: bool = True) -> dict[str, float]:
    """One training step, in seconds by phase; the loss is part of the forward, zeroing of the optimizer's phase.

    Args:
        update: False for a micro batch whose gradients are only accumulated.
    Raises:
        ArithmeticError: the loss is not finite.
    """
    device = device_of(arm)
    start = now(device)
    loss = arm.model(**batch).loss
    forward = now(device)
    loss.backward()
    backward = now(device)
    if arm.optimizer is not None and update:
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)
    end = now(device)
    if not torch.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss.item()}")
    return {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}


def seconds_of(device: torch.device, action: Callable[[], Any]) -> float:
    """How long an action takes, until the device has done it."""
    start = now(device)
    action()
    return now(device) - start


# Counted ------------------------------------------------------------------------------------------------------------


def count_flops(arm: Arm, batch: Batch) -> dict[str, int]:
    """FLOPs of matrix products, by phase, as torch's counter and the formulas of smtune's own operators have them."""
    with FlopCounterMode(display=False) as forward:
        loss = arm.model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    _drop_gradients(arm)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def count_saved(arm: Arm, batch: Batch) -> int:
    """`saved_bytes` of the arm; what its method keeps for itself is left out too."""
    return saved_bytes(arm.model, batch, arm.kept)


def saved_bytes(model: nn.Module, batch: Batch, kept: Iterable[Tensor] = ()) -> int:
    """Bytes handed to saved-tensor hooks in one forward: each storage once, parameters and buffers left out.

    Storages are told apart by themselves and not by their address, which those of fake tensors lack.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *kept)}
    storages: dict[int, Any] = {}  # held, so that none is made in another's place

    def pack(tensor: Tensor) -> None:
        parts = [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]
        for storage in (part.untyped_storage() for part in parts):
            if storage._cdata not in own:
                storages[storage._cdata] = storage

    def unpack(nothing: None) -> Tensor:
        raise AssertionError("there is no backward")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = model(**batch).loss
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def state_bytes(arm: Arm) -> dict[str, int]:
    """Bytes that live from step to step, by what they are for; `gradients` live from the backward to the step."""
    trained = {id(parameter) for parameter in arm.trained}
    kept = {id(tensor) for tensor in arm.kept}
    states = arm.optimizer.state.values() if arm.optimizer is not None else ()
    kind = device_of(arm).type  # on a GPU AdamW's counts of steps are on the CPU
    resident = {id(tensor): tensor for tensor in (*arm.model.parameters(), *arm.model.buffers())}
    return {
        "trained": sum(parameter.nbytes for parameter in arm.trained),
        "gradients": sum(parameter.nbytes for parameter in arm.trained),
        "optimizer": sum(
            value.nbytes
            for state in states
            for value in state.values()
            if isinstance(value, Tensor) and value.device.type == kind
        ),
        "originals": sum(tensor.nbytes for tensor in arm.kept) if arm.plan is not None else 0,
        "index": sum(tensor.nbytes for tensor in arm.kept) if arm.plan is None else 0,
        "base": sum(tensor.nbytes for key, tensor in resident.items() if key not in trained | kept),
    }


def peak_tensor_bytes(arm: Arm, batch: Batch) -> int:
    """The most bytes of tensors alive at once within one step, those that live from step to step included."""
    state = state_bytes(arm)
    before = sum(state.values()) - state["gradients"]
    device = device_of(arm)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(arm, batch)
        return torch.cuda.memory_stats(device)["requested_bytes.all.peak"]  # what is allocated is rounded up
    changes = memory_changes(lambda: step(arm, batch))
    return before + max(accumulate(changes, initial=0))


def alive_after_forward(arm: Arm, batch: Batch) -> int | None:
    """Bytes of tensors that a forward leaves alive for its backward, however they are kept; None on a GPU: not counted.

    Saved-tensor hooks see only what goes through `save_for_backward`.
    """
    if device_of(arm).type == "cuda":
        return None
    return sum(memory_changes(lambda: arm.model(**batch).loss))


def memory_changes(run: Callable[[], Any]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) on the CPU, in order of time; what `run` returns is kept."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory(prefix="smtune-bench-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def block_op_seconds(arm: Arm, batch: Batch, steps: int = 7) -> list[float]:
    """Seconds of a step spent in smtune's own operators (the block gradients), by torch's profiler.

    For effects that are too small to be seen in the difference of two whole steps.
    """
    seconds = []
    on_gpu = device_of(arm).type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    for _ in range(steps):
        with profile(activities=activities) as profiler:
            step(arm, batch)
        ours = [event for event in profiler.key_averages() if event.key.startswith("smtune::")]
        seconds.append(sum(event.device_time_total if on_gpu else event.cpu_time_total for event in ours) / 1e6)
    return seconds


def _drop_gradients(arm: Arm) -> None:
    for parameter in arm.trained:
        parameter.grad = None


# The process's memory -----------------------------------------------------------------------------------------------


def rss_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak so far."""
    return _status("VmRSS") or _peak_so_far()


def reset_peak_rss() -> bool:
    """Begin the count of the peak anew. False where the system cannot: the peak is then since the start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """The most resident memory since `reset_peak_rss`."""
    return _status("VmHWM") or _peak_so_far()


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def _peak_so_far() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# An adapter's life --------------------------------------------------------------------------------------------------


def adapter_life(arm: Arm, batch: Batch, repeats: int = 5) -> dict[str, Any] | None:
    """An adapter's size on disk, and the seconds to load one more, switch to it, merge and unmerge; medians.

    A switch is `set_adapter` and a forward of one token, less the median of such a forward without a switch: methods
    may put work off to their next use. It counts no less than `set_adapter` alone takes.
    """
    model: Any = arm.model
    if not arm.is_adapter:
        return None
    seconds = partial(seconds_of, device_of(arm))
    first = model.active_adapter
    token = batch["input_ids"][:1, :1]

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=token)

    loads = []
    with tempfile.TemporaryDirectory(prefix="smtune-bench-") as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        for number in range(3):
            with wrapping():
                loads.append(seconds(lambda number=number: model.load_adapter(folder, f"copy{number}")))
            if number:
                model.delete_adapter(f"copy{number}")
    model.eval()
    forward()
    plain = statistics.median(seconds(forward) for _ in range(repeats))
    switches, settings = [], []
    for number in range(repeats + repeats % 2):  # an even number: ends at the first
        name = first if number % 2 else "copy0"
        settings.append(seconds(lambda name=name: model.set_adapter(name)))
        switches.append(settings[-1] + seconds(forward))
    model.delete_adapter("copy0")
    model.set_adapter(first)

    with model.disable_adapter():  # which takes resident blocks out
        before = base_hash(model)
    merges, unmerges = [], []
    for _ in range(3):
        merges.append(seconds(model.merge_adapter))
        unmerges.append(seconds(model.unmerge_adapter))
    return {
        "bytes": size,
        "load_s": statistics.median(loads),
        "switch_s": max(statistics.median(switches) - plain, statistics.median(settings)),
        "merge_s": statistics.median(merges),
        "unmerge_s": statistics.median(unmerges),
        "restored_exactly": base_hash(model) == before,
    }


def base_hash(model: Any) -> str:
    """Of every weight of the base model under an adapter as it stands in memory; a state dict would take blocks out."""
    digest = hashlib.sha256()
    for name, tensor in model.get_base_model().named_parameters():
        if ".base_layer." in name or model.base_model.prefix not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
