"""Jobs over two nodes are those of one node: losses, samples, decisions, files and refusals."""

import re
from pathlib import Path

import node_job
import pytest
from checkpoints import checkpoint_differences
from jobs import Corpus, job_flags
from nodes import N_NODES, RANKS_PER_NODE, start_agents, start_ranks
from numpy.testing import assert_array_equal
from planned_jobs import plan_of
from recorded_job import read_samples, start

from megatron_tokscale.data import Replanning
from megatron_tokscale.data.history import load_run_plan
from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron

N_RANKS = N_NODES * RANKS_PER_NODE
WRITER = 2  # the first rank of the last pipeline stage, and the first of node 1
LAYOUT = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
STEPS = ("--train-iters", "12", "--save-interval", "6", "--ckpt-format", "torch_dist")


def words_of(corpus: Corpus, folder: Path, *flags: str) -> tuple[str, ...]:
    """The command line of a job in `folder` that notes what it reads and changes."""
    job = job_flags(corpus, *LAYOUT, *flags)
    return (node_job.__file__, str(folder), str(folder / "run"), *job)


def training(corpus: Corpus, folder: Path) -> tuple[str, ...]:
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1")
    plan = ("--tokscale-plan", str(folder / "plan.json"), "--tokscale-replan-interval", "6")
    run = ("--save", str(folder / "saved"), "--tokscale-dir", str(folder / "run"))
    return words_of(corpus, folder, *STEPS, *probe, *plan, *run)


@pytest.fixture(scope="module")
def plan(corpus: Corpus):
    how = Replanning(strength=3.0, floor=0.25, max_change=1.5)
    return plan_of(corpus.prefixes, {0: (0.5, 0.5)}, replanning=how)


@pytest.fixture(scope="module")
def on_one_node(corpus: Corpus, plan, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    plan.save(folder / "plan.json")
    job = start(N_RANKS, *training(corpus, folder))
    assert job.code == 0, job.output[-4000:]
    return folder


@pytest.fixture(scope="module")
def on_two_nodes(corpus: Corpus, plan, tmp_path_factory) -> Path:
    """A job that two torchrun agents have started, which met at a c10d rendezvous."""
    folder = tmp_path_factory.mktemp("two")
    plan.save(folder / "plan.json")
    agents = start_agents("c10d", *training(corpus, folder))
    for agent in agents:
        assert agent.code == 0, agent.output[-4000:]
    return folder


def changed(folder: Path) -> dict[int, set[str]]:
    """The files of the run directory that each rank has changed, without temporary names."""
    found = {}
    for rank in range(N_RANKS):
        paths = map(Path, (folder / "changed" / str(rank)).read_text().splitlines())
        names = {str(path.relative_to(folder / "run/tokscale")) for path in paths}
        found[rank] = {name for name in names if (folder / "run/tokscale" / name).is_file()}
    return found


def assert_same_losses(left: Run, right: Run, steps: list[int]) -> None:
    for step in steps:
        assert_array_equal(left.read_losses_at(step), right.read_losses_at(step))


def test_losses_samples_and_decisions_are_those_of_one_node(on_one_node, on_two_nodes):
    one, two = Run.open(on_one_node / "run"), Run.open(on_two_nodes / "run")
    assert one.step_K.tolist() == two.step_K.tolist() == list(range(13))
    assert_same_losses(one, two, list(range(13)))
    assert read_samples(on_one_node / "seen") == read_samples(on_two_nodes / "seen")
    decisions = load_run_plan(on_two_nodes / "run")
    assert decisions == load_run_plan(on_one_node / "run")
    assert [decision.step for decision in decisions[1]] == [6]
    assert checkpoint_differences(on_one_node / "saved", on_two_nodes / "saved") == []


def test_each_file_is_written_by_one_rank_alone(on_two_nodes):
    files = changed(on_two_nodes)
    assert files[0] == {"plan.json", "replans.json", "data.json"}
    losses = {f"losses/step_{step:08d}.safetensors" for step in range(13)}
    assert losses < files[WRITER]
    assert files[WRITER] - losses >= {"run.json", "probe.safetensors", "journal.jsonl"}
    assert not files[WRITER] & files[0]
    assert files[1] == files[3] == set()


def test_a_replay_without_torchrun_finds_the_same_losses(corpus, on_two_nodes, tmp_path):
    replay = ("--tokscale-probe-set", str(corpus.probe_set), *STEPS)
    replay = (*replay, "--tokscale-replay", str(on_two_nodes / "saved"))
    job = start_ranks(*words_of(corpus, tmp_path, *replay, "--tokscale-dir", str(tmp_path / "run")))
    assert job.codes == [0] * N_RANKS, "".join(job.outputs)[-4000:]
    found = Run.open(tmp_path / "run")
    assert found.step_K.tolist() == [6, 12]
    assert_same_losses(found, Run.open(on_two_nodes / "run"), [6, 12])
    files = changed(tmp_path)
    assert files[WRITER] and not files[0] | files[1] | files[3]


MISSING_ON_NODE_1 = """
import os, sys
if int(os.environ["RANK"]) >= 2:
    sys.argv[sys.argv.index("--tokscale-probe-set") + 1] = "/not/here"
from megatron_tokscale.pretrain import main
main()
"""


@pytest.mark.parametrize("launch", ["torchrun", "ranks"])
def test_a_file_that_one_node_lacks_ends_each_node_with_one_line(corpus, tmp_path, launch):
    (tmp_path / "script.py").write_text(MISSING_ON_NODE_1)
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path / "run"))
    words = (str(tmp_path / "script.py"), *job_flags(corpus, *LAYOUT, *STEPS, *flags))
    if launch == "torchrun":
        agents = start_agents("static", *words)
        outputs = [agent.output for agent in agents]
        # torchrun ends the other ranks of a node when it has seen the first end.
        causes = [output.partition("Root Cause")[2] for output in outputs]
        codes = [int(re.search(r"exitcode\s*: (-?\d+)", cause)[1]) for cause in causes]
        assert all(agent.code for agent in agents)
    else:
        codes, outputs = start_ranks(*words)
    assert set(codes) == {2}, outputs
    for output in outputs:
        (line,) = re.findall(r"megatron-tokscale: .*", output)
        assert "/not/here" in line
        assert "AgreedError" not in output  # torchrun prints a traceback of its own
    assert not (tmp_path / "run").exists()
