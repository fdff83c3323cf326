import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.stats import norm
from scored import RANGE, SEQ_LENGTH, cut, job_over, run_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan
from megatron_tokscale.reweight import (
    CutSettings,
    EasyFirst,
    Frontier,
    Guards,
    PlanOptions,
    make_plan,
    plan_by_scores,
    time_map_of,
)
from megatron_tokscale.reweight.policy import policy_stages
from megatron_tokscale.reweight.time_map import ByRank, LearnedByTime, SameTokens

rng = np.random.default_rng(1)
TIMES = rng.normal(12, 1, 400), rng.normal(13, 0.5, 300)
DROPS = rng.uniform(0.5, 3, 400), rng.uniform(0.5, 3, 300)
UNLEARNED = np.where(np.arange(300) % 4 == 0, 0.95, 0.1)
TRAIN_SAMPLES = 20_000
LOOSE = Guards(floor=1e-6, max_change=1e6, max_epochs=None)


def two_datasets(shift=0.0, **details):
    """Web is learned around e^12 tokens, code around e^13, and a quarter of it never."""
    web = cut("web", TIMES[0] + shift, lengths=[640] * 400, drop=DROPS[0], **details)
    code = cut(
        *("code", TIMES[1] + shift),
        lengths=[640] * 300,
        drop=np.where(UNLEARNED > 0.5, 0.05, DROPS[1]),
        unlearned=UNLEARNED,
        **details,
    )
    return [web, code]


DATASETS = two_datasets()
BY_FREQUENCY = two_datasets(settings=CutSettings(4, by="frequency"))


def job_of(datasets=DATASETS, **changes):
    job = job_over(datasets, (0.6, 0.4)[: len(datasets)], TRAIN_SAMPLES)
    return replace(job, **changes)


def plan_frontier(datasets, job, out, options=None, time_map=None, **settings):
    time_map = time_map_of(datasets, job, time_map)
    policy = Frontier(datasets, time_map, job.seq_length, **settings)
    return plan_by_scores(policy, job, out, options)


def weights_of(plan: Plan):
    return np.array([plan.weight_Z(stage) for stage in plan.segments])


def learnability_by_hand(samples, x0, x1):
    """Sample by sample, with scipy's normal distribution."""
    total = 0.0
    for time, spread, drop in zip(samples.time_N, samples.spread_N, samples.drop_N, strict=True):
        total += drop * (norm.cdf(x1, time, spread) - norm.cdf(x0, time, spread))
    return total / len(samples.time_N)


def test_one_stage_against_a_loop_over_samples():
    first, window = 2000, 3.0
    policy = Frontier(DATASETS, SameTokens(RANGE[1]), SEQ_LENGTH, window, 0.5, 2, first)
    weights_Z = weights_of(make_plan(job_of(), policy, LOOSE))[1]
    x0 = math.log(first * SEQ_LENGTH)
    at = 0
    for share, dataset in zip((0.6, 0.4), DATASETS, strict=True):
        found = [learnability_by_hand(s, x0, x0 + math.log(window)) for s in dataset.learning_Z]
        tilted = [s * math.sqrt(f) for s, f in zip(dataset.shares, found, strict=True)]
        expected = [share * t / sum(tilted) for t in tilted]
        np.testing.assert_allclose(weights_Z[at : at + len(expected)], expected, rtol=1e-4)
        at += len(expected)


def test_the_frontier_goes_from_the_first_quantile_to_the_last(tmp_path):
    options = PlanOptions(guards=Guards(max_epochs=None))
    plan = plan_frontier(DATASETS, job_of(), tmp_path / "plan.json", options, n_stages=60)
    names = [stratum.name for stratum in plan.strata]
    assert names == [f"web/q{q}" for q in (1, 2, 3, 4)] + [
        *(f"code/q{q}" for q in (1, 2, 3, 4)),
        "code/unlearned",
    ]
    favour_TZ = weights_of(plan) / (job_of().base_D[plan.dataset_Z] * plan.share_Z)
    favoured = [names[z] for z in favour_TZ[:, :4].argmax(axis=1)]
    assert favoured == sorted(favoured)
    assert {"web/q1", "web/q4"} <= set(favoured)
    assert favour_TZ[20:, -1].max() < 0.35  # never learned: near the floor of 0.25


def test_shares_of_datasets_are_kept_to_the_last_bit(tmp_path):
    plan = plan_frontier(DATASETS, job_of(), tmp_path / "plan.json")
    assert len(plan.segments) > 10
    assert {segment.weights for segment in plan.segments} == {(0.6, 0.4)}


def test_before_the_first_stage_shares_hold(tmp_path):
    plan = plan_frontier(DATASETS, job_of(), tmp_path / "plan.json", first=500)
    assert plan.segments[1].start == 500
    base_Z = job_of().base_D[plan.dataset_Z] * plan.share_Z
    np.testing.assert_allclose(plan.weight_Z(plan.segments[0]), base_Z)


def test_beyond_the_end_of_the_reference_the_last_weights_hold():
    """A window of 4 is half seen until the end over 2."""
    end = math.log(8000 * SEQ_LENGTH)
    policy = Frontier(DATASETS, SameTokens(end), SEQ_LENGTH, n_stages=80)
    plan = make_plan(job_of(), policy, LOOSE)
    assert 3500 < plan.segments[-1].start <= 4000


def test_where_nothing_is_learned_shares_hold():
    nothing = cut("web", np.full(400, np.nan), spread=np.nan, drop=0.0)
    job = job_of([nothing])
    plan = make_plan(job, Frontier([nothing], SameTokens(RANGE[1]), SEQ_LENGTH), LOOSE)
    np.testing.assert_allclose(weights_of(plan), np.full((len(plan.segments), 4), 0.25))


def test_strength_zero_keeps_the_shares():
    policy = Frontier(DATASETS, SameTokens(RANGE[1]), SEQ_LENGTH, strength=0)
    weights_TZ = weights_of(make_plan(job_of(), policy))
    np.testing.assert_allclose(weights_TZ, np.broadcast_to(weights_TZ[0], weights_TZ.shape))


def test_shares_move_with_the_mean_learnability_of_their_strata():
    first = 2000
    policy = Frontier(
        DATASETS, SameTokens(RANGE[1]), SEQ_LENGTH, n_stages=2, first=first, move_shares=True
    )
    plan = make_plan(job_of(), policy, LOOSE)
    x0 = math.log(first * SEQ_LENGTH)
    means = [
        sum(
            share * learnability_by_hand(samples, x0, x0 + math.log(4))
            for share, samples in zip(dataset.shares, dataset.learning_Z, strict=True)
        )
        for dataset in DATASETS
    ]
    expected = np.array([0.6, 0.4]) * means
    np.testing.assert_allclose(plan.segments[1].weights, expected / expected.sum(), rtol=1e-4)


def test_every_stratum_keeps_within_the_guards(tmp_path):
    guards = Guards(floor=0.4, max_change=1.3, max_epochs=3.0)
    job = job_of(train_samples=12_000, epoch_samples=[4000, 3000])
    for name, control, options in (
        ("a", None, {}),
        ("b", None, {"move_shares": True}),
        ("c", "easy-first", {}),
        ("p", "permuted", {}),
    ):
        plan = plan_frontier(
            DATASETS, job, tmp_path / name, PlanOptions(control, guards), **options
        )
        weights_TZ = weights_of(plan)
        base_Z = job.base_D[plan.dataset_Z] * plan.share_Z
        assert (weights_TZ >= 0.4 * base_Z - 1e-12).all()
        ratio = weights_TZ[1:] / weights_TZ[:-1]
        assert 1 / 1.3 - 1e-9 <= ratio.min() < ratio.max() <= 1.3 + 1e-9
        draws_Z = plan.target_Z(job.train_samples)
        assert (draws_Z / plan.sizes_Z([4000, 3000])).max() <= 3 + 1e-9
        assert plan.max_epochs == 3.0
    tight = replace(guards, max_epochs=1.81)
    plan = plan_frontier(DATASETS, job, tmp_path / "d", PlanOptions(guards=tight))
    epochs_Z = plan.target_Z(job.train_samples) / plan.sizes_Z([4000, 3000])
    assert epochs_Z.max() == pytest.approx(1.81, abs=1e-3)


def test_a_stratum_that_base_weights_repeat_too_often_is_refused(tmp_path):
    job = job_of(epoch_samples=[500, 3000])
    with pytest.raises(TokscaleError, match="stratum 'web/q1' would be repeated for 24 epochs"):
        plan_frontier(DATASETS, job, tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_a_plan_says_all_that_is_needed_to_make_it_again(tmp_path):
    plan = plan_frontier(DATASETS, job_of(), tmp_path / "plan.json", window=3, strength=2)
    assert Plan.load(tmp_path / "plan.json") == plan
    about = plan.provenance
    assert about.sources.scores == {"web": DATASETS[0].scores, "code": DATASETS[1].scores}
    assert about.sources.reference == "reference"
    assert (about.policy, about.control, about.settings["window"]) == ("frontier", None, 3)
    assert about.settings["cutting"] == asdict(CutSettings(4))
    how = plan.replanning
    assert (how.floor, how.max_change, plan.max_epochs) == (0.25, 1.5, 4.0)
    assert how.epoch_samples == tuple(dataset.n_samples for dataset in DATASETS)
    assert how.base_weights == tuple(job_of().base_weights)
    assert (how.train_samples, how.strength) == (TRAIN_SAMPLES, 2.0)


def test_scores_of_several_reference_runs_do_not_compare(tmp_path):
    datasets = [DATASETS[0], two_datasets(run_id="other")[1]]
    with pytest.raises(TokscaleError, match="several reference runs"):
        plan_frontier(datasets, job_of(), tmp_path / "plan.json")


# Controls


def test_frequency_has_the_same_weights_for_other_samples(tmp_path):
    plan = plan_frontier(DATASETS, job_of(), tmp_path / "plan.json")
    frequency = plan_frontier(
        DATASETS, job_of(), tmp_path / "f.json", PlanOptions("frequency", by_frequency=BY_FREQUENCY)
    )
    assert (frequency.stages, frequency.strata) == (plan.stages, plan.strata)
    assert frequency.fingerprint != plan.fingerprint
    assert [cut.order for cut in frequency.cuts] == ["frequency"] * 2
    assert [cut.order for cut in plan.cuts] == ["learning-time"] * 2
    assert frequency.provenance.control == "frequency"


def test_easy_first_draws_evenly_from_what_the_competence_covers():
    """Platanios et al. 2019: c(u) = sqrt(u (1 - c0^2) + c0^2)."""
    policy = EasyFirst(DATASETS, competence=0.3, n_stages=9, first=1000)
    plan = make_plan(job_of(), policy, LOOSE)
    assert len(plan.segments) == 9
    for segment in plan.segments:
        covered = math.sqrt(segment.start / TRAIN_SAMPLES * (1 - 0.3**2) + 0.3**2)
        at = 0
        for share, dataset in zip((0.6, 0.4), DATASETS, strict=True):
            for low, part in zip(dataset.bounds, dataset.shares, strict=False):
                expected = share * min(max(covered - low, 0), part) / covered
                found = plan.weight_Z(segment)[at]
                assert found == pytest.approx(expected, abs=1e-5)
                at += 1


# Time maps


def plans_by_time_map(tmp_path, time_map, **options):
    for shift in (0.0, math.log(7)):
        datasets = two_datasets(shift, log_tokens_range=(RANGE[0] + shift, RANGE[1] + shift))
        path = tmp_path / f"{shift}-{len(options)}.json"
        yield plan_frontier(datasets, job_of(datasets), path, time_map=time_map, **options)


def test_a_reference_with_stretched_times_gives_the_same_plan_by_the_time_map(tmp_path):
    time_map = run_of(tmp_path / "clock", ["web", "code"], [400, 1200], 0.8, [1, 40, 2500], 2500)
    plan, stretched = plans_by_time_map(tmp_path, time_map)
    assert len(plan.segments) > 10
    np.testing.assert_allclose(weights_of(plan), weights_of(stretched), rtol=1e-6)
    plan, stretched = plans_by_time_map(tmp_path, None, n_stages=25)
    n = min(len(plan.segments), len(stretched.segments))
    assert np.abs(weights_of(plan)[1:n] / weights_of(stretched)[1:n] - 1).max() > 0.2


def test_a_run_that_learned_as_the_reference_did_changes_nothing():
    x_G = np.linspace(*RANGE, 500)
    base_D = job_of().base_D
    learned_G = base_D @ [d.learned_by(x_G) @ np.array(d.shares) for d in DATASETS]
    time_map = ByRank(LearnedByTime(x_G, learned_G - learned_G[0]), x_G, learned_G)
    inside = np.linspace(10, 15, 50)
    np.testing.assert_allclose(time_map.x(inside), inside, atol=0.02)
    half = slice(0, 250)  # the first part of the training is the time_map
    early = ByRank(LearnedByTime(x_G[half], (learned_G - learned_G[0])[half]), x_G, learned_G)
    assert early.end == x_G[249]
    before = np.linspace(10, early.end, 20)
    np.testing.assert_allclose(early.x(before), before, atol=0.02)


def test_transfer_is_by_the_share_that_is_learned():
    """The time_map learns 6 nats evenly from 10 to 12, the reference 3 nats evenly from 5 to 8."""
    time_map = ByRank(
        LearnedByTime(np.array([10.0, 12.0]), np.array([0.0, 6.0])),
        np.array([5.0, 8.0]),
        np.array([1.0, 4.0]),
    )
    np.testing.assert_allclose(time_map.x(np.array([9, 10, 11, 12, 13])), [5, 5, 6.5, 8, 8])
    short = replace(time_map, learned=LearnedByTime(np.array([10.0, 12.0]), np.array([0.0, 1.5])))
    np.testing.assert_allclose(short.x(np.array([10, 11, 12])), [5, 5.75, 6.5])


def test_while_nothing_is_learned_the_time_map_stands():
    time_map = ByRank(
        LearnedByTime(np.array([10.0, 11.0, 12.0, 13.0]), np.array([0.0, 1.0, 1.0, 2.0])),
        np.array([5.0, 6.0, 7.0, 8.0]),
        np.array([0.0, 1.0, 1.0, 2.0]),
    )
    np.testing.assert_allclose(time_map.x(np.array([11, 11.5, 12])), [6, 6, 6])


def test_a_time_map_counts_the_runs_own_tokens(tmp_path):
    """Samples of 128 tokens: its tokens, not its steps, are those of the training."""
    run = run_of(tmp_path / "run", ["web"], [100], tokens_per_sample=128)
    learned = LearnedByTime.from_run(run, ["web"], np.ones(1))
    assert learned.log_tokens_G[0] == pytest.approx(math.log(8 * 128))
    assert learned.log_tokens_G[-1] == pytest.approx(math.log(8 * 128 * 1000))
    half = np.interp(math.log(8 * 128 * 100), learned.log_tokens_G, learned.learned_G)
    assert half / learned.learned_G[-1] == pytest.approx(0.5, abs=1e-3)


def test_a_time_map_by_a_run_without_a_spectrum_of_these_data_is_refused(tmp_path):
    run = run_of(tmp_path / "run", ["web", "other"], [100, 200])
    with pytest.raises(TokscaleError, match="watched no tokens of code"):
        plan_frontier(DATASETS, job_of(), tmp_path / "plan.json", time_map=run)
    run = run_of(tmp_path / "bare", ["web", "code"], [100, 200])
    run.paths.spectrum_arrays.unlink()
    with pytest.raises(TokscaleError, match="is not there; run `megatron-tokscale spectrum"):
        plan_frontier(DATASETS, job_of(), tmp_path / "plan.json", time_map=run)
    with pytest.raises(TokscaleError, match="learned nothing; expected"):
        ByRank(LearnedByTime(np.array([1.0, 2.0]), np.zeros(2)), np.arange(2.0), np.arange(2.0))


def test_a_time_map_by_a_run_that_does_not_know_its_tokens_is_refused(tmp_path):
    run = run_of(tmp_path / "run", ["web", "code"], [100, 200])
    run.x_K = lambda time: np.log(np.array([1, 1, 3, 10, 30, 100, 300, 1000.0]) * 0 + 1)
    with pytest.raises(TokscaleError, match="consumed tokens"):
        LearnedByTime.from_run(run, ["web", "code"], np.array([0.5, 0.5]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda time_map: Frontier(DATASETS, time_map, SEQ_LENGTH, window=1), "window"),
        (lambda time_map: Frontier(DATASETS, time_map, SEQ_LENGTH, strength=-1), "strength"),
        (lambda time_map: Frontier(DATASETS, time_map, SEQ_LENGTH, n_stages=1), "stages"),
        (lambda time_map: EasyFirst(DATASETS, competence=0), "competence"),
        (
            lambda time_map: policy_stages(
                Frontier(DATASETS, time_map, SEQ_LENGTH, first=9), np.full(9, 1 / 9), 9
            ),
            "first stage",
        ),
    ],
)
def test_a_policy_out_of_range_is_refused(make, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        make(SameTokens(RANGE[1]))
