"""Norm of the covariance C(n) of tokens n apart in a corpus, without forming the matrix.

Shapes: N tokens, D documents, M pairs of tokens at one lag, V distinct tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, svds

from megatron_tokscale.core.arrays import Floats, Integers32, Mask
from megatron_tokscale.core.errors import UndefinedError

_TOLERANCE = 1e-2  # tolerance of the singular vectors; its square is the tolerance of the norm


@dataclass(frozen=True)
class Documents:
    """Token ids of documents, end to end.

    Attributes:
        token_N: ids, renumbered from 0 to V - 1.
        document_N: document of each token, ascending from 0.
        n_distinct: number of distinct tokens V.
    """

    token_N: Integers32
    document_N: Integers32
    n_distinct: int

    @classmethod
    def from_sequences(cls, sequences: Sequence[ArrayLike]) -> Self:
        """Join the token ids of documents, of any vocabulary.

        Raises:
            UndefinedError: there are no tokens, or all are the same.
        """
        arrays = [np.asarray(sequence) for sequence in sequences]
        ids_N = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        distinct, token_N = np.unique(ids_N, return_inverse=True)
        if len(distinct) < 2:
            raise UndefinedError(
                f"documents of {len(distinct)} distinct tokens have no correlations; give others"
            )
        document_N = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays])
        return cls(token_N.astype(np.int32), document_N.astype(np.int32), len(distinct))

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return len(self.token_N)

    @cached_property
    def length_D(self) -> Floats:
        """Number of tokens in each document."""
        return np.bincount(self.document_N).astype(np.float64)

    @cached_property
    def counts_DV(self) -> csr_array:
        """Count of each token in each document."""
        shape = (len(self.length_D), self.n_distinct)
        return csr_array((np.ones(self.n_tokens), (self.document_N, self.token_N)), shape=shape)

    def permuted(self, rng: np.random.Generator) -> "Documents":
        """Return the documents with the tokens within each in random order."""
        order_N = np.argsort(self.document_N + rng.random(self.n_tokens))
        return Documents(self.token_N[order_N], self.document_N, self.n_distinct)


@dataclass(frozen=True)
class Pairs:
    """Pairs of tokens at one lag, both tokens in the same document.

    Attributes:
        documents: the documents.
        lag: distance n of the two tokens.
        centred: whether C(n) is the joint distribution minus its mean over all permutations of the
            tokens within each document, instead of minus the product of the marginals.
    """

    documents: Documents
    lag: int
    centred: bool

    def norm(self) -> float:
        """Return the top singular value of C(n)."""
        return self._top()[1]

    def norm_and_influence(self) -> tuple[float, Floats]:
        """Return the norm s, and its derivatives by the documents' weights.

        This is the infinitesimal jackknife: to first order s changes by u'(dC)v, a sum over pairs.
        It needs one singular value; leaving out one document at a time would need as many as there
        are documents. Resampling would add noise to the matrix, and so raise its norm.
        """
        u_V, norm, v_V = self._top()
        u_M, v_M = u_V[self._left_M], v_V[self._right_M]
        excess_M = u_M * v_M - self._expected(u_V, v_V, u_M, v_M) - norm
        n_documents = len(self.documents.length_D)
        return norm, np.bincount(self._document_M, excess_M, n_documents) / self.n

    @cached_property
    def n(self) -> int:
        """Number of pairs M."""
        return len(self._left_M)

    @cached_property
    def _within_N(self) -> Mask:
        document_N = self.documents.document_N
        return np.equal(document_N[: -self.lag], document_N[self.lag :])

    @cached_property
    def _left_M(self) -> Integers32:
        return self.documents.token_N[: -self.lag][self._within_N]

    @cached_property
    def _right_M(self) -> Integers32:
        return self.documents.token_N[self.lag :][self._within_N]

    @cached_property
    def _document_M(self) -> Integers32:
        return self.documents.document_N[: -self.lag][self._within_N]

    def _expected(self, u_V: Floats, v_V: Floats, u_M: Floats, v_M: Floats) -> Floats:
        """Return each pair's part of u'Ev, with E the matrix that C(n) subtracts."""
        if not self.centred:
            return np.asarray(u_M * v_M.mean() + v_M * u_M.mean() - u_M.mean() * v_M.mean())
        counts_DV, length_D = self.documents.counts_DV, self.documents.length_D
        both_D = (counts_DV @ u_V) * (counts_DV @ v_V) - counts_DV @ (u_V * v_V)
        return np.asarray((both_D / np.maximum(length_D * (length_D - 1), 1))[self._document_M])

    def _top(self) -> tuple[Floats, float, Floats]:
        """Return the top singular vectors and value.

        The start is a fixed random vector: C(n) maps a vector of ones to zero.
        """
        start_V = np.random.default_rng(0).standard_normal(self.documents.n_distinct)
        u, s, vt = svds(self._covariance(), k=1, tol=_TOLERANCE, v0=start_V)
        return np.asarray(u[:, 0]), float(s[0]), np.asarray(vt[0])

    def _covariance(self) -> LinearOperator:
        shape = (self.documents.n_distinct, self.documents.n_distinct)
        share_M = np.full(self.n, 1 / self.n)
        joint_VV = csr_array((share_M, (self._left_M, self._right_M)), shape=shape)
        flipped_VV = joint_VV.T.tocsr()
        if self.centred:
            shuffled = self._shuffled
            return LinearOperator(
                shape,
                matvec=lambda x_V: joint_VV @ x_V - shuffled(x_V),
                rmatvec=lambda x_V: flipped_VV @ x_V - shuffled(x_V),
                dtype=np.float64,
            )
        left_V, right_V = joint_VV.sum(axis=1), joint_VV.sum(axis=0)
        return LinearOperator(
            shape,
            matvec=lambda x_V: joint_VV @ x_V - left_V * (right_V @ x_V),
            rmatvec=lambda x_V: flipped_VV @ x_V - right_V * (left_V @ x_V),
            dtype=np.float64,
        )

    def _shuffled(self, x_V: Floats) -> Floats:
        """Return the mean of the joint distribution over permutations, times x.

        Any two places of a document of l tokens hold a and b with probability
        (c_a c_b - [a = b] c_a) / (l (l - 1)), c the document's counts.
        """
        counts_DV, weight_D = self.documents.counts_DV, self._weight_D
        squares = counts_DV.T @ (weight_D * (counts_DV @ x_V))
        return np.asarray(squares - self._repeat_V * x_V)

    @cached_property
    def _weight_D(self) -> Floats:
        """Share of the pairs in each document, divided by its number of ordered pairs of places."""
        length_D = self.documents.length_D
        n_pairs_D = np.maximum(length_D - self.lag, 0)
        return np.asarray(n_pairs_D / np.maximum(length_D * (length_D - 1), 1) / self.n)

    @cached_property
    def _repeat_V(self) -> Floats:
        """Weight of each token's pairs with itself in the mean over permutations."""
        return np.asarray(self.documents.counts_DV.T @ self._weight_D)
