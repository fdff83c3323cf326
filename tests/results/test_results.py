"""Results on disk: read as they were written, and refused if they belong to other data."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from analyses import blank, edit, edit_identity, plant_spectrum, replace_arrays
from runs import plain_probe_set, probe_steps, write_run

from megatron_tokscale.core.arrays import Floats, Integers
from megatron_tokscale.core.checked import read_typed_result, write_typed_result
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.core.schemas import FIT_SCHEMA, TRANSFER_SCHEMA
from megatron_tokscale.fit import fit_run
from megatron_tokscale.fit.summary import FitSummary, NonFiniteLosses
from megatron_tokscale.results import (
    FittedRun,
    SpectrumResult,
    non_finite_line,
    read_axis,
    read_fit,
    read_transfer,
    transfers_to_keep,
)
from megatron_tokscale.results.axis import AxisSummary, GroupPrediction, Shift, Top
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.evidence import Evidence, ForwardPrediction
from megatron_tokscale.results.npz import array_forms, read_npz, write_npz
from megatron_tokscale.results.primary import COVARIANCE, ORDER
from megatron_tokscale.results.skill import GroupTest
from megatron_tokscale.results.transfer import (
    FallCovariance,
    LearningOrder,
    Surface,
    Transfer,
    Transfers,
)
from megatron_tokscale.results.verdict import Claim, ClaimTest
from megatron_tokscale.spectrum import axis_run, spectrum_run

N_TOKENS, STEPS = 160, probe_steps(20, last=2000)


def planted(path, shift=0.0):
    """A run in which every token falls, the later ones later."""
    rng = np.random.default_rng(0)
    midpoint_N = rng.uniform(2, 6, N_TOKENS) + shift
    x_K = np.log(np.maximum(STEPS, 1e-9))
    loss_NK = 1 + 3 / (1 + np.exp((x_K - midpoint_N[:, None]) / 0.3))
    loss_NK += 0.05 * rng.standard_normal(loss_NK.shape)
    return write_run(path, STEPS, loss_NK.astype(np.float32))


@pytest.fixture
def analysed(tmp_path):
    run = planted(tmp_path / "run")
    fit_run(run)
    spectrum_run(run, n_resamples=5, null_tokens=40)
    return run


def test_a_spectrum_is_read_as_it_was_written(tmp_path):
    run = planted(tmp_path / "run")
    fit = fit_run(run)
    evidence = spectrum_run(run, n_resamples=5, null_tokens=40)
    found = SpectrumResult.open(run)
    assert found.fit == read_fit(run) == fit
    assert to_json(found.evidence) == to_json(evidence)
    assert found.summary.fit == evidence.fit == fit.identity
    assert found.summary.overall.n_tokens == N_TOKENS
    assert found.arrays.mean_loss_RK.shape == (6, len(STEPS))
    assert found.arrays.reconstructions()["full"] is found.arrays.full_G


@pytest.mark.parametrize(
    "value",
    [
        Undefined("too few probes"),
        blank(ForwardPrediction, groups={}, fall=Estimate(1.0, 0.5, 2.0, 1.1)),
        {"document": blank(GroupTest, test=ClaimTest.of(ORDER, Estimate(0.3, 0.2, 0.4)))},
    ],
)
def test_undefined_and_defined_results_are_read_as_what_they_are(value):
    kind = {dict: dict[str, GroupTest] | Undefined}.get(type(value), ForwardPrediction | Undefined)
    assert to_json(from_json(kind, to_json(value))) == to_json(value)
    assert type(from_json(kind, to_json(value))) is type(value)


def _shift():
    test = ClaimTest.of(Claim("a claim", least=0.5), Estimate(1.0, 0.7, 1.2))
    prediction = blank(GroupPrediction, test=test)
    tests = {"earlier_test": test, "left_out_test": replace(test, estimate=Undefined("one run"))}
    return blank(Shift, top=Top.UNKNOWN, groups={"dataset": prediction}, **tests)


def test_every_result_is_read_from_json_as_it_was_written():
    order, covariance = (
        ClaimTest.of(claim, Estimate(0.3, 0.2, 0.4)) for claim in (ORDER, COVARIANCE)
    )
    group = {"document": blank(GroupTest, test=order), "frequency": blank(GroupTest, test=None)}
    results = [
        blank(FitSummary),
        blank(Evidence),
        blank(
            Transfer,
            absolute=group,
            order=blank(LearningOrder, test=order),
            falls=blank(FallCovariance, test=covariance),
            surface=Undefined("few tokens fall"),
        ),
        blank(Transfer, surface=blank(Surface, tests={"A's fits": covariance})),
        blank(AxisSummary, shift=_shift(), falls=(Estimate(1.0),)),
        blank(AxisSummary),
    ]
    for result in results:
        assert to_json(from_json(type(result), to_json(result))) == to_json(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe_fingerprint": "x"}, "is of other probes"),
        ({"run_id": "x"}, "is of another run"),
        ({"steps": [1, 2]}, "is of other probes"),
        ({"losses_crc32": ["x"]}, "is of other losses"),
        ({"time": "tokens"}, "is of another time"),
        ({"fit_id": "x"}, "is of other fits"),
    ],
)
@pytest.mark.parametrize("name", ["spectrum.json", "reconstruction.json"])
def test_a_spectrum_of_other_fits_is_refused(analysed, name, changes, message):
    edit_identity(analysed.paths.analysis / name, "fit", **changes)
    with pytest.raises(TokscaleError, match=f"{name} {message} than the run has now; run `.*again"):
        SpectrumResult.open(analysed)


def test_two_files_of_two_spectra_are_refused(analysed):
    edit(analysed.paths.reconstruction, arrays_crc32="00000000")
    with pytest.raises(TokscaleError, match=r"reconstruction\.json is of another spectrum"):
        SpectrumResult.open(analysed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certain_to_x": "late"}, r"certain_to_x is 'late'; expected a number"),
        ({"more": 1}, "more is unknown"),
        ({"fall": {"undefined": "no"}}, "fall.* is unknown"),
    ],
)
def test_a_file_of_another_form_is_refused(analysed, changes, message):
    edit(analysed.paths.spectrum, **changes)
    with pytest.raises(TokscaleError, match=f"is damaged: {message}.*run `megatron-tokscale"):
        SpectrumResult.open(analysed)


@dataclass(frozen=True)
class Arrays:
    step_K: Integers
    loss_RK: Floats


@dataclass(frozen=True)
class MoreArrays(Arrays):
    x_K: Floats


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = Arrays(np.arange(3), np.ones((2, 3)))
    checksum = write_npz(tmp_path / "a.npz", arrays)
    found = read_npz(Arrays, tmp_path / "a.npz", checksum, "again")
    np.testing.assert_array_equal(found.step_K, arrays.step_K)
    np.testing.assert_array_equal(found.loss_RK, arrays.loss_RK)
    assert array_forms(Arrays) == {
        "step_K": (np.dtype(np.int64), 1),
        "loss_RK": (np.dtype(np.float64), 2),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_G": np.zeros(4, np.float32)},
            "type float32 and 1 axes; expected float64 and 1",
        ),
        (
            {"x_G": np.zeros((4, 4))},
            "type float64 and 2 axes; expected float64 and 1",
        ),
        ({"more": np.zeros(4)}, "array more is unknown"),
    ],
)
def test_arrays_of_another_form_are_refused(analysed, changes, message):
    replace_arrays(analysed, **changes)
    with pytest.raises(TokscaleError, match=f"is damaged: .*{message}"):
        SpectrumResult.open(analysed)


def test_a_missing_array_is_refused(tmp_path):
    checksum = write_npz(tmp_path / "a.npz", Arrays(np.arange(3), np.ones((2, 3))))
    with pytest.raises(TokscaleError, match=r"array .* is missing; make it again"):
        read_npz(MoreArrays, tmp_path / "a.npz", checksum, "make it again")


def transfer(run, source_id, **changes):
    identity = replace(read_fit(run).identity, **changes)
    return blank(Transfer, source=source_id, source_run_id=source_id, fit=identity)


def write_transfers(run, *transfers):
    write_typed_result(run.paths.transfer, TRANSFER_SCHEMA, Transfers(transfers))


def test_transfers_of_other_fits_are_refused_and_not_kept(analysed):
    fit = read_fit(analysed)
    assert read_transfer(analysed, fit) == transfers_to_keep(analysed, fit) == ()
    good, stale = transfer(analysed, "a"), transfer(analysed, "b", fit_id="x")
    write_transfers(analysed, good)
    assert [each.source for each in read_transfer(analysed, fit)] == ["a"]
    write_transfers(analysed, good, stale)
    assert [each.source for each in transfers_to_keep(analysed, fit)] == ["a"]
    with pytest.raises(TokscaleError, match="of other fits than the run has now; it has b; remove"):
        read_transfer(analysed, fit)


def test_transfers_of_an_older_schema_are_not_kept_and_damaged_ones_are_refused(analysed):
    fit = read_fit(analysed)
    write_transfers(analysed, transfer(analysed, "a"))
    edit(analysed.paths.transfer, schema_version=TRANSFER_SCHEMA - 1)
    assert transfers_to_keep(analysed, fit) == ()
    edit(analysed.paths.transfer, schema_version=TRANSFER_SCHEMA, transfers=[{}])
    with pytest.raises(TokscaleError, match=r"is damaged: transfers\[0\].* is missing; remove it"):
        transfers_to_keep(analysed, fit)


def test_an_axis_is_read_for_runs_of_its_probe_set_alone(tmp_path):
    runs = []
    for k, last in enumerate((50, 100, 200, 400)):
        loss_NK = np.random.default_rng(k).uniform(1, 2, (N_TOKENS, 2)) - k / 10
        runs.append(write_run(tmp_path / f"d{k}", [0, last], loss_NK.astype(np.float32)))
    summary = axis_run(runs, "D", tmp_path / "D", n_resamples=3)
    found = read_axis(runs[0], tmp_path / "D")
    assert to_json(found.summary) == to_json(summary)
    np.testing.assert_allclose(np.exp(found.arrays.log_size_I), [run.size for run in summary.runs])
    other = write_run(tmp_path / "other", [0, 9], np.ones((80, 2)), plain_probe_set(80))
    with pytest.raises(TokscaleError, match="watch other tokens"):
        read_axis(other, tmp_path / "D")


def test_a_planted_spectrum_can_be_opened(tmp_path):
    run = planted(tmp_path / "run")
    x_G = np.linspace(0, 7, 9)
    plant_spectrum(run, {"prose": 5, "code": 0}, x_G=x_G, drop_weighted_DG=np.ones((2, 9)))
    found = SpectrumResult.open(run)
    assert [each.n_tokens for each in found.summary.datasets] == [5, 0]
    np.testing.assert_array_equal(found.arrays.x_G, x_G)


def test_fits_that_were_not_written_with_their_summary_are_refused(analysed):
    edit(analysed.paths.fit, fits_crc32="00000000")
    with pytest.raises(TokscaleError, match=r"fits\.parquet is damaged, or was not written toget"):
        FittedRun.open(analysed)


def test_a_summary_is_read_with_the_line_that_it_needs(analysed):
    path = analysed.paths.fit
    edit(path, n_tokens=None)
    with pytest.raises(TokscaleError, match="n_tokens is None; expected a whole number; run `meg"):
        read_typed_result(FitSummary, path, FIT_SCHEMA, "run `megatron-tokscale fit` again")


def test_losses_that_are_not_finite_are_counted_in_one_line():
    assert non_finite_line(NonFiniteLosses(0, 0, 10)) == []
    assert non_finite_line(NonFiniteLosses(1200, 3, 4000)) == [
        "  1,200 losses of 3 of 4,000 tokens are NaN or infinite; these tokens are left out of "
        "every mean"
    ]
