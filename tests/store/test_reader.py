"""Mean losses of a run on disk. N tokens, K probe steps."""

import numpy as np
import pytest
from runs import write_run

from megatron_tokscale.core.errors import TokscaleError


def test_the_mean_loss_of_a_run_is_over_the_tokens_that_miss_no_loss(tmp_path):
    loss_NK = np.random.default_rng(0).uniform(1, 5, (16, 3)).astype(np.float32)
    loss_NK[3, 2] = np.nan
    run = write_run(tmp_path / "run", [0, 1, 4], loss_NK)
    whole_NK = np.delete(loss_NK, 3, axis=0).astype(float)
    np.testing.assert_allclose(run.mean_losses(), whole_NK.mean(axis=0), rtol=1e-6)


def test_a_run_whose_tokens_all_miss_a_loss_has_no_mean_loss(tmp_path):
    run = write_run(tmp_path / "run", [0, 1], np.tile([[np.nan, 1.0], [1.0, np.nan]], (8, 1)))
    with pytest.raises(TokscaleError, match=r"no token .* has finite losses at all 2 probes"):
        run.mean_losses()
