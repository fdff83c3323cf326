"""Tables of tokens made by hand."""

import numpy as np

from megatron_tokscale.compare.token_table import SHIFTS, TokenTable
from megatron_tokscale.fit import TokenClass
from megatron_tokscale.store.token_state import TokenState


def table(n_tokens, **columns):
    """A table of learned tokens that do not move, with noise of 0.1 nats in the late loss."""
    plain = {
        "complete_N": np.ones(n_tokens, bool),
        "state_N": np.full(n_tokens, TokenState.LEARNED, np.int8),
        "class_N": np.full(n_tokens, TokenClass.FALLING, np.int8),
        "late_N": np.zeros(n_tokens, np.float32),
        "variance_N": np.full(n_tokens, 0.01, np.float32),
        "time_N": np.full(n_tokens, np.nan, np.float32),
        "drop_N": np.zeros(n_tokens, np.float32),
        "moved_NH": np.zeros((n_tokens, len(SHIFTS)), np.float32),
    }
    return TokenTable(**plain | columns)
