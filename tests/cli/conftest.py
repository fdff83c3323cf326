"""Worlds and runs on which the verbs work."""

import os
from pathlib import Path

import numpy as np
import pytest
from damages import world_in
from jobs import Corpus
from runs import log_time, write_run
from scipy.special import expit

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.scores import (
    DocumentScores,
    Reliability,
    ScoreDetails,
    data_digest,
    identity_of,
    scores_path,
)
from megatron_tokscale.probe import ProbeSet


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of files in which every verb can run; it is the working directory."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    yield world_in(folder)
    os.chdir(before)


@pytest.fixture
def run(corpus: Corpus, tmp_path):
    """A run whose tokens follow planted sigmoids."""
    probe_set = ProbeSet.load(corpus.probe_set)
    generator = np.random.default_rng(0)
    n = probe_set.n_tokens
    midpoint_N, drop_N = generator.uniform(1, 6, n), generator.uniform(1, 4, n)
    steps = np.array([0, *sorted({round(2 ** (i / 4)) for i in range(41)})])
    curve_NK = expit((midpoint_N[:, None] - log_time(steps)) / 0.2)
    loss_NK = 0.5 + drop_N[:, None] * curve_NK + generator.normal(0, 0.05, (n, len(steps)))
    return write_run(tmp_path / "run", steps, loss_NK, probe_set).path


@pytest.fixture
def scores(corpus, tmp_path):
    """A folder with scores of both datasets: the later in the file, the later learned.

    Falls grow with the place in the file, target scores shrink.
    """
    folder = tmp_path / "scores"
    folder.mkdir()
    for prefix in corpus.prefixes:
        tokens = IndexedTokens.open(prefix)
        n = tokens.n_sequences
        DocumentScores(
            learning_time_Q=np.linspace(9, 13, n).astype(np.float32),
            **{f"{key}_Q": np.ones(n, np.float32) for key in ("spread", "drop", "surprisal")},
            unlearned_Q=np.zeros(n, np.float32),
            watched_Q=np.full(n, 8, np.int32),
            fall_Q=np.linspace(0.1, 0.5, n).astype(np.float32),
            target_Q=np.linspace(1, -1, n).astype(np.float32),
            dataset=identity_of(tokens),
            digest=data_digest(tokens),
            details=ScoreDetails(
                run_id="reference",
                log_tokens_range=(8.0, 14.0),
                reliability={"fall": Reliability(0.9, None, 0.3, 0.0133, n)},
                reference_parameters=1000,
                reference_tokens=2000,
            ),
        ).save(folder / scores_path(prefix).name)
    return folder
