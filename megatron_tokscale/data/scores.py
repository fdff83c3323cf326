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
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
from megatron_tokscale.core.schemas import SCORES_SCHEMA
from megatron_tokscale.core.tensors import TensorFile
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.names import listed, whole_prefix
from megatron_tokscale.data.plan import DatasetIdentity

KIND: Final = "tokscale-scores-dir"
_FILE: Final = TensorFile(KIND, SCORES_SCHEMA, "score file", "megatron-tokscale score")
SUFFIX: Final = ".tokscale.safetensors"

_END_TOKENS: Final = 2**20
_ARRAYS: Final[dict[str, type[np.generic]]] = {
    "learning_time": np.float32,
    "spread": np.float32,
    "drop": np.float32,
    "unlearned": np.float32,
    "surprisal": np.float32,
    "watched": np.int32,
}


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """When the documents of a dataset are learned, and how much there is to learn in them.

    Attributes:
        learning_time_Q: float32 drop-weighted mean of ln(consumed tokens of the reference run) at
            the midpoints of the document's tokens; NaN where nothing is learned, or is known.
        spread_Q: float32 drop-weighted standard deviation of the same; NaN likewise.
        drop_Q: float32 learnable drop in nats per token: the sum of the drops over the tokens, at
            least 0; NaN: no score.
        unlearned_Q: float32 share of the tokens that are never learned, 0 to 1; NaN: no score.
        surprisal_Q: float32 mean of -ln p(token) in nats under the counts of single tokens in the
            training data; NaN only for empty documents.
        watched_Q: int32 watched tokens behind the score; 0: predicted, or no score.
        digest: `data_digest` of its files.
        details: how the scores were made (reference run, predictor, its errors), plain JSON values.

    Raises:
        TokscaleError: on construction, if these do not fit together.
    """

    learning_time_Q: NDArray[np.float32]
    spread_Q: NDArray[np.float32]
    drop_Q: NDArray[np.float32]
    unlearned_Q: NDArray[np.float32]
    surprisal_Q: NDArray[np.float32]
    watched_Q: NDArray[np.int32]
    dataset: DatasetIdentity
    digest: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in _ARRAYS.items():
            array = getattr(self, f"{name}_Q")
            if array.shape != (self.n_documents,) or array.dtype != dtype:
                raise TokscaleError(
                    f"the scores' {name} are {array.dtype} of shape {array.shape}, not "
                    f"{np.dtype(dtype)} for the {self.n_documents} documents of {self.dataset}"
                )
            if np.isinf(array).any():
                raise TokscaleError(f"the scores' {name} of {self.dataset} have infinite values")
        for name, low, high in (
            ("spread", 0.0, np.inf),
            ("drop", 0.0, np.inf),
            ("unlearned", 0.0, 1.0),
            ("surprisal", 0.0, np.inf),
            ("watched", 0.0, np.inf),
        ):
            array = getattr(self, f"{name}_Q")
            if ((array < low) | (array > high)).any():
                raise TokscaleError(
                    f"the scores' {name} of {self.dataset} have values that are out of range"
                )

    @property
    def n_documents(self) -> int:
        """Number of documents Q."""
        return self.dataset.n_sequences

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of the scores and of what they were made for."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.dataset.content, self.digest]).encode())
        for name in _ARRAYS:
            array = getattr(self, f"{name}_Q")
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the scores to `path` (safetensors), whole or not at all."""
        from safetensors.numpy import save_file

        details = json.dumps(dict(self.details), allow_nan=False)
        metadata = _FILE.metadata(
            self.fingerprint,
            dataset=json.dumps(self.dataset.content),
            digest=self.digest,
            details=details,
        )
        arrays = {name: np.ascontiguousarray(getattr(self, f"{name}_Q")) for name in _ARRAYS}
        with whole_or_absent(path) as temporary:
            save_file(arrays, temporary, metadata)

    @staticmethod
    def load(path: Path) -> "DocumentScores":
        """Read scores and check them against their own fingerprint.

        Raises:
            TokscaleError: the file is missing, truncated, altered, newer, or holds no scores.
        """
        read, metadata = _FILE.read(path, list(_ARRAYS))
        arrays: dict[str, Any] = {f"{name}_Q": array for name, array in read.items()}
        try:
            _FILE.check_details(metadata, "dataset", "digest")
            scores = DocumentScores(
                **arrays,
                dataset=DatasetIdentity(**json.loads(metadata["dataset"])),
                digest=metadata["digest"],
                details=json.loads(metadata["details"]),
            )
        except (KeyError, ValueError, TypeError, TokscaleError) as error:
            raise TokscaleError(f"score file {path} is damaged ({error}); make it again") from error
        if scores.fingerprint != metadata.get("fingerprint"):
            raise TokscaleError(f"score file {path} does not match its fingerprint; make it again")
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
            "make them again"
        )


def scores_path(prefix: str) -> Path:
    """Where the scores of the dataset PREFIX.bin/.idx lie."""
    return Path(prefix + SUFFIX)


def scores_file(tokens: IndexedTokens, folder: Path | None = None) -> Path:
    """Return the file of a dataset's scores: beside its data, or in a folder.

    In a folder the scores of namesakes have numbers, NAME#N, by the order in which they were
    scored; which file is whose is told by what it says of its data.

    Raises:
        TokscaleError: several files there are scores of these data.
    """
    beside = scores_path(tokens.prefix)
    if folder is None:
        return beside
    plain = folder / beside.name
    others = sorted(folder.glob(f"{glob.escape(tokens.name)}#*{SUFFIX}"))
    if not others:
        return plain
    digest = data_digest(tokens)
    own = {path: prefix for path in (plain, *others) for prefix in _prefixes(path, tokens, digest)}
    named = [path for path, prefix in own.items() if prefix == whole_prefix(tokens.prefix)]
    found = named or list(own)
    if len(found) > 1:
        raise TokscaleError(
            f"{folder} has several files of scores of {tokens.prefix}: "
            f"{listed([path.name for path in found])}; keep one of them there"
        )
    return found[0] if found else plain


def _prefixes(path: Path, tokens: IndexedTokens, digest: str) -> list[str]:
    """Return the prefix that a score file names, if it is of these data."""
    metadata = _metadata(path)
    try:
        dataset = DatasetIdentity(**json.loads(metadata["dataset"]))
        details = json.loads(metadata["details"])
    except (KeyError, ValueError, TypeError):
        return []
    is_own = dataset == identity_of(tokens) and metadata.get("digest") == digest
    return [str(details.get("prefix", ""))] if is_own else []


def holds_scores(path: Path) -> bool:
    """Whether the file at `path` says that it holds document scores, whole or not."""
    return _metadata(path).get("kind") == KIND


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def identity_of(tokens: IndexedTokens) -> DatasetIdentity:
    """By what a plan and a score file know the dataset."""
    prefix = whole_prefix(tokens.prefix)
    return DatasetIdentity(tokens.name, tokens.n_sequences, tokens.n_tokens, prefix)


def data_digest(tokens: IndexedTokens) -> str:
    """SHA-256 (first 16 hex digits) of a dataset's type, lengths, and first and last tokens.

    Of the tokens 2^20 at either end are read, so that it costs nothing on a large corpus.
    """
    every_token = tokens.stream(range(tokens.n_sequences))
    digest = hashlib.sha256(np.dtype(tokens.dtype).name.encode())
    for array in (tokens.lengths, every_token[:_END_TOKENS], every_token[-_END_TOKENS:]):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
