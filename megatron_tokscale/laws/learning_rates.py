"""The learning rate of every step of a run, from run.json, checked against what the job recorded.

Shapes: T steps, K probe steps.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import UndefinedError
from megatron_tokscale.store import Run

_TOLERANCE = 1e-3

Array = NDArray[np.float64]


def learning_rates(run: Run) -> Array:
    """learning_rate_T: Megatron's constant, linear or cosine schedule with its linear warm-up.

    Raises:
        UndefinedError: another schedule, or one whose sums are not those recorded at the probes.
    """
    about = run.info.get("learning_rate", {})
    peak, low = float(about.get("peak") or 0), float(about.get("minimum") or 0)
    warmup, decay = int(about.get("warmup_iters") or 0), about.get("decay_iters")
    n_steps = int(run.step_K[-1])
    step_T = np.arange(n_steps, dtype=np.float64)
    ratio_T = np.clip((step_T - warmup) / max(int(decay or n_steps) - warmup, 1), 0, 1)
    shapes = {
        "constant": np.ones(n_steps),
        "linear": 1 - ratio_T,
        "cosine": (np.cos(np.pi * ratio_T) + 1) / 2,
    }
    style = str(about.get("decay_style"))
    if style not in shapes:
        raise UndefinedError(
            f"{run.path} has the learning-rate schedule {style}, which run.json does not tell"
        )
    rate_T = low + (peak - low) * shapes[style]
    rate_T[:warmup] = peak * step_T[:warmup] / max(warmup, 1)
    sum_K = np.concatenate([[0.0], np.cumsum(rate_T)])[run.step_K]
    recorded_K = np.array([record.lr_sum for record in run.records])
    if not np.allclose(sum_K, recorded_K, rtol=_TOLERANCE, atol=_TOLERANCE * peak):
        raise UndefinedError(
            f"the learning rates that {run.path} recorded are not those of its run.json"
        )
    return np.asarray(rate_T)
