"""What is asked of `smtune bench`: checked as a whole before anything starts, then turned into jobs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smtune.bench import single, suites
from smtune.bench.arms import load_rival
from smtune.bench.machine import cores, describe
from smtune.bench.process import ChildError
from smtune.bench.results import Results
from smtune.bench.run import How, run_series
from smtune.errors import InputError, did_you_mean
from smtune.files import not_writable
from smtune.models import DTYPES

Job = Callable[[Results, How], None]

TOKENS = {"smollm2": 512}
DEFAULT_TOKENS = 1024
OF_ARMS = ("layers7b", "smollm2")
"""Suites that compare arms."""
OWN_TOKENS = ("sweeps", "cost-aware")
"""Suites that have tokens of their own."""
QUICK_ARMS = ["floor", "smt-0.84", "lora", "full"]
QUICK_MODEL, QUICK_TOKENS = "llama-64x2", 64


@dataclass(frozen=True)
class Request:
    """A call of `smtune bench`.

    Attributes:
        suites: names in `SUITES`, or "all".
        dtypes: of the base weights, in the suites that compare arms.
        tokens: of a batch. None: 1,024, and 512 for SmolLM2.
        arms: of the suites that compare arms. None: all that can be built (`appendix-a` wants its file).
        rounds: timed rounds.
        threads: of each process. None: all cores.
        device: "cpu" or "cuda".
        rival: the Python file of the arm `appendix-a`.
        quick: a tiny model, few arms, two rounds, in place of any suite.
        anew: time arms of the comparing suites again that `output` has already; both records stay.
    """

    suites: Sequence[str] = ("layers7b",)
    dtypes: Sequence[str] = ("float32",)
    tokens: Sequence[int] | None = None
    arms: Sequence[str] | None = None
    rounds: int = 7
    threads: int | None = None
    device: str = "cpu"
    rival: Path | None = None
    quick: bool = False
    anew: bool = False


def check(request: Request, writable: Sequence[Path]) -> None:
    """Raises InputError that names every fault: unknown names, counts below one, places that cannot be written."""
    faults = [
        *_unknown("suite", request.suites, [*suites.SUITES, "all"]),
        *_unknown("dtype", request.dtypes, DTYPES),
        *_unknown("arm", request.arms or (), suites.ARMS),
        *_unknown("device", [request.device], ("cpu", "cuda")),
    ]
    wrong = [count for count in request.tokens or () if count < 4 or count % 4]
    faults += [f"Expected tokens to be a multiple of 4, the rows of a batch. Got {count}." for count in wrong]
    faults += _nothing_to_do(request)
    if request.rounds < 1:
        faults.append(f"Expected at least one round. Got {request.rounds}.")
    here = cores()
    if request.threads is not None and not 1 <= request.threads <= here:
        faults.append(f"Expected from 1 to {here} threads, the cores here. Got {request.threads}.")
    if request.device == "cuda" and not torch.cuda.is_available():
        faults.append("Expected a CUDA device here. There is none: use --device cpu.")
    if request.arms is not None and "appendix-a" in request.arms and request.rival is None:
        faults.append("Expected --rival benchmarks/appendix_a.py, the file of the arm appendix-a. Got none.")
    if request.rival is not None:
        try:
            load_rival(str(request.rival))
        except InputError as error:
            faults.append(str(error))
    faults += [fault for path in writable if (fault := not_writable(path)) is not None]
    if faults:
        raise InputError("\n".join(faults))


def _nothing_to_do(request: Request) -> list[str]:
    """Arms and tokens that no suite of the request would take up."""
    wanted = [name for name in suites.SUITES if name in request.suites or "all" in request.suites]
    has_arms = request.quick or any(name in OF_ARMS for name in wanted)
    faults = []
    if request.arms is not None and wanted and not has_arms:
        faults.append(f"Expected --arms with the suites {' or '.join(OF_ARMS)}. Got it with {', '.join(wanted)}.")
    dtypes = ("float32",) if request.quick else request.dtypes
    unfit = [arm for arm in request.arms or () if not any(suites.is_for(arm, dtype) for dtype in dtypes)]
    faults += [f"Expected --dtype bfloat16 for the arm {arm}. Got {', '.join(dtypes)}." for arm in unfit]
    own = [name for name in wanted if name in OWN_TOKENS]
    if request.tokens and (request.quick or (own and own == wanted)):
        which = "--quick" if request.quick else ", ".join(own)
        faults.append(f"Expected no --tokens with {which}, which has its own. Got some.")
    if request.device == "cuda" and "kernels" in request.suites and not request.quick:
        faults.append("Expected --device cpu for the suite kernels. Got cuda: `make bench-gpu` times those of GPUs.")
    return faults


def _unknown(what: str, given: Sequence[str], known: Collection[str]) -> list[str]:
    if not given and what != "arm":
        return [f"Expected at least one {what} of {', '.join(known)}. Got none."]
    return [
        f"Expected each {what} to be one of {', '.join(known)}. Got {name!r}.{did_you_mean(name, known)}"
        for name in given
        if name not in known
    ]


def run(request: Request, output: Path, command: str, how: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Measure what has no record in `output` yet, or arms anew.

    Returns the file's content, and what kept series from being measured.

    Args:
        request: checked.
        output: the JSON file.
        command: for the record.
        how: `say` and `tell` of `How`.
    """
    threads = request.threads or cores()
    results = Results(output, describe(threads, request.device), command)
    rounds = 2 if request.quick else request.rounds
    settings = How(rounds, threads, request.device, request.anew, **how)
    faults = []
    for job in jobs(request):
        try:
            job(results, settings)
        except ChildError as error:
            faults.append(str(error))
            settings.tell(f"cannot go on here: {error}")
    return results.values, faults


def jobs(request: Request) -> list[Job]:
    """What the request comes to, in order."""
    rival = None if request.rival is None else str(request.rival.resolve())
    can_be_built = [arm for arm in suites.ARMS if arm != "appendix-a" or rival is not None]
    if request.quick:
        arms = request.arms or QUICK_ARMS
        return [partial(run_series, suites.comparison("quick", QUICK_MODEL, "float32", QUICK_TOKENS, arms, rival))]
    wanted = [name for name in suites.SUITES if name in request.suites or "all" in request.suites]
    wanted = [name for name in wanted if name != "kernels" or request.device == "cpu"]  # `make bench-gpu` has GPUs'
    arms = [arm for arm in can_be_built if request.arms is None or arm in request.arms]
    found: list[Job] = []
    for suite in wanted:
        for dtype in request.dtypes:
            for tokens in (suite not in OWN_TOKENS and request.tokens) or [TOKENS.get(suite, DEFAULT_TOKENS)]:
                found += _of_suite(suite, dtype, tokens, arms, rival)
    return found


def _of_suite(suite: str, dtype: str, tokens: int, arms: Sequence[str], rival: str | None) -> list[Job]:
    llama = "llama-7b-layers"
    if suite == "layers7b":
        series = [suites.comparison(suite, llama, dtype, tokens, arms, rival)]
    elif suite == "smollm2":
        series = [suites.comparison(suite, "smollm2-135m", dtype, tokens, arms, rival)]
    elif suite == "sweeps":
        series = suites.sweeps(dtype)
    elif suite == "write":
        series = [suites.writes(llama, dtype, tokens)]
    elif suite == "table1":
        return [partial(single.run_table1, suites.table1(llama, dtype, tokens))]
    elif suite == "scoring":
        return [partial(single.run_scoring, llama, dtype, tokens)]
    elif suite == "kernels":
        return [partial(single.run_kernels, dtype, tokens)]
    else:
        return [partial(single.run_cost_aware, dtype)]
    return [partial(run_series, each) for each in series]
