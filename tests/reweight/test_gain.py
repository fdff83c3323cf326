"""The gain of a plan at most, against sums over documents and simulated t tests."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from scored import SEQ_LENGTH, cut_documents, job_over

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan
from megatron_tokscale.data.scores import Reliability
from megatron_tokscale.results.gain import Gain, TargetShift, gain_in, with_gain
from megatron_tokscale.reweight import (
    ByFall,
    ByTarget,
    GainSettings,
    PlanOptions,
    describe_plan,
    gain_of,
    make_plan,
    plan_by_scores,
    seeds_needed,
)
from megatron_tokscale.reweight.gain import reference_cost
from megatron_tokscale.reweight.gain_text import describe_gain

rng = np.random.default_rng(5)
N = 3000
LENGTHS = rng.integers(100, 500, N)
FALLS = [rng.gamma(4, 0.1, N).astype(np.float32), rng.gamma(1.5, 0.2, N).astype(np.float32)]
RELIABILITY = [Reliability(0.8, 0.4, 0.4, 0.04, 900), Reliability(0.6, 0.2, 0.3, 0.05, 900)]
WATCHED = np.where(np.arange(N) < 600, 128, 0)


def datasets_of(falls=FALLS, reliability=RELIABILITY, **details):
    details = {"reference_parameters": 1_000_000, "reference_tokens": 2_000_000} | details
    return [
        cut_documents(
            name,
            LENGTHS,
            fall=fall,
            watched=WATCHED,
            reliability={} if own is None else {"fall": own},
            **details,
        )
        for name, fall, own in zip(("web", "code"), falls, reliability, strict=True)
    ]


DATASETS = datasets_of()


def job_of(datasets=DATASETS):
    return job_over(datasets, (3.0, 1.0), 10_000, documents=[(0, N)] * len(datasets))


PLAN = make_plan(job_of(), ByFall(DATASETS))
GAIN = gain_of(PLAN, DATASETS)


def covariance_by_hand(plan):
    """Over all documents, each with the mean relative weight of its stratum and its own fall."""
    mean_Z = sum(
        plan.weight_Z(segment) * (stop - start) for start, stop, segment in plan.intervals(10_000)
    )
    share, omega, fall = [], [], []
    for d, base in enumerate((0.75, 0.25)):
        stratum = np.searchsorted(DATASETS[d].cut.edges, FALLS[d], side="right")
        base_Z = base * np.array(DATASETS[d].shares)
        relative_Z = mean_Z[16 * d : 16 * d + 16] / 10_000 / base_Z
        share.append(base * LENGTHS / LENGTHS.sum())
        omega.append(relative_Z[stratum])
        fall.append(FALLS[d].astype(float))
    share, omega, fall = (np.concatenate(each) for each in (share, omega, fall))
    relative = fall / (share @ fall)
    return share @ (omega * relative) - (share @ omega) * (share @ relative)


def test_the_first_order_is_the_covariance_over_the_documents_of_the_pool():
    assert GAIN.covariance == pytest.approx(covariance_by_hand(PLAN), rel=1e-6)
    assert 0.05 < GAIN.covariance < 0.5
    assert GAIN.at_most == pytest.approx(1 - np.exp(-GAIN.covariance))


def test_weights_in_proportion_to_falls_gain_their_variance():
    """omega = lambda: S = CV² of the strata, but for the first twentieth of the training."""
    loose = replace(PLAN, replanning=replace(PLAN.replanning, train_samples=10**9))
    base_Z = 0.75 * np.array(DATASETS[0].shares), 0.25 * np.array(DATASETS[1].shares)
    base_Z = np.concatenate(base_Z)
    fall_Z = np.concatenate([dataset.fall_Z for dataset in DATASETS])
    relative_Z = fall_Z / (base_Z @ fall_Z)
    stage = replace(loose.stages[0], weights=(1.0, 1.0), within=tuple(base_Z * relative_Z))
    weights = np.bincount(loose.dataset_Z, base_Z * relative_Z)
    plan = replace(loose, stages=(replace(stage, weights=tuple(weights)),))
    gain = gain_of(plan, DATASETS)
    assert gain.covariance == pytest.approx(base_Z @ (relative_Z - 1) ** 2, rel=1e-6)


def test_base_weights_gain_nothing(tmp_path):
    uniform = plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "u", PlanOptions("uniform"))
    gain = gain_in(uniform, Gain)
    assert gain.covariance == pytest.approx(0, abs=1e-12)
    assert (gain.seeds, gain.advice) == (None, [])


def test_the_spread_is_that_within_datasets_and_between_their_means():
    mean = 0.75 * 0.4 + 0.25 * 0.3
    variance = 0.75 * (0.04 + (0.4 - mean) ** 2) + 0.25 * (0.05 + (0.3 - mean) ** 2)
    assert GAIN.spread == pytest.approx(variance / mean**2)


def test_reliability_is_weighted_by_tokens():
    own = LENGTHS[:600].sum() / LENGTHS.sum()
    watched, predicted = 0.75 * 0.8 + 0.25 * 0.6, 0.75 * 0.4 + 0.25 * 0.2
    found = GAIN.scores
    assert (found.watched, found.predicted) == (pytest.approx(watched), pytest.approx(predicted))
    assert found.reliability == pytest.approx(own * watched + (1 - own) * predicted)


def test_what_the_scores_do_not_tell_is_said():
    datasets = datasets_of(reliability=[RELIABILITY[0], None], reference_parameters=None)
    gain = gain_of(PLAN, datasets)
    assert (gain.spread, gain.scores.watched, gain.scores.reliability, gain.kept) == (None,) * 4
    assert gain.scores.cost is None
    assert gain.covariance == pytest.approx(GAIN.covariance)
    text = "\n".join(describe_gain(with_gain(PLAN, gain)))
    assert "spread of falls     unknown" in text and "cost    unknown" in text
    assert "reliability" not in text
    predicted_unknown = replace(RELIABILITY[1], predicted=None)
    gain = gain_of(PLAN, datasets_of(reliability=[RELIABILITY[0], predicted_unknown]))
    assert gain.scores.watched is not None and gain.scores.reliability is None


def test_without_falls_there_is_no_gain_to_state():
    target = [
        cut_documents(name, LENGTHS, "target", target=FALLS[0], watched=WATCHED)
        for name in ("web", "code")
    ]
    assert gain_of(PLAN, target) is None


@pytest.mark.parametrize(("probes", "passes"), [(None, 2), (2, 2), (17, 17)])
def test_the_reference_costs_its_training_and_a_forward_pass_for_each_probe(probes, passes):
    """A training takes 6 N D FLOPs, a forward pass 2 N D."""
    training = 6 * 2e6 * 10_000 * SEQ_LENGTH
    expected = (6 * 1e6 * 2e6 + passes * 2 * 1e6 * 2 * WATCHED.sum()) / training
    datasets = datasets_of(probes=probes)
    given = gain_of(PLAN, datasets, GainSettings(parameters=2_000_000)).scores
    assert given.cost == pytest.approx(expected)
    assert not given.is_reference_size
    own = gain_of(PLAN, datasets).scores
    assert own.cost == pytest.approx(2 * expected)
    assert own.is_reference_size and own.parameters == 1_000_000
    assert reference_cost(20, 1000, 1, 0, 1000, 2) == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    ("sd", "gain", "seeds"), [(2.2, 5, 4), (2.2, 2, 12), (3.5, 5, 6), (5.4, 5, 12), (5.4, 2, 60)]
)
def test_the_number_of_seeds_is_that_of_power_tables(sd, gain, seeds):
    """Numbers of an independent calculation (G*Power's a priori analysis gives the same)."""
    assert abs(seeds_needed(gain, sd) - seeds) <= 1


def test_so_many_seeds_see_the_gain_four_times_in_five():
    draw = np.random.default_rng(0)
    n = seeds_needed(2.0, 2.2)
    for seeds, least, most in ((n, 0.78, 1), (n - 1, 0, 0.82)):
        found = draw.normal(2.0, 2.2, (20_000, seeds))
        assert least < (ttest_1samp(found, 0, axis=1).pvalue < 0.05).mean() < most


def test_no_gain_needs_no_seeds():
    assert seeds_needed(0) is None
    assert seeds_needed(-1) is None
    assert seeds_needed(1e-3) is None
    assert seeds_needed(100) == 2


def test_a_plan_that_costs_more_than_it_gains_is_advised_against():
    dear = gain_of(PLAN, DATASETS, GainSettings(parameters=10))
    assert "and its reference costs" in dear.advice[0]
    cheap = gain_of(PLAN, DATASETS, GainSettings(parameters=10**9))
    assert cheap.advice == []
    alike = [replace(each, signal_variance=0.001) for each in RELIABILITY]
    low = gain_of(PLAN, datasets_of(reliability=alike), GainSettings(parameters=10**9))
    assert "differ little" in low.advice[0]


def test_the_plan_keeps_and_shows_its_gain(tmp_path):
    options = PlanOptions(gain=GainSettings(parameters=10**9, sd_points=3.0))
    plan = plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "plan.json", options)
    assert plan.fingerprint == PLAN.fingerprint
    found = gain_in(Plan.load(tmp_path / "plan.json"), Gain)
    assert found == gain_of(plan, DATASETS, options.gain)
    text = describe_plan(plan)
    assert f"at most {found.at_most:.1%}" in text
    assert f"CV² {found.spread:.3f}" in text
    assert "sd of 3 points between seeds" in text
    assert "of a training of 1,000,000,000 parameters" in text
    assert "advice" not in text
    assert max(map(len, text.splitlines())) <= 100
    dear = describe_plan(plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "dear.json"))
    assert "advice: do not train this plan:" in dear and "own size; give --parameters" in dear
    assert max(map(len, dear.splitlines())) <= 100


def test_a_plan_by_target_scores_says_how_far_it_moves_them_and_no_gain(tmp_path):
    """Top quarter: by hand over documents, each with the mean relative weight of its stratum."""
    draw = np.random.default_rng(6)
    score = draw.normal(0.05, 0.2, N).astype(np.float32)
    dataset = cut_documents(
        "web",
        LENGTHS,
        "target",
        target=score,
        fall=FALLS[0],
        watched=WATCHED,
        reliability={"fall": RELIABILITY[1], "target": RELIABILITY[0]},
        reference_parameters=1_000_000,
        reference_tokens=2_000_000,
        probes=3,
    )
    job = job_over([dataset], (1.0,), 10_000, documents=[(0, N)])
    plan = plan_by_scores(ByTarget([dataset]), job, tmp_path / "plan.json")
    assert gain_in(plan, Gain) is None
    shift = gain_in(Plan.load(tmp_path / "plan.json"), TargetShift)
    stratum = np.searchsorted(dataset.cut.edges, score, side="right")
    drawn = np.bincount(stratum, LENGTHS)
    relative = plan.target_Z(10_000) / 10_000 / (drawn / drawn.sum())
    assert shift.pool == pytest.approx(np.average(score, weights=LENGTHS), rel=1e-6)
    assert shift.plan == pytest.approx(
        np.average(score, weights=LENGTHS * relative[stratum]), rel=1e-6
    )
    assert shift.plan > shift.pool + 0.1
    assert shift.scores.watched == 0.8
    spent = 6 * 1e6 * 2e6 + 3 * 2 * 1e6 * WATCHED.sum()
    assert shift.scores.cost == pytest.approx(spent / (6 * 1e6 * 10_000 * SEQ_LENGTH))
    text = describe_plan(plan)
    assert "gain on the target  not estimated" in text
    assert f"{shift.plan:.3g} nats per token, {shift.pool:.3g} in the pool" in text
    assert "cost before tuning  " in text and "of its own size; give --parameters" in text
    assert "at most" not in text and "advice" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_edited_gain_is_no_error():
    edited = replace(PLAN, provenance=replace(PLAN.provenance, settings={"gain": {"spread": 1}}))
    assert gain_in(edited, Gain) is None
    assert "what it can gain" not in describe_plan(edited)


@pytest.mark.parametrize("change", [{"parameters": 0}, {"sd_points": 0.0}, {"sd_points": 101.0}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(TokscaleError, match=r"(parameters|seeds) is .*; expected .*; give another"):
        GainSettings(**change)
