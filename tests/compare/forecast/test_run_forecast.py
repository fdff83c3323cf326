"""`forecast_run` on a planted run whose later falls are known. N tokens, K probes, H horizons."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from analyses import edit
from runs import log_time, probe_steps, write_run
from scipy.special import expit
from scipy.stats import norm

from megatron_tokscale.cli import main
from megatron_tokscale.compare.forecast import describe_forecast, forecast_run
from megatron_tokscale.compare.forecast.judge import judge
from megatron_tokscale.compare.forecast.origin import Forecaster, _combined, _estimates
from megatron_tokscale.compare.forecast.run_forecast import _watched, assumptions
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import fit_run
from megatron_tokscale.results import FittedRun, read_forecast
from megatron_tokscale.results.estimate import Undefined
from megatron_tokscale.results.fitted import read_fit
from megatron_tokscale.results.forecast import FACTORS, Method, Standing
from megatron_tokscale.spectrum.scored_range import scored_range_of
from megatron_tokscale.store import Run

N_TOKENS, LAST, HAZARD, DROP, FLOOR, WIDTH = 2400, 5000, 0.5, 4.0, 0.3, 0.2
STEPS = probe_steps(50, last=LAST)


def planted():
    """Losses of tokens that fall at a flat hazard from step 10 on, and their curve at any step."""
    rng = np.random.default_rng(0)
    midpoint_N = np.log(10) + rng.exponential(1 / HAZARD, N_TOKENS)

    def clean(steps):
        return FLOOR + DROP * expit((midpoint_N[:, None] - log_time(steps)) / WIDTH)

    return clean(STEPS) + 0.1 * rng.standard_normal((N_TOKENS, len(STEPS))), clean


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("forecast") / "run", STEPS, planted()[0])
    fit_run(run)
    return run


@pytest.fixture(scope="module")
def result(run):
    return forecast_run(run, n_resamples=40)


def watched(run, **changes):
    source = FittedRun.open(run)
    scored = scored_range_of(run, source.x_K, run.mean_losses())
    return replace(_watched(source, scored, 1200, 20, 0), **changes)


def test_the_falls_to_ten_times_the_training_are_foretold(result):
    _, clean = planted()
    came_H = clean([LAST])[:, 0].mean() - clean(LAST * np.array(FACTORS)).mean(axis=0)
    for horizon, came in zip(result.now.horizons, came_H, strict=True):
        said = horizon.falls[Method.HAZARD]
        assert said.low < came < said.high
        assert said.value == pytest.approx(came, rel=0.12)
    assert result.now.hazard_per_octave.value == pytest.approx(1 - 2**-HAZARD, abs=0.06)


def test_back_tests_end_at_the_last_probe_and_have_what_came(result):
    _, clean = planted()
    quarter, half = result.back_tests
    assert [each.factor for each in quarter.horizons] == [2.0, 4.0]
    assert [each.factor for each in half.horizons] == [2.0]
    for test in result.back_tests:
        assert test.time <= LAST * test.share
        for horizon in test.horizons:
            assert horizon.time <= LAST * (1 + 1e-9)
            came = clean([test.time])[:, 0].mean() - clean([horizon.time])[:, 0].mean()
            assert horizon.measured.value == pytest.approx(came, abs=0.015)
    assert all(horizon.measured is None for horizon in result.now.horizons)


def test_the_back_tests_do_not_refute_a_true_hazard(result):
    standing = {each.method: each.standing for each in result.judgements}
    assert standing[Method.HAZARD] is Standing.STANDS
    assert standing[Method.SLOPE] is Standing.REFUTED


def test_a_back_test_uses_no_loss_behind_its_origin(run):
    """Losses behind half of the training change what came, and nothing of what was said."""
    data = watched(run)
    behind_K = np.exp(data.x_K) > LAST / 2
    altered_NK = data.loss_NK + np.where(behind_K, 3.0, 0.0).astype(np.float32)
    before, after = (
        Forecaster(each).origin(0.5) for each in (data, watched(run, loss_NK=altered_NK))
    )
    assert before.horizons[0].falls == after.horizons[0].falls
    assert before.loss == after.loss
    for grouping, groups in before.groups.items():
        assert [each.falls for each in groups] == [each.falls for each in after.groups[grouping]]
    assert after.horizons[0].measured.value < before.horizons[0].measured.value - 1


def test_a_loss_that_stops_to_fall_refutes_the_hazard(run):
    data = watched(run)
    at = int(np.flatnonzero(np.exp(data.x_K) <= LAST / 4)[-1])
    stopped_NK = data.loss_NK.copy()
    stopped_NK[:, at + 1 :] = data.loss_NK[:, at - 3 : at + 1].mean(axis=1, keepdims=True)
    forecaster = Forecaster(watched(run, loss_NK=stopped_NK))
    found = judge([forecaster.origin(share) for share in (0.25, 0.5)])
    standing = {each.method: each.standing for each in found}
    assert standing[Method.HAZARD] is Standing.REFUTED
    assert found[0].method is Method.NOTHING


def test_shares_add_up_to_one_and_falls_to_that_of_all_tokens(result):
    for origin in (result.now, *result.back_tests):
        assert set(origin.groups) == {
            "dataset", "frequency decile", "position decile", "label before",
        }  # fmt: skip
        for groups in origin.groups.values():
            for h, horizon in enumerate(origin.horizons):
                assert sum(each.shares[h].value for each in groups) == pytest.approx(1)
                total = sum(each.tokens * each.falls[h].value for each in groups)
                total /= sum(each.tokens for each in groups)
                assert total == pytest.approx(horizon.falls[Method.HAZARD].value, rel=1e-9)


def test_the_fall_of_a_dataset_is_per_token_of_its_own(run):
    """Of two datasets of which one is known, the other falls by more than all tokens."""
    data = watched(run)
    known_N = data.dataset_N == 1
    loss_NK = np.where(known_N[:, None], np.float32(0.1), data.loss_NK)
    test = Forecaster(watched(run, loss_NK=loss_NK)).origin(0.5)
    falling, known = test.groups["dataset"]
    (whole,) = test.horizons
    ratio = len(known_N) / (~known_N).sum()
    assert falling.falls[0].value == pytest.approx(ratio * whole.falls[Method.HAZARD].value)
    assert falling.measured[0] == pytest.approx(ratio * whole.measured.value)
    assert (falling.shares[0].value, known.shares[0].value) == (1, 0)
    assert known.falls[0].value == 0 and known.measured[0] == pytest.approx(0, abs=1e-6)


def test_each_class_has_the_slope_of_its_own_mean_loss_and_an_empty_one_none(run):
    data = watched(run)
    x_K = np.where(np.isfinite(data.x_K), data.x_K, 0.0)
    slope_C = np.array([0.2, 0.9, 0.0])
    mean_CK = 9 - slope_C[:, None] * x_K
    found_C = Forecaster(data)._slopes(data.to_x, mean_CK, np.array([5, 7, 0]))
    assert found_C == pytest.approx(slope_C, abs=1e-6)


def test_the_combination_is_the_mean_of_two_methods_and_its_interval_holds_what_they_dispute(
    result,
):
    for origin in (result.now, *result.back_tests):
        assert math.isfinite(origin.correction)
        for horizon in origin.horizons:
            both = [horizon.falls[each] for each in (Method.HAZARD, Method.POWER_LAW)]
            combined = horizon.falls[Method.COMBINATION]
            assert combined.value == pytest.approx(np.mean([each.value for each in both]))
            assert combined.low <= max(each.low for each in both)
            assert combined.high >= min(each.high for each in both)


def test_the_pooled_interval_is_that_of_the_mixture():
    """Half of the draws about 1, half about 3: 2.5% of all are 5% of one half."""
    z_R = np.random.default_rng(0).standard_normal((200_000, 1))
    one_RH, other_RH = (np.concatenate([[[mean]], mean + 0.1 * z_R]) for mean in (1.0, 3.0))
    (found,) = _estimates(_combined(one_RH, other_RH, True))
    assert found.value == 2
    reach = 0.1 * norm.ppf(0.95)
    assert (found.low, found.high) == pytest.approx((1 - reach, 3 + reach), abs=2e-3)


def test_a_hazard_without_an_earlier_forecast_is_not_corrected_and_its_interval_says_so(run):
    """A scored range that starts less than a factor of four ago has no octave to correct by."""
    late = watched(run, from_x=math.log(LAST / 3), weight_RU=watched(run).units.weights(100, 0))
    origin = Forecaster(late).origin(1.0)
    assert math.isnan(origin.correction)
    falls = origin.horizons[0].falls
    assert falls[Method.HAZARD].high > 2 * falls[Method.HAZARD].value
    assert falls[Method.HAZARD].low < falls[Method.HAZARD].value / 2
    law = falls[Method.POWER_LAW]
    assert falls[Method.COMBINATION].value == law.value


def test_the_text_says_where_a_hazard_is_not_corrected(result):
    not_corrected = replace(result.back_tests[0], correction=math.nan)
    altered = replace(result, back_tests=(not_corrected, result.back_tests[1]))
    assert "not corrected" not in describe_forecast(result)
    assert describe_forecast(altered).count("not corrected") == 1
    now = replace(result.now, correction=math.nan)
    assert describe_forecast(replace(altered, now=now)).count("not corrected") == 2


def test_a_mean_loss_that_is_a_line_keeps_its_slope(run):
    data = watched(run)
    x_K = np.where(np.isfinite(data.x_K), data.x_K, 0.0)
    line_NK = np.tile((9 - 0.7 * x_K).astype(np.float32), (len(data.loss_NK), 1))
    origin = Forecaster(watched(run, loss_NK=line_NK)).origin(1.0)
    found = [each.falls[Method.SLOPE].value for each in origin.horizons]
    assert found == pytest.approx(0.7 * np.log(FACTORS), rel=1e-4)


def test_the_file_is_read_as_it_was_written(run, result):
    found = read_forecast(run, read_fit(run))
    assert to_json(found) == json.loads(json.dumps(to_json(result)))
    assert found.best is result.judgements[0].method


def test_a_changed_file_is_refused(run, result, tmp_path):
    import shutil

    copy = Run.open(shutil.copytree(run.path, tmp_path / "copy"))
    edit(copy.paths.forecast, schema_version=99)
    with pytest.raises(TokscaleError, match="reads up to"):
        read_forecast(copy, read_fit(copy))
    copy.paths.forecast.unlink()
    assert read_forecast(copy, read_fit(copy)) is None


def test_the_text_has_the_best_method_first_and_its_error(result):
    lines = describe_forecast(result).splitlines()
    table = [line for line in lines if line.startswith("    ")]
    assert table[0].split("  ")[2].startswith(str(result.best))
    text = "\n".join(lines)
    assert "back-test from step" in text and "(T/4)" in text and "(T/2)" in text
    assert "label occurred before in its context" in text


def test_a_missing_back_test_says_from_where(result):
    tests = [(Undefined("why"), result.back_tests[1]), (result.back_tests[0], Undefined("why"))]
    for back_tests, origin in zip(tests, ("T/4", "T/2"), strict=True):
        assert f"no back-test from {origin}: why" in describe_forecast(
            replace(result, back_tests=back_tests)
        )


def test_the_heads_of_a_table_stand_apart_from_a_long_name_of_the_time(result):
    long = replace(result, fit=replace(result.fit, time_name="T (unit unknown) of an import"))
    heads = [
        line for line in describe_forecast(long).splitlines() if "by " in line and "(x2)" in line
    ]
    assert len(heads) == 3
    assert all("  by " in line for line in heads)


def test_a_method_without_a_forecast_says_why(result):
    first = result.now.horizons[0]
    falls = {**first.falls, Method.POWER_LAW: Undefined("the curve is straight")}
    now = replace(result.now, horizons=(replace(first, falls=falls), *result.now.horizons[1:]))
    assert "no power law of the mean: the curve is straight" in describe_forecast(
        replace(result, now=now)
    )


def test_a_refuted_hazard_says_so(result):
    refuted = tuple(
        replace(each, standing=Standing.REFUTED) if each.method is Method.HAZARD else each
        for each in result.judgements
    )
    text = describe_forecast(replace(result, judgements=refuted))
    assert "is refuted by its own back-test" in text
    assert "is refuted by its own back-test" not in describe_forecast(result)


def test_the_forecast_starts_where_the_learning_rate_has_half_decayed(run):
    decayed = [
        replace(record, learning_rate=record.learning_rate * (0.1 if record.step > 2600 else 1))
        for record in run.records
    ]
    decaying = replace(run, records=tuple(decayed))
    source = FittedRun.open(decaying)
    scored = scored_range_of(decaying, source.x_K, decaying.mean_losses())
    data = _watched(source, scored, 600, 4, 0)
    origin = Forecaster(data).origin(1.0)
    assert origin.time == pytest.approx(max(step for step in STEPS if step <= 2600))
    said = assumptions(decaying, scored, source)
    assert any("half its peak" in each for each in said)
    assert len(assumptions(run, scored_range_of(run, source.x_K, run.mean_losses()), source)) == 1


def test_few_tokens_have_no_hazard_and_keep_the_power_law(run):
    origin = Forecaster(_watched_few(run)).origin(1.0)
    for method in (Method.HAZARD, Method.COMBINATION):
        assert isinstance(origin.horizons[0].falls[method], Undefined)
    assert origin.horizons[0].falls[Method.POWER_LAW].value > 0
    assert math.isnan(origin.learned) and origin.groups == {}


def _watched_few(run):
    source = FittedRun.open(run)
    scored = scored_range_of(run, source.x_K, run.mean_losses())
    return _watched(source, scored, 60, 4, 0)


def test_an_imported_run_without_columns_is_forecast(tmp_path, capsys):
    loss_NK = planted()[0][:1000, 1:]
    np.save(tmp_path / "losses.npy", loss_NK.astype(np.float32))
    values = ",".join(map(str, STEPS[1:]))
    run = str(tmp_path / "run")
    main(["import", str(tmp_path / "losses.npy"), "--out", run, "--axis", "T", "--values", values])
    main(["fit", run])
    main(["forecast", run, "--resamples", "10"])
    shown = capsys.readouterr().out
    assert "missing: labels are not known" in shown
    assert "missing: there is no text" in shown
    assert "assumed: the learning rates are not known" in shown
    assert "back-test from" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--tokens", "0"], "--tokens"),
        (["{run}", "--resamples", "1"], "--resamples"),
        (["{none}"], "no run in"),
        (["{unfitted}"], "fit.json is not there"),
    ],
)
def test_wrong_input_ends_with_one_line(run, tmp_path, capsys, words, message):
    write_run(tmp_path / "unfitted", STEPS[:12], planted()[0][:16, :12])
    places = {"run": run.path, "none": tmp_path, "unfitted": tmp_path / "unfitted"}
    with pytest.raises(SystemExit) as end:
        main(["forecast", *(word.format(**places) for word in words)])
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("megatron-tokscale: ") and message in line
    assert not (tmp_path / "unfitted/analysis").exists()


def test_too_few_probes_end_with_one_line_and_write_nothing(tmp_path, capsys):
    short = write_run(tmp_path / "short", STEPS[:7], planted()[0][:200, :7])
    fit_run(short)
    with pytest.raises(SystemExit) as end:
        main(["forecast", str(short.path)])
    assert end.value.code == 2
    assert "too few for a forecast" in capsys.readouterr().err
    assert not short.paths.forecast.exists()
