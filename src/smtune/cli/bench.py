"""`smtune bench`: what a step costs, against the floor and against what one would pick instead."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from smtune.errors import InputError
from smtune.version import command_line

if TYPE_CHECKING:
    from smtune.bench.request import Request

LOG_SECONDS = 60.0
"""Between two lines on what is going on, where the output is no terminal."""


def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="With commas: layers7b, smollm2, sweeps, write, scoring, kernels, table1, cost-aware; or all."
        ),
    ] = "layers7b",
    dtype: Annotated[str, typer.Option(help="Of the base weights, with commas: float32, bfloat16.")] = "float32",
    tokens: Annotated[str | None, typer.Option(help="Of a batch, with commas. Default: 1024; SmolLM2: 512.")] = None,
    arms: Annotated[str | None, typer.Option(help="With commas, such as smt-0.84,lora,full. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Steps of each arm that are timed.")] = 7,
    threads: Annotated[int | None, typer.Option(help="Default: all cores.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rival: Annotated[Path | None, typer.Option(help="File of the arm appendix-a: benchmarks/appendix_a.py.")] = None,
    output: Annotated[Path, typer.Option(help="The JSON file; a stopped run goes on with it.")] = Path("bench.json"),
    page: Annotated[Path | None, typer.Option(help="The report. Default: beside the JSON file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model and few arms: a look, in a minute.")] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Time arms of layers7b and smollm2 again; keep both.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing; write the page anew.")] = False,
) -> None:
    """Time and count training steps of SMT and its rivals beside the floor, interleaved; write JSON and a page."""
    from smtune.bench.request import Request, check, run
    from smtune.report.benchmarks import terminal_tables, write_report

    console = Console(stderr=True, highlight=False)
    page = page or output.with_suffix(".md")
    request = Request(
        suites=_words(suite),
        dtypes=_words(dtype),
        tokens=None if tokens is None else _numbers(tokens),
        arms=None if arms is None else _words(arms),
        rounds=rounds,
        threads=threads,
        device=device,
        rival=rival,
        quick=quick,
        anew=anew,
    )
    check(request, [output, page])
    faults: list[str] = []
    if report:
        results = _read(output)
    else:
        _warn_if_busy(console)
        _warn_of_bf16(request, console)
        with _progress(console) as how:
            results, faults = run(request, output, command_line(), how)
    for table in terminal_tables(results):
        Console().print(table)
    written = write_report(results, page)
    console.print(f"Wrote {output}, " + ", ".join(map(str, written)), soft_wrap=True, markup=False)
    if faults:
        console.print("Not measured, for a floor cannot run: " + "; ".join(faults), soft_wrap=True, markup=False)
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"Expected --tokens with whole numbers, such as 512,1024. Got {text!r}.")
    return [int(word) for word in words]


def _read(output: Path) -> dict[str, Any]:
    try:
        values = json.loads(output.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"Expected results at {output}. There are none: leave out --report to measure.") from None
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("records"), list):
        raise InputError(f"Expected --output to be a result of `smtune bench`. {output} is not.")
    return values


def _warn_if_busy(console: Console) -> None:
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores / 2:
        console.print(
            f"[bold yellow]The machine is busy:[/] load {load:.1f} on {cores} cores. Times will spread; ratios are of "
            "neighbouring steps, and every record says how busy others kept the cores.",
            soft_wrap=True,
        )


def _warn_of_bf16(request: Request, console: Console) -> None:
    from smtune.models import cpu_is_slow_in_bf16

    if request.device == "cpu" and "bfloat16" in request.dtypes and cpu_is_slow_in_bf16():
        console.print(
            "[bold yellow]This CPU cannot multiply bfloat16:[/] products take some 6 to 200 times as long as in "
            "float32, whatever the method. Measure --dtype float32 here.",
            soft_wrap=True,
        )


def at_most_every(
    seconds: float, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[str], None]:
    """`tell`, which now hears a text only where the last it heard is `seconds` old; the first at once."""
    heard = -math.inf

    def say(text: str) -> None:
        nonlocal heard
        now = clock()
        if now - heard >= seconds:
            heard = now
            tell(text)

    return say


@contextmanager
def _progress(console: Console) -> Iterator[dict[str, Any]]:
    """`say` shows what is going on: in one line that changes, or in a log at most once a minute. `tell` adds a line."""

    def tell(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield {"say": at_most_every(LOG_SECONDS, tell), "tell": tell}
        return
    with console.status("Starting") as status:
        yield {"say": lambda text: status.update(escape(text)), "tell": tell}
