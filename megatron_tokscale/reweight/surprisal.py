"""Surprisal of tokens and documents by the counts of single tokens; it needs no run.

Shapes: Q documents of a dataset, T tokens of a block, V vocabulary, L documents in a block.
"""

from collections.abc import Iterator, Sequence
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Floats32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.reweight.watched import ratio

_BLOCK_TOKENS: Final = 2**22  # tokens that are read at once: sums of 32 MB


def token_surprisal(portions: Sequence[Portion], vocab_size: int) -> Floats:
    """Return -ln p of every token id by its count in the training data plus one, in nats.

    Raises:
        TokscaleError: the data hold ids beyond the vocabulary.
    """
    count_V = np.zeros(vocab_size, dtype=np.int64)
    for portion in portions:
        lengths = portion.tokens.lengths
        start = int(lengths[: portion.sequences.start].sum(dtype=np.int64))
        stop = start + portion.n_tokens
        for first, id_T in _stream(portion.tokens):
            _check_ids(portion.tokens, id_T, vocab_size)
            inside_T = id_T[max(start - first, 0) : max(stop - first, 0)]
            count_V += np.bincount(inside_T, minlength=vocab_size)
    return np.asarray(np.log(count_V.sum() + vocab_size) - np.log(count_V + 1.0))


def document_surprisal(tokens: IndexedTokens, surprisal_V: Floats) -> Floats32:
    """Return the mean surprisal of each document's tokens in nats; NaN for empty ones."""
    sum_Q = np.zeros(tokens.n_sequences)
    end_Q = np.cumsum(tokens.lengths, dtype=np.int64)
    for first, id_T in _stream(tokens):
        # The documents that begin or end in the block, and where they do.
        total_T = np.concatenate([[0.0], np.cumsum(surprisal_V[id_T])])
        holding = np.searchsorted(end_Q, [first, first + id_T.size - 1], side="right")
        here = slice(int(holding[0]), int(holding[1]) + 1)
        stop_L = np.minimum(end_Q[here] - first, id_T.size)
        start_L = np.maximum(end_Q[here] - tokens.lengths[here] - first, 0)
        sum_Q[here] += total_T[stop_L] - total_T[start_L]
    return ratio(sum_Q, tokens.lengths.astype(np.float64)).astype(np.float32)


def _stream(tokens: IndexedTokens) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """Yield the tokens of a dataset by blocks: the number of the first, and their ids."""
    every_token = cast(NDArray[np.integer], tokens.stream(range(tokens.n_sequences)))
    for first in range(0, every_token.size, _BLOCK_TOKENS):
        yield first, every_token[first : first + _BLOCK_TOKENS]


def _check_ids(tokens: IndexedTokens, id_T: NDArray[np.integer], vocab_size: int) -> None:
    if id_T.dtype.kind == "f":
        raise TokscaleError(
            f"{tokens.prefix} holds {id_T.dtype} numbers; expected whole token ids; give other data"
        )
    lowest, highest = int(id_T.min()), int(id_T.max())
    if not 0 <= lowest <= highest < vocab_size:
        raise TokscaleError(
            f"{tokens.prefix} has token id {lowest if lowest < 0 else highest}, the vocabulary of "
            f"the run ends at {vocab_size - 1}; expected data from the run's tokenizer; give these"
        )
