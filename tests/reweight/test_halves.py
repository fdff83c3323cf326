"""Differences of losses over documents, against a loop over single tokens."""

from dataclasses import replace

import numpy as np
import pytest
from runs import plain_probe_set, write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.reweight import halves as halves_module
from megatron_tokscale.reweight.halves import Measurement, fall_steps, read_halves


@pytest.mark.parametrize("block", [2**20, 37, 1])
def test_halves_are_those_of_a_loop_over_tokens(tmp_path, monkeypatch, block):
    """Documents are in no order in the probe set, and some losses are not finite."""
    monkeypatch.setattr(halves_module, "_BLOCK_TOKENS", block)
    random = np.random.default_rng(0)
    probe_set = plain_probe_set(240)
    probe_set = replace(
        probe_set,
        document_BS=random.integers(0, 7, (30, 1)).astype(np.int32) * np.ones(8, np.int32),
        position_BS=random.integers(0, 50, (30, 8)).astype(np.int32),
    )
    loss_NK = random.normal(3, 1, (240, 3))
    loss_NK[random.random(240) < 0.1, 0] = np.nan
    loss_NK[random.random(240) < 0.1, 2] = np.inf
    run = write_run(tmp_path / "run", [10, 20, 40], loss_NK, probe_set)
    found = read_halves(Measurement(run, 10), Measurement(run, 40), [1, None, 0])
    assert found[1].document_W.size == 0
    for dataset, each in ((1, found[0]), (0, found[2])):
        expected = {}
        for n in np.flatnonzero(probe_set.dataset_N == dataset):
            count, total = expected.setdefault(int(probe_set.document_N[n]), ([0, 0], [0.0, 0.0]))
            fall = float(np.float32(loss_NK[n, 0])) - float(np.float32(loss_NK[n, 2]))
            if np.isfinite(fall):
                count[probe_set.position_N[n] % 2] += 1
                total[probe_set.position_N[n] % 2] += fall
        assert each.document_W.tolist() == sorted(expected)
        for w, document in enumerate(each.document_W.tolist()):
            count, total = expected[document]
            assert each.count_W2[w].tolist() == count
            np.testing.assert_allclose(each.sum_W2[w], total, atol=1e-12)
            assert each.mean_W[w] == pytest.approx(sum(total) / sum(count))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([0, 100, 400], (100, 400)),
        ([1, 70, 160, 400], (70, 400)),  # 0.70 of a quarter, against 1.6
        ([150, 400], (150, 400)),
        ([0, 1, 2, 3, 4], (1, 4)),
    ],
)
def test_a_fall_is_from_the_probe_nearest_a_quarter_to_the_last(tmp_path, steps, expected):
    run = write_run(tmp_path / "run", steps, np.ones((8, len(steps))))
    assert fall_steps(run) == expected


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([0, 60, 400], "the nearest is step 60; expected one from step 67 to 150"),
        ([0, 160, 400], "the nearest is step 160;"),
        ([0, 400], "its last probe, 400: there is none between"),
        ([0], "no probe near step 0"),
    ],
)
def test_a_run_without_a_probe_near_the_quarter_is_refused(tmp_path, steps, sentence):
    run = write_run(tmp_path / "run", steps, np.ones((8, len(steps))))
    with pytest.raises(TokscaleError, match=sentence) as caught:
        fall_steps(run)
    assert "--tokscale-replay" in str(caught.value)
    assert "\n" not in str(caught.value)
