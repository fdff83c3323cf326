"""Start jobs from a process that has imported Megatron already: torchrun's part, without the wait.

Reads one job per line from stdin, {"ranks": 2, "argv": [...]}, forks its ranks, and answers on
stdout with {"code": ..., "output": ..., "errors": ...}. argv is what would follow `python`:
`-m MODULE ...` or a script. The output has stderr too, unless the job has `"apart": true`. As with
torchrun, one rank that fails ends the job.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from typing import Any, TextIO

from jobs import free_port

TIME_LIMIT = 300  # seconds for one job; ranks that wait for each other must not wait for ever


def import_everything() -> None:
    from megatron_tokscale import cpu

    cpu.enable()
    import megatron.core.models.gpt
    import megatron.training.training
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    import megatron_tokscale.training.probe.prober  # noqa: F401

    if importlib.util.find_spec("megatron.bridge"):
        from bridge_stand_ins import stand_in

        stand_in()
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.pretrain  # noqa: F401

    # A checkpoint's writer has a helper process; a spawned one would import all of this anew.
    filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = ("fork",)


def become_rank(rank: int, ranks: int, port: int, streams: tuple[TextIO, TextIO]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    signal.alarm(0)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)


def run_target(argv: list[str]) -> int:
    """What `python ARGV` does, to its exit code."""
    is_module = argv[0] == "-m"
    sys.argv = argv[is_module:]
    run: Any = runpy.run_module if is_module else runpy.run_path
    code = 0
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        traceback.print_exc()
        sys.last_exc = error
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait_for(running: set[int]) -> int:
    """The first exit code that is not 0; the other ranks are killed then, or at the time limit."""
    first_failure = 0
    try:
        signal.alarm(TIME_LIMIT)
        while running and not first_failure:
            child, status = os.wait()
            running.discard(child)
            first_failure = os.waitstatus_to_exitcode(status)
    except TimeoutError:
        first_failure = -signal.SIGALRM
    signal.alarm(0)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return first_failure


def run(ranks: int, argv: list[str], apart: bool = False) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        streams = (output, errors if apart else output)
        port = free_port()
        running = set()
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                become_rank(rank, ranks, port, streams)
                os._exit(run_target(argv))
            running.add(child)
        code = wait_for(running)
        output.seek(0)
        errors.seek(0)
        return {"code": code, "output": output.read(), "errors": errors.read()}


def give_up(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        import_everything()
    signal.signal(signal.SIGALRM, give_up)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
