"""A job that watches several probe sets records each as a job that watches it alone."""

import dataclasses
import shutil

import numpy as np
import pytest
from checkpoints import checkpoint_differences
from jobs import EOD, SEQ_LENGTH, TRAINING, VOCAB_SIZE, Corpus, job_flags, kill_job_at, run_job
from numpy.testing import assert_array_equal
from recorded_job import start
from runs import read_journal

from megatron_tokscale.doctor.preflight import check_flags
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.store import Run, RunPaths

pytestmark = pytest.mark.megatron

PP2 = ("--pipeline-model-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def second(corpus: Corpus, tmp_path_factory):
    """A set of training documents, with another number of sequences than the corpus's set."""
    path = tmp_path_factory.mktemp("second") / "trained.safetensors"
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split=TRAINING["--split"],
        part="train",
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_tokens=300,
        eod=EOD,
    )
    build_probe_set(settings).save(path)
    return path


def watching(*paths, schedule="linear:2"):
    return ("--tokscale-probe-set", *map(str, paths), "--tokscale-probe-schedule", schedule)


def assert_same_losses(found, expected):
    """Losses and records are equal, but for what time it is and how long a probe took."""
    left, right = Run.open(found), Run.open(expected)
    assert_array_equal(left.read_losses(), right.read_losses())
    assert left.records
    for one, other in zip(left.records, right.records, strict=True):
        times = {"wall_time": 0, "duration": 0}
        assert repr(dataclasses.replace(one, **times)) == repr(dataclasses.replace(other, **times))
    left.verify()


@pytest.mark.parametrize("layout", [(), TP2, PP2], ids=["dp", "tp", "pp"])
def test_each_set_is_probed_as_if_it_were_alone_and_training_as_if_none_were(
    corpus, second, tmp_path, layout
):
    flags = ("--train-iters", "5", "--save-interval", "5", *layout)
    names = "none", "one", "two", "both"
    none, one, two, both = (tmp_path / name for name in names)
    run_job(corpus, 2, *flags, "--save", str(none))
    run_job(corpus, 2, *flags, "--save", str(one), *watching(corpus.probe_set))
    run_job(corpus, 2, *flags, "--save", str(two), *watching(second))
    verify = () if layout else ("--tokscale-verify-isolation",)
    run_job(corpus, 2, *flags, "--save", str(both), *watching(corpus.probe_set, second), *verify)
    assert RunPaths(both).probe_sets == [both / "probe-sets/trained"]
    assert_same_losses(both, one)
    assert_same_losses(both / "probe-sets/trained", two)
    assert checkpoint_differences(none, both) == []


def test_a_killed_job_resumes_all_of_its_sets(corpus, second, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--train-iters", "9", "--save-interval", "4", *watching(corpus.probe_set, second))
    run_job(corpus, 1, *flags, "--save", str(whole))
    flags = (*flags, "--save", str(killed), "--load", str(killed))
    kill_job_at(corpus, 1, "tokscale probe at step 8", tmp_path / "log", *flags)
    run_job(corpus, 1, *flags, "--ckpt-step", "4")
    for name in ("", "probe-sets/trained"):
        assert_same_losses(killed / name, whole / name)
        starts = [row for row in read_journal(killed / name) if row["event"] == "started"]
        assert [row["step"] for row in starts] == [0, 4]
        assert 6 in starts[-1]["abandoned"]
    launches = [Run.open(path).info.launches for path in (killed, killed / "probe-sets/trained")]
    assert launches[0] == launches[1]
    assert len(launches[0]) == 2


def test_a_set_that_joins_a_run_is_probed_from_then_on(corpus, second, tmp_path):
    save = ("--save-interval", "4", "--save", str(tmp_path), "--train-iters", "8")
    run_job(corpus, 1, *save, *watching(corpus.probe_set), "--exit-interval", "4")
    load = ("--load", str(tmp_path))
    output = run_job(corpus, 1, *save, *watching(corpus.probe_set, second), *load)
    assert f"no probe from before step 4 is in {tmp_path}/probe-sets/trained/tokscale" in output
    assert Run.open(tmp_path).step_K.tolist() == [0, 2, 4, 6, 8]
    assert Run.open(tmp_path / "probe-sets/trained").step_K.tolist() == [4, 6, 8]
    # Without --load it is a new run; the files of both sets are set aside.
    run_id = Run.open(tmp_path).info.run_id
    run_job(corpus, 1, *save, *watching(corpus.probe_set), "--exit-interval", "1")
    aside = RunPaths(tmp_path).abandoned(run_id)
    assert Run.open(aside / "probe-sets/trained").step_K.tolist() == [4, 6, 8]
    assert RunPaths(tmp_path).probe_sets == []


def test_a_replay_probes_all_sets_and_resumes_each(corpus, second, tmp_path):
    saved, live = tmp_path / "saved", tmp_path / "live"
    steps = ("--train-iters", "6", "--save-interval", "2")
    both = (corpus.probe_set, second)
    live_flags = (*watching(*both), "--tokscale-dir", str(live))
    run_job(corpus, 1, *steps, "--save", str(saved), *live_flags)
    replay = ("--tokscale-replay", str(saved), "--tokscale-dir", str(tmp_path / "replay"))
    run_job(corpus, 2, *steps, *replay, *watching(*both, schedule="list:2,4"))
    (tmp_path / "replay/probe-sets/trained/tokscale/losses/step_00000002.safetensors").unlink()
    output = run_job(corpus, 2, *steps, *replay, *watching(*both, schedule="checkpoints"))
    assert "replay of 2 of the 3 checkpoints" in output
    assert output.count("tokscale probe at step 2 ") == 1
    for name in ("", "probe-sets/trained"):
        found, expected = Run.open(tmp_path / "replay" / name), Run.open(live / name)
        assert found.step_K.tolist() == [2, 4, 6]
        assert_array_equal(found.read_losses(), expected.read_losses()[:, 1:])
        assert found.info.is_replay


def test_the_log_has_a_sets_name_in_the_keys_of_all_but_the_first(corpus, second, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = ("--tensorboard-dir", str(tmp_path / "board"), "--tokscale-dir", str(tmp_path / "run"))
    exits = ("--exit-interval", "3", "--tokscale-probe-at-exit", "--train-iters", "6")
    both = watching(corpus.probe_set, second)
    output = run_job(corpus, 1, *both, *board, *exits)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    keys = [key for key in events.Tags()["scalars"] if key.startswith("tokscale/")]
    first = {key.removeprefix("tokscale/") for key in keys if "/trained/" not in key}
    further = {key.removeprefix("tokscale/trained/") for key in keys if "/trained/" in key}
    assert first == further
    assert {"probe loss", "probe loss/left", "probe loss vs samples"} <= first
    run_dir = tmp_path / "run"
    for prefix, folder in (("", run_dir), ("trained/", run_dir / "probe-sets/trained")):
        logged = {e.step: e.value for e in events.Scalars(f"tokscale/{prefix}probe loss")}
        found = Run.open(folder)
        assert list(logged) == found.step_K.tolist() == [0, 2, 3]
        assert_array_equal(
            list(logged.values()), found.read_losses().astype(float).mean(axis=0).astype(np.float32)
        )
    assert "time (ms) on the last rank | tokscale-probe: " in output
    assert " | tokscale-probe-trained: " in output
    assert "tokscale: held out: the job trains on none of the" in output
    n = Run.open(run_dir / "probe-sets/trained").probe_set.n_tokens
    assert f"tokscale: trained: {n} of the {n} watched tokens (" in output


FULL_FOR_THE_SECOND = """
import errno
from megatron_tokscale.store import writer
write = writer.write_losses
def write_or_fail(path, *rest):
    if "probe-sets" in str(path) and path.name == "step_00000002.safetensors":
        raise OSError(errno.ENOSPC, "No space left on device")
    write(path, *rest)
writer.write_losses = write_or_fail
from megatron_tokscale.pretrain import main
main()
"""


@pytest.mark.parametrize("policy", ["continue", "abort"])
def test_a_disk_that_is_full_for_one_set_ends_the_probes_of_all(corpus, second, tmp_path, policy):
    (tmp_path / "script.py").write_text(FULL_FOR_THE_SECOND)
    flags = (*watching(corpus.probe_set, second, schedule="linear:1"), *PP2)
    flags = (*flags, "--tokscale-dir", str(tmp_path / "run"), "--train-iters", "5")
    words = job_flags(corpus, *flags, "--tokscale-on-write-error", policy)
    result = start(2, str(tmp_path / "script.py"), *words)
    place = tmp_path / "run/probe-sets/trained/tokscale"
    assert f"losses cannot be written to {place}: [Errno 28]" in result.output
    assert Run.open(tmp_path / "run/probe-sets/trained").step_K.tolist() == [0, 1]
    assert Run.open(tmp_path / "run").step_K.tolist() == [0, 1, 2]
    if policy == "continue":
        assert result.code == 0, result.output[-3000:]
        assert result.output.count("training continues WITHOUT probes") == 1
    else:
        assert result.code == 2
        assert len(result.refusals) == 1


def test_sets_that_do_not_fit_are_refused_before_anything_is_written(corpus, second, tmp_path):
    small = ProbeSet.load(second)
    dataclasses.replace(small, vocab_size=256).save(tmp_path / "vocabulary.safetensors")
    arrays = {name: getattr(small, name)[:, :16] for name in vars(small) if name.endswith("_BS")}
    dataclasses.replace(small, **arrays).save(tmp_path / "short.safetensors")
    shutil.copy(corpus.probe_set, tmp_path / "copy.safetensors")
    words = {
        "vocabulary": "is for a vocabulary of 256, the job has 255",
        "short": f"has sequences of 16 tokens, the job trains on --seq-length {SEQ_LENGTH}",
        "copy": f"is the probe set of {corpus.probe_set}; expected each of --tokscale-probe-set",
        "missing": "cannot read probe set",
    }
    into = ("--tokscale-dir", str(tmp_path / "run"), "--train-iters", "1")
    for name, reason in words.items():
        both = watching(corpus.probe_set, tmp_path / f"{name}.safetensors")
        flags = job_flags(corpus, *both, *into)
        result = start(1, "-m", "megatron_tokscale.pretrain", *flags)
        (line,) = result.refusals
        assert result.code == 2
        assert reason in line
        found = check_flags(flags)
        assert [text for text in found.refused if reason in text] == [line.split(": ", 1)[1]]
    assert not (tmp_path / "run").exists()
