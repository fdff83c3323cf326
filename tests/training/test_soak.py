"""A few of the kills of `make soak`."""

import pytest
from jobs import Corpus
from soak import soak

pytestmark = pytest.mark.megatron


def test_kills_at_random_moments_lose_and_double_nothing(corpus: Corpus, tmp_path):
    lives = soak(tmp_path, corpus, n_kills=3, seed=5)
    assert len(lives) == 3
    assert any(life["last probe"] > 0 for life in lives)
