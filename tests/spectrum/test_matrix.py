"""A matrix along D or M without a fit: against planted falls."""

import re

import numpy as np
import pytest
from matrices import write_interchange

from megatron_tokscale.cli.entry import main
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results.matrix import read_matrix
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.spectrum.matrix import matrix_run
from megatron_tokscale.spectrum.matrix_text import describe_matrix
from megatron_tokscale.store import Run
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings
from megatron_tokscale.store.exchange.token_arrays import TokenArrays


@pytest.fixture
def run(tmp_path):
    """Tokens of dataset a fall by 3 nats from M = 4 to M = 8, those of b stay."""
    generator = np.random.default_rng(1)
    kind_N = np.arange(400) // 10 % 2
    value_K = np.array([8.0, 1, 2, 4, 8, 16])
    loss_NK = 3.5 - 3.0 * (kind_N == 0)[:, None] * (value_K >= 8)
    loss_NK += generator.normal(0, 0.05, loss_NK.shape)
    loss_NK[17, 0] = np.nan
    source = write_interchange(
        tmp_path / "in",
        loss_NK.astype(np.float32),
        value_K,
        name="M",
        kind=np.array(["a", "b"])[kind_N],
        sample_id=np.arange(400) // 10,
    )
    arrays = TokenArrays(datasets="kind")
    import_run(source, tmp_path / "run", ImportSettings(arrays=arrays, unit="parameters"))
    return Run.open(tmp_path / "run")


def test_learned_tokens_times_and_falls_are_the_planted_ones(run):
    result = matrix_run(run, n_resamples=50)
    summary, time_N = result.summary, result.arrays.time_N
    kind_N = run.tokens.dataset_N
    assert (time_N[kind_N == 0] == 8).all()
    assert np.isinf(np.delete(time_N, 17)[np.delete(kind_N, 17) == 1]).all() and np.isnan(
        time_N[17]
    )
    assert (summary.n_tokens, summary.left_out) == (399, 1)
    assert [(each.value, each.runs) for each in summary.values] == [
        (1, 1),
        (2, 1),
        (4, 1),
        (8, 2),
        (16, 1),
    ]
    learned = [each.learned.uncorrected for each in summary.values]
    np.testing.assert_allclose(learned, [0, 0, 0, 200 / 399, 200 / 399])
    falls = {each.name: each for each in summary.groups}
    assert falls["a"].fall.low < 3 < falls["a"].fall.high
    assert falls["b"].fall.low < 0 < falls["b"].fall.high
    assert (falls["a"].learned.value, falls["b"].learned.value) == (1, 0)
    assert (summary.unit_kind, summary.n_units) == ("samples", 40)


def test_the_files_hold_the_result(run):
    result = matrix_run(run, n_resamples=20)
    found = read_matrix(run)
    assert found.summary == result.summary
    np.testing.assert_array_equal(found.arrays.time_N, result.arrays.time_N)
    text = describe_matrix(found.summary)
    assert "6 runs along M, parameters" in text and "dataset a" in text


def test_a_result_of_other_losses_is_refused(run):
    matrix_run(run, n_resamples=20)
    run.paths.losses_at(0).unlink()
    with pytest.raises(TokscaleError, match="of other losses than the run has now"):
        read_matrix(Run.open(run.path))


def test_fewer_than_twenty_runs_are_not_fitted(run):
    with pytest.raises(TokscaleError, match=r"at least 20 .*megatron-tokscale spectrum"):
        fit_run(run)


def planted_sigmoids(folder, value_K):
    """Return a run along D with 60 tokens that are planted sigmoids, and their midpoints."""
    generator = np.random.default_rng(0)
    midpoint_N = generator.uniform(3, 6, 60)
    loss_NK = 1 + 3 / (1 + np.exp((np.log(value_K) - midpoint_N[:, None]) / 0.8))
    loss_NK += generator.normal(0, 0.02, loss_NK.shape)
    source = write_interchange(folder / "in", loss_NK.astype(np.float32), value_K, name="D")
    import_run(source, folder / "run", ImportSettings())
    return Run.open(folder / "run"), midpoint_N


TIED = {
    "11 pairs": (np.repeat(np.geomspace(1, 1e4, 11), 2), "22 columns at 11 values; expected .* 20"),
    "a pair among 24": (
        np.append(np.geomspace(1, 1e4, 23), 1e4),
        "24 columns at 23 values of D; expected one run of each value .* import one run of each",
    ),
}


@pytest.mark.parametrize(("value_K", "words"), TIED.values(), ids=TIED)
def test_tied_values_are_not_fitted_and_the_matrix_is_measured(tmp_path, capsys, value_K, words):
    run, _ = planted_sigmoids(tmp_path, value_K)
    for verb in ("fit", "report"):
        with pytest.raises(SystemExit) as caught:
            main([verb, str(run.path)])
        *notes, said = capsys.readouterr().err.splitlines()
        assert all("intervals resample samples" in note for note in notes)
        assert caught.value.code == 2 and re.search(words, said)
        assert "`megatron-tokscale spectrum" in said and "learned or not" in said
        assert not run.paths.analysis.exists()
    main(["spectrum", str(run.path), "--threshold", "2", "--resamples", "20"])
    assert f"{len(value_K)} runs along D" in capsys.readouterr().out


def test_an_older_fit_of_tied_values_is_refused(tmp_path):
    run, _ = planted_sigmoids(tmp_path, np.append(np.geomspace(1, 1e4, 23), 1e4))
    run.paths.analysis.mkdir()
    run.paths.fit.write_text("{}")
    with pytest.raises(TokscaleError, match="expected one run of each value"):
        spectrum_run(run, n_resamples=2)


@pytest.mark.slow
def test_a_run_at_each_of_24_values_is_fitted(tmp_path):
    run, midpoint_N = planted_sigmoids(tmp_path, np.geomspace(1, 1e4, 24))
    summary = fit_run(run)
    assert summary.identity.time == "axis"
    from megatron_tokscale.fit import SigmoidFits

    fits = SigmoidFits.load(run.paths.fits)
    assert np.abs(fits.midpoint_N - midpoint_N).max() < 0.15


def test_a_run_over_time_is_no_matrix_along_m(tmp_path):
    import_run(write_interchange(tmp_path / "in"), tmp_path / "run", ImportSettings())
    with pytest.raises(TokscaleError, match="is one run over time"):
        matrix_run(Run.open(tmp_path / "run"))
