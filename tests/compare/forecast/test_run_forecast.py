"""`forecast_run` on a planted run whose later falls are known. N tokens, K probes, H horizons."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from analyses import edit
from runs import log_time, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.cli import main
from megatron_tokscale.compare.forecast import describe_forecast, forecast_run
from megatron_tokscale.compare.forecast.origin import Forecaster
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
    from megatron_tokscale.compare.forecast.judge import judge

    forecaster = Forecaster(watched(run, loss_NK=stopped_NK))
    found = judge([forecaster.origin(share) for share in (0.25, 0.5)])
    standing = {each.method: each.standing for each in found}
    assert standing[Method.HAZARD] is Standing.REFUTED
    assert found[0].method is Method.NOTHING


def test_groups_add_up_to_the_fall_of_all_tokens(result):
    for origin in (result.now, *result.back_tests):
        assert set(origin.groups) == {
            "dataset", "frequency decile", "position decile", "label before",
        }  # fmt: skip
        for groups in origin.groups.values():
            for h, horizon in enumerate(origin.horizons):
                total = sum(each.falls[h].value for each in groups)
                assert total == pytest.approx(horizon.falls[Method.HAZARD].value, rel=1e-9)


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
    assert isinstance(origin.horizons[0].falls[Method.HAZARD], Undefined)
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
