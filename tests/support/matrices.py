"""Files of token losses, as other people keep them.

Shapes: N tokens, K columns.
"""

import numpy as np

N_TOKENS = 40
VALUES_T = np.array([0.0, 1, 2, 4, 8, 16, 32])


def losses(n_tokens=N_TOKENS, n_columns=7, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).uniform(0, 8, (n_tokens, n_columns)).astype(dtype)


def write_interchange(folder, loss_NK=None, value_K=VALUES_T, name="T", **arrays):
    """A losses.npz with samples of eight tokens, in `folder`; `arrays` are added or replace."""
    folder.mkdir(parents=True, exist_ok=True)
    loss_NK = losses(n_columns=len(value_K)) if loss_NK is None else loss_NK
    number_N = np.arange(len(loss_NK))
    content = {
        "axis_values": value_K,
        "loss_matrix": loss_NK,
        "axis_name": np.array([name]),
        "sample_id": number_N // 8,
        "token_pos": number_N % 8,
    } | arrays
    known = {each: array for each, array in content.items() if array is not None}
    np.savez(folder / "losses.npz", **known)
    return folder / "losses.npz"
