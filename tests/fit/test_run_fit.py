"""Fits on disk: the parquet file, and the streaming fit of a run.

Shapes: N tokens, K probe steps.
"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from recorded_progress import RecordedProgress

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import SigmoidFits, fit_run, fit_sigmoids, fits_file, read_metadata
from megatron_tokscale.fit.summary import NonFiniteLosses

STEPS = np.unique(np.round(np.geomspace(1, 4000, 40))).astype(int)
STEPS = np.concatenate([[0], STEPS])


@pytest.fixture
def run(make_run):
    from scipy.special import expit

    rng = np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        x_K = np.log(STEPS.astype(float))
    midpoint = rng.uniform(3, 7, (240, 1))
    loss_NK = 1 + 4 * expit((midpoint - x_K) / 0.3) + 0.1 * rng.standard_normal((240, len(x_K)))
    loss_NK[5, 7] = np.nan
    return make_run(STEPS, loss_NK.astype(np.float32))


def equal(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for name in ("x_K", *SigmoidFits.columns())
    ) or pytest.fail("the fits differ")


def test_saved_fits_are_read_back_equal(planted, tmp_path):
    data = planted(100, 30)
    fits = fit_sigmoids(data.x_K, data.loss_NK)
    fits.save(tmp_path / "fits.parquet", {"note": "x"})
    equal(SigmoidFits.load(tmp_path / "fits.parquet"), fits)
    assert read_metadata(tmp_path / "fits.parquet")["note"] == "x"
    equal(SigmoidFits.concatenate([fits.rows(slice(0, 40)), fits.rows(slice(40, None))]), fits)


def test_every_column_has_a_unit(planted, tmp_path):
    data = planted(10, 30)
    fit_sigmoids(data.x_K, data.loss_NK).save(tmp_path / "fits.parquet")
    schema = pq.read_schema(tmp_path / "fits.parquet")
    assert all(field.metadata[b"unit"] for field in schema)
    assert schema.field("midpoint").metadata[b"unit"] == b"x"
    assert schema.field("drop").metadata[b"unit"] == b"nats"


def test_a_run_fitted_in_blocks_equals_a_fit_in_memory(run):
    fit_run(run, block_tokens=64, keep_common_shifts=True)
    in_blocks = SigmoidFits.load(run.paths.fits)
    in_memory = fit_sigmoids(run.x_K(), run.read_losses())
    np.testing.assert_array_equal(in_blocks.class_N, in_memory.class_N)
    np.testing.assert_allclose(in_blocks.midpoint_N, in_memory.midpoint_N, atol=1e-4)


def test_parquet_names_each_token(run):
    fit_run(run)
    table = pq.read_table(run.paths.fits)
    assert table.num_rows == run.n_tokens
    for column, array in {
        "label": run.probe_set.label_N,
        "dataset": run.probe_set.dataset_N,
        "document": run.probe_set.document_N,
        "position": run.probe_set.position_N,
        "context": run.probe_set.context_N,
    }.items():
        np.testing.assert_array_equal(table[column].to_numpy(), array)


def test_summary_counts_every_token_and_the_whole_fall(run):
    progress = RecordedProgress()
    summary = fit_run(run, block_tokens=100, keep_common_shifts=True, progress=progress)
    assert progress.reports == {"fit": [(0, 240), (100, 240), (200, 240), (240, 240)]}
    assert progress.units == {"fit": "tokens"}
    stored = json.loads(run.paths.fit.read_text())
    assert to_json(summary).items() <= stored.items()
    assert sum(each.tokens for each in summary.classes.values()) == 240
    assert sum(summary.status.values()) == 240
    loss_NK = run.read_losses().astype(float)
    missing_K = (~np.isfinite(loss_NK)).sum(axis=0)
    assert missing_K.sum() == 1
    assert summary.non_finite == NonFiniteLosses(losses=1, tokens=1, of_tokens=240)
    assert summary.non_finite_K == tuple(missing_K.tolist())
    fall = (loss_NK[:, 0] - loss_NK[:, -1]).sum()
    np.testing.assert_allclose(summary.fall_nats, fall, rtol=1e-6)
    np.testing.assert_allclose(
        sum(each.fall_share for each in summary.classes.values()), 1, rtol=1e-9
    )
    assert summary.identity.steps == tuple(STEPS.tolist())
    assert summary.identity.probe_fingerprint == run.probe_set.fingerprint
    assert stored["settings"]["precision"] == "float32, TF32 off"


def test_time_in_tokens_shifts_midpoints_by_the_tokens_per_step(run):
    fit_run(run)
    by_step = SigmoidFits.load(run.paths.fits)
    fit_run(run, time="tokens")
    by_token = SigmoidFits.load(run.paths.fits)
    shift_N = (by_token.midpoint_N - by_step.midpoint_N)[by_step.status_N == 0]
    np.testing.assert_allclose(shift_N, np.log(32), atol=1e-3)


def test_four_probes_are_refused_and_nothing_is_written(make_run):
    run = make_run([0, 1, 2, 4], np.ones((16, 4), np.float32))
    with pytest.raises(TokscaleError, match="has 4 probe steps, a sigmoid needs at least 5"):
        fit_run(run)
    assert not run.paths.analysis.exists()


def test_a_damaged_losses_file_is_refused_and_old_fits_stay(run):
    fit_run(run)
    before = run.paths.fits.read_bytes()
    path = run.paths.losses_at(int(STEPS[7]))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokscaleError, match="wrong checksum"):
        fit_run(run)
    assert run.paths.fits.read_bytes() == before


def test_fits_of_an_older_schema_are_refused(planted, tmp_path, monkeypatch):
    data = planted(10, 30)
    with monkeypatch.context() as patch:
        patch.setattr(fits_file, "FITS_SCHEMA", 1)
        fit_sigmoids(data.x_K, data.loss_NK).save(tmp_path / "fits.parquet")
    with pytest.raises(TokscaleError, match="older schema; fit the run again"):
        SigmoidFits.load(tmp_path / "fits.parquet")


@pytest.mark.parametrize("content", [None, b"", b"not parquet at all", "other"])
def test_a_file_that_is_not_a_table_of_fits_is_refused(tmp_path, content):
    import pyarrow as pa

    path = tmp_path / "fits.parquet"
    if content == "other":
        pq.write_table(pa.table({"a": [1]}), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(TokscaleError, match=r"fits\.parquet"):
        SigmoidFits.load(path)
