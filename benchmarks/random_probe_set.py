"""A probe set of random ids, for measurements and checks that do not depend on the text."""

import numpy as np

from megatron_tokscale.probe import ProbeSet


def random_probe_set(n_sequences: int, seq_length: int, vocab_size: int) -> ProbeSet:
    """Return a probe set of one dataset, with a document in each sequence; all tokens are watched.

    Two calls with the same arguments return the same ids.
    """
    shape = (n_sequences, seq_length)
    ids_BS = np.random.default_rng(0).integers(0, vocab_size, (n_sequences, seq_length + 1))
    position_S = np.arange(1, seq_length + 1, dtype=np.int32)
    return ProbeSet(
        tokens_BS=ids_BS[:, :-1].astype(np.int32),
        labels_BS=ids_BS[:, 1:].astype(np.int32),
        mask_BS=np.ones(shape, bool),
        document_BS=np.repeat(np.arange(n_sequences, dtype=np.int32)[:, None], seq_length, axis=1),
        position_BS=np.tile(position_S, (n_sequences, 1)),
        dataset_BS=np.zeros(shape, np.int16),
        datasets=("random",),
        vocab_size=vocab_size,
    )
