"""Policies by scores of documents, and their controls, against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scored import cut_documents, job_over

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan
from megatron_tokscale.reweight import (
    ByFall,
    ByTarget,
    Guards,
    PlanOptions,
    Uniform,
    make_plan,
    plan_by_scores,
)

rng = np.random.default_rng(3)
N = 2000
FALLS = {"web": rng.gamma(4, 0.1, N), "code": rng.gamma(2, 0.3, N)}
TARGETS = {"web": rng.normal(0, 1, N), "code": rng.normal(0.5, 2, N)}
LOOSE = Guards(floor=1e-9, max_change=1e9, max_epochs=None)
TRAIN_SAMPLES = 8000


def dataset_of(name, by="fall", **options):
    scores = {"time": rng.normal(12, 1, N)} if by == "learning-time" else {}
    return cut_documents(
        name,
        np.full(N, 300),
        by,
        fall=FALLS[name],
        target=TARGETS[name],
        surprisal=np.linspace(5, 7, N),
        **options,
        **scores,
    )


DATASETS = [dataset_of("web"), dataset_of("code")]
BASE_Z = np.repeat([0.6 / 16, 0.4 / 16], 16)
FALL_Z = np.concatenate([dataset.fall_Z for dataset in DATASETS])


def job_of(datasets=DATASETS, **changes):
    documents = [(0, N)] * len(datasets)
    job = job_over(datasets, (0.6, 0.4)[: len(datasets)], TRAIN_SAMPLES, documents=documents)
    return replace(job, **changes)


def last_weights(plan: Plan):
    return plan.weight_Z(plan.segments[-1])


def fall_by_hand(base_Z, fall_Z, strength=0.8):
    mean = sum(base_Z * fall_Z)
    tilted = [b * (max(f, 0) / mean) ** strength for b, f in zip(base_Z, fall_Z, strict=True)]
    return np.array(tilted) / sum(tilted)


def test_a_stratum_weighs_its_share_times_its_relative_fall_to_the_power():
    plan = make_plan(job_of(), ByFall(DATASETS, share_limit=1e9), LOOSE)
    assert_allclose(last_weights(plan), fall_by_hand(BASE_Z, FALL_Z), rtol=1e-6)
    floored = make_plan(job_of(), ByFall(DATASETS, share_limit=1e9))
    expected = 0.25 * BASE_Z + 0.75 * fall_by_hand(BASE_Z, FALL_Z)
    assert_allclose(last_weights(floored), expected, rtol=1e-9)


def test_base_weights_hold_for_a_twentieth_then_weights_move_within_the_guard_and_stay():
    plan = make_plan(job_of(), ByFall(DATASETS))
    assert plan.segments[1].start == TRAIN_SAMPLES / 20
    weights_TZ = np.array([plan.weight_Z(segment) for segment in plan.segments])
    assert_allclose(weights_TZ[0], BASE_Z)
    ratio_TZ = weights_TZ[1:] / weights_TZ[:-1]
    assert 1 / 1.5 - 1e-9 <= ratio_TZ.min() < ratio_TZ.max() <= 1.5 + 1e-9
    assert 2 < len(plan.segments) < 9
    assert plan.segments[-1].start < TRAIN_SAMPLES / 8


def test_a_stratum_whose_loss_rises_keeps_its_floor():
    falls = np.where(np.arange(N) < N / 4, -0.2, FALLS["web"])
    rising = [cut_documents("web", np.full(N, 300), fall=falls)]
    plan = make_plan(job_of(rising), ByFall(rising))
    base_Z = np.array(rising[0].shares)
    assert rising[0].fall_Z[0] < 0
    assert_allclose(last_weights(plan)[0], 0.25 * base_Z[0], rtol=1e-6)


def test_a_plan_by_falls_is_refused_where_every_loss_rises():
    rising = [cut_documents("web", np.full(N, 300), fall=FALLS["web"] - 10)]
    with pytest.raises(TokscaleError, match="nats per token; expected one above 0; score by"):
        make_plan(job_of(rising), ByFall(rising))


def test_shares_of_datasets_move_no_further_than_their_limit():
    """Only code still falls: without a limit it gets everything but the floor."""
    flat = [cut_documents("web", np.full(N, 300), fall=1e-6), DATASETS[1]]
    plan = make_plan(job_of(flat), ByFall(flat, share_limit=1.5), LOOSE)
    assert_allclose(plan.segments[-1].weights, [0.4, 0.6], rtol=1e-6)
    base_Z = np.concatenate([[0.6], np.full(16, 0.4 / 16)])
    wanted_Z = fall_by_hand(base_Z, np.concatenate([[1e-6], DATASETS[1].fall_Z]))
    within_Z = wanted_Z[1:] / wanted_Z[1:].sum()
    assert_allclose(last_weights(plan)[1:], 0.6 * within_Z, rtol=1e-6)


def test_a_limit_of_one_keeps_shares_to_the_last_bit():
    plan = make_plan(job_of(), ByFall(DATASETS, share_limit=1))
    assert {segment.weights for segment in plan.segments} == {(0.6, 0.4)}
    assert len(plan.segments) > 2


def test_a_stratum_gets_no_more_epochs_than_the_plan_allows():
    guards = Guards(max_epochs=1.0)
    long = job_of(train_samples=sum(dataset.n_samples for dataset in DATASETS) * 3 // 4)
    plan = make_plan(long, ByFall(DATASETS), guards)
    epochs_Z = plan.target_Z(long.train_samples) / [n for each in DATASETS for n in each.samples]
    assert epochs_Z.max() == pytest.approx(1.0)
    assert plan.replanning.stratum_samples == (*DATASETS[0].samples, *DATASETS[1].samples)


# Target


def test_the_top_strata_are_drawn_and_the_others_keep_their_floor():
    datasets = [dataset_of("web", "target"), dataset_of("code", "target")]
    plan = make_plan(job_of(datasets), ByTarget(datasets, top=0.25, share_limit=1e9), LOOSE)
    left, expected_Z = 0.25, np.zeros(32)
    target_Z = np.concatenate([dataset.target_Z for dataset in datasets])
    for z in sorted(range(32), key=lambda z: -target_Z[z]):
        expected_Z[z] = min(BASE_Z[z], left) / 0.25
        left -= min(BASE_Z[z], left)
    assert_allclose(last_weights(plan), expected_Z, atol=1e-8)
    floored = make_plan(job_of(datasets), ByTarget(datasets, top=0.25, share_limit=1e9))
    assert_allclose(last_weights(floored), 0.25 * BASE_Z + 0.75 * expected_Z, rtol=1e-6)


def test_only_the_rank_of_a_target_score_counts():
    plans = [
        make_plan(job_of([each]), ByTarget([each]))
        for each in (
            cut_documents("web", np.full(N, 300), "target", target=scores)
            for scores in (TARGETS["web"], np.exp(TARGETS["web"]) - 9)
        )
    ]
    assert_allclose(last_weights(plans[0]), last_weights(plans[1]))


# Controls


def test_the_baseline_has_the_base_weights_on_the_same_strata(tmp_path):
    plan = plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "f")
    uniform = plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "u", PlanOptions("uniform"))
    assert (uniform.strata, uniform.cuts, uniform.seed) == (plan.strata, plan.cuts, plan.seed)
    assert len(uniform.segments) == 1
    assert_allclose(last_weights(uniform), BASE_Z)


@pytest.mark.parametrize("policy", [ByFall(DATASETS), ByFall(DATASETS, share_limit=1)])
def test_permuted_changes_as_much_and_gives_no_stratum_its_own_weight(policy):
    plan = make_plan(job_of(), policy)
    permuted = make_plan(job_of(), policy, permute=True)
    change = [np.abs(last_weights(each) - BASE_Z).sum() for each in (plan, permuted)]
    assert change[0] > 0.2
    assert change[1] == pytest.approx(change[0], rel=0.02)
    relative, other = (last_weights(each) / BASE_Z for each in (plan, permuted))
    assert np.abs(np.log(other / relative)).min() > 1e-3
    assert abs(np.corrcoef(relative, other)[0, 1]) < 0.1
    again = make_plan(job_of(), policy, permute=True)
    assert again.fingerprint == permuted.fingerprint
    seeded = make_plan(job_of(seed=4), policy, permute=True)
    assert np.abs(last_weights(seeded) - last_weights(permuted)).max() > 1e-3


def test_permuted_changes_as_much_where_the_limit_on_shares_binds():
    """Code falls three times as much, so that most of the change that is wanted is between both."""
    code = cut_documents("code", np.full(N, 300), fall=3 * FALLS["code"])
    datasets = [DATASETS[0], code]
    policy = ByFall(datasets, share_limit=1.2)
    change = [
        np.abs(last_weights(make_plan(job_of(datasets), policy, permute=flag)) - BASE_Z).sum()
        for flag in (False, True)
    ]
    assert change[1] == pytest.approx(change[0], rel=0.05)


def test_permuted_weights_come_from_strata_of_about_the_size():
    """A hundred times as large: nothing is exchanged between the two."""
    policy = ByFall(DATASETS, share_limit=1e9)
    job = job_of(base_weights=(100.0, 1.0))
    base_Z = np.repeat([100 / 101 / 16, 1 / 101 / 16], 16)
    plan, permuted = (make_plan(job, policy, LOOSE, permute=flag) for flag in (False, True))
    relative, other = (last_weights(each) / base_Z for each in (plan, permuted))
    scale = other[:16].max() / relative[:16].max()
    assert_allclose(np.sort(other[:16]), scale * np.sort(relative[:16]), rtol=1e-6)


def test_a_plan_of_one_stratum_has_nothing_to_permute():
    alone = [cut_documents("web", np.full(N, 300), fall=0.5)]
    with pytest.raises(TokscaleError, match="no two strata that can exchange weights"):
        make_plan(job_of(alone), ByFall(alone), permute=True)


def test_frequency_draws_by_rank_of_surprisal_with_the_policys_weights(tmp_path):
    """Half of code has one surprisal, so that its strata differ in size from those by fall."""
    surprisal = np.where(np.arange(N) < N / 2, 6.0, np.linspace(6.1, 9, N))
    code = cut_documents(
        "code", np.full(N, 300), "frequency", fall=FALLS["code"], surprisal=surprisal
    )
    options = PlanOptions("frequency", by_frequency=[dataset_of("web", "frequency"), code])
    policy = ByFall(DATASETS, strength=1.0)
    plan = plan_by_scores(policy, job_of(), tmp_path / "f")
    control = plan_by_scores(policy, job_of(), tmp_path / "c", options)
    assert [cut.order for cut in control.cuts] == ["frequency"] * 2
    assert control.n_strata == 16 + len(code.names) < 32
    weights, found = last_weights(plan), last_weights(control)
    assert_allclose(found[:16], weights[:16], rtol=1e-6)
    # The stratum of one surprisal takes what the lower half by fall has: eight strata.
    assert code.shares[0] == pytest.approx(0.5)
    assert found[16] == pytest.approx(weights[16:24].sum(), rel=1e-6)
    assert found.sum() == pytest.approx(1)


def test_frequency_without_its_strata_is_refused():
    with pytest.raises(TokscaleError, match="the control frequency has no strata; expected"):
        PlanOptions("frequency")


def test_easy_first_needs_the_order_of_learning(tmp_path):
    with pytest.raises(TokscaleError, match="ranked by fall; expected the order of learning"):
        plan_by_scores(ByFall(DATASETS), job_of(), tmp_path / "e", PlanOptions("easy-first"))
    timed = [dataset_of("web", "learning-time"), dataset_of("code", "learning-time")]
    plan = plan_by_scores(ByFall(timed), job_of(), tmp_path / "e", PlanOptions("easy-first"))
    assert plan.provenance.control == "easy-first"
    drawn_Z = plan.weight_Z(plan.segments[0])
    assert drawn_Z[0] > 3 * drawn_Z[15]


def test_a_plan_by_scores_says_all_that_is_needed_to_make_it_again(tmp_path):
    policy = ByTarget([dataset_of("web", "target"), dataset_of("code", "target")], top=0.1)
    plan = plan_by_scores(policy, job_of(), tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    settings = plan.provenance.settings
    assert (plan.provenance.policy, settings["top"], settings["share_limit"]) == ("target", 0.1, 2)
    assert settings["cutting"]["by"] == "target"
    assert plan.replanning.share_limit == 2.0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ByFall(DATASETS, strength=-1), "strength is -1"),
        (lambda: ByFall(DATASETS, share_limit=0.5), "limit on shares is 0.5; expected a finite"),
        (lambda: ByFall(DATASETS, n_stages=1), "stages is 1"),
        (lambda: ByTarget(DATASETS, top=0), "drawn from is 0; expected a number above 0"),
    ],
)
def test_a_policy_out_of_range_is_refused(make, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        make()


def test_scores_without_falls_are_refused():
    lacking = [cut_documents("web", np.full(N, 300), "target", target=TARGETS["web"])]
    with pytest.raises(TokscaleError, match="the scores of web have no falls; expected some"):
        make_plan(job_of(lacking), ByFall(lacking))
    make_plan(job_of(lacking), Uniform(lacking))
