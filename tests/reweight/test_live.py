"""Weights from the losses so far, against slopes and guards computed by hand."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from runs import GLOBAL_BATCH, launch, plain_probe_set, write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    Replanning,
    Stage,
    Stratum,
    with_decisions,
)
from megatron_tokscale.data.history import save_run_plan
from megatron_tokscale.reweight.live import decide, main, slopes
from megatron_tokscale.store import Batch, Run

STEPS = np.array([0, 1, 10, 40, 50, 64, 80, 100, 130])
AT = 100
WINDOW = (STEPS >= AT / 2) & (STEPS <= AT)
TOKENS = 64


def losses_of(prose: float, code: float) -> np.ndarray:
    """Losses that fall by so many nats per unit of ln(step), around which each token wobbles."""
    is_code_N = plain_probe_set(TOKENS).dataset_N == 1
    x_K = np.log(np.maximum(STEPS, 1))
    slope_N = np.where(is_code_N, code, prose)
    noise_NK = np.random.default_rng(0).normal(0, 0.05, (TOKENS, len(STEPS)))
    return (8 - slope_N[:, None] * x_K + noise_NK).astype(np.float32)


@pytest.fixture
def run(tmp_path) -> Run:
    return write_run(tmp_path, STEPS, losses_of(prose=0.1, code=0.4))


def plan_of(*stages: Stage, how=None, **changes) -> Plan:
    """Of the run's datasets, in the other order."""
    fields = {
        "datasets": (DatasetIdentity("code", 50, 8000), DatasetIdentity("prose", 100, 80_000)),
        "strata": (Stratum("code", 0), Stratum("prose", 1)),
        "stages": stages or (Stage(0, (0.5, 0.5)),),
        "seq_length": 8,
        "seed": 0,
        "replanning": Replanning(**{"train_samples": 1000, **(how or {})}),
    }
    return Plan(**fields | changes)


LOOSE = {"floor": 1e-9, "max_change": 100.0}


def slopes_by_polyfit(run: Run) -> np.ndarray:
    """Of code and prose, by numpy's other fit on the mean losses."""
    is_code_N = run.probe_set.dataset_N == 1
    loss_NK = run.read_losses().astype(np.float64)[:, WINDOW]
    x_K = np.log(STEPS[WINDOW])
    return np.array(
        [-np.polyfit(x_K, loss_NK[own].mean(0), 1)[0] for own in (is_code_N, ~is_code_N)]
    )


def test_weights_follow_the_present_slopes(run):
    assert_allclose(slopes(run, plan_of(), AT), slopes_by_polyfit(run), rtol=1e-10)
    assert_allclose(slopes_by_polyfit(run), (0.4, 0.1), atol=0.05)
    expected_D = np.array([0.5, 0.5]) * slopes_by_polyfit(run)
    assert_allclose(
        decide(run, plan_of(how=LOOSE), AT).weights, expected_D / expected_D.sum(), rtol=1e-6
    )


def test_the_base_weights_and_the_strength_are_those_of_the_plan(run):
    how = {**LOOSE, "base_weights": (1.0, 3.0), "strength": 0.5}
    expected_D = np.array([0.25, 0.75]) * np.sqrt(slopes_by_polyfit(run))
    assert_allclose(
        decide(run, plan_of(how=how), AT).weights, expected_D / expected_D.sum(), rtol=1e-6
    )


def test_no_weight_falls_below_its_floor(run):
    how = {"floor": 0.8, "max_change": 100.0}
    free_D = np.array(decide(run, plan_of(how=LOOSE), AT).weights)
    assert_allclose(decide(run, plan_of(how=how), AT).weights, 0.8 * 0.5 + 0.2 * free_D, rtol=1e-6)


def test_a_weight_changes_only_so_much_at_a_time(run):
    how = {"floor": 1e-9, "max_change": 1.2}
    assert_allclose(decide(run, plan_of(how=how), AT).weights, (0.5833333, 0.4166667), rtol=1e-6)


def test_change_is_counted_from_the_weights_that_hold_or_are_decided_already(run):
    how = {"base_weights": (1.0, 1.0), "floor": 1e-9, "max_change": 1.2}
    consumed = AT * GLOBAL_BATCH
    plan = plan_of(Stage(0, (0.1, 0.9)), Stage(consumed - 1, (0.3, 0.7)), how=how)
    assert decide(run, plan, AT).weights[0] == pytest.approx(0.36)
    later = plan_of(Stage(0, (0.3, 0.7)), Stage(consumed + 1, (0.9, 0.1)), how=how)
    assert decide(run, later, AT).weights[0] == pytest.approx(0.36)
    pending = with_decisions(later, [Decision(90, consumed + 24, (0.5, 0.5))])
    assert decide(run, pending, AT).weights[0] == pytest.approx(0.5833333)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_dataset_grows_no_further_than_its_limit_on_epochs(run, is_told):
    """400 samples are drawn, 600 left; a half of each is code's, which has 1000 in an epoch."""
    how = {**LOOSE, **({"epoch_samples": (1000, 10_000)} if is_told else {})}
    free = decide(run, plan_of(how=LOOSE), AT).weights[0]
    assert free > 0.7
    for limit, expected in ((0.56, (560 - 200) / 600), (0.4, 0.5), (9.0, free)):
        plan = plan_of(how=how, max_epochs=limit)
        assert decide(run, plan, AT).weights[0] == pytest.approx(expected, rel=1e-6)


def test_within_a_dataset_the_limit_is_each_stratums(run):
    """Half of code's samples come from the tenth of it that has 100."""
    plan = plan_of(
        Stage(0, (0.5, 0.5), (0.5, 0.5, 1.0)),
        how=LOOSE,
        strata=(Stratum("code/0", 0, 0.1), Stratum("code/1", 0, 0.9), Stratum("prose", 1)),
        cuts=(Cut("scores"), None),
        max_epochs=2.7,
    )
    assert decide(run, plan, AT).weights[0] == pytest.approx((2 * 270 - 200) / 600, rel=1e-6)


def test_training_is_as_long_as_the_run_says_if_the_plan_does_not(run):
    plan = plan_of(max_epochs=0.28, replanning=Replanning(**LOOSE))  # 130 steps of 4: 520 samples
    assert decide(run, plan, AT).weights[0] == pytest.approx((280 - 200) / 120, rel=1e-6)


def test_training_is_as_long_as_the_job_says_that_goes_on_from_there(run):
    """130 steps of 4 as it began; from step 90 on 8 a step to step 130: 360 + 320 samples."""
    batch = Batch(global_batch_size=8, micro_batch_size=4, train_iters=130)
    launches = (*run.launches, launch(90, batch=batch), launch(120))
    changed = replace(run, info=replace(run.info, launches=launches))
    plan = plan_of(max_epochs=0.4, replanning=Replanning(**LOOSE))
    assert decide(changed, plan, AT).weights[0] == pytest.approx((400 - 200) / 280, rel=1e-6)
    unknown = replace(run, info=replace(run.info, launches=(launch(),)))
    with pytest.raises(TokscaleError, match="does not say how long the job trains"):
        decide(unknown, plan, AT)


def test_a_dataset_that_rises_keeps_its_floor(tmp_path):
    run = write_run(tmp_path, STEPS, losses_of(prose=-0.3, code=0.4))
    how = {"floor": 0.25, "max_change": 100.0}
    assert slopes(run, plan_of(), AT)[1] == 0
    assert_allclose(decide(run, plan_of(how=how), AT).weights, (0.875, 0.125))


def test_losses_that_are_not_finite_are_left_out(tmp_path):
    loss_NK = losses_of(0.1, 0.4)
    spoiled_NK = loss_NK.copy()
    spoiled_NK[3, 5], spoiled_NK[9, 6] = np.nan, np.inf
    run = write_run(tmp_path, STEPS, spoiled_NK)
    is_code_N = run.probe_set.dataset_N == 1
    mean_K = np.nanmean(np.where(np.isfinite(spoiled_NK), spoiled_NK, np.nan)[is_code_N], axis=0)
    expected = -np.polyfit(np.log(STEPS[WINDOW]), mean_K[WINDOW], 1)[0]
    assert slopes(run, plan_of(), AT)[0] == pytest.approx(expected, rel=1e-5)


def test_later_losses_do_not_matter(run, tmp_path):
    other = losses_of(0.1, 0.4)
    other[:, STEPS > AT] = 0.0
    changed = write_run(tmp_path / "other", STEPS, other)
    assert_allclose(
        decide(changed, plan_of(), AT).weights, decide(run, plan_of(), AT).weights, rtol=0
    )


def test_losses_that_define_no_weights_give_a_reason(run, tmp_path):
    with pytest.raises(TokscaleError, match="has no losses of step 99"):
        decide(run, plan_of(), 99)
    with pytest.raises(
        TokscaleError, match="1 of the 4 probes that a slope needs are there since step 20"
    ):
        decide(run, plan_of(), 40)
    unwatched = plan_of(datasets=(DatasetIdentity("code", 1, 1), DatasetIdentity("math", 1, 1)))
    with pytest.raises(TokscaleError, match="watches no tokens of math"):
        decide(run, unwatched, AT)
    rising = write_run(tmp_path / "rising", STEPS, losses_of(-0.3, -0.3))
    with pytest.raises(TokscaleError, match="no dataset's loss falls"):
        decide(rising, plan_of(), AT)
    lost = losses_of(0.1, 0.4)
    lost[plain_probe_set(TOKENS).dataset_N == 1, 6] = np.nan
    with pytest.raises(
        TokscaleError, match=f"a dataset has no finite losses: code at step {STEPS[6]}"
    ):
        decide(write_run(tmp_path / "lost", STEPS, lost), plan_of(), AT)


def test_a_watched_dataset_that_the_plan_does_not_have_may_lose_its_losses(run, tmp_path):
    lost = losses_of(0.1, 0.4)
    lost[plain_probe_set(TOKENS).dataset_N == 0, 6] = np.nan
    spoiled = write_run(tmp_path / "lost", STEPS, lost)
    alone = plan_of(
        datasets=(DatasetIdentity("code", 1, 1),),
        strata=(Stratum("code", 0),),
        stages=(Stage(0, (1.0,)),),
    )
    assert_allclose(slopes(spoiled, alone, AT), slopes(run, alone, AT), rtol=1e-12)


def test_the_command_prints_the_same_weights(run, capsys):
    save_run_plan(plan_of(), [], run.path)
    main([str(run.path), "--until", str(AT)])
    assert json.loads(capsys.readouterr().out) == {
        "weights": [*decide(run, plan_of(), AT).weights],
        "within": None,
    }
    main([str(run.path), "--until", "7"])
    assert "has no losses of step 7" in json.loads(capsys.readouterr().out)["reason"]
    main([str(run.path / "nowhere"), "--until", "7"])
    assert "no run in" in json.loads(capsys.readouterr().out)["reason"]


def test_provenance_decides_nothing(run, capsys):
    """It is edited where a user would, in the run's directory."""
    expected_D = decide(run, plan_of(), AT).weights
    save_run_plan(plan_of(), [], run.path)
    path = run.path / "tokscale/plan.json"
    content = json.loads(path.read_text())
    content["provenance"]["settings"] = {
        **{"base_weights": [1, 9], "strength": 3.0, "train_samples": 150, "given": "0"},
        **{"guards": {"floor": 0.9, "max_change": 1.01}, "epoch_samples": [1, 1]},
        "live": [{"step": 90, "start": 10_000, "weights": [1, 9]}],
    }
    del content["checksum"]
    path.write_text(json.dumps(content))
    main([str(run.path), "--until", str(AT)])
    assert json.loads(capsys.readouterr().out) == {"weights": [*expected_D], "within": None}


# Strata

SLOPES = {"code/q1": 0.1, "code/q2": 0.6, "prose/q1": 0.0, "prose/q2": 0.3}
SHARES = {"code/q1": 0.4, "code/q2": 0.6, "prose/q1": 0.5, "prose/q2": 0.5}


def plan_of_strata(how=None, **changes) -> Plan:
    """Two strata of documents in each dataset."""
    cut = Cut("scores", "fall", unit="documents", edges=(0.2,), held_out=3)
    fields = {
        "strata": tuple(
            Stratum(name, int(name.startswith("prose")), share) for name, share in SHARES.items()
        ),
        "cuts": (cut, cut),
        "documents": ((0, 50), (0, 100)),
        "how": {"base_weights": (1.0, 3.0), **LOOSE, "max_change": 1e6, **(how or {})},
    }
    return plan_of(Stage(0, (0.25, 0.75)), **fields | changes)


def watch_strata(run: Run, names=tuple(SLOPES)) -> None:
    """Add to a run the probe set of its strata, whose losses fall by these slopes."""
    plain = plain_probe_set(8 * len(names))
    place_BS = np.arange(len(names), dtype=np.int16)[:, None] * np.ones(8, np.int16)
    probe_set = replace(plain, dataset_BS=place_BS, datasets=names)
    slope_N = np.array([SLOPES[name] for name in names])[probe_set.dataset_N]
    loss_NK = 8 - slope_N[:, None] * np.log(np.maximum(STEPS, 1))
    write_run(run.path / "probe-sets/strata", STEPS, loss_NK.astype(np.float32), probe_set)


def strata_by_hand(slope_Z, strength=1.0):
    base_Z = np.array([0.25 * 0.4, 0.25 * 0.6, 0.75 * 0.5, 0.75 * 0.5])
    tilted_Z = base_Z * np.array(slope_Z) ** strength
    return tilted_Z / tilted_Z.sum(), base_Z


def test_strata_that_a_probe_set_watches_follow_their_own_slopes(run):
    watch_strata(run)
    for strength in (1.0, 0.8):
        weights, within = decide(run, plan_of_strata({"strength": strength}), AT)
        expected_Z, _ = strata_by_hand([*SLOPES.values()], strength)
        assert_allclose(within, expected_Z, rtol=1e-4, atol=1e-6)
        assert_allclose(weights, (expected_Z[:2].sum(), expected_Z[2:].sum()), rtol=1e-4)


def test_the_strata_may_be_the_first_probe_set(run):
    watch_strata(run)
    alone = Run.open(run.path / "probe-sets/strata")
    assert decide(alone, plan_of_strata(), AT) == decide(run, plan_of_strata(), AT)


def test_strata_keep_the_floor_the_limits_on_change_and_on_shares(run):
    watch_strata(run)
    expected_Z, base_Z = strata_by_hand([*SLOPES.values()])
    floored = decide(run, plan_of_strata({"floor": 0.4}), AT).within
    assert_allclose(floored, 0.4 * base_Z + 0.6 * expected_Z, rtol=1e-4)
    within = np.array(decide(run, plan_of_strata({"max_change": 1.1}), AT).within)
    ratio_Z = within / base_Z
    assert max(ratio_Z.max() / 1.1, 1 / 1.1 / ratio_Z.min()) == pytest.approx(1, rel=1e-6)
    limited = decide(run, plan_of_strata({"share_limit": 1.2}), AT)
    assert_allclose(limited.weights, (0.25 * 1.2, 1 - 0.25 * 1.2), rtol=1e-6)
    assert_allclose(limited.within[:2], 0.3 * expected_Z[:2] / expected_Z[:2].sum(), rtol=1e-4)


def test_a_stratum_grows_no_further_than_its_epochs_allow(run):
    """The second stratum of code has 200 samples: 60 of 400 are drawn, 600 are left."""
    watch_strata(run)
    how = {"stratum_samples": (500, 200, 9000, 9000)}
    weights = decide(run, plan_of_strata(how, max_epochs=0.8), AT)
    assert 400 * 0.15 + 600 * weights.within[1] == pytest.approx(0.8 * 200, rel=1e-6)


def test_a_stratum_that_is_not_watched_falls_as_its_datasets_others(run):
    watch_strata(run, ("code/q1", "prose/q1", "prose/q2"))
    expected_Z, _ = strata_by_hand([0.1, 0.1, 0.0, 0.3])
    assert_allclose(decide(run, plan_of_strata(), AT).within, expected_Z, rtol=1e-4, atol=1e-6)


def test_a_dataset_without_a_watched_stratum_gives_a_reason(run):
    watch_strata(run, ("code/q1", "code/q2"))
    with pytest.raises(TokscaleError, match="watches no stratum of prose; expected one at least"):
        decide(run, plan_of_strata(), AT)


def test_without_a_probe_set_of_its_strata_a_plan_weighs_datasets(run):
    other = plain_probe_set(16)
    losses = np.ones((16, len(STEPS)), np.float32)
    write_run(run.path / "probe-sets/valid", STEPS, losses, other)
    weights = decide(run, plan_of_strata(), AT)
    assert weights.within is None
    expected_D = np.array([0.25, 0.75]) * slopes_by_polyfit(run)
    assert_allclose(weights.weights, expected_D / expected_D.sum(), rtol=1e-6)


def test_the_command_prints_the_weights_of_strata(run, capsys):
    watch_strata(run)
    save_run_plan(plan_of_strata(), [], run.path)
    main([str(run.path), "--until", str(AT)])
    expected = decide(run, plan_of_strata(), AT)
    printed = {"weights": [*expected.weights], "within": [*expected.within]}
    assert json.loads(capsys.readouterr().out) == printed


def test_the_command_loads_no_slow_package():
    code = (
        "import sys, megatron_tokscale.reweight.live\n"
        "assert not {'torch', 'megatron', 'numba', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
