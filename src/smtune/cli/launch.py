"""Start a command on several processes of this machine, as torchrun does; `torch.distributed` does the work."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import torch

from smtune.errors import InputError


def launch(arguments: list[str], processes: int) -> int:
    """Run `smtune ARGUMENTS` in several processes, one for each GPU where there are any.

    Returns:
        The exit code: 0, or that of the process that failed first. The others are ended then.
    Raises:
        InputError: more processes than GPUs, or a process that a launcher has started already.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "LOCAL_RANK" in os.environ:  # RANK alone is also set by those who start one process a machine
        raise InputError("Expected --nproc without another launcher. Got both: leave --nproc out.")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes > n_devices:
        raise InputError(f"Expected --nproc of at most {n_devices}, the number of GPUs here. Got {processes}.")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes tell what went wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
    )
    debug = ["--debug"] if "--debug" in sys.argv else []
    try:
        elastic_launch(config, sys.executable)("-m", "smtune", *arguments, *debug)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name  # such a process could not tell
        hint = ": the system may have run out of memory, of which every process needs its own" * (name == "SIGKILL")
        print(f"Process {rank} of {processes} was ended by {name}{hint}.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException:
        return 130
    return 0
