"""The test of two spectra: scipy's energy distance, all swaps, and Student's t.

Shapes: N tokens, U units.
"""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from token_tables import table

from megatron_tokscale.compare import spectra
from megatron_tokscale.compare.spectra import compare_spectra
from megatron_tokscale.core.errors import UndefinedError
from megatron_tokscale.core.resampling import Units
from megatron_tokscale.results.comparison import NO_SECOND_SEED, Difference

SPAN = (2.0, 7.0)


def learned(rng, time_N):
    drop_N = np.full(len(time_N), 2.0, np.float32)
    return table(len(time_N), time_N=np.float32(time_N), drop_N=drop_N)


def units_of(n_tokens, n_documents):
    document_N = np.arange(n_tokens) * n_documents // n_tokens
    return Units.from_documents(np.zeros(n_tokens, int), document_N, seed=0)


def test_distance_is_scipys_energy_distance(monkeypatch):
    monkeypatch.setattr(spectra, "BIN", 0.001)
    rng = np.random.default_rng(0)
    a_N, b_N = rng.uniform(2.5, 6.5, 500), rng.normal(4, 0.5, 500).clip(2.1, 6.9)
    units = units_of(500, 10)
    found = compare_spectra(
        learned(rng, a_N), learned(rng, b_N), [], SPAN, units, units.weights(0, 0), 0
    )
    # Both integrate the squared difference of cumulative shares; ours are 2 nats in all.
    energy = stats.energy_distance(a_N, b_N) ** 2 / 2
    assert found.distance.uncorrected**2 * (SPAN[1] - SPAN[0]) / 4 == pytest.approx(
        energy, rel=0.01
    )


def test_spectra_add_up_to_the_nats_learned_per_token():
    rng = np.random.default_rng(0)
    time_N = np.concatenate([rng.uniform(*SPAN, 60), np.full(20, 1.5), np.full(20, 7.5)])
    units = units_of(100, 10)
    run = learned(rng, time_N)
    found = compare_spectra(run, run, [run], SPAN, units, units.weights(10, 0), 0)
    assert np.sum(found.a) * (found.edges[1] - found.edges[0]) == pytest.approx(2 * 0.6)
    assert found.a == found.b == found.noise[0]


def test_p_value_over_documents_is_the_share_of_all_swaps():
    rng = np.random.default_rng(3)
    n_tokens, n_documents = 160, 8
    a_N = rng.uniform(3, 6, n_tokens)
    b_N = a_N - 0.15 + 0.3 * np.repeat(rng.standard_normal(n_documents), n_tokens // n_documents)
    units = units_of(n_tokens, n_documents)
    found = compare_spectra(
        learned(rng, a_N), learned(rng, b_N), [], SPAN, units, units.weights(10, 0), 0
    )
    edges = np.array(found.edges)
    sums = [
        np.stack(
            [np.histogram(t[units.unit_N == u], edges)[0].cumsum() for u in range(n_documents)]
        )
        for t in (a_N, b_N)
    ]
    difference_UC = (sums[1] - sums[0]).astype(float)
    measured = (difference_UC.sum(axis=0) ** 2).sum()
    signs = np.array(list(product([-1, 1], repeat=n_documents)))
    exact = np.mean(((signs @ difference_UC) ** 2).sum(axis=1) >= measured - 1e-9)
    assert 0.02 < exact < 0.9
    assert found.p_documents == pytest.approx(exact, abs=0.04)


def test_p_value_among_seeds_is_students_for_spectra_that_differ_in_one_direction():
    rng = np.random.default_rng(0)
    n_tokens = 1000
    late = {"a": 0, "b": 400, "c1": 50, "c2": 20}  # tokens learned late, in one bin

    def run(count):
        return learned(rng, np.where(np.arange(n_tokens) * 7 % n_tokens < count, 6.0, 3.0))

    a, b, *noise = map(run, late.values())
    units = units_of(n_tokens, 10)
    found = compare_spectra(a, b, noise, SPAN, units, units.weights(10, 0), 0)
    seeds = np.array([0.0, 50, 20])
    t = (400 - seeds.mean()) / (seeds.std(ddof=1) * np.sqrt(1 + 1 / 3))
    assert found.p_seeds == pytest.approx(2 * stats.t.sf(t, 2))
    assert found.p_documents <= 0.05
    assert found.outcome is Difference.DIFFER
    assert found.seeds[0] == pytest.approx(found.distance.uncorrected / 8)


def test_without_noise_runs_no_spectra_differ():
    rng = np.random.default_rng(0)
    units = units_of(1000, 20)
    a, b = (learned(rng, rng.normal(middle, 0.3, 1000)) for middle in (3, 6))
    found = compare_spectra(a, b, [], SPAN, units, units.weights(10, 0), 0)
    assert found.p_documents <= 0.01
    assert found.p_seeds == NO_SECOND_SEED and found.outcome is Difference.UNDECIDED


def test_empty_range_and_runs_that_learn_nothing_have_no_spectra():
    rng = np.random.default_rng(0)
    units = units_of(100, 10)
    run = learned(rng, np.full(100, 1.0))
    with pytest.raises(UndefinedError, match="no token is learned"):
        compare_spectra(run, run, [], SPAN, units, units.weights(2, 0), 0)
    with pytest.raises(UndefinedError, match="range is empty"):
        compare_spectra(run, run, [], (3.0, 3.0), units, units.weights(2, 0), 0)
