"""A probe that is due is taken, also at skipped steps and odd checkpoints, or a line says why."""

import pytest
from jobs import SEQ_LENGTH, Corpus, job_flags
from numpy.testing import assert_array_equal
from recorded_job import start

from megatron_tokscale.doctor.preflight import check_flags
from megatron_tokscale.store import Run

pytestmark = pytest.mark.megatron


def run(corpus: Corpus, folder, n_processes, schedule, *extra, without=()):
    """Run a probed job and return its output."""
    flags = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(folder))
    flags = (*flags, "--tokscale-probe-schedule", schedule, *extra)
    words = ("-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags, without=without))
    result = start(n_processes, *words)
    assert result.code == 0, result.output[-4000:]
    return result.output


def steps(folder):
    return Run.open(folder).step_K.tolist()


def said(output: str) -> list[str]:
    """The job's lines, without the one on held-out data, which every job has."""
    lines = [line for line in output.splitlines() if line.startswith("tokscale:")]
    return [line for line in lines if not line.startswith("tokscale: held out:")]


def test_a_probe_due_at_a_skipped_step_is_taken_after_the_next_one(corpus: Corpus, tmp_path):
    save = ("--save", str(tmp_path / "save"), "--save-interval", "4", "--train-iters", "16")
    skipped = ("--iterations-to-skip", "4", "5", "16")
    tokens = 8 * SEQ_LENGTH
    schedule = f"linear:4+checkpoints+last+tokens:list:{10 * tokens}"
    run(corpus, tmp_path, 1, schedule, *save, *skipped)
    assert steps(tmp_path) == [0, 6, 8, 10, 12, 16]
    # Megatron saves no checkpoint at a step that it skips, nor one at the end if that is regular.
    saved = sorted(path.name for path in (tmp_path / "save").glob("iter_*"))
    assert saved == ["iter_0000008", "iter_0000012"]
    assert [r.consumed_samples for r in Run.open(tmp_path).records] == [0, 48, 64, 80, 96, 128]


def test_the_last_probe_sees_current_parameters_of_a_distributed_optimizer(corpus, tmp_path):
    """After its loop Megatron has taken the hooks off that gather the parameters."""
    flags = ("--use-distributed-optimizer", "--overlap-param-gather", "--overlap-grad-reduce")
    flags = (*flags, "--iterations-to-skip", "5", "6", "--tokscale-verify-isolation")
    run(corpus, tmp_path, 2, "list:4+last", "--train-iters", "6", *flags)
    assert steps(tmp_path) == [4, 6]
    loss_NK = Run.open(tmp_path).read_losses()
    assert_array_equal(loss_NK[:, 1], loss_NK[:, 0])
    run(
        corpus,
        tmp_path / "none",
        2,
        "list:0+last",
        "--train-iters",
        "2",
        *flags,
        "--iterations-to-skip",
        "1",
        "2",
    )
    loss_NK = Run.open(tmp_path / "none").read_losses()
    assert_array_equal(loss_NK[:, 1], loss_NK[:, 0])


def test_checkpoints_between_the_intervals_are_probed(corpus: Corpus, tmp_path):
    """Megatron saves one before the batch grows; so it does non-persistent ones."""
    samples = ("--train-samples", "40", "--lr-decay-samples", "40", "--lr-warmup-samples", "8")
    growing = ("--step-batch-size-schedule", f"0:4 {16 * SEQ_LENGTH}:8", "--save-interval", "5")
    without = ("--global-batch-size", "--lr-decay-iters", "--lr-warmup-iters")
    save = ("--save", str(tmp_path / "growing"))
    run(corpus, tmp_path, 1, "checkpoints", *samples, *growing, *save, without=without)
    assert steps(tmp_path) == [4, 5, 7]
    saved = sorted(path.name for path in (tmp_path / "growing").glob("iter_*"))
    assert saved == ["iter_0000004", "iter_0000005", "iter_0000007"]

    save = ("--save", str(tmp_path / "both"), "--save-interval", "5", "--train-iters", "7")
    often = ("--non-persistent-save-interval", "3", "--non-persistent-ckpt-type", "global")
    flags = (*save, *often, "--ckpt-format", "torch_dist", "--save-retain-interval", "10")
    run(corpus, tmp_path / "both", 1, "checkpoints", *flags)
    assert steps(tmp_path / "both") == [3, 5, 6, 7]


def test_a_resumed_job_catches_up_or_says_what_is_missing(corpus: Corpus, tmp_path):
    save = ("--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "4")
    save = (*save, "--train-iters", "8")
    run(corpus, tmp_path, 1, "list:0", *save)
    # Step 3 is due since the last probe, and 4 is the first step at which it can be taken.
    output = run(corpus, tmp_path, 1, "list:3,7", *save, "--ckpt-step", "4")
    assert steps(tmp_path) == [0, 4, 7] and said(output) == []
    # A directory with no probe at all: what is missing is said, once.
    flags = ("--load", str(tmp_path), "--ckpt-step", "4", "--train-iters", "8")
    output = run(corpus, tmp_path / "new", 1, "linear:3", *flags)
    assert steps(tmp_path / "new") == [6]
    assert [line for line in said(output) if "no probe from before step 4" in line] == said(output)
    assert len(said(output)) == 1
    # A job that starts at its own last step takes that probe.
    single = ("--data-path", corpus.prefixes[0])  # a blend has no sample left, and Megatron stops
    run(corpus, tmp_path / "end", 1, "last", "--load", str(tmp_path), "--train-iters", "8", *single)
    assert steps(tmp_path / "end") == [8]


@pytest.mark.parametrize("kind", ["probe-set", "plan"])
def test_a_job_that_only_evaluates_gets_a_line(corpus: Corpus, tmp_path, kind):
    flags = (f"--tokscale-{kind}", str(corpus.probe_set), "--tokscale-dir", str(tmp_path))
    words = job_flags(corpus, *flags, "--train-iters", "2", "--skip-train")
    result = start(2, "-m", "megatron_tokscale.pretrain", *words)
    assert result.code == 0, result.output[-4000:]
    (line,) = said(result.output)
    assert "--skip-train trains nothing" in line and "--tokscale-replay" in line
    assert list(tmp_path.iterdir()) == []
    found = check_flags(words)
    assert (found.refused, found.warned) == ([], [line.removeprefix("tokscale: ")])
