"""`laws_run` on planted runs, fitted and with their spectra. N tokens, K probe steps."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from analyses import edit, edit_identity, replace_arrays
from runs import log_time, plain_probe_set, probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, sealed, write_json
from megatron_tokscale.core.records import to_json
from megatron_tokscale.fit import fit_run
from megatron_tokscale.laws import describe_laws, fit_power_law, laws_run
from megatron_tokscale.laws.power_law.power_law import measure_power_law
from megatron_tokscale.laws.power_law.tail import compare_tail
from megatron_tokscale.laws.several_runs import several_runs
from megatron_tokscale.results import read_laws
from megatron_tokscale.results.estimate import Estimate, Undefined
from megatron_tokscale.results.fitted import read_fit
from megatron_tokscale.results.laws import TailExponent
from megatron_tokscale.results.verdict import Verdict
from megatron_tokscale.spectrum import spectrum_run
from megatron_tokscale.store import Run

STEPS = probe_steps(45, last=5000)
EXPONENT, FLOOR, N_TOKENS = 0.5, 2.0, 2400
N_RESAMPLES = 50


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose learning times follow a power law from step 10 to far beyond its end."""
    rng = np.random.default_rng(0)
    midpoint_N = np.log(10) + rng.exponential(1 / EXPONENT, N_TOKENS)
    drop_N = rng.uniform(2, 6, N_TOKENS)
    mean_NK = drop_N[:, None] * expit((midpoint_N[:, None] - log_time(STEPS)) / 0.15)
    noise_NK = 0.05 * rng.standard_normal(mean_NK.shape)
    run = write_run(tmp_path_factory.mktemp("laws") / "run", STEPS, FLOOR + mean_NK + noise_NK)
    fit_run(run)
    spectrum_run(run, null_tokens=200, n_resamples=N_RESAMPLES, seed=0)
    return run


@pytest.fixture(scope="module")
def result(run):
    return laws_run(run, n_resamples=N_RESAMPLES)


def altered(run, tmp_path, **arrays):
    """Return a copy of the run with other arrays in its spectrum."""
    copy = Run.open(shutil.copytree(run.path, tmp_path / "copy"))
    copy.paths.laws.unlink(missing_ok=True)
    replace_arrays(copy, **arrays)
    return copy


def test_the_file_holds_the_returned_result(run, result):
    content = json.loads(run.paths.laws.read_text())
    for name in ("schema_version", "version", "checksum"):
        del content[name]
    assert content == json.loads(json.dumps(to_json(result)))


def test_the_file_is_read_as_it_was_written(run, result):
    found = read_laws(run, read_fit(run))
    assert to_json(found) == json.loads(json.dumps(to_json(result)))


def test_the_planted_exponent_is_in_every_interval(result):
    for exponent in (result.overall.exponent_documents, result.tail.exponent):
        assert exponent.low < EXPONENT < exponent.high
    difference = result.tail_minus_law.difference
    assert difference.low < 0 < difference.high


def test_the_tail_of_other_times_does_not_agree_with_the_loss(run, tmp_path):
    """Mirror the drops of the spectrum in x: late learning, which the loss does not show."""
    with np.load(run.paths.spectrum_arrays) as file:
        mirrored_RC = file["drop_RC"][:, ::-1]
    result = laws_run(altered(run, tmp_path, drop_RC=mirrored_RC), n_resamples=10)
    assert result.tail_minus_law.test.verdict is Verdict.FAILS


def test_the_tail_is_a_decade_long_and_a_shorter_one_is_refused(run, result):
    assert result.tail.to_x - result.tail.from_x == pytest.approx(np.log(10), abs=0.02)
    assert result.tail_minus_law.law.law.from_time >= np.exp(result.tail.from_x)
    short = laws_run(run, from_=STEPS[-1] / 5, n_resamples=2)
    assert "expected 1 or more" in short.tail.undefined
    (row,) = (row for row in short.explanations if row.explanation == "learning-time spectrum")
    assert row.verdict is Verdict.UNDECIDED and "decades" in row.measured


def test_undefined_laws_say_why(run, tmp_path):
    rows = 1 + N_RESAMPLES
    rising_RK = np.tile(np.sqrt(np.maximum(STEPS, 0.5)), (rows, 1))
    drop_RC = np.zeros((rows, 2048), np.float32)
    copy = altered(run, tmp_path, mean_loss_RK=rising_RK, drop_RC=drop_RC)
    result = laws_run(copy, n_resamples=2)
    assert "does not fall" in result.overall.undefined
    assert "no tail" in result.tail.undefined
    assert isinstance(result.tail_minus_law, Undefined)
    assert "does not fall" in describe_laws(result)


def test_the_start_of_the_fit_can_be_chosen(run):
    result = laws_run(run, from_=50, n_resamples=2)
    with np.load(run.paths.spectrum_arrays) as file:
        mean_K = file["mean_loss_K"]
    by_hand = fit_power_law(STEPS, mean_K, from_=50, n_resamples=2)
    law = result.overall.law
    assert law.from_time == pytest.approx(STEPS[STEPS >= 50][0])
    assert law.exponent.value == pytest.approx(by_hand.exponent.value, rel=1e-4)
    assert result.settings.start == 50


def test_groups_with_own_times_and_with_one_slope_get_their_verdicts(run, tmp_path, result):
    """Plant frequency groups that drop one after the other, and groups of one power law."""
    assert isinstance(result.one_third.frequency_groups, Undefined)  # every token occurs once
    x_K = log_time(STEPS)
    drops_FK = np.stack([2 + 3 * expit((c - x_K) / 0.3) for c in np.linspace(4.5, 8, 6)])
    slopes_FK = np.stack([2 + s * np.maximum(STEPS, 1) ** (-1 / 3) for s in range(3, 9)])
    share_F = np.full(6, 1 / 6)
    rng = np.random.default_rng(1)
    verdicts = []
    for number, loss_FK in enumerate((drops_FK, slopes_FK)):
        noisy_RFK = loss_FK * (1 + 0.002 * rng.standard_normal((5, *loss_FK.shape)))
        copy = altered(
            run, tmp_path / str(number), frequency_loss_RFK=noisy_RFK, frequency_share_F=share_F
        )
        found = laws_run(copy, n_resamples=2).one_third.frequency_groups
        verdicts.append(found.test.verdict)
    assert verdicts == [Verdict.FAILS, Verdict.HOLDS]


def test_bins_of_frequency_with_few_events_hardly_move_the_exponent_of_learning_times(
    run, tmp_path
):
    frequency_I = np.geomspace(1e-3, 1e-1, 12)
    few_I = np.arange(12) < 2
    copy = altered(
        run,
        tmp_path,
        frequency_I=frequency_I,
        frequency_time_I=np.where(few_I, 3, 1) / frequency_I,
        frequency_events_I=np.where(few_I, 1, 10_000),
    )
    found = laws_run(copy, n_resamples=2).quanta.frequency
    assert found.b.value == pytest.approx(1, abs=0.01)


def test_the_table_has_every_explanation(result):
    names = {row.explanation for row in result.explanations}
    assert names == {
        *("learning-time spectrum", "one-third law (softmax)", "quantization model"),
        *("statistics of the language", "loss deceleration"),
    }
    text = describe_laws(result)
    for row in result.explanations:
        assert row.claim in text
        assert row.measured in text
        assert row.verdict in Verdict
        assert np.isnan(row.p_value) or 0 <= row.p_value <= 1


def test_zero_sum_figures_are_those_of_a_loop(run, result):
    loss_NK = run.read_losses().astype(float)
    pairs = result.zero_sum.pairs
    steps = run.step_K.tolist()
    for pair in (pairs[0], pairs[-1]):
        before, after = (steps.index(int(step)) for step in (pair.from_step, pair.to_step))
        move_N = loss_NK[:, after] - loss_NK[:, before]
        assert pair.movement.value == pytest.approx(np.abs(move_N).mean(), rel=1e-6)
        assert pair.interference.value == pytest.approx(
            1 - abs(move_N.sum()) / np.abs(move_N).sum(), rel=1e-6
        )


def size(run, parameters):
    info = read_json(run.path / "tokscale/run.json")
    about = {"parameters": parameters, "non_embedding": parameters, "flops_per_token": 6}
    write_json(run.path / "tokscale/run.json", sealed(info | {"size": about}))
    return type(run).open(run.path)


def test_chinchilla_is_fitted_over_runs(tmp_path):
    """Twelve runs whose last losses are planted: N in the parameters, D in the last step."""
    runs = []
    for n in (1e6, 4e6, 16e6, 64e6):
        for last in (100, 400, 1600):
            steps = np.array([0, last // 4, last])
            tokens = last * 4 * 8  # as tests/support/runs.py counts them
            final = 1.5 + 400 * n**-0.35 + 60 * tokens**-0.4
            loss_NK = np.tile([9.0, final + 1, final], (16, 1))
            run = write_run(tmp_path / f"{n:.0f}-{last}", steps, loss_NK)
            runs.append(size(run, int(n)))
    found = several_runs(runs, n_resamples=5, seed=0)
    law = found.chinchilla
    assert (law.alpha.value, law.beta.value) == pytest.approx((0.35, 0.4), abs=0.01)
    assert law.floor.value == pytest.approx(1.5, abs=0.05)
    assert [row.tokens for row in found.runs[:3]] == [3200, 12_800, 51_200]
    assert isinstance(found.multi_power, Undefined)
    forecast = found.chinchilla_forecast
    assert forecast.names == tuple(f"64000000-{last}" for last in (100, 400, 1600))
    assert forecast.law.n_runs == 9
    assert forecast.predicted_S == pytest.approx(forecast.loss_S, rel=1e-3)
    assert forecast.test.verdict is Verdict.HOLDS


def test_runs_that_watch_other_tokens_are_refused(run, tmp_path):
    other = write_run(tmp_path / "other", [0, 5], np.ones((16, 2)))
    with pytest.raises(TokscaleError, match="watches other tokens"):
        several_runs([run, other], n_resamples=2, seed=0)


def test_runs_of_unknown_size_have_no_chinchilla_law(run):
    found = several_runs([run, run], n_resamples=2, seed=0)
    assert "is not known" in found.chinchilla.undefined


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "run `megatron-tokscale spectrum .*` first"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is damaged"),
    ],
)
def test_a_spectrum_that_is_not_there_or_damaged_is_refused(run, tmp_path, spoil, message):
    copy = altered(run, tmp_path)
    spoil(copy.paths.spectrum_arrays)
    with pytest.raises(TokscaleError, match=message):
        laws_run(copy)
    assert not copy.paths.laws.exists()


def test_a_spectrum_of_other_probes_or_of_an_older_version_is_refused(run, tmp_path):
    copy = altered(run, tmp_path / "a")
    edit_identity(copy.paths.spectrum, "fit", steps=(STEPS + 1).tolist())
    with pytest.raises(TokscaleError, match="of other probes"):
        laws_run(copy)
    copy = altered(run, tmp_path / "b")
    edit(copy.paths.spectrum, schema_version=1)
    with pytest.raises(TokscaleError, match="of an older schema"):
        laws_run(copy)


@pytest.mark.parametrize("documents", [1, 3])
def test_laws_of_few_documents_have_no_intervals_over_documents(run, tmp_path, documents):
    probe_set = plain_probe_set(N_TOKENS)
    probe_set.dataset_BS[:] = 0
    probe_set.document_BS[:] = np.arange(len(probe_set.document_BS))[:, None] % documents
    one = write_run(tmp_path / "one", STEPS, run.read_losses(), probe_set)
    fit_run(one)
    spectrum_run(one, null_tokens=200, n_resamples=20, seed=0)
    result = laws_run(one, n_resamples=10)
    assert not result.overall.exponent_documents.has_interval
    assert not result.tail.exponent.has_interval
    assert "without resamples" in result.tail_minus_law.undefined
    assert "all tokens" in describe_laws(result)


def test_the_corpus_gives_the_correlations_of_its_tokens(run, corpus):
    """The table shows beta of a Markov chain's text, or the reason why beta is undefined."""
    result = laws_run(run, corpus=corpus.data_path, n_resamples=2)
    beta = result.cagnetta.beta
    reason = beta.undefined if isinstance(beta, Undefined) else ""
    assert "were not given" not in reason
    (row,) = (row for row in result.explanations if row.explanation == "statistics of the language")
    assert (reason or "beta") in row.measured


def test_a_corpus_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(TokscaleError, match="nowhere"):
        laws_run(run, corpus=[str(tmp_path / "nowhere")])


def test_a_resample_without_a_loss_keeps_its_place():
    """Exponents are paired by resample: a missing exponent must not move the later ones."""
    t_K = np.geomspace(1, 1000, 40)
    exponents = (0.5, 0.45, np.nan, 0.55, 0.6)
    loss_RK = np.stack([2 + 5 * t_K**-a for a in exponents])
    law = measure_power_law(t_K, loss_RK, 10.0, 2, 0)
    assert np.isnan(law.exponent_R[2])
    np.testing.assert_allclose(law.exponent_R, exponents, atol=2e-3)
    tail_R = (0.4, 0.5, 0.9, 0.3, 0.7)
    tail = TailExponent(Estimate(0.4), tail_R, from_x=0.0, to_x=1.0, share=1.0)
    exact = replace(law, law=replace(law.law, exponent_se=0.0))
    both = compare_tail(tail, exact)
    paired = np.subtract(tail_R, exponents)[[1, 3, 4]]
    assert both.se == pytest.approx(paired.std(ddof=1), abs=5e-3)
    assert both.difference.value == pytest.approx(-0.1, abs=2e-3)
