"""The command line: parse, wire, exit codes.

Exit codes: 0 done, 2 bad input, or too much of it for the device's memory, 1 a fault of ours, 130 stopped from the
keyboard. Bad input is told in a message without a traceback; `--debug` shows it. The upper layers are imported inside
the commands that need them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from smtune.cli.bench import bench
from smtune.cli.reproduce import reproduce
from smtune.errors import InputError
from smtune.files import new_folder, not_writable
from smtune.version import __version__

if TYPE_CHECKING:
    from smtune.selection import Plan

app = typer.Typer(
    name="smtune",
    help="Sparse Matrix Tuning: fine-tune a language model by training blocks of its weights.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
OUT_OF_MEMORY = (
    "For training, lower training.batch_size and raise training.gradient_accumulation_steps, or set "
    "training.gradient_checkpointing=true, dtype=bfloat16 or smt.accumulator_device=cpu; for evaluation, lower "
    "evaluation.batch_size (--batch-size), or give --dtype bfloat16, as for merging."
)

console = Console(stderr=True, highlight=False)
"""Progress and messages; results go to the standard output."""

Config = Annotated[Path, typer.Argument(help="A YAML configuration, such as examples/smollm2-arithmetic.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to it, such as training.max_steps=50.")
]
DType = Annotated[str, typer.Option(help="Of the base weights: float32 (4 bytes each: 28 GB for 7B) or bfloat16.")]


@app.command()
def select(
    config: Config,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
) -> None:
    """Score blocks and write a plan; train nothing."""
    from smtune.report import plan_table
    from smtune.training import load_config, select_plan

    if output.exists():
        raise InputError(f"Expected a new file for the plan. {output} exists: choose another --output.")
    _check_place(output, "--output")
    wanted = load_config(config, overrides or [])
    plan = select_plan(wanted, console)
    plan.save(output)
    Console().print(plan_table(plan))
    place = str(output) if re.fullmatch(r"[\w./-]+", str(output)) else json.dumps(str(output), ensure_ascii=False)
    mode = "" if wanted.smt.mode == "auto" else f", mode: {wanted.smt.mode}"  # all else is in the plan
    command = shlex.join(["smtune", "train", str(config), *(overrides or []), f"smt={{plan: {place}{mode}}}"])
    console.print(f"Wrote {output}. Train it:\n  {command}", soft_wrap=True, markup=False)


def _check_place(path: Path, what: str) -> None:
    """Raises InputError for a file that could not be written, before there is anything to write."""
    fault = not_writable(path)
    if fault is not None:
        raise InputError(f"{what}: {fault}")


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan of work.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to start here, one for each GPU.")] = None,
) -> None:
    """Fine-tune: score and select blocks, train, save.

    Then evaluate, if the configuration names tasks.
    """
    from smtune import training

    checked = training.load_config(config, overrides or [])
    options = checked.evaluation
    items = _items(options.tasks, options.source, options.limit, options.protocol) if options.tasks else []
    if dry_run:
        Console().print(training.dry_run(checked, resume=resume, processes=nproc))
        if items:
            Console().print(f"Then {len(items):,} test items by {options.protocol}, into {checked.output}/evaluation/")
        return
    if nproc is not None:
        from smtune.cli.launch import launch

        raise typer.Exit(launch(["train", str(config), *(overrides or []), *["--resume"] * resume], nproc))
    result = training.train(checked, resume=resume, console=console)
    if not is_main_process():
        return
    held_out = "" if result.eval_loss is None else f", of the rows held out {result.eval_loss:.4f}"
    console.print(f"Trained {result.trained} in {result.seconds:.0f} s, loss {result.loss:.4f}{held_out}")
    if items:
        _forget_training()
        _evaluate(result.folder, items, options.protocol, options.batch_size, checked.dtype, None)


def _forget_training() -> None:
    """Free what training held, and have models load whole: ZeRO-3's other processes, which took parts, are gone."""
    from accelerate.utils import release_memory
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    release_memory()  # layers that share an input refer to each other


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="An alias, a folder of a model, an adapter or a run, or a hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas. Packaged: arithmetic, comparison, gsm8k, SVAMP, AQuA, openbookqa, social_i_qa, "
            "winogrande. Others, and the groups commonsense and math, want --source."
        ),
    ],
    source: Annotated[str | None, typer.Option(help="Folder or file of test records. Default: the package's.")] = None,
    protocol: Annotated[str, typer.Option(help="generate, or likelihood for tasks with options.")] = "generate",
    limit: Annotated[int | None, typer.Option(help="Items of a task, at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    beams: Annotated[int, typer.Option(min=1, help="Of the search for an answer; 1 is greedy.")] = 1,
    backend: Annotated[
        str, typer.Option(help="smtune, or lm-eval: likelihood by lm-evaluation-harness's own model class.")
    ] = "smtune",
    dtype: DType = "float32",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results. Default: evaluation/<protocol>-<dtype> in the model's folder, or, of an alias or "
            "a hub id, in evaluations/<name>. --beams and --backend are added to its name."
        ),
    ] = None,
) -> None:
    """Measure accuracy with intervals.

    A call that was cut short goes on where it stopped.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("Expected --tasks with names of tasks or groups, such as gsm8k,boolq. Got none.")
    items = _items(names, source, limit, protocol, beams, backend)
    _evaluate(model, items, protocol, batch_size, dtype, output, beams, backend)


def is_main_process() -> bool:
    """Whether this process writes, of those that a launcher has started."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _items(
    tasks: list[str],
    source: str | None,
    limit: int | None,
    protocol: str,
    beams: int = 1,
    backend: str = "smtune",
) -> list[Any]:
    """The test items, all of them readable by the protocol."""
    from smtune.data import packaged_tests
    from smtune.evaluation import check, load_items, resolve_tasks
    from smtune.evaluation.tasks import RECORDS_URL

    chosen = resolve_tasks(tasks)
    packaged = {path.stem for path in packaged_tests().glob("*.jsonl")}
    absent = [task.name for task in chosen if source is None and task.name not in packaged]
    if absent:
        raise InputError(
            f"Expected --source (evaluation.source in a configuration) for {', '.join(absent)}: the package carries "
            f"test items of {', '.join(sorted(packaged))} only. `git clone {RECORDS_URL}` has all sets: give its "
            "folder `dataset`."
        )
    items = [item for task in chosen for item in load_items(task, source, limit)]
    check(items, protocol, beams=beams, backend=backend)
    return items


def _evaluate(
    model: str,
    items: list[Any],
    protocol: str,
    batch_size: int,
    dtype: str,
    output: Path | None,
    beams: int = 1,
    backend: str = "smtune",
) -> None:
    """Evaluate, print, keep every item's output."""
    from rich.progress import Progress

    from smtune.evaluation import check_folder, summary_table
    from smtune.evaluation import evaluate as evaluate_items
    from smtune.models import fingerprint, load_merged, load_tokenizer
    from smtune.training.lock import locked

    if output is None:
        place = Path(model) if Path(model).is_dir() else Path("evaluations") / model.replace("/", "--")
        how = protocol + (f"-beams{beams}" if beams > 1 else "") + (f"-{backend}" if backend != "smtune" else "")
        output = place / "evaluation" / f"{how}-{dtype}"
    if output.exists() and not output.is_dir():
        raise InputError(f"Expected --output to be a folder. {output} is a file.")
    _check_place(output / "summary.json", "--output")
    model_id = fingerprint(model)
    check_folder(output, items, protocol=protocol, model_id=model_id, dtype=dtype, beams=beams, backend=backend)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with locked(output), progress as bar:
        task = bar.add_task("Evaluating", total=len(items))
        evaluation = evaluate_items(
            load_merged(model, dtype),
            load_tokenizer(model),
            items,
            protocol=protocol,  # type: ignore[arg-type]
            model_id=model_id,
            out_dir=output,
            batch_size=batch_size,
            beams=beams,
            backend=backend,  # type: ignore[arg-type]
            progress=lambda done, total: bar.update(task, completed=done),
        )
    Console().print(summary_table(evaluation.summary))
    console.print(f"Every item's output and the summary: {output}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="An evaluated run, or the folder of an evaluation's results.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same test items.")],
) -> None:
    """Compare two evaluations item by item.

    Accuracy of the first minus the second, by task, with a paired 95 % interval and McNemar's test.
    """
    from smtune.evaluation import compare as compare_items
    from smtune.evaluation import comparison_table, load_run

    (run_a, a), (run_b, b) = map(load_run, _results_folders(first, second))
    differing = {name: (run_a.get(name), run_b.get(name)) for name in {*run_a, *run_b} - {"model"}}
    differing = {name: values for name, values in differing.items() if values[0] != values[1]}
    if "protocol" in differing:
        protocols = " and ".join(differing["protocol"])
        raise InputError(f"Expected two evaluations by one protocol. Got {protocols}: evaluate one of them anew.")
    Console().print(comparison_table(compare_items(a, b), str(first), str(second)))
    for name, (of_first, of_second) in sorted(differing.items()):
        values = " and ".join("the default" if value is None else str(value) for value in (of_first, of_second))
        console.print(f"They differ in {name}: {values}.", markup=False)
    left_out = len({item.key for item in a} ^ {item.key for item in b})
    if left_out:
        console.print(f"{left_out:,} items that only one of them holds are left out.")


def _results_folders(*paths: Path) -> list[Path]:
    """The folder of an evaluation of each: itself, the only one below a run, or the only one that all have."""
    from smtune.evaluation.results import ITEMS_FILE

    found = []
    for path in paths:
        is_one = (path / ITEMS_FILE).is_file()
        folders = [path] if is_one else sorted(items.parent for items in path.glob(f"evaluation/*/{ITEMS_FILE}"))
        if not folders:
            raise InputError(
                f"Expected an evaluated run at {path}. It has no results: run `smtune evaluate` on it first."
            )
        found.append({folder.name: folder for folder in folders})
    shared = set.intersection(*map(set, found))
    chosen = []
    for path, folders in zip(paths, found):
        names = shared if len(folders) > 1 else folders.keys()
        if len(names) != 1:
            named = ", ".join(map(str, folders.values()))
            raise InputError(f"Expected one evaluation below {path} to compare. Name one of {named}.")
        chosen.extend(folders[name] for name in names)
    return chosen


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="A run or an adapter.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    dtype: Annotated[
        str, typer.Option(help="float32 keeps every bit of what was trained; bfloat16 rounds the blocks.")
    ] = "float32",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make a quantised base dense first, which keeps all that was trained.")
    ] = False,
) -> None:
    """Write a plain checkpoint with the blocks in it.

    It loads without smtune.
    """
    from safetensors import SafetensorError

    import smtune
    from smtune.models import DTYPES, load_model, load_tokenizer, quiet
    from smtune.tuner.quantised import is_quantised

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"Expected a new or empty folder. {output} is not: choose another.")
    place = output.resolve()
    _check_place(place.parent / f".{place.name}", "output")  # it is written there first
    model: Any = load_model(adapter, dtype)
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"Expected an adapter. {adapter} is a whole model already.")
    if dequantize:
        model = smtune.dequantize(model, DTYPES[dtype], device="cpu")  # bitsandbytes' are on a GPU, if there is one
    elif any(map(is_quantised, model.modules())):
        raise InputError(
            "Expected a base in 16 or 32 bits: transformers cannot save a quantised checkpoint again, and quantising "
            f"anew would lose a part of what was trained. That of {adapter} is quantised: add --dequantize."
        )
    tokenizer = load_tokenizer(adapter)
    merged = model.merge_and_unload(safe_merge=True)
    try:
        with quiet(), new_folder(place) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"Expected to write {output}. Got {error}: free space there, or choose another output."
        ) from error
    console.print(f"Wrote {output} ({dtype}): AutoModelForCausalLM.from_pretrained({str(output)!r})")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A plan, an adapter or a run.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the pictures. Default: beside it.")] = None,
) -> None:
    """Show where the trained blocks are.

    A table, and the paper's Figures 4 and 5 as pictures.
    """
    from smtune import report

    plan = _find_plan(path)
    folder = output or (path if path.is_dir() else path.parent) / "figures"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"Expected --output to be a folder. {folder} is a file.")
    Console().print(report.plan_table(plan))
    written = [folder / "blocks.png", folder / "shares.png"]
    folder.mkdir(parents=True, exist_ok=True)
    report.block_map(plan, written[0])
    report.projection_shares(plan, written[1])
    metrics = path / "metrics.jsonl"
    if metrics.is_file():
        from smtune.training import read_metrics

        written.append(folder / "loss.png")
        report.loss_curve(read_metrics(metrics), written[-1])
    console.print("Wrote " + ", ".join(map(str, written)))


def _find_plan(path: Path) -> Plan:
    """The plan in a file, a run folder, or an adapter's configuration."""
    from smtune.models import ADAPTER_FILE, adapter_config
    from smtune.selection import Plan

    if not path.exists():
        raise InputError(f"Expected a plan, an adapter or a run at {path}. There is nothing.")
    if path.is_file():
        return Plan.load(path)
    if (path / "plan.json").is_file():
        return Plan.load(path / "plan.json")
    for folder in (path, path / "adapter"):
        values = adapter_config(folder)
        if values is not None:
            if values.get("peft_type") != "SMT":
                raise InputError(
                    f"Expected an SMT adapter: `inspect` shows where blocks are. {folder / ADAPTER_FILE} is of type "
                    f"{values.get('peft_type')}."
                )
            return Plan.from_dict(values.get("plan") or {})
    raise InputError(f"Expected a plan, an adapter or a run. {path} has neither plan.json nor adapter_config.json.")


@app.command(name="demo")
def show_demo(
    compare: Annotated[bool, typer.Option("--compare", help="Also LoRA of as many parameters, same data.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Also SMT on shuffled answers: what learning the format alone gives.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for everything.")] = Path("smtune-demo"),
) -> None:
    """Fine-tune SmolLM2-135M on word problems.

    Here and now, with its accuracy before and after.
    """
    from smtune.cli.demo import run_demo

    run_demo(output, compare=compare, control=control, console=Console(highlight=False))


app.command(name="bench", short_help="Time and count training steps of SMT and its rivals.")(bench)
app.command(name="reproduce")(reproduce)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, of bad input too.")] = False,
) -> None:
    """Read by `main`, which takes it anywhere on the line; it stands here for `--help`."""


def main() -> None:
    """The entry point: turn what goes wrong into an exit code and, unless asked for, no traceback."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run(arguments, debug=len(arguments) < len(sys.argv) - 1))


def _let_the_first_tell() -> None:
    """Of several processes most find the same fault. The launcher ends this one once the first has told it."""
    if "LOCAL_RANK" in os.environ and int(os.environ.get("RANK", 0)):
        time.sleep(30.0)


def _tell(text: str, debug: bool) -> None:
    """Say what was wrong, after the traceback where that is asked for."""
    if debug:
        traceback.print_exc()
    console.print(f"[bold red]smtune:[/] {escape(text)}", soft_wrap=True)


def run(arguments: list[str], debug: bool = False) -> int:
    """Run a command line and return its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(arguments)
    except SystemExit as exit:  # how typer ends, after telling what was wrong with the line
        if exit.code == INTERRUPTED:
            console.print("smtune: stopped. The same command goes on where it was; for `train`, add --resume.")
        return exit.code if isinstance(exit.code, int) else 1
    except InputError as error:
        _let_the_first_tell()
        _tell(str(error), debug)
        return 2
    except OSError as error:  # a path that cannot be read or written, a full disk
        _let_the_first_tell()
        _tell(str(error), debug)
        return 2 if error.filename is not None else 1
    except torch.OutOfMemoryError as error:
        _let_the_first_tell()
        _tell(f"{error}\n{OUT_OF_MEMORY}", debug)
        return 2
    except Exception as error:
        fault = f"a fault of smtune or of a library: {type(error).__name__}: {error}"
        _tell(f"{fault}\nRun it again with --debug for the traceback.", debug)
        return 1
    return 0
