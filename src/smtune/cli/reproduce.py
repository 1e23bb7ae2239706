"""`smtune reproduce`: the paper's tables and figures, run anew."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from smtune.errors import InputError, did_you_mean
from smtune.files import write_json

if TYPE_CHECKING:
    from smtune.reproduce.run import Request

PRETRAIN = "pretrain-mini"
EVIDENCE = "evidence"
RESULTS = Path("reproduction")
REQUEST = "request.json"
TRIAL = "trial"
"""Where the pages of a trial go, beside those of results."""


def reproduce(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERIMENT",
            help="table1 to table6, figure3 to figure5, memory, study or a part of it; all by default. pretrain-mini "
            "makes the model of the tier mini, evidence the answer.",
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="embedded, the default, or paper: the paper's models and data.")
    ] = None,
    tier: Annotated[
        str | None, typer.Option(help="Of the embedded scale: mini, smollm2 or real (wants --data).")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the experiments, and what there is of them.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve every cell; estimate memory, time and disk.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --output was last asked for; no other options needed.")
    ] = False,
    check: Annotated[
        str | None, typer.Option("--check", metavar="CELL", help="Run a stored cell again; it must give the same bits.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; on GPUs one each.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each job. Default: the cores shared.")] = None,
    seeds: Annotated[str | None, typer.Option(help="With commas. Default: the tier's.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of data: LLM-Adapters' repository, or its files by task.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of results. Default: reproduction/<tier>; of evidence reproduction.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Of evidence: the page to write. Default: evidence.md in --output.")
    ] = None,
    cells: Annotated[int | None, typer.Option(min=1, help="A trial: at most so many cells of each.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="A trial: so many training steps.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="A trial: so many items of each test.")] = None,
) -> None:
    """Run the paper's experiments anew.

    They are shown in its layout beside its numbers. A stopped run goes on.
    """
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if experiments == [PRETRAIN]:
        _pretrain(steps, threads, say)
        return
    if page is not None and experiments != [EVIDENCE]:
        raise InputError(f"Expected --page with the experiment {EVIDENCE} alone. Got it with others: leave it out.")
    if experiments == [EVIDENCE]:
        _evidence(output or RESULTS, page, say)
        return
    from smtune.reproduce.declared import expand, experiment_names, load_experiment

    names = expand(experiments or experiment_names())
    for name in names:
        load_experiment(name)
    chosen = _tier(scale, tier)
    output = output or RESULTS / chosen
    if resume:
        given = {"--data": data, "--steps": steps, "--items": items, "--seeds": seeds, "--cells": cells}
        beside = [option for option, value in given.items() if value is not None]
        if beside:
            raise InputError(
                f"Expected --resume alone: it goes on with what was asked for. Got {', '.join(beside)} beside it: "
                "leave out --resume; what has been run is not run again."
            )
        names, request = _resumed(output, bool(experiments), names, scale, tier)
    else:
        request = _request(chosen, data, steps, items, seeds, cells)
    if list_:
        _list(names, request, output)
    elif dry_run:
        _dry_run(names, request, jobs)
    elif check is not None:
        _check(check, request, output, threads, say)
    else:
        _run(names, request, output, jobs, threads, say)


def _tier(scale: str | None, tier: str | None) -> str:
    from smtune.reproduce.declared import SCALES

    scale = "embedded" if scale is None else scale
    if scale not in SCALES:
        raise InputError(f"Expected --scale among {', '.join(SCALES)}. Got {scale!r}.{did_you_mean(scale, SCALES)}")
    tiers = SCALES[scale]
    if tier is not None and tier not in tiers:
        hint = did_you_mean(tier, tiers)
        raise InputError(f"Expected --tier of the scale {scale} among {', '.join(tiers)}. Got {tier!r}.{hint}")
    return tier or tiers[0]


def _request(
    tier: str,
    data: Path | None,
    steps: int | None,
    items: int | None,
    seeds: str | None,
    cells: int | None,
) -> Request:
    from smtune.reproduce.run import Request
    from smtune.reproduce.setting import Setting

    if data is not None and not data.is_dir():
        raise InputError(f"Expected --data to be a folder. There is none at {data}.")
    words = None if seeds is None else [word.strip() for word in seeds.split(",") if word.strip()]
    if words is not None and (not words or not all(word.isdecimal() for word in words)):
        raise InputError(f"Expected --seeds with whole numbers, such as 0,1,2. Got {seeds!r}.")
    setting = Setting(tier, None if data is None else str(data.resolve()), steps, items)
    return Request(setting, None if words is None else list(dict.fromkeys(map(int, words))), cells)


def _resumed(
    output: Path, named: bool, names: list[str], scale: str | None, tier: str | None
) -> tuple[list[str], Request]:
    """What the folder was last asked for; experiments that are named now take the place of those named then.

    Raises:
        InputError: there is none, or one of another scale or tier than those given.
    """
    from smtune.reproduce.declared import SCALES
    from smtune.reproduce.run import Request
    from smtune.reproduce.setting import Setting

    try:
        asked = json.loads((output / REQUEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"Expected --output with a run to go on with. {output} has none: leave out --resume to begin one."
        ) from None
    stored = asked["setting"]["tier"]
    if (tier is not None and tier != stored) or (scale is not None and stored not in SCALES[scale]):
        given = f"--tier {tier}" if tier is not None else f"--scale {scale}"
        raise InputError(
            f"Expected --resume with the tier of {output}, {stored}. Got {given}: leave it out, or begin a run in "
            "another --output."
        )
    names = names if named else asked["experiments"]
    return names, Request(Setting(**asked["setting"]), asked["seeds"], asked["max_cells"])


def _pretrain(steps: int | None, threads: int | None, say: Any) -> None:
    import torch

    from smtune.reproduce import mini

    if threads is not None:
        torch.set_num_threads(threads)
    mini.pretrain(steps or mini.STEPS, say)


def _evidence(output: Path, page: Path | None, say: Any) -> None:
    from smtune.reproduce.evidence import write_evidence

    if not any(output.glob("*/cells/*.jsonl")):
        raise InputError(
            f"Expected a folder with results of `smtune reproduce`, a folder for each tier. {output} has none: run an "
            "experiment first, or give its place as --output."
        )
    if page is not None and page.is_dir():
        raise InputError(f"Expected --page to be a file. {page} is a folder: name a .md file in it.")
    written = write_evidence(output, page or output / "evidence.md")
    say("wrote " + ", ".join(map(str, written)))


def _list(names: list[str], request: Request, output: Path) -> None:
    from rich.table import Table

    from smtune.reproduce import mini
    from smtune.reproduce.declared import load_experiment
    from smtune.reproduce.run import CELLS
    from smtune.reproduce.store import Store

    setting = request.setting
    table = Table(title=f"Experiments at the tier {setting.tier}, results in {output}")
    for heading in ("name", "what", "cells there"):
        table.add_column(heading)
    store, can_look = Store(output / CELLS), (output / CELLS).is_dir() and (setting.tier != "mini" or mini.is_made())
    for name in names:
        experiment = load_experiment(name)
        there = "0"
        if can_look:
            arms = request.arms(experiment)
            count = sum(store.find(cell) is not None for arm in arms for cell in arm.cells(store.find))
            there = f"{count} of {sum(arm.n_cells for arm in arms)}"
        table.add_row(name, experiment.title.partition(": ")[2] or experiment.title, there)
    Console().print(table)


def _dry_run(names: list[str], request: Request, jobs: int) -> None:
    from smtune.reproduce import dry

    console = Console()
    if request.setting.data is not None:
        _read_data(names, request)
    for name in names:
        console.print(dry.table(name, dry.estimate(request, name), jobs))
    tier = request.setting.declared
    recipe = tier.recipe
    settings = ", ".join(f"{name} {value}" for name, value in recipe.model_dump(exclude_none=True).items())
    batch = f"{recipe.micro_batch_size} × {recipe.max_length}"
    console.print(
        f"Model: {', '.join(tier.models)}, {tier.dtype} base, what is trained in fp32; blocks of {tier.block_size}².\n"
        f"Recipe: {settings}.\n"
        f"Memory: of a step, counted for a micro batch of {batch} tokens, without temporaries.\n"
        f"Time: of a cell, counted FLOP at an assumed {tier.flops_per_second:.2g} FLOP/s; an order of magnitude.\n"
        "Experiments that share cells run them once.",
        highlight=False,
    )


def _read_data(names: list[str], request: Request) -> None:
    """Raises InputError that says which file is missing."""
    from smtune.reproduce.setting import load_data

    for family in dict.fromkeys(family for name in names for family in request.families(name)):
        load_data(request.setting, family)


def _check(cell: str, request: Request, output: Path, threads: int | None, say: Any) -> None:
    from smtune.reproduce.run import CELLS, check_cell
    from smtune.reproduce.store import Store

    differences = check_cell(cell, Store(output / CELLS), request.setting, threads)
    if differences:
        say("\n".join(f"{cell}: {difference}" for difference in differences))
        raise typer.Exit(1)
    say(f"{cell}: the same metrics, plan and answers, bit for bit")


def _run(names: list[str], request: Request, output: Path, jobs: int, threads: int | None, say: Any) -> None:
    from dataclasses import asdict

    from smtune.reproduce.declared import load_experiment
    from smtune.reproduce.layouts import collect, render
    from smtune.reproduce.run import Runner

    if output.exists() and not output.is_dir():
        raise InputError(f"Expected --output to be a folder. {output} is a file.")
    runner = Runner(request, output, jobs, threads, say)
    _read_data(names, request)
    output.mkdir(parents=True, exist_ok=True)
    asked = {"experiments": names, "setting": asdict(request.setting), "seeds": request.seeds}
    write_json(output / REQUEST, {**asked, "max_cells": request.max_cells, "date": time.strftime("%Y-%m-%d")})
    missing = []
    for name in names:
        if not runner.run(name):
            missing.append(name)
        result = collect(load_experiment(name), request, runner.store)
        if result.arms:
            written = render(result, output / TRIAL if request.is_cut else output)
            say(f"{name}: wrote " + ", ".join(map(str, written)))
    if missing:
        say(f"Cells are missing of {', '.join(missing)}. The same command, or --resume, runs them.")
        raise typer.Exit(1)
