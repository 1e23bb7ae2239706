"""The parent's end of `worker`: a fresh Python process that holds one arm, or several that take turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any


class ChildError(RuntimeError):
    """The arm cannot go on: it raised, or its process died."""


class Child:
    """A worker process; a context manager that ends it.

    Args:
        threads: that its products use.
    """

    def __init__(self, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "smtune.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, **arguments: Any) -> Any:
        """The worker's answer. Raises ChildError with its message, or with how it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ChildError(self._how_it_died())
        answer = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer["ok"]

    def _how_it_died(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        memory = " (9 is what the system sends when memory runs out)" if code == -9 else ""
        return f"the process died with {how}{memory}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the process: politely by the end of its input, else by force."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
