"""The scores of the documents that a reference run watched, from the fits of their tokens.

Shapes: N watched tokens, K probe steps, E events, W watched documents of a dataset, U watched
documents of all datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.names import listed, whole_prefix
from megatron_tokscale.fit import SigmoidFits, TokenClass
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.results import FittedRun
from megatron_tokscale.reweight.predict import Target
from megatron_tokscale.spectrum.density import finite_range
from megatron_tokscale.spectrum.events import events_of

_COMPARED_TOKENS: Final = 2**14
"""Watched tokens of a dataset that are compared with its files: enough to detect another tokenizer
or another order of documents, and read in seconds."""


@dataclass(frozen=True, eq=False)
class TokensByTime:
    """The tokens that a run had consumed at each x of its fits, piecewise linear between probes.

    Attributes:
        x_K: natural logarithm of the fits' time at the probes after training began, ascending.
        log_tokens_K: natural logarithm of the training tokens consumed by then, ascending.
    """

    x_K: Floats
    log_tokens_K: Floats

    @classmethod
    def from_fitted_run(cls, source: FittedRun) -> Self:
        """Read the consumed tokens of a fitted run.

        Raises:
            TokscaleError: the run has no record of its consumed tokens.
        """
        timed_K = np.isfinite(source.x_K)
        log_tokens_K = source.run.x_K("tokens")[timed_K]
        if not np.isfinite(log_tokens_K).all() or (np.diff(log_tokens_K) <= 0).any():
            raise TokscaleError(
                f"the probes of {source.run.path} do not hold the consumed tokens; expected "
                f"ascending counts; give another run"
            )
        return cls(source.x_K[timed_K], log_tokens_K)

    def log_tokens(self, x_E: Floats) -> Floats:
        """Return ln(consumed tokens) at `x_E`, which is inside the probed range."""
        return np.interp(x_E, self.x_K, self.log_tokens_K)


@dataclass(frozen=True, eq=False)
class WatchedDocuments:
    """The watched documents of a dataset and their scores.

    Attributes:
        document_W: index in the dataset's .idx, ascending.
        tokens_W: watched tokens whose losses are all finite.
        learning_time_W: ln(consumed tokens); NaN where nothing is learned.
        spread_W: standard deviation of the same; NaN likewise.
        drop_W: nats per token; NaN for a document without finite tokens.
        unlearned_W: share of tokens never learned; NaN likewise.
    """

    document_W: Integers
    tokens_W: Floats
    learning_time_W: Floats
    spread_W: Floats
    drop_W: Floats
    unlearned_W: Floats

    def rows(self, chosen_W: Mask) -> "WatchedDocuments":
        """Return the documents in a mask."""
        return WatchedDocuments(*(array[chosen_W] for array in vars(self).values()))

    def targets(self) -> dict[str, Target]:
        """Return the scores to fit a prediction to; learning times are weighted by drop."""
        by_drop_W = self.tokens_W * self.drop_W
        return {
            "learning_time": Target(self.learning_time_W, by_drop_W),
            "spread": Target(self.spread_W, by_drop_W),
            "drop": Target(self.drop_W, self.tokens_W),
            "unlearned": Target(self.unlearned_W, self.tokens_W),
        }


def find_datasets(probe_set: ProbeSet, portions: Sequence[Portion]) -> list[int | None]:
    """Return the number of each portion's dataset in a probe set; None if it is not watched.

    Raises:
        TokscaleError: the probe set is not of training documents, of other data, or from another
            tokenizer.
    """
    part = probe_set.origin.part if probe_set.origin else "train"
    if part != "train":
        raise TokscaleError(
            f"the run watched documents of the {part} part; expected training documents; watch "
            "them with `megatron-tokscale probe build --part train`"
        )
    datasets = probe_set.dataset_indices(
        [whole_prefix(portion.tokens.prefix) for portion in portions]
    )
    if all(dataset is None for dataset in datasets):
        raise TokscaleError(
            f"the run watched {listed(probe_set.datasets)}, the data are "
            f"{listed([portion.name for portion in portions])}; expected the same; give the data "
            "that the probe set was built from"
        )
    for portion, dataset in zip(portions, datasets, strict=True):
        if dataset is not None:
            _check_tokens(probe_set, np.flatnonzero(probe_set.dataset_N == dataset), portion.tokens)
    return datasets


def _check_tokens(probe_set: ProbeSet, index_N: Integers, tokens: IndexedTokens) -> None:
    """Compare up to 2^14 of a dataset's watched tokens with its files.

    Raises:
        TokscaleError: naming the first token that is missing or differs.
    """
    advice = "give the data, from the tokenizer, that the probe set was built from"
    document_N, position_N = probe_set.document_N[index_N], probe_set.position_N[index_N]
    if index_N.size and document_N.max() >= tokens.n_sequences:
        raise TokscaleError(
            f"the run watched document {document_N.max()} of {tokens.name}, but {tokens.prefix} "
            f"has {tokens.n_sequences}; {advice}"
        )
    if (position_N >= tokens.lengths[document_N]).any():
        raise TokscaleError(
            f"the run watched longer documents of {tokens.name} than {tokens.prefix} has; {advice}"
        )
    at = np.unique(np.linspace(0, index_N.size - 1, _COMPARED_TOKENS).round().astype(np.int64))
    for n in at if index_N.size else []:
        found = int(tokens.sequence(document_N[n])[position_N[n]])
        watched = int(probe_set.label_N[index_N[n]])
        if found != watched:
            raise TokscaleError(
                f"token {position_N[n]} of document {document_N[n]} is {found} in "
                f"{tokens.prefix}.bin, the run watched {watched}; {advice}"
            )


def read_watched(
    source: FittedRun, tokens_by_time: TokensByTime, datasets: Sequence[int | None]
) -> list[WatchedDocuments]:
    """Return the scores of all watched documents of each dataset, in one pass over the fits.

    Args:
        source: the fitted run.
        tokens_by_time: the tokens that it had consumed.
        datasets: numbers of the datasets in its probe set; None has no watched documents.
    """
    key_U, unit_N = number_documents(source.run.probe_set)
    n_units = len(key_U)

    # Sums over its tokens and events; times from the middle, so that their squares round little.
    centre = float(tokens_by_time.log_tokens_K.mean())
    tokens_U, unlearned_U, drop_U, first_U, second_U = np.zeros((5, n_units))
    at = 0
    for fits in SigmoidFits.blocks(source.run.paths.fits):
        unit = unit_N[at : at + len(fits)]
        at += len(fits)
        complete = fits.complete_N
        never = complete & fits.is_class(TokenClass.FLAT_UNLEARNED)
        events = events_of(fits).learned
        events = events.rows(events.midpoint_E >= finite_range(fits.x_K)[0])
        unit_E, drop_E = unit[events.token_E], events.drop_E
        time_E = tokens_by_time.log_tokens(events.midpoint_E) - centre
        tokens_U += np.bincount(unit[complete], minlength=n_units)
        unlearned_U += np.bincount(unit[never], minlength=n_units)
        drop_U += np.bincount(unit_E, drop_E, n_units)
        first_U += np.bincount(unit_E, drop_E * time_E, n_units)
        second_U += np.bincount(unit_E, drop_E * time_E**2, n_units)

    # The scores, dataset by dataset.
    mean_U = ratio(first_U, drop_U)
    variance_U = np.maximum(ratio(second_U, drop_U) - mean_U**2, 0)
    every_document = WatchedDocuments(
        document_W=key_U & (2**32 - 1),
        tokens_W=tokens_U,
        learning_time_W=mean_U + centre,
        spread_W=np.sqrt(variance_U),
        drop_W=ratio(drop_U, tokens_U),
        unlearned_W=ratio(unlearned_U, tokens_U),
    )
    return [
        every_document.rows(key_U >> 32 == (-1 if dataset is None else dataset))
        for dataset in datasets
    ]


def number_documents(probe_set: ProbeSet) -> tuple[Integers, Integers]:
    """Return a key of each watched document, ascending, and the document of each watched token.

    A key is the number of the dataset times 2^32, plus that of the document.
    """
    key_N = probe_set.dataset_N.astype(np.int64) << 32 | probe_set.document_N
    key_U, unit_N = np.unique(key_N, return_inverse=True)
    return key_U, unit_N


def ratio(above: Floats, below: Floats) -> Floats:
    """Return the ratio of positive numbers; NaN where the denominator is 0."""
    quotient = np.full(len(above), np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient
