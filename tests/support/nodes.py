"""Jobs over two nodes, both on this machine: by two torchrun agents, or by ranks without torchrun.

A node is a number and the ranks that it starts: LOCAL_RANK counts them from 0. All nodes see the
same files.
"""

import json
import subprocess
import sys
from typing import NamedTuple

from jobs import free_port, job_environment, warm_launcher
from recorded_job import Result

N_NODES, RANKS_PER_NODE = 2, 2
_TIME_LIMIT = 300  # seconds of one job; agents that wait for each other must not wait for ever


class RankResults(NamedTuple):
    """Exit code of each rank, and output of each node."""

    codes: list[int]
    outputs: list[str]


def start_agents(backend: str, *words: str) -> list[Result]:
    """Run a script, or `-m MODULE`, by a torchrun agent on each node, to any end."""
    port = free_port()
    where = {
        "c10d": ("--rdzv_id", "tokscale", "--rdzv_endpoint", f"127.0.0.1:{port}"),
        "static": ("--master_addr", "127.0.0.1", "--master_port", str(port)),
    }[backend]
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *("--nnodes", str(N_NODES), "--node_rank", str(node)),
                *("--nproc_per_node", str(RANKS_PER_NODE), "--local_addr", "127.0.0.1"),
                *("--rdzv_backend", backend, *where, *words),
            ],
            env=job_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(N_NODES)
    ]
    try:
        outputs = [agent.communicate(timeout=_TIME_LIMIT)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [Result(agent.returncode, out) for agent, out in zip(agents, outputs, strict=True)]


def start_ranks(*words: str) -> RankResults:
    """Run a script, or `-m MODULE`, on ranks that no launcher watches, until all have ended.

    They have the variables that `srun` with a few exports gives: RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT.
    """
    launcher = warm_launcher("")
    assert launcher.stdin and launcher.stdout
    job = {"ranks": N_NODES * RANKS_PER_NODE, "argv": words, "per_node": RANKS_PER_NODE}
    launcher.stdin.write(json.dumps(job) + "\n")
    launcher.stdin.flush()
    answer = json.loads(launcher.stdout.readline())
    return RankResults(answer["codes"], answer["outputs"])
