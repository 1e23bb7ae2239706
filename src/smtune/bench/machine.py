"""The machine a run was on, and what else it was doing meanwhile. Nothing about the user or the machine's name."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import smtune

FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
SAME = ("cpu", "features", "cores", "threads", "gpu", "torch", "transformers", "peft")
"""What must be equal for records to be compared. Processors of several generations may have one name."""


def describe(threads: int, device: str) -> dict[str, Any]:
    """Plain JSON values."""
    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": threads,
        "memory_bytes": total_memory(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "features": [name for name in FEATURES if name in (cpu.get("flags") or cpu.get("Features") or "").split()],
        "python": platform.python_version(),
        "smtune": smtune.__version__,
        **{package: metadata.version(package) for package in ("torch", "transformers", "peft")},
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """Of the first processor; empty where the system does not tell in /proc."""
    lines = _read("/proc/cpuinfo").partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def total_memory() -> int:
    """Bytes of memory that this process may use at most: the machine's, or what its container is given."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given = _read("/sys/fs/cgroup/memory.max").strip()
    return min(whole, int(given)) if given.isdigit() else whole


def available_memory(device: str = "cpu") -> int:
    """Bytes that can be had now on a device, on "cpu" without swapping, as far as the system tells."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable"):
            return min(int(line.split()[1]) * 1024, total_memory())
    return total_memory()


def load() -> float:
    """The 1-minute load average; it holds this run's own threads too."""
    return round(os.getloadavg()[0], 2)


class OthersUsage:
    """How many cores other processes kept busy, on average, since this was made. None where /proc does not tell.

    The load average cannot say it: it counts the run itself.

    Args:
        own: process ids of the run; they should live until `cores` is called.
    """

    def __init__(self, own: Iterable[int]) -> None:
        self._own = {pid: _ticks_of(pid) for pid in own}
        self._busy, self._total = _ticks()

    def cores(self) -> float | None:
        busy, total = _ticks()
        if total <= self._total:
            return None
        own = sum(max(0, _ticks_of(pid) - start) for pid, start in self._own.items())
        others = max(0, busy - self._busy - own)
        return round(others / (total - self._total) * (os.cpu_count() or 1), 3)


def _ticks() -> tuple[int, int]:
    """(busy, all) ticks of all cores since the start of the machine."""
    fields = [int(field) for field in _read("/proc/stat").partition("\n")[0].split()[1:9]]
    if not fields:
        return 0, 0
    idle = sum(fields[3:5])
    return sum(fields) - idle, sum(fields)


def _ticks_of(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if fields else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
