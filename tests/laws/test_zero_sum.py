"""`ZeroSum` against loops, identities and the normal distribution. K probes, N tokens, U units."""

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError, UndefinedError
from megatron_tokscale.laws.zero_sum import ZeroSum, doubling_pairs

STEPS = np.array([0, 1, 2, 3, 4, 6, 8])


def random_losses(n=57, seed=0):
    return np.random.default_rng(seed).gamma(2, 1.5, (n, len(STEPS)))


def added(loss, n_units=1, **given):
    zero_sum = ZeroSum(STEPS, n_units)
    zero_sum.add(loss, **given)
    return zero_sum


def test_pairs_are_those_nearest_to_twice_the_step():
    assert STEPS[doubling_pairs(STEPS)].tolist() == [[1, 2], [2, 4], [3, 6], [4, 8]]
    assert doubling_pairs([10, 18, 21, 100]).tolist() == [[0, 2]]
    assert doubling_pairs([0, 1, 2, 4, 8]).tolist() == [[1, 2], [2, 3], [3, 4]]


def test_the_metrics_are_those_of_a_loop_over_tokens():
    loss = random_losses()
    zero_sum = added(loss)
    metrics = zero_sum.metrics()
    pairs = list(zip(zero_sum.from_step_P, zero_sum.to_step_P, strict=True))
    assert pairs == [(1, 2), (2, 4), (3, 6), (4, 8)]
    for p, (before, after) in enumerate(pairs):
        total = size = 0.0
        for row in loss:
            moved = row[list(STEPS).index(after)] - row[list(STEPS).index(before)]
            total, size = total + moved, size + abs(moved)
        assert metrics.interference[p] == pytest.approx(1 - abs(total) / size)
        assert metrics.movement[p] == pytest.approx(size / len(loss))
        assert metrics.change[p] == pytest.approx(total / len(loss))


def test_the_change_of_the_mean_is_what_interference_leaves_of_the_movement():
    metrics = added(random_losses()).metrics()
    mean = random_losses().mean(axis=0)
    assert np.abs(mean[2] - mean[1]) == pytest.approx(np.abs(metrics.change[0]))
    assert np.abs(metrics.change) == pytest.approx((1 - metrics.interference) * metrics.movement)


def test_blocks_of_any_size_give_the_same_sums():
    loss, unit = random_losses(), np.arange(57) % 5
    whole = added(loss, 5, unit_N=unit)
    blocks = ZeroSum(STEPS, 5)
    for rows in np.split(np.arange(57), [1, 20, 20, 50]):
        blocks.add(loss[rows], unit_N=unit[rows])
    assert blocks.sum_dl_UP == pytest.approx(whole.sum_dl_UP)
    assert blocks.sum_abs_UP == pytest.approx(whole.sum_abs_UP)
    assert blocks.tokens_U.tolist() == whole.tokens_U.tolist() == [12, 12, 11, 11, 11]


def test_single_precision_losses_are_summed_in_double():
    loss = np.full((100_000, len(STEPS)), 9.0, dtype=np.float32)
    loss[:, 2] -= np.float32(1e-3)
    exact = float(np.float64(loss[0, 2]) - 9.0)
    assert added(loss).metrics().change[0] == pytest.approx(exact, rel=1e-12)


def test_tokens_that_fall_alike_do_not_interfere():
    metrics = added(np.tile(10 - np.sqrt(STEPS), (20, 1))).metrics()
    assert metrics.interference == pytest.approx(0)
    assert metrics.movement == pytest.approx(-metrics.change)


def test_tokens_that_change_places_interfere_completely():
    loss = np.ones((2, len(STEPS)))
    loss[0, 2], loss[1, 2] = 2, 0
    assert added(loss).metrics().interference[0] == 1


def test_where_nothing_moves_interference_is_undefined():
    metrics = added(np.ones((3, len(STEPS)))).metrics()
    assert np.isnan(metrics.interference).all()
    assert metrics.movement.tolist() == [0] * 4


def test_noise_alone_moves_by_its_documented_floor():
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.1, 0.5, 40_000)
    loss = 5 + sd[:, None] * rng.standard_normal((len(sd), len(STEPS)))
    metrics = added(loss).metrics()
    assert (metrics.interference > 0.97).all()
    assert metrics.movement == pytest.approx(2 * sd.mean() / np.sqrt(np.pi), rel=0.02)


def test_a_resample_is_the_metrics_of_the_tokens_it_draws():
    loss, unit = random_losses(), np.random.default_rng(1).integers(4, size=57)
    zero_sum = added(loss, 4, unit_N=unit)
    resampled = zero_sum.resampled([[1, 1, 1, 1], [2, 0, 1, 1]])
    drawn = np.concatenate([loss[unit == u] for u in (0, 0, 2, 3)])
    for metric in ("interference", "movement", "change"):
        values = getattr(resampled, metric)
        assert values[0] == pytest.approx(getattr(zero_sum.metrics(), metric))
        assert values[1] == pytest.approx(getattr(added(drawn).metrics(), metric))


def test_intervals_cover_the_planted_movement():
    """Units that move together; of normal changes mean |dl| is sqrt(2 / pi)."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        loss = np.zeros((400, len(STEPS)))
        loss[:, 2] = np.repeat(rng.standard_normal(80), 5)
        zero_sum = added(loss, 80, unit_N=np.repeat(np.arange(80), 5))
        draws = rng.multinomial(80, np.full(80, 1 / 80), 200)
        low, high = zero_sum.intervals(draws).movement_2P[:, 0]
        covered += low <= np.sqrt(2 / np.pi) <= high
    assert covered >= 0.85 * 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_NK": np.ones((3, 6))}, r"shape \(3, 6\) does not match 7 probes"),
        ({"loss_NK": np.full((3, 7), np.nan)}, "leave out the tokens"),
        ({"loss_NK": np.ones((3, 7)), "unit_N": [0, 1, 2]}, "integers from 0 to 1"),
        ({"loss_NK": np.ones((3, 7)), "unit_N": [0, 1]}, "are not 3 integers"),
        ({"loss_NK": np.ones((3, 7)), "unit_N": [0.0, 1.0, 1.0]}, "are not 3 integers"),
    ],
)
def test_a_block_of_another_shape_is_refused_and_changes_no_sum(given, message):
    zero_sum = ZeroSum(STEPS, 2)
    with pytest.raises(TokscaleError, match=message):
        zero_sum.add(**given)
    assert zero_sum.tokens_U.tolist() == [0, 0]
    assert not zero_sum.sum_abs_UP.any()


@pytest.mark.parametrize("steps", [[0], [0, 1], [1, 1.2], [4, 2], []])
def test_steps_without_a_doubling_pair_are_refused(steps):
    with pytest.raises((TokscaleError, UndefinedError), match=r"do not ascend|near twice"):
        ZeroSum(steps)


@pytest.mark.parametrize("weight", [np.ones((2, 3)), np.ones(2), [[-1.0, 2.0]], [[0.0, 0.0]]])
def test_weights_that_draw_no_token_are_refused(weight):
    zero_sum = added(random_losses(), 2)
    with pytest.raises((TokscaleError, UndefinedError), match=r"do not resample|no token"):
        zero_sum.intervals(weight)


def test_metrics_of_no_tokens_are_refused():
    with pytest.raises(UndefinedError, match="add a block"):
        ZeroSum(STEPS).metrics()
