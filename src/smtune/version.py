"""What runs, for the record: the version, which stands here alone, a checkout's commit, and the command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

__version__ = "0.1.0"


def commit() -> str | None:
    """The commit of smtune's checkout, with "+changes" if files differ; None where it is installed otherwise."""
    source = Path(__file__).parent
    try:
        # An installed package may lie inside a repository that is not smtune's.
        _git(source, "ls-files", "--error-unmatch", "__init__.py")
        changes = _git(source, "status", "--porcelain", ".")
        return _git(source, "rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The command that this process was started by, without the program's folder; "smtune" for `python -m smtune`."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
