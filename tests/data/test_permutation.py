import numpy as np
import pytest
from scipy.stats import chisquare

from megatron_tokscale.data import Permutation, epoch_permutation, stratum_key

SIZES = [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097]


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_comes_once_per_epoch(size):
    key = stratum_key(3, "web")
    for epoch in (0, 1, 2, 10**12):
        permutation = epoch_permutation(size, key, epoch)
        assert sorted(permutation(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000, 2**20 + 1, 2**33 + 5, 2**60])
def test_the_vectorised_path_equals_the_scalar_one(size):
    permutation = Permutation(size, 0xFEDCBA9876543210)
    positions = np.random.default_rng(0).integers(0, size, 200)
    assert permutation.many(positions).tolist() == [permutation(i) for i in positions.tolist()]


def test_a_million_samples_are_permuted_without_a_table():
    images = Permutation(10**6, 5).many(np.arange(10**6))
    assert np.array_equal(np.sort(images), np.arange(10**6))


def test_epochs_seeds_and_strata_have_orders_of_their_own():
    orders = {
        tuple(epoch_permutation(50, stratum_key(seed, name), epoch)(i) for i in range(50))
        for seed in (0, 1)
        for name in ("web", "code")
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 12


def test_the_order_is_pinned():
    """A change here changes what running jobs train on: it needs a new ORDER_VERSION."""
    permutation = epoch_permutation(10, stratum_key(1234, "web"), 0)
    assert [permutation(i) for i in range(10)] == [6, 9, 2, 7, 5, 8, 0, 3, 4, 1]


def test_images_are_spread_evenly_over_epochs():
    """Where a sample lands, and its neighbour, over many epochs: chi-squared against uniform."""
    key, size, n_epochs = stratum_key(0, "web"), 40, 4000
    images = np.array([epoch_permutation(size, key, e).many(np.arange(2)) for e in range(n_epochs)])
    assert chisquare(np.bincount(images[:, 0], minlength=size)).pvalue > 1e-3
    gap = (images[:, 1] - images[:, 0]) % size
    assert chisquare(np.bincount(gap, minlength=size)[1:]).pvalue > 1e-3


def test_a_random_permutation_has_one_fixed_point_on_average():
    positions = np.arange(1000)
    fixed = [(epoch_permutation(1000, 9, e).many(positions) == positions).sum() for e in range(500)]
    assert abs(np.mean(fixed) - 1) < 4 / np.sqrt(500)
