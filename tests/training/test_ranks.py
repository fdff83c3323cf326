"""Errors of some ranks end all of them with one line, without Megatron."""

import re

import pytest
from nodes import start_ranks
from recorded_job import start

pytestmark = pytest.mark.megatron

HEAD = """
import time
from datetime import timedelta
import torch
TIME_LIMIT = 4  # seconds of a collective
from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.training.ranks import (
    begin_job, ending_together, first_of_all_ranks, from_rank_0, is_first_to_end, meet_to_end,
    together, while_others_wait,
)
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIME_LIMIT))
torch.distributed.barrier()  # no rank ends while another one still connects to it
rank = torch.distributed.get_rank()
"""

FAILURES = {
    "a rank of a job that was started again": """
torch.distributed.distributed_c10d._get_default_store().add("tokscale/ended", 1)
torch.distributed.barrier()
begin_job()
torch.distributed.barrier()
with exit_with_one_line(is_first_to_end):
    if rank == 1:
        raise TokscaleError("rank 1 alone")
    torch.distributed.TCPStore("127.0.0.1", 0, is_master=True).wait(["never"])
""",
    "a rank that the others meet in a collective": """
with ending_together():
    if rank == 1:
        raise TokscaleError("rank 1 alone")
    try:
        torch.distributed.barrier()
    except RuntimeError as error:  # the connection is closed when rank 1 ends
        raise TokscaleError(str(error)) from error
""",
    "all ranks, each with its own message": """
with ending_together():
    raise TokscaleError(f"rank {rank} alone")
""",
    "ranks with an error of their own": """
with exit_with_one_line(is_first_to_end):
    if rank > 0:
        raise TokscaleError(f"rank {rank} alone")
torch.distributed.TCPStore("127.0.0.1", 0, is_master=True).wait(["never"])
""",
    "a file that one rank lacks": """
with exit_with_one_line(is_first_to_end):
    together(lambda: open("/not/here") if rank == 2 else None)
""",
    "the first rank, for all": """
with exit_with_one_line(is_first_to_end):
    from_rank_0(lambda: open("/not/here").read())
""",
    "a rank that the others wait for": """
with exit_with_one_line(is_first_to_end):
    while_others_wait(lambda: open("/not/here").read(), where=rank == 0)
""",
    "a rank that fails after the time limit of a collective": """
def work():
    time.sleep(2 * TIME_LIMIT)
    raise TokscaleError("rank 1 alone")
with exit_with_one_line(is_first_to_end):
    while_others_wait(work, where=rank == 1)
""",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_line_is_printed_and_all_ranks_end(tmp_path, failure):
    (tmp_path / "script.py").write_text(HEAD + FAILURES[failure])
    result = start(3, str(tmp_path / "script.py"))
    assert result.code == 2, result.output
    (line,) = result.refusals
    assert ("alone" in line) != ("/not/here" in line)
    assert "Traceback" not in result.output


def test_blocks_without_an_error_go_on(tmp_path):
    (tmp_path / "script.py").write_text(
        HEAD
        + """
for _ in range(2):
    with ending_together():
        torch.distributed.barrier()
assert together(lambda: rank, where=rank == 1) == (1 if rank == 1 else None)
assert from_rank_0(lambda: [rank, "a"]) == [0, "a"]
assert first_of_all_ranks(None) is None
assert first_of_all_ranks("") is None
assert first_of_all_ranks(f"rank {rank}" if rank else None) == "rank 1"
for turn in range(3):
    assert while_others_wait(lambda: (turn, rank), where=rank == turn) == (
        (turn, rank) if rank == turn else None
    )
"""
    )
    result = start(3, str(tmp_path / "script.py"))
    assert result.code == 0, result.output


def test_work_that_takes_longer_than_a_collective_may(tmp_path):
    (tmp_path / "script.py").write_text(
        HEAD
        + """
assert while_others_wait(lambda: time.sleep(2 * TIME_LIMIT) or "done", where=rank == 0) == (
    "done" if rank == 0 else None
)
torch.distributed.barrier()
"""
    )
    result = start(3, str(tmp_path / "script.py"))
    assert result.code == 0, result.output


def test_an_error_of_all_ranks_is_printed_before_the_first_of_them_ends(tmp_path):
    """A launcher kills the first rank of a node as soon as another has ended."""
    (tmp_path / "script.py").write_text(
        HEAD
        + """
with exit_with_one_line(is_first_to_end, meet_to_end):
    try:
        together(lambda: open("/not/here"), where=rank == 1)
    finally:
        time.sleep(3 * (rank == 0))
"""
    )
    result = start(3, str(tmp_path / "script.py"))
    assert result.code == 2, result.output
    (line,) = result.refusals
    assert "/not/here" in line


def test_ranks_end_that_wait_for_one_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(
        HEAD
        + """
import os, signal
def die():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
with exit_with_one_line(is_first_to_end, meet_to_end):
    while_others_wait(die, where=rank == 0)
"""
    )
    codes, outputs = start_ranks(str(tmp_path / "script.py"))
    assert codes == [-9, 2, 2, 2], outputs
    first, second = (re.findall(r"megatron-tokscale: .*", output) for output in outputs)
    assert first == []  # the rank that prints on this node is the one that was killed
    (line,) = second
    assert "a rank has ended while this one waited" in line
