"""What happens beside the steps of Hugging Face's Trainer: checkpoints, metrics and progress."""

from __future__ import annotations

import json
import math
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smtune.errors import InputError
from smtune.training.folder import RunFolder, list_checkpoints, mark_complete, read_metrics


class Checkpoints(TrainerCallback):
    """Marks checkpoints as complete, and deletes old ones only then, so that a kill at any instant leaves one.

    The last step needs none: what was trained is saved right after it. Rows held out are looked at then too.
    """

    def __init__(self, run: RunFolder, keep: int) -> None:
        self.run = run
        self.keep = keep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_last = state.global_step >= state.max_steps
        if is_last:
            control.should_save = False
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO
        if is_last or control.should_save:
            # Trainer forgets on resuming what it has not logged; so both runs log the same windows.
            control.should_log = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every rank has written its part
        if not args.should_save:
            return
        folder = Path(args.output_dir or "")
        self.run.sync_metrics()  # resuming takes the time and the losses before a checkpoint from them
        mark_complete(folder / f"checkpoint-{state.global_step}")
        for checkpoint in list_checkpoints(folder)[: -self.keep]:
            shutil.rmtree(checkpoint)


class Metrics(TrainerCallback):
    """Appends each log event to `metrics.jsonl`, and shows it.

    A line holds `step`, `epoch`, `loss` (mean since the last line), `learning_rate`, `grad_norm`, `tokens` (trained
    on so far, without padding), `tokens_per_second` (since the last line) and `elapsed` (seconds of training, over
    all parts of a run that was resumed). Where rows are held out, a line after it holds `step`, `epoch`, `eval_loss`
    (of those rows) and `elapsed`, which leaves the time for them out.
    """

    def __init__(self, path: Path, progress: TrainProgress) -> None:
        self.path = path
        self.progress = progress
        self.elapsed_before = 0.0
        self.started = self.last_time = 0.0
        self.last_tokens = 0

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.elapsed_before + time.perf_counter() - self.started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before = read_metrics(self.path) if self.path.is_file() else []
        self.elapsed_before = before[-1]["elapsed"] if before else 0.0
        self.started = self.last_time = time.perf_counter()
        self.last_tokens = state.num_input_tokens_seen

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            _check_finite("loss of the rows held out", logs["eval_loss"], args, state)
            self._log_held_out(state, logs)
            return
        if not logs or "loss" not in logs:  # Trainer's summary at the end
            return
        for what, key in (("loss", "loss"), ("gradient", "grad_norm")):
            _check_finite(what, logs.get(key), args, state)
        now = time.perf_counter()
        event = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": round((state.num_input_tokens_seen - self.last_tokens) / (now - self.last_time), 1),
            "elapsed": round(self.elapsed, 3),
        }
        self.last_time, self.last_tokens = now, state.num_input_tokens_seen
        if state.is_world_process_zero:
            self._append(event)
            self.progress.show(event)

    def _log_held_out(self, state: TrainerState, logs: dict[str, Any]) -> None:
        self.started += logs["eval_runtime"]
        self.last_time += logs["eval_runtime"]
        if state.is_world_process_zero:
            event = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), "eval_loss": logs["eval_loss"]}
            self._append(event | {"elapsed": round(self.elapsed, 3)})
            self.progress.show_held_out(event)

    def _append(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _check_finite(what: str, value: float | None, args: TrainingArguments, state: TrainerState) -> None:
    """Raises InputError for what has no number any more. Logging comes before a checkpoint, which so stays sound."""
    if value is not None and not math.isfinite(value):
        raise InputError(
            f"Expected a finite {what}. Got {value} at step {state.global_step}: lower training.learning_rate "
            f"({args.learning_rate:g}), or lengthen the warm-up."
        )


class TrainProgress(TrainerCallback):
    """A bar with loss, tokens a second and time left on a terminal; elsewhere a line per log event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: Any = None
        self.max_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.max_steps = state.max_steps
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def show(self, event: dict[str, Any]) -> None:
        """Show a log event, as `Metrics` writes it."""
        numbers = f"loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, numbers=numbers)
        else:
            left = timedelta(seconds=round(event["elapsed"] / event["step"] * (self.max_steps - event["step"])))
            line = f"step {event['step']}/{self.max_steps}  {numbers}  {left} left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def show_held_out(self, event: dict[str, Any]) -> None:
        """Show the loss of the rows held out, which stays above a bar."""
        line = f"step {event['step']}/{self.max_steps}  loss of the rows held out {event['eval_loss']:.4f}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away, whether training ended or failed."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
