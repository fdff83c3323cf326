"""Predicted scores of unwatched documents, by ridge regression on their tokens.

Shapes: Q documents of a dataset, W watched ones, L some of either, T tokens, C hashed columns,
P columns in all, A ridge penalties, F folds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.arrays import Floats, Floats32, Integers, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.scores import HeldOutError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MIN_DOCUMENTS: Final = 50  # least documents to fit; our choice: ten in each of five folds
FIRST_TOKENS: Final = 4096  # tokens read per document; our choice: enough to show its kind

_COLUMNS: Final = 2**16  # hashed tokens and pairs; `_mixed` keeps 16 bits
_PENALTIES: Final = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # for features of mean square 1
_FOLDS: Final = 5
_TOLERANCE: Final = 1e-3  # relative tolerance of the solver: far below the noise of a fold's error
_TRAINING_TOKENS: Final = 2**24  # most tokens to fit; our choice: some minutes and a gigabyte
_BLOCK_TOKENS: Final = 2**21  # tokens whose features are made at once: some 50 MB


@dataclass(frozen=True, eq=False)
class Target:
    """A score to predict, with its values for the watched documents.

    Attributes:
        value_W: values.
        weight_W: weight of each value in the fit; 0 where the value is not known.
    """

    value_W: Floats
    weight_W: Floats


def held_out_error(value_W: Floats, predicted_W: Floats, weight_W: Floats) -> HeldOutError:
    """Return the error of predictions of values that are not all the same."""
    from scipy.stats import rankdata

    share_W = weight_W / weight_W.sum()
    variance = float(share_W @ (value_W - share_W @ value_W) ** 2)
    error = float(share_W @ (value_W - predicted_W) ** 2)
    spearman = None
    if np.ptp(predicted_W) > 0:
        ranks = rankdata(value_W), rankdata(predicted_W)
        spearman = float(np.corrcoef(*ranks)[0, 1])
    r2 = 1 - error / variance
    return HeldOutError(len(value_W), r2, spearman, float(np.sqrt(error)), float(np.sqrt(variance)))


@dataclass(frozen=True, eq=False)
class _Model:
    """Linear model of one target; its predictions are NaN if no document has a value.

    `held_out_W` are the predictions for the fitted documents, each by the folds that it is not in.
    """

    coefficient_P: Floats
    intercept: float
    low: float
    high: float
    held_out: HeldOutError
    held_out_W: Floats = field(default_factory=lambda: np.empty(0))

    def predict(self, design_LP: "csr_matrix") -> Floats:
        raw_L = design_LP @ self.coefficient_P + self.intercept
        return np.asarray(np.clip(raw_L, self.low, self.high))


@dataclass(frozen=True, eq=False)
class Features:
    """Features of every document of a dataset, from its tokens and its mean surprisal.

    They are the frequencies of its tokens and of their pairs among its first 4,096 tokens, hashed
    into 2^16 columns; its mean surprisal; the logarithm of its length.

    Attributes:
        tokens: the dataset.
        surprisal_Q: mean surprisal of the documents in nats; NaN for empty ones.
    """

    tokens: IndexedTokens
    surprisal_Q: Floats32

    def hashed(self, document_L: Integers) -> "csr_matrix":
        """Return frequencies of documents' tokens and pairs, float32, by hashed columns."""
        from scipy.sparse import csr_matrix

        # The first tokens of the documents, one after the other.
        length_L = self.used_L(document_L)
        end_L = np.cumsum(length_L)
        n_tokens = int(end_L[-1]) if end_L.size else 0
        within_T = np.arange(n_tokens) - np.repeat(end_L - length_L, length_L)
        itemsize = np.dtype(self.tokens.dtype).itemsize
        offset_L = (self.tokens.offsets[document_L] - self.tokens.offsets[0]) // itemsize
        every_token = self.tokens.stream(range(self.tokens.n_sequences))
        id_T = every_token[np.repeat(offset_L, length_L) + within_T].astype(np.uint64)

        # A column for each token, and for each pair with the token before it.
        previous_T = np.concatenate([id_T[:1], id_T[:-1]])
        pair_T = (previous_T + np.uint64(1)) << np.uint64(32) | id_T
        column_T2 = np.stack([_mixed(id_T), _mixed(pair_T)], axis=1)

        # Their frequencies in the document.
        share_T2 = np.repeat(1 / np.maximum(length_L, 1), length_L).astype(np.float32)
        share_T2 = np.repeat(share_T2[:, None], 2, axis=1)
        share_T2[within_T == 0, 1] = 0  # the first token follows none
        ends = 2 * np.concatenate([[0], end_L])
        shape = len(document_L), _COLUMNS
        return csr_matrix((share_T2.ravel(), column_T2.ravel(), ends), shape=shape)

    def surprisal_and_length(self, document_L: Integers) -> Floats:
        """Return mean surprisal and logarithm of the length, of shape (L, 2)."""
        length_L = self.tokens.lengths[document_L].astype(np.float64)
        return np.stack([self.surprisal_Q[document_L], np.log(length_L)], axis=1, dtype=np.float64)

    def used_L(self, document_L: Integers) -> Integers:
        """Return the number of tokens of each document that are read."""
        return np.minimum(self.tokens.lengths[document_L], FIRST_TOKENS).astype(np.int64)


def _mixed(key_T: NDArray[np.uint64]) -> Integers32:
    """Return columns of keys: the upper 16 bits of splitmix64's mixer (Steele et al. 2014)."""
    key_T = key_T + np.uint64(0x9E3779B97F4A7C15)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key_T = (key_T ^ (key_T >> np.uint64(shift))) * np.uint64(multiplier)
    return ((key_T ^ (key_T >> np.uint64(31))) >> np.uint64(48)).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Predictor:
    """Ridge regressions of several targets on the same features. Make one with `fit_predictor`.

    Attributes:
        features: features of the dataset it was made for.
        document_W: the watched documents that it was fitted to.
    """

    features: Features
    document_W: Integers
    _scaling: "_Scaling"
    _models: Mapping[str, _Model]

    @property
    def held_out(self) -> dict[str, HeldOutError]:
        """Error of each target on documents that were held out, in five folds."""
        return {name: model.held_out for name, model in self._models.items()}

    def predict_held_out(self, name: str, document_L: Integers) -> Floats:
        """Return one target for documents, those fitted by folds that they are not in."""
        predicted_L = self.predict(document_L)[name]
        order_W = np.argsort(self.document_W)
        at_L = np.searchsorted(self.document_W, document_L, sorter=order_W)
        at_L = order_W[np.minimum(at_L, len(order_W) - 1)]
        is_fitted_L = self.document_W[at_L] == document_L
        return np.where(is_fitted_L, self._models[name].held_out_W[at_L], predicted_L)

    def predict(self, document_L: Integers) -> dict[str, Floats]:
        """Return each target for documents that are not empty, in bounded memory.

        A prediction stays within the range of the fitted documents; it is NaN
        where no document had a value.
        """
        parts: list[dict[str, Floats]] = []
        for block in blocks(self.features.used_L(document_L), _BLOCK_TOKENS):
            design_LP = self._scaling.design(self.features, document_L[block])
            parts.append({name: m.predict(design_LP) for name, m in self._models.items()})
        return {
            name: np.concatenate([np.empty(0), *(part[name] for part in parts)])
            for name in self._models
        }


def fit_predictor(
    features: Features,
    document_W: Integers,
    targets: Mapping[str, Target],
    *,
    seed: int,
    progress: Progress | None = None,
) -> Predictor:
    """Fit ridge regressions of `targets` to the watched documents.

    The penalty is the one with the least error in five folds. The reported errors are on held-out
    documents, with the penalty chosen on the other folds.

    Args:
        features: features of the dataset.
        document_W: the watched documents, none empty; above 2^24 tokens to read, a random part of
            them is used.
        targets: scores to predict.
        seed: seed of the folds, and of the draw of documents.
        progress: receiver of the name of each stage; None for none.

    Raises:
        TokscaleError: fewer than 50 documents, or scikit-learn is not installed.
    """
    progress = progress or NoProgress()
    check_installed()
    if len(document_W) < MIN_DOCUMENTS:
        raise TokscaleError(
            f"{features.tokens.prefix} has {len(document_W)} watched documents, too few to learn a "
            f"prediction from; expected {MIN_DOCUMENTS}; watch more of them"
        )

    # The documents to fit, in random order, and their folds.
    random = np.random.default_rng(seed)
    order_W = random.permutation(len(document_W))
    used_W = np.cumsum(features.used_L(document_W[order_W]))
    order_W = order_W[: max(int(np.searchsorted(used_W, _TRAINING_TOKENS)) + 1, MIN_DOCUMENTS)]
    fold_W = np.arange(len(order_W)) % _FOLDS

    # One model for each target.
    scaling = _Scaling.from_features(features, document_W[order_W])
    design_WP = scaling.design(features, document_W[order_W])
    design_WP.sum_duplicates()
    models = {}
    for name, target in targets.items():
        progress.stage(f"predicting {name.replace('_', ' ')}")
        drawn = Target(target.value_W[order_W], target.weight_W[order_W])
        models[name] = _fit_target(design_WP, drawn, fold_W)
    return Predictor(features, document_W[order_W], scaling, models)


def check_installed() -> None:
    """Refuse to predict without scikit-learn.

    Raises:
        TokscaleError: it is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise TokscaleError(
            "predicting scores needs scikit-learn, which is not installed; run `pip install "
            "'megatron-tokscale[scores]'`, or score the watched documents alone (--no-predict)"
        ) from error


def blocks(size_L: Integers, most: int) -> Iterator[slice]:
    """Yield slices of documents of at most `most` tokens in all, or of one longer document."""
    end_L = np.cumsum(size_L)
    start = 0
    while start < len(size_L):
        before = int(end_L[start] - size_L[start])
        stop = max(int(np.searchsorted(end_L, before + most, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True)
class _Scaling:
    """The scale of the features: ridge penalties compare coefficients, so all get one scale.

    The hashed columns keep their scale among themselves and have a mean square of 1 per document
    together; mean surprisal and log length have a mean of 0 and a variance of 1.
    """

    hashed: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def from_features(cls, features: Features, document_W: Integers) -> Self:
        """Return the scale of some documents' features."""
        square = 0.0
        for block in blocks(features.used_L(document_W), _BLOCK_TOKENS):
            hashed_LC = features.hashed(document_W[block])
            hashed_LC.sum_duplicates()
            square += float((hashed_LC.data.astype(np.float64) ** 2).sum())
        other_W2 = features.surprisal_and_length(document_W)
        deviation = other_W2.std(axis=0)
        return cls(
            float(np.sqrt(len(document_W) / square)),
            tuple(other_W2.mean(axis=0).tolist()),
            tuple(np.where(deviation > 0, deviation, 1.0).tolist()),
        )

    def design(self, features: Features, document_L: Integers) -> "csr_matrix":
        """Return the scaled features of documents, float32, of shape (L, P)."""
        from scipy.sparse import csr_matrix, hstack

        hashed_LC = features.hashed(document_L)
        hashed_LC.data *= np.float32(self.hashed)
        other_L2 = (features.surprisal_and_length(document_L) - self.mean) / self.deviation
        other = csr_matrix(other_L2.astype(np.float32))
        return csr_matrix(hstack([hashed_LC, other], format="csr"))


def _fit_target(design_WP: "csr_matrix", target: Target, fold_W: Integers) -> _Model:
    """Return the ridge regression of a target, with its error on held-out folds."""
    # The mean, where there is nothing to fit.
    known_W = target.weight_W > 0
    value_W, fold_W = target.value_W[known_W], fold_W[known_W]
    n_known = len(value_W)
    if n_known < MIN_DOCUMENTS or np.ptp(value_W) == 0:
        weight_W = target.weight_W[known_W]
        mean = float(np.average(value_W, weights=weight_W)) if n_known else float("nan")
        held_out_W = np.full(len(known_W), mean)
        nothing_P = np.zeros(design_WP.shape[1])
        return _Model(nothing_P, mean, mean, mean, HeldOutError(n_known), held_out_W)

    # Predictions of each fold from the other folds, for each penalty.
    weight_W = target.weight_W[known_W] / target.weight_W[known_W].mean()
    design_WP = design_WP[known_W]
    predicted_AW = np.empty((len(_PENALTIES), n_known))
    for fold in range(_FOLDS):
        learn_W = fold_W != fold
        learned = design_WP[learn_W], value_W[learn_W], weight_W[learn_W]
        held_out_LP = design_WP[~learn_W]
        for a, penalty in enumerate(_PENALTIES):
            predicted_AW[a, ~learn_W] = _ridge(*learned, penalty).predict(held_out_LP)

    # The best penalty over all folds, and for each fold the best over the other folds.
    square_AW = weight_W * (predicted_AW - value_W) ** 2
    square_AF = np.stack([square_AW[:, fold_W == f].sum(axis=1) for f in range(_FOLDS)], axis=1)
    chosen_F = np.argmin(square_AF.sum(axis=1, keepdims=True) - square_AF, axis=0)
    predicted_W = predicted_AW[chosen_F[fold_W], np.arange(n_known)]
    model = _ridge(design_WP, value_W, weight_W, _PENALTIES[square_AF.sum(axis=1).argmin()])
    held_out = held_out_error(value_W, predicted_W, weight_W)
    held_out_W = np.full(len(known_W), np.nan)
    held_out_W[known_W] = predicted_W
    return replace(model, held_out=held_out, held_out_W=held_out_W)


def _ridge(design_WP: "csr_matrix", value_W: Floats, weight_W: Floats, penalty: float) -> _Model:
    from sklearn.linear_model import Ridge

    mean = float(np.average(value_W, weights=weight_W))
    ridge: Any = Ridge(alpha=penalty, solver="lsqr", tol=_TOLERANCE)
    ridge.fit(design_WP, value_W - mean, sample_weight=weight_W)
    return _Model(
        np.asarray(ridge.coef_, dtype=np.float64),
        float(ridge.intercept_) + mean,
        float(value_W.min()),
        float(value_W.max()),
        HeldOutError(len(value_W)),
    )
