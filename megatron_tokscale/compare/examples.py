"""The strongest gained and lost tokens, in context.

Shapes: N compared tokens.
"""

from pathlib import Path
from typing import Final

import numpy as np

from megatron_tokscale.compare.calls import Calls
from megatron_tokscale.compare.group_rows import Tables
from megatron_tokscale.compare.token_table import TokenTable
from megatron_tokscale.core.arrays import Floats32, Integers, Integers8, Integers32
from megatron_tokscale.probe.text import Tokenizer, load_tokenizer, passages
from megatron_tokscale.results.comparison import NO_SECOND_SEED, ChangedToken, Passage
from megatron_tokscale.store import WatchedTokens
from megatron_tokscale.store.token_state import TokenState

SHOWN: Final = 20
"""Tokens shown of each kind (our choice): a page."""


def tokenizer_of(path: Path | None, tokens: WatchedTokens) -> Tokenizer | None:
    """Return the tokenizer of a tokenizer.json, to show text; None without a path or without text.

    Raises:
        TokscaleError: the file cannot be read, or has too small a vocabulary.
    """
    if path is None or tokens.probe_set is None:
        return None
    return load_tokenizer(path, tokens.probe_set)


def strongest(
    calls: Calls,
    tables: Tables,
    token_N: Integers,
    tokens: WatchedTokens,
    tokenizer: Tokenizer | None,
) -> tuple[ChangedToken, ...]:
    """Return the called tokens with the largest z; without noise runs, the candidates.

    Args:
        calls: the calls of one direction.
        tables: the tables of the runs.
        token_N: number of each compared token among the watched ones.
        tokens: the watched tokens.
        tokenizer: tokenizer of their text; None to show ids.
    """
    chosen_N = calls.called_N if len(calls.seed_SN) else calls.candidate_N
    index = np.flatnonzero(chosen_N)
    index = index[np.argsort(-calls.z_N[index], kind="stable")][:SHOWN]
    texts: list[Passage | None] = [None] * len(index)
    if tokens.probe_set is not None:
        found = passages(tokens.probe_set, token_N[index].tolist(), tokenizer)
        texts = [Passage(each.before, each.target, each.after) for each in found]
    time_a_N, time_b_N = (_learned_time(each) for each in (tables.a, tables.b))
    return tuple(
        ChangedToken(
            token=int(token_N[i]),
            dataset=tokens.datasets[int(tokens.dataset_N[token_N[i]])],
            document=_known(tokens.document_N, token_N[i]),
            position=_known(tokens.position_N, token_N[i]),
            state_a=_label(tables.a.state_N[i]),
            state_b=_label(tables.b.state_N[i]),
            late_loss_a=float(tables.a.late_N[i]),
            late_loss_b=float(tables.b.late_N[i]),
            time_a=float(np.exp(time_a_N[i], dtype=np.float64)),
            time_b=float(np.exp(time_b_N[i], dtype=np.float64)),
            z=float(calls.z_N[i]),
            q_value=float(calls.q_value_N[i]) if len(calls.seed_SN) else NO_SECOND_SEED,
            passage=text,
        )
        for i, text in zip(index.tolist(), texts, strict=True)
    )


def _learned_time(table: TokenTable) -> Floats32:
    """Return the learning times of learned tokens in x; NaN for others."""
    return np.where(table.learned_N, table.time_N, np.float32(np.nan))


def _known(column_N: Integers32 | None, token: int) -> int | None:
    return None if column_N is None else int(column_N[token])


def _label(state: Integers8) -> str:
    return TokenState(int(state)).label
