"""Steps of a study: each is done once, some at the same time, and a command runs on one core."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_tokscale.core.errors import TokscaleError


@dataclass(frozen=True)
class Step:
    """A piece of work that is done once."""

    name: str
    is_done: Callable[[], bool]
    do: Callable[[], None]


def run_steps(phases: Iterable[Sequence[Step]], at_once: int) -> None:
    """Run the unfinished steps, phase by phase, `at_once` steps of a phase at a time.

    A step that fails does not stop the others of its phase.

    Raises:
        TokscaleError: naming the steps that failed; later phases are not begun.
    """
    for phase in phases:
        failed: list[str] = []

        def do(step: Step, failed: list[str] = failed) -> None:
            print(f"{step.name} ...", flush=True)
            try:
                step.do()
            except (TokscaleError, OSError) as error:
                failed.append(f"{step.name}: {error}")
            else:
                if not step.is_done():
                    failed.append(f"{step.name}: ended early")

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(do, [step for step in phase if not step.is_done()]))
        if failed:
            raise TokscaleError("; ".join(failed))


def run_logged(command: Sequence[str], log: Path) -> None:
    """Run a command in one process on one core, and append its output to `log`.

    Raises:
        TokscaleError: the command failed.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        print("$", *command, file=output, flush=True)
        job = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if job.returncode:
        raise TokscaleError(f"exit code {job.returncode}; see the end of {log}")
