"""Scores of the documents of one dataset, in a file beside its .bin/.idx.

Shapes: Q documents of a dataset (the sequences of its .idx file, all splits).
"""

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, cast

import numpy as np

from megatron_tokscale.core.arrays import Floats32, Integers32
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.core.schemas import SCORES_SCHEMA
from megatron_tokscale.core.tensors import TensorFile
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.names import listed, whole_prefix
from megatron_tokscale.data.plan_parts import DatasetIdentity

KIND: Final = "tokscale-scores"
_FILE: Final = TensorFile(KIND, SCORES_SCHEMA, "score file", "megatron-tokscale score")
_AGAIN: Final = "make it again with `megatron-tokscale score`"
SUFFIX: Final = ".tokscale.safetensors"

_END_TOKENS: Final = 2**20
"""Tokens at either end of a dataset that its digest reads: a few megabytes of a large corpus."""

_RANGES: Final[dict[str, tuple[type[np.generic], float, float]]] = {
    "learning_time": (np.float32, -np.inf, np.inf),
    "spread": (np.float32, 0.0, np.inf),
    "drop": (np.float32, 0.0, np.inf),
    "unlearned": (np.float32, 0.0, 1.0),
    "surprisal": (np.float32, 0.0, np.inf),
    "watched": (np.int32, 0.0, np.inf),
    "fall": (np.float32, -np.inf, np.inf),
    "target": (np.float32, -np.inf, np.inf),
}
"""Type, least and largest value of each array, in the order of the file and the fingerprint."""

_ALWAYS: Final = ("surprisal", "watched")  # the arrays that every score file has
_FITTED: Final = ("learning_time", "spread", "drop", "unlearned")  # all of them, or none

_ORDERS: Final = {
    "learning-time": ("learning_time", "learning times"),
    "frequency": ("surprisal", "surprisals"),
    "fall": ("fall", "falls"),
    "target": ("target", "target scores"),
}
"""The array by which each order of a cut ranks documents, and its name in messages."""


@dataclass(frozen=True)
class HeldOutError:
    """Error of predicted scores on documents that the predictor was not fitted to.

    Attributes:
        documents: number of documents with a value.
        r2: share of the weighted variance that is predicted; None if the prediction is the mean,
            as there are too few documents, or all have one value.
        spearman: rank correlation of prediction and value, unweighted; None likewise.
        rmse: weighted root mean square error, in units of the score; None likewise.
        rmse_of_mean: the same error of the weighted mean of all values; None likewise.
    """

    documents: int
    r2: float | None = None
    spearman: float | None = None
    rmse: float | None = None
    rmse_of_mean: float | None = None


@dataclass(frozen=True)
class PredictorDetails:
    """The model that predicted the scores of unwatched documents.

    Attributes:
        model: its kind, in words.
        documents: watched documents that it was fitted to.
        held_out: its error on held-out documents, by the name of the score.
    """

    model: str
    documents: int
    held_out: Mapping[str, HeldOutError]


@dataclass(frozen=True)
class Reliability:
    """Agreement of a score with the true value of a document, of one dataset.

    Attributes:
        watched: split-half reliability of the score of a watched document: the share of its
            variance between documents that is no noise; None if it cannot be estimated.
        predicted: squared correlation of the predicted score with the true one, on held-out folds;
            None without a prediction, or where `watched` may be chance.
        mean: mean score over the tokens of the watched documents, in nats per token.
        signal_variance: variance between documents that is no noise, in squared nats per token.
        documents: watched documents with a score.
    """

    watched: float | None
    predicted: float | None
    mean: float
    signal_variance: float
    documents: int


@dataclass(frozen=True)
class ScoreDetails:
    """Origin of scores; outside their fingerprint.

    Attributes:
        version: version of megatron-tokscale that made them.
        run: path of the reference run.
        run_id: id of the reference run.
        probe_fingerprint: fingerprint of its probe set.
        fitted_time: the time of its fits: "step", "tokens" or "lr-sum".
        log_tokens_range: ln(consumed tokens) of the reference run at its first and last probe;
            None if not known.
        min_tokens: watched tokens that a document needs for a score of its own.
        vocab_size: size of the vocabulary that surprisal counts.
        surprisal_of: names of the datasets whose training parts surprisal counts.
        prefix: whole prefix of the data, which tells namesakes apart.
        train_documents: first document of the training part, and the one after its last.
        predictor: the model that predicted the other documents' scores, if one did.
        reliability: reliability of "fall" and of "target", where the file has them.
        fall_tokens: training tokens that the reference run had consumed at the two probes between
            which a fall is measured; None without falls, or if not known.
        reference_parameters: parameters of the reference run's model; None if not known.
        reference_tokens: training tokens that the reference run consumed; None if not known.
    """

    version: str = ""
    run: str = ""
    run_id: str = ""
    probe_fingerprint: str = ""
    fitted_time: str = ""
    log_tokens_range: tuple[float, float] | None = None
    min_tokens: int | None = None
    vocab_size: int | None = None
    surprisal_of: tuple[str, ...] = ()
    prefix: str = ""
    train_documents: tuple[int, int] | None = None
    predictor: PredictorDetails | None = None
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    fall_tokens: tuple[int, int] | None = None
    reference_parameters: int | None = None
    reference_tokens: int | None = None

    @property
    def reference(self) -> str:
        """Id of the reference run, or its path where the id is not known."""
        return self.run_id or self.run


class FittedScores(NamedTuple):
    """The four scores of documents that come from sigmoids. See `DocumentScores`."""

    learning_time_Q: Floats32
    spread_Q: Floats32
    drop_Q: Floats32
    unlearned_Q: Floats32


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentScores:
    """Scores of each document of a dataset: what falls in it, when it is learned, its surprisal.

    A file has at least one of the falls, the target scores and the four scores of a fitted run
    (learning time, spread, drop, unlearned), which it has together.

    Attributes:
        surprisal_Q: mean of -ln p(token) in nats under the counts of single tokens in the training
            data; NaN only for empty documents.
        watched_Q: watched tokens behind the score; 0 for a predicted score, or none.
        dataset: the dataset.
        digest: `data_digest` of its files.
        details: origin of the scores.
        learning_time_Q: drop-weighted mean of ln(consumed tokens of the reference run) at the
            midpoints of the document's tokens; NaN where nothing is learned, or without a score.
            None where the reference run is not fitted.
        spread_Q: drop-weighted standard deviation of the same; NaN and None likewise.
        drop_Q: learnable drop in nats per token: the sum of the drops over the tokens, at least 0;
            NaN without a score; None likewise.
        unlearned_Q: share of the tokens that are never learned, 0 to 1; NaN without a score; None
            likewise.
        fall_Q: fall in nats per token: mean loss at a quarter of the reference run less mean loss
            at its end, shrunk by its reliability; negative where the loss rises; NaN without a
            score. None where it is not measured.
        target_Q: mean loss in nats per token under the reference run less that under the reference
            run tuned on a target, shrunk likewise; NaN without a score. None likewise.

    Raises:
        TokscaleError: on construction, if the arrays do not fit together.
    """

    surprisal_Q: Floats32
    watched_Q: Integers32
    dataset: DatasetIdentity
    digest: str
    details: ScoreDetails = field(default_factory=ScoreDetails)
    learning_time_Q: Floats32 | None = None
    spread_Q: Floats32 | None = None
    drop_Q: Floats32 | None = None
    unlearned_Q: Floats32 | None = None
    fall_Q: Floats32 | None = None
    target_Q: Floats32 | None = None

    def __post_init__(self) -> None:
        arrays = self._arrays
        fitted = [name for name in _FITTED if name in arrays]
        if 0 < len(fitted) < len(_FITTED):
            raise TokscaleError(
                f"the scores of {self.dataset} have {', '.join(fitted)}; expected all of "
                f"{', '.join(_FITTED)}, or none of them; make the scores again"
            )
        if arrays.keys() == set(_ALWAYS):
            raise TokscaleError(
                f"the scores of {self.dataset} have no falls, target scores or learning times; "
                "expected one of them at least; make the scores again"
            )
        for name, array in arrays.items():
            dtype, low, high = _RANGES[name]
            if array.shape != (self.n_documents,) or array.dtype != dtype:
                raise TokscaleError(
                    f"the scores' {name} are {array.dtype} of shape {array.shape}; expected "
                    f"{np.dtype(dtype)} for the {self.n_documents} documents of {self.dataset}; "
                    "make the scores again"
                )
            if (np.isinf(array) | (array < low) | (array > high)).any():
                raise TokscaleError(
                    f"the scores' {name} of {self.dataset} have values that are infinite or out of "
                    f"range; expected finite ones in [{low:g}, {high:g}]; make the scores again"
                )

    @property
    def _arrays(self) -> dict[str, Floats32]:
        """The arrays that there are, by name, in the order of the file and the fingerprint."""
        arrays = {name: cast(Floats32 | None, getattr(self, f"{name}_Q")) for name in _RANGES}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def fitted(self) -> FittedScores | None:
        """The four scores of a fitted run; None where the reference run is not fitted."""
        arrays = self._arrays
        if "drop" not in arrays:
            return None
        return FittedScores(*(arrays[name] for name in _FITTED))

    def require_fitted(self) -> FittedScores:
        """Return the four scores of a fitted run.

        Raises:
            TokscaleError: the reference run is not fitted.
        """
        if (fitted := self.fitted) is None:
            raise self._missing("learning-time")
        return fitted

    def ordering_Q(self, order: str) -> Floats32:
        """Return the score by which a cut with this order ranks the documents.

        Args:
            order: "learning-time", "frequency", "fall" or "target".

        Raises:
            TokscaleError: the file does not have this score.
        """
        found = self._arrays.get(_ORDERS[order][0])
        if found is None:
            raise self._missing(order)
        return found

    def _missing(self, order: str) -> TokscaleError:
        """Return the error about a score that the file does not have, with what makes it."""
        run = self.details.run or "RUN"
        score = f"megatron-tokscale score {run}"
        remedy = {
            "learning-time": f"run `megatron-tokscale fit {run}`, which needs probes at 5 steps, "
            f"then `{score} --force`",
            "fall": f"watch {run} at a quarter and at the end of its training, then run "
            f"`{score} --force`",
            "target": f"run `{score} --tuned TUNED --force`",
        }[order]
        words = _ORDERS[order][1]
        return TokscaleError(f"the scores of {self.dataset.name} have no {words}; {remedy}")

    @property
    def n_documents(self) -> int:
        """Number of documents Q."""
        return self.dataset.n_sequences

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the scores and of the scored data."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.dataset.content, self.digest]).encode())
        for name, array in self._arrays.items():
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the scores to `path` (safetensors), whole or not at all."""
        from safetensors.numpy import save_file

        metadata = _FILE.metadata(
            self.fingerprint,
            dataset=json.dumps(self.dataset.content),
            digest=self.digest,
            details=json.dumps(to_json(self.details), allow_nan=False),
        )
        arrays = {name: np.ascontiguousarray(array) for name, array in self._arrays.items()}
        with whole_or_absent(path) as temporary:
            save_file(arrays, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read scores and check them against their own fingerprint.

        Raises:
            TokscaleError: the file is missing, truncated, altered, of another schema version, or
                holds no scores.
        """
        optional = [name for name in _RANGES if name not in _ALWAYS]
        arrays, metadata = _FILE.read(path, _ALWAYS, optional)
        try:
            _FILE.check_details(metadata, "dataset", "digest")
            scores = cls(
                **{f"{name}_Q": cast(Any, array) for name, array in arrays.items()},
                dataset=from_json(DatasetIdentity, json.loads(metadata["dataset"]), "dataset"),
                digest=metadata["digest"],
                details=from_json(ScoreDetails, json.loads(metadata["details"]), "details"),
            )
        except (KeyError, ValueError, TypeError, RecursionError, TokscaleError) as error:
            raise TokscaleError(f"score file {path} is damaged ({error}); {_AGAIN}") from error
        if scores.fingerprint != metadata.get("fingerprint"):
            raise TokscaleError(
                f"score file {path} does not match its fingerprint, so it is damaged; {_AGAIN}"
            )
        return scores

    def check(self, tokens: IndexedTokens) -> None:
        """Refuse a dataset that these scores were not made for.

        Raises:
            TokscaleError: another dataset, or the same documents from another tokenizer.
        """
        found = identity_of(tokens)
        if found != self.dataset:
            why = f"they are for {self.dataset}, the files hold {found}"
        elif data_digest(tokens) != self.digest:
            why = f"the tokens of {self.dataset} are not those that were scored"
        else:
            return
        raise TokscaleError(
            f"the scores of {tokens.prefix} were made for other data or another tokenizer: {why}; "
            "make them again with `megatron-tokscale score`"
        )


def scores_path(prefix: str) -> Path:
    """Return the path of the scores of the dataset PREFIX.bin/.idx."""
    return Path(prefix + SUFFIX)


def scores_file(tokens: IndexedTokens, folder: Path | None = None) -> Path:
    """Return the file of a dataset's scores: beside its data, or in a folder.

    In a folder the scores of namesakes have numbers, NAME#N, by the order in which they were
    scored; a file's metadata name its data.

    Raises:
        TokscaleError: several files there hold scores of these data.
    """
    beside = scores_path(tokens.prefix)
    if folder is None:
        return beside
    unnumbered = folder / beside.name
    numbered = sorted(folder.glob(f"{glob.escape(tokens.name)}#*{SUFFIX}"))
    if not numbered:
        return unnumbered
    digest = data_digest(tokens)
    own = {
        path: prefix
        for path in (unnumbered, *numbered)
        if (prefix := _prefix_in(path, tokens, digest)) is not None
    }
    of_prefix = [path for path, prefix in own.items() if prefix == whole_prefix(tokens.prefix)]
    found = of_prefix or list(own)
    if len(found) > 1:
        raise TokscaleError(
            f"{folder} has several files of scores of {tokens.prefix}: "
            f"{listed([path.name for path in found])}; expected one; keep one of them there"
        )
    return found[0] if found else unnumbered


def _prefix_in(path: Path, tokens: IndexedTokens, digest: str) -> str | None:
    """Return the prefix that a score file names; None if the file is of other data."""
    metadata = _metadata(path)
    try:
        dataset = from_json(DatasetIdentity, json.loads(metadata["dataset"]))
        details = from_json(ScoreDetails, json.loads(metadata["details"]))
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    is_own = dataset == identity_of(tokens) and metadata.get("digest") == digest
    return details.prefix if is_own else None


def read_score_details(path: Path) -> ScoreDetails | None:
    """Return the origin of the scores in a file, from its header; None if it holds no scores."""
    metadata = _metadata(path)
    if metadata.get("kind") != KIND:
        return None
    try:
        return from_json(ScoreDetails, json.loads(metadata["details"]))
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def holds_scores(path: Path) -> bool:
    """Return whether the file at `path` says that it holds document scores, whole or not."""
    return _metadata(path).get("kind") == KIND


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def identity_of(tokens: IndexedTokens) -> DatasetIdentity:
    """Return the identity of a dataset in plans and score files."""
    prefix = whole_prefix(tokens.prefix)
    return DatasetIdentity(tokens.name, tokens.n_sequences, tokens.n_tokens, prefix)


def data_digest(tokens: IndexedTokens) -> str:
    """Return SHA-256 (first 16 hex digits) of a dataset's type, lengths, first and last tokens.

    2^20 tokens at either end are read, so that it takes no time on a large corpus.
    """
    every_token = tokens.stream(range(tokens.n_sequences))
    digest = hashlib.sha256(np.dtype(tokens.dtype).name.encode())
    for array in (tokens.lengths, every_token[:_END_TOKENS], every_token[-_END_TOKENS:]):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
