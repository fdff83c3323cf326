"""Which datasets a figure shows: a blend may have more than can be told apart."""

import numpy as np

from megatron_tokscale.probe import ProbeSet

MAX_SHOWN = 6


def largest_datasets(probe_set: ProbeSet) -> dict[int, str]:
    """Index and name of at most six datasets, those with the most watched tokens, in order."""
    count_D = np.bincount(probe_set.dataset_N, minlength=len(probe_set.datasets))
    chosen = np.argsort(-count_D, kind="stable")[:MAX_SHOWN].tolist()
    return {d: probe_set.datasets[d] for d in sorted(chosen)}


def left_out(shown: dict[int, str], probe_set: ProbeSet) -> str:
    """A sentence for the caption if not every dataset is shown."""
    count = len(probe_set.datasets)
    return f" Shown: the {len(shown)} largest of {count} datasets." if len(shown) < count else ""
