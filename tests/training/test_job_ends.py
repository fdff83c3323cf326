"""An error of any rank ends the job with one line and exit code 2, in every layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from disks import read_only
from jobs import Corpus, job_flags, run_job
from numpy.testing import assert_array_equal
from planned_jobs import make_scores, stratified_plan
from recorded_job import Result, start

from megatron_tokscale.store import Run
from megatron_tokscale.trace.trace import Trace

pytestmark = pytest.mark.megatron

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")


def run(corpus: Corpus, n_processes: int, *flags: str) -> Result:
    """Run a job to any end."""
    return start(n_processes, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags))


def assert_refused(result: Result, *words: str) -> None:
    """The job has ended with one line that holds these words."""
    assert result.code == 2, result.output[-4000:]
    (line,) = result.refusals
    assert all(word in line for word in words), line
    assert "Traceback" not in result.output and "closed by peer" not in result.output


def probe(corpus: Corpus, folder: Path) -> tuple[str, ...]:
    return ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(folder))


FULL_AT_STEP_3 = """
import errno
from megatron_tokscale.store import writer
write = writer.write_losses
def write_or_fail(path, *rest):
    if path.name == "step_00000003.safetensors":
        raise OSError(errno.ENOSPC, "No space left on device")
    write(path, *rest)
writer.write_losses = write_or_fail
from megatron_tokscale.pretrain import main
main()
"""


EXIT = ("--exit-interval", "3", "--train-iters", "6")


@pytest.mark.parametrize(
    "layout",
    [(), PP2, TP2, (*PP2, *TP2), (*PP2, *EXIT)],
    ids=["dp", "pp", "tp", "tp-pp", "pp-exit"],
)
def test_a_disk_that_is_full_at_the_last_probe_gets_one_line(corpus: Corpus, tmp_path, layout):
    """The rank that writes is the first of the last pipeline stage, and meets the error alone."""
    (tmp_path / "script.py").write_text(FULL_AT_STEP_3)
    flags = (*probe(corpus, tmp_path), "--tokscale-on-write-error", "abort")
    schedule = ("--tokscale-probe-schedule", "list:0,1,3", "--train-iters", "3")
    words = job_flags(corpus, *flags, *schedule, *layout)
    result = start(4 if layout == (*PP2, *TP2) else 2, str(tmp_path / "script.py"), *words)
    assert_refused(result, "losses cannot be written", "No space left")
    assert Run.open(tmp_path).step_K.tolist() == [0, 1]


def test_a_file_that_one_rank_lacks_gets_one_line(corpus: Corpus, tmp_path):
    """As on a node to which the probe set was not copied."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--tokscale-probe-set') + 1] = '/not/here'\n"
        "from megatron_tokscale.pretrain import main\n"
        "main()\n"
    )
    words = job_flags(corpus, *probe(corpus, tmp_path), "--train-iters", "2")
    assert_refused(start(2, str(script), *words), "/not/here")


@pytest.fixture(scope="module")
def saved(corpus: Corpus, tmp_path_factory):
    """Checkpoints of steps 3, 6 and 9 in both formats, and the losses that a replay finds."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("torch", "torch_dist"):
        flags = ("--train-iters", "9", "--save-interval", "3", "--ckpt-format", name, *TP2)
        run_job(corpus, 2, *flags, "--save", str(folder / name))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def cut_data(step: Path) -> None:
    for path in step.glob("*.distcp"):
        cut(path)


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def cut_both(step: Path) -> None:
    for rank in range(2):
        cut(step / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")


DAMAGES = {
    "one rank's file cut": ("torch", lambda step: cut(step / "mp_rank_01/model_optim_rng.pt")),
    "every rank's file cut": ("torch", cut_both),
    "an empty folder": ("torch", empty),
    "no metadata": ("torch_dist", lambda step: (step / ".metadata").unlink()),
    "data cut": ("torch_dist", cut_data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_replay_names_the_checkpoint_that_cannot_be_loaded(corpus, saved, tmp_path, damage):
    name, spoil = DAMAGES[damage]
    shutil.copytree(saved / name, tmp_path / "saved")
    spoil(tmp_path / "saved/iter_0000006")
    flags = (*probe(corpus, tmp_path), "--tokscale-replay", str(tmp_path / "saved"))
    result = run(corpus, 2, *flags, "--train-iters", "9", "--ckpt-format", name, *TP2)
    assert result.code == 2, result.output[-4000:]
    (line,) = result.refusals
    assert "saved/iter_0000006 cannot be loaded (" in line
    # The probe before stays, whole.
    found = Run.open(tmp_path)
    assert found.step_K.tolist() == [3]
    found.verify()


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("release", "names 'release'"),
        ("", "names ''"),
        ("12", "names iteration 12, whose folder is not there"),
    ],
)
def test_a_replay_needs_the_last_checkpoint_that_is_named(corpus, saved, tmp_path, tracker, words):
    from megatron_tokscale.core.errors import TokscaleError
    from megatron_tokscale.training.replay import saved_steps

    shutil.copytree(saved / "torch", tmp_path / "saved")
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(TokscaleError, match=words):
        saved_steps(tmp_path / "saved")


@pytest.fixture(scope="module")
def plan(corpus: Corpus, tmp_path_factory):
    """Flags of a job under a plan of strata."""
    folder = tmp_path_factory.mktemp("plan")
    scores = [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]
    for one in scores:
        one.save(folder / f"{one.dataset.name}.tokscale.safetensors")
    stratified_plan(corpus, scores).save(folder / "plan.json")
    return ("--tokscale-plan", str(folder / "plan.json"), "--tokscale-scores-dir", str(folder))


SLOW_RANK_0 = """
import time
from datetime import timedelta
import torch
init = torch.distributed.init_process_group
def init_impatiently(*args, **kwargs):
    init(*args, **kwargs | {"timeout": timedelta(seconds=10)})
torch.distributed.init_process_group = init_impatiently
from megatron_tokscale.training.data.follower import Follower
build = Follower._build
def build_slowly(self, *args):
    time.sleep(15)
    return build(self, *args)
Follower._build = build_slowly
from megatron_tokscale.pretrain import main
main()
"""


def test_a_plan_is_prepared_for_longer_than_a_collective_may_take(corpus: Corpus, plan, tmp_path):
    """As an index of billions of samples beyond --distributed-timeout-minutes."""
    (tmp_path / "script.py").write_text(SLOW_RANK_0)
    flags = (*plan, "--train-iters", "2", "--tokscale-dir", str(tmp_path / "run"), *TP2)
    result = start(2, str(tmp_path / "script.py"), *job_flags(corpus, *flags))
    assert result.code == 0, result.output[-4000:]


FULL_FOR_THE_INDEX = """
import errno
from megatron_tokscale.data import index
def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
index.write_array = fail
from megatron_tokscale.pretrain import main
main()
"""


def test_a_plan_for_whose_index_no_disk_has_room_gets_one_line(corpus: Corpus, plan, tmp_path):
    (tmp_path / "script.py").write_text(FULL_FOR_THE_INDEX)
    flags = (*plan, "--train-iters", "2", "--tokscale-dir", str(tmp_path / "run"), *PP2)
    flags = (*flags, "--data-cache-path", str(tmp_path / "cache"))
    result = start(2, str(tmp_path / "script.py"), *job_flags(corpus, *flags))
    assert_refused(result, "No space left", "make room or get permission")


def order(folder: Path) -> list[tuple[str, int]]:
    trace = Trace.open(folder)
    found = [trace.sample(k) for k in range(32)]
    return [(sample.dataset.name, sample.number) for sample in found]


def test_a_plan_whose_data_cache_cannot_be_written(corpus: Corpus, plan, tmp_path):
    """The cache holds what Megatron needs of it, as one that was built before the job."""
    built, steps = tmp_path / "built", ("--train-iters", "4")
    assert run(corpus, 2, *steps, "--data-cache-path", str(built)).code == 0
    writable = ("--data-cache-path", str(tmp_path / "other"))
    assert run(corpus, 2, *plan, *steps, *writable, "--tokscale-dir", str(tmp_path / "a")).code == 0
    with read_only(built, tmp_path / "cache") as cache:
        flags = (*plan, *steps, "--data-cache-path", str(cache))
        result = run(corpus, 2, *flags, "--tokscale-dir", str(tmp_path / "b"))
        assert result.code == 0, result.output[-4000:]
        own = tmp_path / "b/tokscale/cache"
        assert f"{cache} cannot be used ([Errno 30]" in result.output
        assert result.output.count(f"the plan's files are in {own}") == 1
        result = run(corpus, 2, *flags, "--tokscale-dir", str(cache))
        assert_refused(result, f"data cache {cache} cannot be used", "make room or get permission")
    # The samples are the same, and traced from the files in the run's directory.
    assert order(tmp_path / "b") == order(tmp_path / "a")
    content = json.loads((tmp_path / "b/tokscale/data.json").read_text())
    assert content["records"][0]["order"]["cache_dir"] == str(own)


def test_an_index_that_a_full_disk_has_cut_short_is_made_elsewhere(corpus, plan, tmp_path):
    cache, steps = tmp_path / "cache", ("--train-iters", "4")
    flags = (*plan, *steps, "--data-cache-path", str(cache), "--tokscale-dir")
    assert run(corpus, 1, *flags, str(tmp_path / "a")).code == 0
    record = Trace.open(tmp_path / "a").datasets[0]
    cut(Path(record.shuffle_index))
    result = run(corpus, 2, *flags, str(tmp_path / "b"))
    assert result.code == 0, result.output[-4000:]
    assert "the index files of" in result.output and "are damaged" in result.output
    expected = order_of_whole(corpus, plan, tmp_path)
    assert order(tmp_path / "b") == expected


def order_of_whole(corpus: Corpus, plan, tmp_path) -> list[tuple[str, int]]:
    flags = (*plan, "--train-iters", "4", "--data-cache-path", str(tmp_path / "whole"))
    assert run(corpus, 1, *flags, "--tokscale-dir", str(tmp_path / "c")).code == 0
    return order(tmp_path / "c")


def test_losses_that_cannot_be_written_do_not_hide_what_ended_the_job(corpus, tmp_path):
    """Training fails first; that its last losses are lost is said beside it."""
    from megatron_tokscale.core.errors import TokscaleError
    from megatron_tokscale.training.events import JobPart, closing

    class Prober(JobPart):
        def close(self):
            raise TokscaleError("losses cannot be written")

    with pytest.raises(ZeroDivisionError), closing([Prober()]):
        raise ZeroDivisionError
    with pytest.raises(TokscaleError), closing([Prober()]):
        raise SystemExit(0)
    with pytest.raises(TokscaleError), closing([Prober()]):
        pass


def test_nan_losses_are_counted_in_the_log_of_a_job(corpus: Corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = ("--tensorboard-dir", str(tmp_path / "board"), "--lr-warmup-iters", "0")
    huge = ("--lr", "1e9", "--no-check-for-nan-in-loss-and-grad", "--train-iters", "3")
    flags = (*probe(corpus, tmp_path), "--tokscale-probe-schedule", "linear:1", *board, *huge)
    result = run(corpus, 2, *flags)
    assert result.code == 0, result.output[-4000:]
    loss_KN = np.stack([Run.open(tmp_path).read_losses_at(step) for step in range(4)])
    n_lost_K = (~np.isfinite(loss_KN)).sum(axis=1)
    assert n_lost_K[0] == 0 and n_lost_K[-1] > 0
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    logged = {e.step: e.value for e in events.Scalars("tokscale/tokens without finite loss")}
    assert_array_equal([logged.get(k, 0) for k in range(4)], n_lost_K)
    assert f"tokens without finite loss: {n_lost_K[-1]:.6E}" in result.output


WITH_GROUPS = """
import functools
from megatron_tokscale import pretrain
from megatron_tokscale.launch import prepare
prepare()
import megatron.training
theirs = megatron.training.pretrain
@functools.wraps(theirs)
def with_groups(**flow):
    return theirs(**flow, {name}=object())
megatron.training.pretrain = with_groups
pretrain.train()
"""


@pytest.mark.parametrize("name", ["pg_collection", "p2p_communicator"])
def test_a_script_with_process_groups_of_its_own_is_refused(corpus: Corpus, tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(WITH_GROUPS.format(name=name))
    result = start(1, str(script), *job_flags(corpus, *probe(corpus, tmp_path / "run")))
    assert_refused(result, "the probe does not support", name)
    assert not (tmp_path / "run").exists()


ASYNCHRONOUS = """
from megatron.training import async_utils, initialize
from megatron_tokscale import pretrain

class LateQueue:
    # Writes a checkpoint only when the job waits for it; the worker of Megatron's needs a GPU.
    def __init__(self):
        self.requests = []
    def schedule_async_request(self, request):
        self.requests.append(request)
    def get_num_unfinalized_calls(self):
        return len(self.requests)
    def maybe_finalize_async_calls(self, blocking, no_dist):
        while blocking and self.requests:
            self.requests.pop().execute_sync()
    def close(self):
        pass

async_utils._async_calls_queue = LateQueue()
initialize.init_persistent_async_worker = lambda *args, **kwargs: None

forward_step = pretrain.forward_step
def spoiling_forward_step(iterator, model):
    if not model.training:
        next(model.parameters()).data.flatten()[0] += 1e-3
    return forward_step(iterator, model)
pretrain.forward_step = spoiling_forward_step
pretrain.main()
"""


def test_an_asynchronous_checkpoint_is_finished_before_an_error_of_ours_ends_the_job(
    corpus: Corpus, tmp_path
):
    (tmp_path / "script.py").write_text(ASYNCHRONOUS)
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "2")
    late = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
    flags = (*save, *late, "--ckpt-format", "torch_dist", "--train-iters", "4")
    stop = ("--tokscale-probe-schedule", "list:3", "--tokscale-verify-isolation")
    words = job_flags(corpus, *flags, *probe(corpus, tmp_path / "run"), *stop)
    result = start(2, str(tmp_path / "script.py"), *words)
    assert_refused(result, "the probe at step 3 changed parameters")
    assert (tmp_path / "saved/latest_checkpointed_iteration.txt").read_text() == "2"
