"""Arms in a process of their own: `python -m smtune.bench.worker`, driven by lines of JSON.

Arms of one process are of one model and share its weights: equal steps on weights that lie elsewhere in memory differ
by up to a tenth. What they train of these weights, they train for all; a step's time does not depend on the values.

A request is `{"do": command, …}` on the standard input, its answer `{"ok": …}` or `{"error": …}` on what was the
standard output when the process started. Whatever libraries print goes to the error stream.

Commands are the methods of `Worker`; the end of the input closes the process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, TextIO

import torch

from smtune.bench import arms, measure, probes
from smtune.bench.plans import used_columns
from smtune.bench.subjects import find_subject, same_weights
from smtune.kernels.candidates import CANDIDATES
from smtune.selection import Plan

ALONE = "arm"
"""The name of an arm that has none."""


class Worker:
    """Holds the model, the batch and the arms, by name, between requests."""

    def __init__(self) -> None:
        self._model: Any = None
        self._of: tuple[Any, ...] = ()
        self._arms: dict[str, Any] = {}
        self._peak_is_of_steps = False

    def build(
        self,
        arm: str,
        model: str,
        dtype: str,
        tokens: int,
        device: str = "cpu",
        threads: int | None = None,
        plan: dict | None = None,
        name: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Make the arm. Returns what a record says of it.

        Args:
            name: of one among several, each on a model of its own that has the weights of the others'. None: the only
                arm, so that nothing else keeps what its method replaces.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        subject = find_subject(model)
        if self._of != (model, dtype, tokens, device):
            self._arms.clear()
            self._model = None
            self._model = subject.load(dtype, device)
            self._batch = subject.inputs(self._model, tokens)
            self._of = (model, dtype, tokens, device)
        setting = arms.Setting(
            subject, dtype, device, plan=None if plan is None else Plan.from_dict(plan), **_tuples(options)
        )
        base: Any = self._model
        if name is None:
            self._model, self._of = None, ()
        else:
            base = same_weights(base)
        layers = base.config.num_hidden_layers
        total_params = sum(parameter.numel() for parameter in base.parameters())
        built = self._arms[name or ALONE] = arms.build(arm, setting, base, self._batch)
        plan_ = built.plan
        by_layer = {len_ for len_ in _blocks_by_layer(plan_).values() if len_} if plan_ is not None else set()
        return {
            "label": built.label,
            "batch": subject.batch,
            "layers": layers,
            "block_size": plan_.block_size if plan_ is not None else None,
            "blocks_per_layer": by_layer.pop() if len(by_layer) == 1 else None,
            "blocks": plan_.n_blocks if plan_ is not None else None,
            "used_columns": used_columns(plan_) if plan_ is not None else None,
            "trained_params": sum(parameter.numel() for parameter in built.trained),
            "total_params": total_params,
            "threads": torch.get_num_threads(),
            "rss_before_bytes": measure.rss_bytes(),
        }

    def drop(self, name: str) -> None:
        """Forget the arm."""
        self._arms.pop(name, None)

    def step(self, name: str = ALONE, fresh_peak: bool = False) -> dict[str, Any]:
        """One step, timed. `fresh_peak`: the process's peak memory counts from here."""
        if fresh_peak:
            self._peak_is_of_steps = measure.reset_peak_rss()
        return measure.step(self._arms[name], self._batch)

    def counts(self, name: str = ALONE, block_ops: bool = False) -> dict[str, Any]:
        """The process's peak since `fresh_peak`, then all that is counted."""
        peak = measure.peak_rss_bytes()
        arm, batch = self._arms[name], self._batch
        counted = {
            "peak_rss_bytes": peak,
            "peak_rss_since": "second step" if self._peak_is_of_steps else "start of the process",
            "flops": measure.count_flops(arm, batch),
            "saved_bytes": measure.count_saved(arm, batch),
            "alive_after_forward_bytes": measure.alive_after_forward(arm, batch),
            "state_bytes": measure.state_bytes(arm),
            "peak_tensor_bytes": measure.peak_tensor_bytes(arm, batch),
        }
        if block_ops:
            counted["block_ops_s"] = measure.block_op_seconds(arm, batch)
        return counted

    def adapter(self, name: str = ALONE) -> dict[str, Any] | None:
        """The adapter's life, or None for what is no adapter."""
        return measure.adapter_life(self._arms[name], self._batch)

    def scoring(self, model: str, dtype: str, tokens: int, device: str, threads: int, **how: Any) -> dict[str, Any]:
        """`probes.scoring` on a model of its own."""
        torch.set_num_threads(threads)
        subject = find_subject(model)
        base = subject.load(dtype, device)
        return probes.scoring(base, subject, subject.inputs(base, tokens), **how)

    def candidates(self, dtype: str, device: str, threads: int) -> list[str]:
        """The kernels to compare; `widened` is `strided` where nothing needs to be."""
        torch.set_num_threads(threads)
        return [name for name in CANDIDATES if name != "widened" or dtype != "float32"]

    def kernels(self, **how: Any) -> dict[str, dict[str, Any]]:
        """`probes.kernels`."""
        return probes.kernels(**how)

    def plans(self, model: str, limits: list[float], threads: int) -> list[dict[str, Any]]:
        """`probes.plans` on a model of its own, in fp32."""
        torch.set_num_threads(threads)
        subject = find_subject(model)
        return probes.plans(subject.load("float32"), model, subject, limits)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _blocks_by_layer(plan: Any) -> dict[str, int]:
    """Blocks by decoder layer: the modules' names up to their number."""
    counts: dict[str, int] = {}
    for name, module in plan.modules.items():
        layer = name.partition(".self_attn")[0]
        counts[layer] = counts.get(layer, 0) + len(module.rows)
    return counts


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        command = getattr(worker, request.pop("do"))
        try:
            answer = {"ok": command(**request)}
        except Exception as error:  # whatever a method raises is a result of the measurement
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
