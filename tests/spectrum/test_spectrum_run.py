"""`spectrum_run` on a run on disk.

Shapes: N tokens, K probe steps, G grid points, D datasets.
"""

import json

import numpy as np
import pytest

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.fit import SigmoidFits, fit_run
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.spectrum.run import document_half
from megatron_tokscale.store.losses import losses_name


@pytest.fixture
def fitted(make_run, local_losses):
    steps, loss_NK, _, _ = local_losses
    loss_NK = loss_NK.copy()
    loss_NK[11, 4] = np.inf
    run = make_run(steps, loss_NK)
    fit_run(run)
    return run


def test_files_hold_spectra_overall_and_per_dataset(fitted):
    result = spectrum_run(fitted, null_tokens=200)
    assert result == json.loads((fitted.analysis / "reconstruction.json").read_text())
    about = json.loads((fitted.analysis / "spectrum.json").read_text())
    assert [domain["name"] for domain in about["domains"]] == ["prose", "code"]
    arrays = np.load(fitted.analysis / "spectrum.npz", allow_pickle=False)
    finite_N = np.isfinite(fitted.read_losses()).all(axis=1)
    mean_K = fitted.read_losses()[finite_N].astype(float).mean(axis=0)
    np.testing.assert_allclose(arrays["mean_loss_K"], mean_K, rtol=1e-6)
    for d in range(2):
        of_domain = finite_N & (fitted.probe_set.domain_N == d)
        mean_K = fitted.read_losses()[of_domain].astype(float).mean(axis=0)
        np.testing.assert_allclose(arrays["mean_loss_DK"][d], mean_K, rtol=1e-6)
    share_D = np.array([domain["n_tokens"] for domain in about["domains"]]) / about["n_tokens"]
    np.testing.assert_allclose(
        share_D @ arrays["drop_weighted_DG"], arrays["drop_weighted_G"], atol=1e-9
    )
    assert arrays["x_G"].shape == arrays["full_G"].shape == arrays["half_full_G"].shape


def test_local_learning_is_reconstructed_and_narrower_than_the_null(fitted):
    result = spectrum_run(fitted)
    assert result["same_tokens"]["kernel"]["r2"] > 0.98
    assert result["other_documents"]["full"]["r2"] > 0.8
    widths = result["widths"]
    assert widths["observed"]["width_x"]["p50"] < widths["mean_curve_null"]["width_x"]["p50"] / 2
    about = json.loads((fitted.analysis / "spectrum.json").read_text())
    np.testing.assert_allclose(
        about["drop_of_events_nats_per_token"], about["fall_nats_per_token"], rtol=0.05
    )


def test_spectrum_needs_a_fit_first(make_run, local_losses):
    run = make_run(*local_losses[:2])
    with pytest.raises(TokscaleError, match=r"run `megatron-tokscale fit .*` first"):
        spectrum_run(run)


def test_fits_of_other_probe_steps_are_refused(fitted):
    last = fitted.records[-1].step
    (fitted.path / "tokscale" / "losses" / losses_name(last)).unlink()
    with pytest.raises(TokscaleError, match="fitted on other probes"):
        spectrum_run(type(fitted).open(fitted.path))


def test_halves_keep_documents_whole_and_are_about_equal():
    domain_N = np.repeat(np.arange(3, dtype=np.int16), 4000)
    document_N = np.tile(np.repeat(np.arange(1000, dtype=np.int32), 4), 3)
    half_N = document_half(domain_N, document_N, seed=0)
    assert (half_N.reshape(-1, 4) == half_N.reshape(-1, 4)[:, :1]).all()
    assert abs(half_N.mean() - 0.5) < 0.05
    per_domain = half_N.reshape(3, -1)
    assert (per_domain[0] != per_domain[1]).any()
    assert (document_half(domain_N, document_N, seed=1) != half_N).any()


def test_means_predicted_by_the_fits_are_the_measured_ones(fitted):
    fits = SigmoidFits.load(fitted.analysis / "fits.parquet")
    finite_N = fits.complete_N
    measured_K = fitted.read_losses()[finite_N].mean(axis=0)
    np.testing.assert_allclose(fits.predict(fits.x_K)[finite_N].mean(axis=0), measured_K, atol=0.02)
