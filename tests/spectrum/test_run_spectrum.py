"""`spectrum_run` on a run on disk: the files, the text, and what is refused.

Shapes: N tokens, K probe steps, G grid points, D datasets.
"""

import json

import numpy as np
import pytest
from runs import log_time, plain_probe_set, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import SigmoidFits, fit_run
from megatron_tokscale.results import SpectrumResult
from megatron_tokscale.results.estimate import format_estimate
from megatron_tokscale.results.scored_range import RangeEnd, RangeStart
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.spectrum.spectrum_text import describe_datasets, describe_spectrum
from megatron_tokscale.store import Run
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
    result = spectrum_run(fitted, null_tokens=200, n_resamples=20, seed=0)
    stored = json.loads(fitted.paths.reconstruction.read_text())
    assert to_json(result).items() <= stored.items()
    about = json.loads(fitted.paths.spectrum.read_text())
    assert [dataset["name"] for dataset in about["datasets"]] == ["prose", "code"]
    arrays = np.load(fitted.paths.spectrum_arrays, allow_pickle=False)
    finite_N = np.isfinite(fitted.read_losses()).all(axis=1)
    mean_K = fitted.read_losses()[finite_N].astype(float).mean(axis=0)
    np.testing.assert_allclose(arrays["mean_loss_K"], mean_K, rtol=1e-6)
    assert arrays["mean_loss_RK"].shape == (21, len(mean_K))
    np.testing.assert_allclose(arrays["mean_loss_RK"][0], mean_K, rtol=1e-6)
    for d in range(2):
        of_dataset = finite_N & (fitted.probe_set.dataset_N == d)
        mean_K = fitted.read_losses()[of_dataset].astype(float).mean(axis=0)
        np.testing.assert_allclose(arrays["mean_loss_DK"][d], mean_K, rtol=1e-6)
    count_D = np.array([dataset["n_tokens"] for dataset in about["datasets"]])
    share_D = count_D / about["overall"]["n_tokens"]
    np.testing.assert_allclose(
        share_D @ arrays["drop_weighted_DG"], arrays["drop_weighted_G"], atol=1e-9
    )
    assert arrays["frequency_events_I"].sum() == about["overall"]["n_events"]
    assert arrays["x_G"].shape == arrays["full_G"].shape == arrays["unlearned_G"].shape
    low_G, high_G = arrays["measured_interval_2G"]
    assert (low_G <= high_G).all()


def test_local_learning_is_reconstructed_and_narrower_than_the_null_model(fitted):
    result = spectrum_run(fitted, n_resamples=50, seed=0)
    assert result.same_tokens["kernel"].r2.value > 0.98
    assert result.other_documents["full"].r2.value > 0.8
    widths = result.widths
    assert widths.test.verdict is Verdict.HOLDS
    assert widths.observed.width_x.p50.value < widths.group_null.width_x.p50.value / 2
    summary = SpectrumResult.open(fitted).summary
    learned_nats = summary.overall.learned_nats.value
    np.testing.assert_allclose(learned_nats, summary.fall.value, rtol=0.05)
    assert f"holds: {format_estimate(widths.test.estimate)} (at most 0.95)" in describe_spectrum(
        result
    )
    assert describe_spectrum(result).count("needs a second run") == 2
    assert "needs a second run" not in describe_spectrum(result, has_second_run=True)


def test_noise_of_the_checkpoints_is_reported_and_is_in_the_measured_mean(make_run):
    """The fits are without the common shifts, and the mean loss and its ceiling are with them."""
    steps, rng = probe_steps(50, last=5000), np.random.default_rng(1)
    midpoint_N = rng.uniform(3, 7, (800, 1))
    loss_NK = 1 + 3 * expit((midpoint_N - log_time(steps)) / 0.5)
    shared_K = 0.05 * rng.standard_normal(50)
    loss_NK += shared_K + 0.1 * rng.standard_normal((800, 50))
    run = make_run(steps, loss_NK.astype(np.float32))
    fit_run(run)
    result = spectrum_run(run, n_resamples=50, null_tokens=200, seed=0)
    arrays = np.load(run.paths.spectrum_arrays, allow_pickle=False)
    np.testing.assert_allclose(arrays["mean_loss_K"], loss_NK.mean(axis=0), atol=1e-5)
    noise = result.slope_noise
    assert noise.shared.low < shared_K[1:].std() < noise.shared.high
    assert noise.own < 0.01
    assert set(result.dataset_noise) == {"prose", "code"}
    full = result.same_tokens["full"]
    assert full.r2.value > 0.7
    assert full.ceiling == noise.ceiling
    assert 0.03 < full.loss_error.value < 0.07  # a perfect model has the noise as its error
    text = describe_spectrum(result)
    assert f"shared by all tokens {noise.shared.value:.4f}" in text
    assert f"would reach: {noise.ceiling.value:.3f}" in text


def test_a_slope_that_is_noise_has_no_r2_and_the_text_says_why(make_run):
    steps, rng = np.arange(0, 3600, 100), np.random.default_rng(2)
    x_K = np.maximum(log_time(steps), 0)
    loss_NK = 6 - 0.2 * x_K + rng.standard_normal(36) + 0.1 * rng.standard_normal((400, 36))
    run = make_run(steps, loss_NK.astype(np.float32))
    fit_run(run)
    result = spectrum_run(run, n_resamples=20, null_tokens=100, seed=0)
    assert result.slope_noise.ceiling.value < 0.5
    for each in result.same_tokens.values():
        assert "cannot be measured" in each.r2.undefined
    assert "the slope cannot be measured" in describe_spectrum(result)
    assert SpectrumResult.open(run).evidence.same_tokens == result.same_tokens


def test_tokens_that_follow_the_mean_curve_are_not_local(make_run):
    steps, rng = probe_steps(50, last=5000), np.random.default_rng(0)
    mean_K = 3 * expit((5.5 - log_time(steps)) / 0.9)
    loss_NK = rng.uniform(0.5, 2, (800, 1)) * mean_K + 1 + 0.1 * rng.standard_normal((800, 50))
    run = make_run(steps, loss_NK.astype(np.float32))
    fit_run(run)
    result = spectrum_run(run, n_resamples=50, seed=0)
    assert result.widths.test.verdict is not Verdict.HOLDS
    assert f"{result.widths.test.verdict}: " in describe_spectrum(result)


def test_one_document_has_numbers_and_no_intervals(tmp_path, local_losses):
    steps, loss_NK, _, _ = local_losses
    probe_set = plain_probe_set(400)
    for name in ("document_BS", "dataset_BS"):
        getattr(probe_set, name)[:] = 0
    run = write_run(tmp_path / "one", steps, loss_NK[:400], probe_set)
    fit_run(run)
    result = spectrum_run(run, n_resamples=50, seed=0)
    assert result.n_units == 1
    assert result.same_tokens["kernel"].r2.value > 0.9
    assert not result.same_tokens["kernel"].r2.has_interval
    assert result.widths.test.estimate.value < 1
    assert result.widths.test.verdict is Verdict.UNDECIDED
    assert "undecided: " in describe_spectrum(result)


def test_too_few_probes_leave_the_forward_prediction_undefined(make_run, local_losses):
    steps, loss_NK, _, _ = local_losses
    run = make_run(steps[::6], loss_NK[:400, ::6])
    fit_run(run)
    result = spectrum_run(run, n_resamples=5, seed=0)
    assert "probe more often" in result.forward.undefined
    assert "probe more often" in describe_spectrum(result)


def test_spectrum_needs_a_fit_first(make_run, local_losses):
    run = make_run(*local_losses[:2])
    with pytest.raises(TokscaleError, match=r"run `megatron-tokscale fit .*` first"):
        spectrum_run(run)


def test_fits_of_other_probe_steps_are_refused(fitted):
    last = fitted.records[-1].step
    (fitted.path / "tokscale" / "losses" / losses_name(last)).unlink()
    with pytest.raises(
        TokscaleError,
        match=r"fit\.json is of other probes than the run has now; run `megatron-tokscale fit",
    ):
        spectrum_run(Run.open(fitted.path))


def test_means_predicted_by_the_fits_are_the_measured_ones(fitted):
    fits = SigmoidFits.load(fitted.paths.fits)
    finite_N = fits.complete_N
    measured_K = fitted.read_losses()[finite_N].mean(axis=0)
    np.testing.assert_allclose(fits.predict(fits.x_K)[finite_N].mean(axis=0), measured_K, atol=0.02)


@pytest.fixture
def imported(tmp_path, local_losses):
    """A run without labels and documents, whose losses were imported."""
    steps, loss_NK, _, _ = local_losses
    np.savez(tmp_path / "losses.npz", loss_matrix=loss_NK, axis_values=steps)
    line = f"import {tmp_path / 'losses.npz'} --axis T --unit step --out {tmp_path / 'imported'}"
    main(line.split())
    run = Run.open(tmp_path / "imported")
    fit_run(run)
    return run


def test_without_labels_the_range_starts_at_the_first_probe_and_says_so(imported):
    result = spectrum_run(imported, null_tokens=200, n_resamples=10, seed=0)
    assert result.scored.start_reason is RangeStart.NO_LABELS
    assert result.scored.from_x == imported.x_K()[1]
    assert "as the labels are not known" in describe_spectrum(result)
    summary = SpectrumResult.open(imported).summary
    assert summary.scored.end_reason is RangeEnd.NO_RATES
    assert result.same_tokens["spectrum"].r2.value > 0.9


def test_the_table_says_what_became_of_the_tokens_of_each_dataset(make_run, local_losses):
    steps, loss_NK, midpoint_N, drop_N = local_losses
    loss_NK = loss_NK.copy()
    later_N = np.arange(len(loss_NK)) % 16 == 1  # tokens of the first dataset
    loss_NK[later_N] = 7 + 0.1 * np.random.default_rng(1).standard_normal((100, len(steps)))
    run = make_run(steps, loss_NK)
    fit_run(run)
    spectrum_run(run, null_tokens=100, n_resamples=20, seed=0)
    result = SpectrumResult.open(run)
    prose, code = result.summary.datasets
    assert (prose.n_tokens, code.n_tokens) == (800, 800)
    assert abs(prose.censored - 100) <= 10 and code.censored <= 10
    assert prose.n_events + prose.censored + prose.known + prose.forgotten == 800
    of_prose = run.probe_set.dataset_N == 0
    learned_N = of_prose & ~later_N
    expected = drop_N[learned_N].mean() * 100 / 800
    np.testing.assert_allclose(prose.expected_nats.value, expected, rtol=0.15)
    np.testing.assert_allclose(prose.learned_nats.value, drop_N[learned_N].sum() / 800, rtol=0.05)
    time_N = np.where(later_N, np.inf, midpoint_N)
    assert prose.median_x.low - 0.05 < np.median(time_N[of_prose]) < prose.median_x.high + 0.05
    lines = describe_datasets(result.summary).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["all", "prose", "code"]
    assert "800" in lines[3] and "12." in lines[3]
    left_G = result.arrays.unlearned_G
    assert (np.diff(left_G) <= 1e-12).all()
    total = prose.learned_nats.value + prose.expected_nats.value
    total += code.learned_nats.value + code.expected_nats.value
    last = (prose.expected_nats.value + code.expected_nats.value) / total
    np.testing.assert_allclose(left_G[-1], last, atol=0.01)
