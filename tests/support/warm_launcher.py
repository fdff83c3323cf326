"""Start jobs from a process that has imported Megatron already: torchrun's part, without the wait.

Reads one job per line from stdin, {"ranks": 2, "argv": [...]}, forks its ranks, and answers on
stdout with {"code": ..., "output": ..., "errors": ...}. argv is what would follow `python`:
`-m MODULE ...` or a script. The output has stderr too, unless the job has `"apart": true`. As with
torchrun, one rank that fails ends the job.

With "per_node" the ranks are those of several nodes, and nothing watches them, as without torchrun.
The answer is {"codes": [...], "outputs": [...]}: a code for each rank and an output for each node.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from argparse import ArgumentParser
from typing import Any, TextIO

from jobs import free_port

TIME_LIMIT = 300  # seconds for one job; ranks that wait for each other must not wait for ever


def import_everything() -> None:
    from megatron_tokscale import cpu

    cpu.enable()
    import megatron.core.datasets.gpt_dataset
    import megatron.core.models.gpt
    import megatron.training.training
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    import megatron_tokscale.training.data.follower
    import megatron_tokscale.training.gpt_flags
    import megatron_tokscale.training.plugin
    import megatron_tokscale.training.replay  # noqa: F401

    if importlib.util.find_spec("megatron.bridge"):
        from bridge_stand_ins import stand_in

        stand_in()
        import megatron.bridge.training.gpt_step
        import megatron.bridge.training.pretrain  # noqa: F401

    # Megatron reads the help of its flags from its source: a third of the time of a short job.
    remember_docstrings(ArgumentGroupFactory)
    add_megatron_arguments(ArgumentParser())

    # A checkpoint's writer has a helper process; a spawned one would import all of this anew.
    filesystem_async.get_write_results_queue.__wrapped__.__defaults__ = ("fork",)


def remember_docstrings(factory: Any) -> None:
    """Let Megatron read the docstrings of each of its configurations once."""
    read, known = factory._get_field_docstrings, dict[type, dict[str, str]]()

    def docstrings(self: Any, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(self, config)
        return known[config]

    factory._get_field_docstrings = docstrings


def become_rank(
    rank: int, ranks: int, per_node: int, port: int, streams: tuple[TextIO, TextIO]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(per_node),
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


def wait_for(running: set[int], *, is_watched: bool = True) -> dict[int, int]:
    """The exit codes by process, in the order of their ends.

    The ranks that still run are killed at the time limit and, of a job that is watched, when one
    rank has failed.
    """
    codes: dict[int, int] = {}
    try:
        signal.alarm(TIME_LIMIT)
        while running and not (is_watched and any(codes.values())):
            child, status = os.wait()
            running.discard(child)
            codes[child] = os.waitstatus_to_exitcode(status)
    except TimeoutError:
        codes |= dict.fromkeys(running, -signal.SIGALRM)
    signal.alarm(0)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return codes


def fork(
    ranks: int, per_node: int, argv: list[str], streams: list[tuple[TextIO, TextIO]]
) -> list[int]:
    """The processes of the ranks, which write to the streams of their node."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            become_rank(rank, ranks, per_node, port, streams[rank // per_node])
            os._exit(run_target(argv))
        children.append(child)
    return children


def text_of(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def run(ranks: int, argv: list[str], apart: bool = False, per_node: int = 0) -> dict[str, object]:
    n_nodes = ranks // per_node if per_node else 1
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(n_nodes)]
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))
        streams = [(output, errors if apart else output) for output in outputs]
        children = fork(ranks, per_node or ranks, argv, streams)
        codes = wait_for(set(children), is_watched=not per_node)
        texts = [text_of(output) for output in outputs]
        error_text = text_of(errors)
    if per_node:
        return {"codes": [codes[child] for child in children], "outputs": texts}
    first_failure = next((code for code in codes.values() if code), 0)
    return {"code": first_failure, "output": texts[0], "errors": error_text}


def give_up(*_: object) -> None:
    raise TimeoutError


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        import_everything()
    signal.signal(signal.SIGALRM, give_up)
    gc.collect()
    gc.freeze()  # the collections of a rank leave out all that is here, and copy none of its pages
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
