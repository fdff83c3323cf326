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
from typing import Final, Self, cast

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
}
"""Type, least and largest value of each array, in the order of the file and the fingerprint."""


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

    @property
    def reference(self) -> str:
        """Id of the reference run, or its path where the id is not known."""
        return self.run_id or self.run


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Learning time, learnable drop and surprisal of each document of a dataset.

    Attributes:
        learning_time_Q: drop-weighted mean of ln(consumed tokens of the reference run) at the
            midpoints of the document's tokens; NaN where nothing is learned, or without a score.
        spread_Q: drop-weighted standard deviation of the same; NaN likewise.
        drop_Q: learnable drop in nats per token: the sum of the drops over the tokens, at least 0;
            NaN without a score.
        unlearned_Q: share of the tokens that are never learned, 0 to 1; NaN without a score.
        surprisal_Q: mean of -ln p(token) in nats under the counts of single tokens in the training
            data; NaN only for empty documents.
        watched_Q: watched tokens behind the score; 0 for a predicted score, or none.
        dataset: the dataset.
        digest: `data_digest` of its files.
        details: origin of the scores.

    Raises:
        TokscaleError: on construction, if the arrays do not fit together.
    """

    learning_time_Q: Floats32
    spread_Q: Floats32
    drop_Q: Floats32
    unlearned_Q: Floats32
    surprisal_Q: Floats32
    watched_Q: Integers32
    dataset: DatasetIdentity
    digest: str
    details: ScoreDetails = field(default_factory=ScoreDetails)

    def __post_init__(self) -> None:
        for name, (dtype, low, high) in _RANGES.items():
            array = self._array_Q(name)
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

    def _array_Q(self, name: str) -> Floats32:
        return cast(Floats32, getattr(self, f"{name}_Q"))

    @property
    def n_documents(self) -> int:
        """Number of documents Q."""
        return self.dataset.n_sequences

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the scores and of the scored data."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.dataset.content, self.digest]).encode())
        for name in _RANGES:
            array = self._array_Q(name)
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
        arrays = {name: np.ascontiguousarray(self._array_Q(name)) for name in _RANGES}
        with whole_or_absent(path) as temporary:
            save_file(arrays, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read scores and check them against their own fingerprint.

        Raises:
            TokscaleError: the file is missing, truncated, altered, of another schema version, or
                holds no scores.
        """
        arrays, metadata = _FILE.read(path, list(_RANGES))
        version = int(metadata["schema_version"])
        if version < SCORES_SCHEMA:
            raise TokscaleError(
                f"score file {path} is of an older version, {version}; expected {SCORES_SCHEMA}; "
                f"{_AGAIN}"
            )
        try:
            _FILE.check_details(metadata, "dataset", "digest")
            scores = cls(
                learning_time_Q=cast(Floats32, arrays["learning_time"]),
                spread_Q=cast(Floats32, arrays["spread"]),
                drop_Q=cast(Floats32, arrays["drop"]),
                unlearned_Q=cast(Floats32, arrays["unlearned"]),
                surprisal_Q=cast(Floats32, arrays["surprisal"]),
                watched_Q=cast(Integers32, arrays["watched"]),
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
