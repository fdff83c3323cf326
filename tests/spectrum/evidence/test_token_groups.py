"""Groups by frequency within datasets: their sizes, their purity, and datasets that are small."""

from itertools import pairwise

import numpy as np

from megatron_tokscale.spectrum.evidence.token_groups import groups_by_frequency


def test_groups_are_quantiles_of_frequency_in_each_dataset():
    rng = np.random.default_rng(0)
    dataset_N = rng.integers(0, 2, 4000).astype(np.int16)
    value_N = rng.standard_normal(4000) + 3 * dataset_N
    groups = groups_by_frequency(dataset_N, value_N)
    assert len(groups.names) == 20 == groups.group_N.max() + 1
    ends = []
    for group in range(20):
        inside = groups.group_N == group
        assert len(set(dataset_N[inside])) == 1
        share = inside.sum() / (dataset_N == dataset_N[inside][0]).sum()
        assert abs(share - 0.1) < 0.01
        ends.append((dataset_N[inside][0], value_N[inside].min(), value_N[inside].max()))
    for (dataset, _, high), (after, low, _) in pairwise(ends):
        assert dataset != after or high < low


def test_equal_frequencies_stay_together():
    value_N = np.repeat([1.0, 2.0, 3.0], [900, 50, 50])
    group_N = groups_by_frequency(np.zeros(1000, np.int16), value_N).group_N
    assert all(len(set(group_N[value_N == value])) == 1 for value in (1.0, 2.0, 3.0))


def test_small_datasets_have_fewer_groups_and_without_labels_the_groups_are_datasets():
    dataset_N = np.repeat([0, 1], [1000, 120]).astype(np.int16)
    value_N = np.random.default_rng(1).standard_normal(1120)
    assert len(groups_by_frequency(dataset_N, value_N).names) == 12
    assert groups_by_frequency(dataset_N).group_N.tolist() == dataset_N.tolist()
