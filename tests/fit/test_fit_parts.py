"""A fit that is stopped, shared or short of disk writes the same files, or ends with one line.

Shapes: N tokens, K probe steps.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked import Forked, launched
from jobs import free_port
from recorded_progress import RecordedProgress
from runs import log_time, plain_probe_set, probe_steps, write_run
from scipy.special import expit

import megatron_tokscale.fit.run_fit as run_module
from megatron_tokscale.cli import main
from megatron_tokscale.core import files
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import SigmoidFits, fit_run, fit_sigmoids
from megatron_tokscale.fit.fit_text import describe_fit
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.store import Run, reader
from megatron_tokscale.store.losses import losses_name, read_losses, read_record, write_losses

N_TOKENS, BLOCK = 288, 32
STEPS = probe_steps(16, last=4000)

# `megatron-tokscale fit RUN` with small blocks, and a failure on rank 1.
COMMAND = f"""
import os, sys, time
from pathlib import Path
import megatron_tokscale.fit.run_fit as run
from megatron_tokscale.cli import entry as cli
from megatron_tokscale.core.errors import TokscaleError
run._BLOCK_TOKENS = {BLOCK}, {BLOCK}
write, rank = run.Parts.write, os.environ.get("RANK")
def failing(self, block, table):
    failed = Path(sys.argv[1]) / "failed"
    if rank == "1" and block > 2:
        failed.touch()
        raise TokscaleError("rank 1 has met a bad block")
    while block > 2 and not failed.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    write(self, block, table)
run.Parts.write = failing
cli.main(["fit", sys.argv[1]])
"""
HOLD_LOCK = """
import sys
from pathlib import Path
from megatron_tokscale.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def loss_NK():
    rng = np.random.default_rng(0)
    midpoint = rng.uniform(3, 7, (N_TOKENS, 1))
    noise_NK = 0.1 * rng.standard_normal((N_TOKENS, len(STEPS)))
    loss_NK = 1 + 4 * expit((midpoint - log_time(STEPS)) / 0.3) + noise_NK
    loss_NK[[5, 70, 70], [7, 1, 2]] = np.nan
    return loss_NK.astype(np.float32)


@pytest.fixture(scope="module")
def one_fit(loss_NK):
    return fit_sigmoids(log_time(STEPS), loss_NK[:1])


@pytest.fixture
def quick_fitter(one_fit):
    """Replace fit_sigmoids by a quick function whose numbers depend on the losses and the time."""

    def fit(x_K, loss_NK, device=None):
        columns = {
            name: np.resize(getattr(one_fit, name), len(loss_NK)) for name in SigmoidFits.columns()
        }
        for column_N in columns.values():
            if column_N.dtype.kind == "f":
                column_N[:] = loss_NK.sum(axis=1) + x_K[-1]
        return SigmoidFits(x_K, **columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "fit_sigmoids", fit)
        yield


@pytest.fixture
def run(tmp_path, loss_NK, quick_fitter):
    return write_run(tmp_path / "run", STEPS, loss_NK)


@pytest.fixture
def whole(tmp_path, loss_NK, quick_fitter):
    """The files of a fit that nothing stopped."""
    return fit_at_once(tmp_path / "whole", loss_NK)


@pytest.fixture
def fitted_run(tmp_path, loss_NK):
    """A run that other processes fit with the real fit_sigmoids."""
    return write_run(tmp_path / "run", STEPS, loss_NK)


@pytest.fixture(scope="module")
def fitted_whole(tmp_path_factory, loss_NK):
    return fit_at_once(tmp_path_factory.mktemp("whole"), loss_NK)


def fit_alone(path):
    fit_run(Run.open(path), block_tokens=BLOCK)


def fit_slowly(words):
    """The verb `fit` with small blocks, of which each takes its time."""
    run_module._BLOCK_TOKENS = BLOCK, BLOCK
    write = run_module.Parts.write

    def write_late(*block):
        time.sleep(0.5)
        write(*block)

    run_module.Parts.write = write_late
    main(words)


def fit_at_once(path, loss_NK):
    run = write_run(path, STEPS, loss_NK)
    fit_run(run, block_tokens=BLOCK)
    return outcome(run)


def outcome(run):
    """Return the bytes of fits.parquet, and fit.json without its times and its checksum."""
    summary = json.loads(run.paths.fit.read_text())
    for name in ("seconds", "tokens_per_second", "resumed_tokens", "checksum"):
        del summary[name]
    assert sorted(path.name for path in run.paths.analysis.iterdir()) == [
        "fit.json",
        "fits.parquet",
    ]
    return run.paths.fits.read_bytes(), summary


def parts(run):
    return list(run.paths.fit_parts.glob("part-*.arrow"))


class Stopped(BaseException):
    """A kill that the test's own process survives."""


def stop_after(n_tokens):
    def react(done, total):
        if done >= n_tokens:
            raise Stopped

    return RecordedProgress(react)


def fit_and_stop(run, n_blocks=3, **settings):
    with pytest.raises(Stopped):
        fit_run(run, **{"block_tokens": BLOCK, **settings}, progress=stop_after(n_blocks * BLOCK))
    assert len(parts(run)) == n_blocks


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(fitted_run, fitted_whole, forkserver):
    rng = random.Random(0)
    for enough in (1, 3, 6):
        process = forkserver.Process(target=fit_alone, args=(fitted_run.path,))
        process.start()
        while len(parts(fitted_run)) < enough and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not fitted_run.paths.fits.exists()
    n_parts = len(parts(fitted_run))
    assert fit_run(fitted_run, block_tokens=BLOCK).resumed_tokens == n_parts * BLOCK
    assert n_parts >= 6
    assert outcome(fitted_run) == fitted_whole


@pytest.mark.parametrize("n_published", [0, 1])
def test_fits_and_summary_never_disagree(run, whole, monkeypatch, n_published):
    fit_run(run, time="tokens")
    replace, published = os.replace, []

    def replace_or_stop(source, target):
        if target.parent == run.paths.analysis:
            if len(published) == n_published:
                raise Stopped
            published.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(Stopped):
        fit_run(run, block_tokens=BLOCK)
    assert not run.paths.fit.exists()
    monkeypatch.undo()
    assert fit_run(run, block_tokens=BLOCK).resumed_tokens == N_TOKENS
    assert outcome(run) == whole


@pytest.mark.slow
def test_three_processes_write_the_same_bytes(fitted_run, fitted_whole, forkserver, tmp_path):
    fit_and_stop(fitted_run, 2)
    words, port = ["fit", str(fitted_run.path)], free_port()
    ranks = [
        Forked(forkserver, tmp_path, fit_slowly, words, launched(rank, 3, port))
        for rank in range(3)
    ]
    ends = [rank.end() for rank in ranks]
    output, errors = ("".join(texts) for texts in zip(*(end[1:] for end in ends), strict=True))
    assert [code for code, *_ in ends] == [0, 0, 0], errors
    assert output.count("tokens at 16 probes") == 1
    assert "64 tokens were fitted before" in output
    assert "224 of 224 tokens" in errors
    assert outcome(fitted_run) == fitted_whole


@pytest.mark.slow
def test_a_rank_that_fails_ends_all(fitted_run, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = subprocess.run(
        [sys.executable, *torchrun, str(script), str(fitted_run.path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode != 0
    assert process.stderr.count("megatron-tokscale: ") == 1
    assert "megatron-tokscale: rank 1 has met a bad block\n" in process.stderr
    assert process.stdout == ""
    assert 0 < len(parts(fitted_run)) < 5  # rank 0 alone would have made 5


def other_time(run):
    return {"time": "tokens"}


def other_blocks(run):
    return {"block_tokens": 2 * BLOCK}


def other_losses(run):
    path = run.paths.losses_at(int(STEPS[3]))
    losses_N, (record, _) = read_losses(path), read_record(path)
    write_losses(path, losses_N + 1, record)
    return {}


def fewer_probes(run):
    run.paths.losses_at(int(STEPS[-1])).unlink()
    return {}


def shifts_left_in(run):
    return {"keep_common_shifts": True}


@pytest.mark.parametrize(
    "change", [other_time, other_blocks, other_losses, fewer_probes, shifts_left_in]
)
def test_parts_of_another_fit_are_removed(run, tmp_path, change):
    fit_and_stop(run)
    settings = {"block_tokens": BLOCK, **change(run)}
    shutil.copytree(run.path / "tokscale", tmp_path / "fresh" / "tokscale")
    summary = fit_run(Run.open(run.path), **settings)
    assert summary.resumed_tokens == 0
    fresh = Run.open(tmp_path / "fresh")
    fit_run(fresh, **settings)
    assert outcome(run) == outcome(fresh)


def test_parts_of_another_version_are_removed(run, whole, monkeypatch):
    monkeypatch.setattr(run_module, "__version__", "0.0.0")
    fit_and_stop(run)
    monkeypatch.undo()
    assert fit_run(run, block_tokens=BLOCK).resumed_tokens == 0
    assert outcome(run) == whole


def test_a_second_fit_is_refused(run, whole):
    lock = run.paths.fit_parts / ".lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TokscaleError, match=rf"another fit .* process {other.pid}\)"):
            fit_run(run, block_tokens=BLOCK)
        assert lock.exists()
        other.stdin.close()
    fit_run(run, block_tokens=BLOCK)
    assert outcome(run) == whole


def test_a_resumed_fit_checks_only_what_has_changed(run, monkeypatch):
    checked = []
    monkeypatch.setattr(reader, "check_losses", checked.append)
    fit_and_stop(run)
    assert checked == [run.paths.losses_at(int(step)) for step in STEPS]
    checked.clear()
    touched = run.paths.losses_at(int(STEPS[4]))
    os.utime(touched)
    summary = fit_run(run, block_tokens=BLOCK)
    assert checked == [touched]
    assert summary.resumed_tokens == 3 * BLOCK


def test_progress_and_rate_are_of_this_call_alone(run):
    fit_and_stop(run)
    progress = RecordedProgress()
    summary = fit_run(run, block_tokens=BLOCK, progress=progress)
    left = N_TOKENS - 3 * BLOCK
    assert progress.reports == {"fit": [(done, left) for done in range(0, left + 1, BLOCK)]}
    assert summary.tokens_per_second == pytest.approx(left / summary.seconds, rel=0.1)
    assert "; 96 tokens were fitted before\n" in describe_fit(summary)


def test_losses_that_appear_during_the_fit_are_left_out(run, whole, loss_NK):
    record, _ = read_record(run.paths.losses_at(int(STEPS[-1])))

    def write_more(done, total):
        write_losses(run.paths.losses_at(9999), loss_NK[:, 0], record)

    summary = fit_run(run, block_tokens=BLOCK, progress=RecordedProgress(write_more))
    assert summary.identity.steps == tuple(STEPS.tolist())
    assert outcome(run) == whole


def test_losses_that_change_during_the_fit_are_refused(run):
    progress = RecordedProgress(lambda done, total: other_losses(run))
    with pytest.raises(TokscaleError, match="were replaced while they were fitted"):
        fit_run(run, block_tokens=BLOCK, progress=progress)
    assert not run.paths.fits.exists()


def test_losses_that_vanish_during_the_fit_are_refused(run):
    def abandon(done, total):
        run.paths.losses_at(int(STEPS[-1])).unlink(missing_ok=True)

    with pytest.raises(TokscaleError, match="cannot read losses"):
        fit_run(run, block_tokens=BLOCK, progress=RecordedProgress(abandon))


def test_a_half_written_file_of_the_job_is_not_fitted(run, whole):
    last = run.paths.losses_at(int(STEPS[-1]))
    (last.parent / f".{losses_name(9999)}.0123abcd.tmp").write_bytes(last.read_bytes()[:100])
    fit_run(Run.open(run.path), block_tokens=BLOCK)
    assert outcome(run) == whole
    run.paths.losses_at(9999).write_bytes(last.read_bytes()[:100])
    with pytest.raises(TokscaleError, match=f"{losses_name(9999)} is truncated"):
        Run.open(run.path)


def test_a_full_disk_gets_one_line_and_keeps_finished_blocks(run, whole, monkeypatch):
    sync = files._sync

    def full(path):
        if len(parts(run)) == 4:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(TokscaleError, match=r"cannot write .*No space left.* blocks are kept"):
        fit_run(run, block_tokens=BLOCK)
    monkeypatch.undo()
    assert fit_run(run, block_tokens=BLOCK).resumed_tokens >= 3 * BLOCK
    assert outcome(run) == whole


def test_a_folder_that_cannot_be_made_gets_one_line(run):
    run.paths.analysis.write_text("in the way")
    with pytest.raises(TokscaleError, match=r"cannot write .*analysis"):
        fit_run(run)


def test_a_device_that_is_not_there_is_refused(run):
    with pytest.raises(TokscaleError, match="cannot compute on device 'nowhere'"):
        fit_run(run, device="nowhere")
    assert not run.paths.analysis.exists()


def test_every_block_is_a_row_group_and_names_its_tokens(tmp_path, loss_NK, quick_fitter):
    rng = np.random.default_rng(1)
    full = plain_probe_set(2 * N_TOKENS)
    mask_BS = rng.random(full.mask_BS.shape) < 0.3
    mask_BS[:9] = False
    probe_set = ProbeSet(**{**vars(full), "mask_BS": mask_BS})
    n_tokens = probe_set.n_tokens
    run = write_run(tmp_path / "run", STEPS, loss_NK[:n_tokens], probe_set)
    fit_run(run, block_tokens=50)
    file = pq.ParquetFile(run.paths.fits)
    assert file.metadata.num_row_groups == -(-n_tokens // 50)
    table = file.read()
    for name in ("label", "dataset", "document", "position", "context"):
        expected_N = getattr(probe_set, f"{name}_N")
        np.testing.assert_array_equal(table[name].to_numpy(), expected_N)
        assert table.schema.field(name).type.to_pandas_dtype() == expected_N.dtype


@pytest.mark.parametrize(
    ("n_tokens", "n_probes", "expected"),
    [(1000, 60, 2**14), (2_000_000, 100, 31_250), (10**7, 500, 33_554), (10**9, 5, 2**18)],
)
def test_blocks_are_neither_small_nor_beyond_64_megabytes(n_tokens, n_probes, expected):
    assert run_module._block_tokens(n_tokens, n_probes) == expected
