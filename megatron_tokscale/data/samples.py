"""The documents that each sample of Megatron's GPT dataset reads, and the sample's scores.

The dataset lays its documents end to end in the order of `document_index`, as often as it has
epochs, and cuts this stream every S tokens; sample j is stretch number `shuffle_index[j]` of it. It
reads S + 1 tokens: the last is the label of the token before it, and the first token of the next
stretch (core/datasets/gpt_dataset.py).

Shapes: Q documents of the dataset's file, P documents in the order of the stream, N samples.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Mask
from megatron_tokscale.data.plan_parts import Cut
from megatron_tokscale.data.scores import DocumentScores


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a document, as part of a sample."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """The three indices of a GPT dataset, from samples to documents and back.

    Attributes:
        lengths_Q: tokens per document of the file.
        document_P: documents in the order of the stream.
        bound_N12: position in the stream's documents and offset in the document at which each
            stretch begins, and, in one more row, at which the last one ends.
        shuffle_N: the stretch that each sample reads.
        extra: tokens that a sample reads beyond its stretch: 1 for the last label, or 0 with
            `add_extra_token_to_sequence=False`.
    """

    lengths_Q: NDArray[np.integer]
    document_P: NDArray[np.integer]
    bound_N12: NDArray[np.integer]
    shuffle_N: NDArray[np.integer]
    extra: int = 1

    def __len__(self) -> int:
        return len(self.shuffle_N)

    def pieces(self, sample: int) -> list[Piece]:
        """Return the pieces of documents that a sample reads, in its order.

        Raises:
            IndexError: there is no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in the dataset; it has {len(self)}")
        stretch = int(self.shuffle_N[sample])
        (first, offset), (last, end) = (
            self.bound_N12[stretch].tolist(),
            self.bound_N12[stretch + 1].tolist(),
        )
        pieces = []
        for position in range(first, last + 1):
            document = int(self.document_P[position])
            stop = end + self.extra if position == last else int(self.lengths_Q[document])
            pieces.append(Piece(document, offset if position == first else 0, stop))
        return [piece for piece in pieces if piece.stop > piece.start]

    def holding(self, document: int) -> Integers:
        """Return the samples that read a token of a document, ascending."""
        found = [np.empty(0, np.int64)]
        if not self.lengths_Q[document]:
            return found[0]
        for position in np.flatnonzero(self.document_P == document):
            start = self._start_P[position]
            stop = start + self.lengths_Q[document]
            first = np.searchsorted(self._bound_N1[1:] + self.extra, start, side="right")
            last = np.searchsorted(self._bound_N1[:-1], stop, side="left")
            found.append(self.sample_of_stretch_N[first:last])
        return np.unique(np.concatenate(found))

    def read_by(self, numbers: Integers) -> Mask:
        """Return a mask of the file's documents of which any of the samples reads a token.

        Raises:
            IndexError: there is no such sample.
        """
        is_read_N = np.zeros(len(self), np.bool_)
        is_read_N[self.shuffle_N[numbers]] = True
        before_N1 = np.concatenate([[0], np.cumsum(is_read_N)])
        # Of each document the first stretch that reads it, and the first one behind it.
        stop_P = self._start_P + self._length_P
        first_P = np.searchsorted(self._bound_N1[1:] + self.extra, self._start_P, side="right")
        last_P = np.searchsorted(self._bound_N1[:-1], stop_P, side="left")
        is_read_P = before_N1[np.maximum(last_P, first_P)] > before_N1[first_P]
        found_Q = np.zeros(len(self.lengths_Q), np.bool_)
        found_Q[self.document_P[is_read_P & (self._length_P > 0)]] = True
        return found_Q

    @cached_property
    def _start_P(self) -> Integers:
        """Place in the stream at which each document begins."""
        return np.asarray(np.cumsum(self._length_P) - self._length_P)

    @cached_property
    def _length_P(self) -> Integers:
        return np.asarray(self.lengths_Q[self.document_P], dtype=np.int64)

    @cached_property
    def _bound_N1(self) -> Integers:
        """Place in the stream at which each stretch begins, and the last one ends."""
        bound_N1 = self._start_P[self.bound_N12[:, 0]] + self.bound_N12[:, 1].astype(np.int64)
        return np.asarray(bound_N1)

    @cached_property
    def sample_of_stretch_N(self) -> Integers:
        """The sample that reads each stretch: the inverse of `shuffle_N`."""
        sample_N = np.empty(len(self), np.int64)
        sample_N[self.shuffle_N] = np.arange(len(self))
        return sample_N

    @cached_property
    def _labels_N(self) -> tuple[Integers, ...]:
        """Start and stop of each stretch's labels in the stream, and their end documents."""
        # The first token of a stretch is no label; the token behind its end is one.
        start_N = self._bound_N1[:-1] + 1
        stop_N = np.maximum(self._bound_N1[1:] + self.extra, start_N)
        # Of documents that start together all but the last are empty.
        first_N, last_N = (
            np.searchsorted(self._start_P, token_N, side="right") - 1
            for token_N in (start_N, np.maximum(stop_N - 1, start_N))
        )
        return start_N, stop_N, first_N, last_N

    @property
    def n_labels_N(self) -> Integers:
        """Number of tokens that each sample predicts."""
        return self.n_labels_of(np.arange(len(self)))

    def n_labels_of(self, numbers: Integers) -> Integers:
        """Return the number of tokens that each of some samples predicts."""
        start_N, stop_N, *_ = self._labels_N
        return np.asarray((stop_N - start_N)[self.shuffle_N[numbers]])

    def sum_over_labels(self, value_Q: Floats) -> Floats:
        """Return, for each sample, the sum of the document's value over the tokens it predicts.

        A value that is not finite spoils every sample that follows it in the stream.
        """
        value_P, length_P = value_Q[self.document_P], self._length_P
        before_P1 = np.concatenate([[0.0], np.cumsum(value_P * length_P)])
        start_N, stop_N, first_N, last_N = self._labels_N
        # Piece by piece, with the difference of two large sums for whole documents only: values
        # earlier in the stream then leave no rounding in samples whose values are all zero.
        head_N = (self._start_P[first_N] + length_P[first_N] - start_N) * value_P[first_N]
        tail_N = (stop_N - self._start_P[last_N]) * value_P[last_N]
        between_N = before_P1[last_N] - before_P1[first_N + 1]
        within_N = (stop_N - start_N) * value_P[first_N]
        sum_N = np.where(first_N == last_N, within_N, head_N + between_N + tail_N)
        return np.asarray(sum_N[self.shuffle_N])


@dataclass(frozen=True, eq=False)
class SampleScores:
    """Scores of samples: means over the tokens that they predict, each with its document's score.

    Tokens of documents that have no score are left out of the mean.

    Attributes:
        learning_time_N: mean ln(consumed tokens of the reference run) at which a sample's drop
            happens, weighted by drop; NaN without a drop.
        spread_N: standard deviation of the same; NaN likewise.
        drop_N: learnable drop in nats per token; NaN where no token has a score.
        unlearned_N: share of tokens never learned; NaN likewise.
        surprisal_N: mean -ln of the tokens' frequencies, in nats.
    """

    learning_time_N: Floats
    spread_N: Floats
    drop_N: Floats
    unlearned_N: Floats
    surprisal_N: Floats

    @classmethod
    def from_document_scores(
        cls, scores: DocumentScores, index: SampleIndex, cut: Cut | None = None
    ) -> Self:
        """Return the scores of the samples of a dataset.

        Args:
            scores: scores of the dataset's documents.
            index: the dataset's indices.
            cut: compute only the scores that this cut ranks samples by; the others are NaN.

        Raises:
            TokscaleError: learning times are to be computed, and the scores have none.
        """
        total, unknown_N = index.sum_over_labels, np.full(len(index), np.nan)
        time_N = spread_N = drop_N = unlearned_N = surprisal_N = unknown_N
        if cut is None or cut.order == "frequency":
            surprisal_N = _mean_of_known(scores.surprisal_Q, index)
        if cut is None or cut.order == "learning-time":
            fitted = scores.require_fitted()
            unlearned_N = _mean_of_known(fitted.unlearned_Q, index)
            drop_Q = np.nan_to_num(fitted.drop_Q.astype(np.float64))
            time_Q = np.where(drop_Q > 0, fitted.learning_time_Q, 0.0).astype(np.float64)
            total_drop_N = total(drop_Q)
            with np.errstate(invalid="ignore", divide="ignore"):
                mean_N = total(drop_Q * time_Q) / total_drop_N
            time_N = np.where(total_drop_N > 0, mean_N, np.nan)
        if cut is None:
            drop_N = _mean_of_known(fitted.drop_Q, index)
            spread_Q = np.where(drop_Q > 0, fitted.spread_Q, 0.0).astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                square_N = total(drop_Q * (spread_Q**2 + time_Q**2)) / total_drop_N
            spread_N = np.sqrt(np.maximum(square_N - time_N**2, 0.0))
        return cls(time_N, spread_N, drop_N, unlearned_N, surprisal_N)

    def ranked(self, cut: Cut, n_unlearned: int) -> Integers:
        """Return the samples in the order in which a cut lays them into strata.

        Args:
            cut: the rule.
            n_unlearned: size of the stratum of samples that are never learned; they come last.
        """
        n = len(self.drop_N)
        if cut.order == "frequency":
            return np.argsort(self.surprisal_N, kind="stable")
        by_unlearned = np.argsort(np.nan_to_num(self.unlearned_N), kind="stable")
        learned = np.sort(by_unlearned[: n - n_unlearned])
        # A sample without a drop is known from the start, unless it counts as never learned.
        time_N = np.nan_to_num(self.learning_time_N, nan=-np.inf)
        order = np.argsort(time_N[learned], kind="stable")
        return np.concatenate([learned[order], by_unlearned[n - n_unlearned :]])


def _mean_of_known(value_Q: Floats32, index: SampleIndex) -> Floats:
    """Return each sample's mean over the tokens whose document has a value; NaN without any."""
    is_known_Q = ~np.isnan(value_Q)
    sum_N = index.sum_over_labels(np.where(is_known_Q, value_Q, 0.0).astype(np.float64))
    count_N = index.n_labels_N if is_known_Q.all() else index.sum_over_labels(is_known_Q * 1.0)
    return np.where(count_N > 0, sum_N / np.maximum(count_N, 1.0), np.nan)
