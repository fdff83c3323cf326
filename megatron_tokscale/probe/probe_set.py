"""The probe set: fixed sequences, and a mask of the tokens in them that are watched.

Shapes: B sequences, S sequence length, N watched tokens: the true entries of `mask_BS`, by rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import AnyArray, Integers16, Integers32, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
from megatron_tokscale.core.records import from_json, to_json
from megatron_tokscale.core.schemas import PROBE_SET_SCHEMA
from megatron_tokscale.core.tensors import TensorFile
from megatron_tokscale.corpus.names import base_name, match_prefixes

_FILE = TensorFile(
    "tokscale-probe-set", PROBE_SET_SCHEMA, "probe set", "megatron-tokscale probe build"
)
_ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "labels": np.int32,
    "mask": np.bool_,
    "document": np.int32,
    "position": np.int32,
    "dataset": np.int16,
}


@dataclass(frozen=True)
class DuplicateCounts:
    """Numbers of duplicates of training text in one dataset.

    Attributes:
        documents: documents that were searched for.
        duplicate_documents: documents that are whole in the training part.
        windows: windows that were searched for.
        duplicate_windows: windows whose document, or one of whose passages, is in the training
            part.
        duplicate_tokens: watched tokens of the set in such windows.
    """

    documents: int
    duplicate_documents: int
    windows: int
    duplicate_windows: int
    duplicate_tokens: int


@dataclass(frozen=True)
class DuplicateSearch:
    """The search for duplicates of training text, and the treatment of those found.

    Attributes:
        dropped: true if duplicates were passed over; false if they were kept and counted.
        passage_tokens: length of a passage.
        training: whole prefixes of the datasets of the training part.
        datasets: the counts of each dataset of the set.
    """

    dropped: bool
    passage_tokens: int
    training: tuple[str, ...]
    datasets: tuple[DuplicateCounts, ...]


@dataclass(frozen=True, kw_only=True)
class ProbeSetOrigin:
    """The data that a probe set was drawn from, and how; outside of its fingerprint.

    Attributes:
        split: Megatron's --split; None with per-split data.
        part: the part of the data: train, valid or test.
        per_dataset: how the datasets share the tokens: equal or proportional.
        seed: seed of the draw.
        eod: id of the end-of-document token, which is not watched; None if there is none.
        prefixes: whole prefixes of the datasets.
        duplicates: the search for duplicates of training text; None if there was none.
        unseen_by: ids or paths of the runs whose trainings have drawn none of the documents; None
            if no run was named.
        plan: fingerprint of the plan whose training leaves these documents out; each dataset of the
            set is then a stratum of it. None for documents of a whole part.
    """

    split: str | None
    part: str
    per_dataset: str
    seed: int
    eod: int | None
    prefixes: tuple[str, ...]
    duplicates: DuplicateSearch | None = None
    unseen_by: str | None = None
    plan: str | None = None


@dataclass(frozen=True)
class ProbeSet:
    """Fixed sequences whose token losses are followed through training.

    Attributes:
        tokens_BS: int32 input ids.
        labels_BS: int32 ids to predict; the loss of a watched token is the loss of its label.
        mask_BS: bool, true where the label is watched.
        document_BS: int32 index of the label's document in its dataset.
        position_BS: int32 position of the label in its document, from 0.
        dataset_BS: int16 index into `datasets`.
        datasets: names of the datasets, each unique.
        vocab_size: size of the vocabulary the ids are drawn from.
        origin: the data that the set was drawn from; None if it was not drawn from data.
    """

    tokens_BS: Integers32
    labels_BS: Integers32
    mask_BS: Mask
    document_BS: Integers32
    position_BS: Integers32
    dataset_BS: Integers16
    datasets: tuple[str, ...]
    vocab_size: int
    origin: ProbeSetOrigin | None = None

    @property
    def prefixes(self) -> list[str]:
        """The whole prefixes of the datasets; their names in a set without prefixes."""
        prefixes = self.origin.prefixes if self.origin else ()
        if len(prefixes) != len(self.datasets):
            return list(self.datasets)
        names = [base_name(prefix) for prefix in prefixes]
        is_own = all(
            dataset == name or dataset.startswith(f"{name}#")
            for dataset, name in zip(self.datasets, names, strict=True)
        )
        return list(prefixes) if is_own else list(self.datasets)

    def dataset_indices(self, prefixes: Sequence[str]) -> list[int | None]:
        """Return the indices into `datasets` of a job's datasets, by their prefixes.

        The index of a dataset that the set does not watch is None.

        Raises:
            TokscaleError: namesakes cannot be told apart.
        """
        return match_prefixes(prefixes, self.prefixes, "the probe set")

    @property
    def n_sequences(self) -> int:
        """Number of sequences B."""
        return int(self.tokens_BS.shape[0])

    @property
    def seq_length(self) -> int:
        """Sequence length S in tokens."""
        return int(self.tokens_BS.shape[1])

    @cached_property
    def n_tokens(self) -> int:
        """Number of watched tokens N."""
        return int(self.mask_BS.sum())

    @cached_property
    def label_N(self) -> Integers32:
        """Ids of the watched tokens."""
        return self.labels_BS[self.mask_BS]

    @cached_property
    def document_N(self) -> Integers32:
        """Document of each watched token, within its dataset."""
        return self.document_BS[self.mask_BS]

    @cached_property
    def position_N(self) -> Integers32:
        """Position of each watched token in its document."""
        return self.position_BS[self.mask_BS]

    @cached_property
    def dataset_N(self) -> Integers16:
        """Dataset of each watched token, an index into `datasets`."""
        return self.dataset_BS[self.mask_BS]

    @cached_property
    def context_N(self) -> Integers32:
        """Number of tokens that each watched token is predicted from."""
        return (np.nonzero(self.mask_BS)[1] + 1).astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of all that gives a losses file its meaning."""
        digest = hashlib.sha256()
        digest.update(json.dumps([list(self.datasets), self.vocab_size]).encode())
        for name, dtype in _ARRAYS.items():
            array = np.ascontiguousarray(getattr(self, f"{name}_BS"), dtype=dtype)
            digest.update(f"{name}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the set to `path` (safetensors), whole or not at all."""
        from safetensors.numpy import save

        metadata = _FILE.metadata(
            self.fingerprint,
            datasets=json.dumps(list(self.datasets)),
            vocab_size=str(self.vocab_size),
            details=json.dumps(to_json(self.origin)),
        )
        arrays = {name: np.ascontiguousarray(getattr(self, f"{name}_BS")) for name in _ARRAYS}
        with whole_or_absent(path) as temporary:
            temporary.write_bytes(save(arrays, metadata))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a probe set and check it against its own fingerprint.

        Raises:
            TokscaleError: the file is missing, truncated, altered, of another schema, or not a
                probe set.
        """
        read, metadata = _FILE.read(path, list(_ARRAYS))
        try:
            return cls._checked(read, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise TokscaleError(
                f"probe set {path} does not match its fingerprint ({error}); make it again"
            ) from error

    @classmethod
    def _checked(cls, read: Mapping[str, AnyArray], metadata: Mapping[str, str]) -> Self:
        """Return the probe set of these arrays; a ValueError names the fault if they do not fit."""
        for name, dtype in _ARRAYS.items():
            if read[name].dtype != dtype or read[name].ndim != 2:
                raise ValueError(f"{name} has type {read[name].dtype}, shape {read[name].shape}")
        if len({array.shape for array in read.values()}) > 1:
            raise ValueError("its arrays have different shapes")
        _FILE.check_details(metadata, "datasets", "vocab_size")
        origin = json.loads(metadata["details"])
        probe_set = cls(
            tokens_BS=np.asarray(read["tokens"], np.int32),
            labels_BS=np.asarray(read["labels"], np.int32),
            mask_BS=np.asarray(read["mask"], np.bool_),
            document_BS=np.asarray(read["document"], np.int32),
            position_BS=np.asarray(read["position"], np.int32),
            dataset_BS=np.asarray(read["dataset"], np.int16),
            datasets=tuple(json.loads(metadata["datasets"])),
            vocab_size=int(metadata["vocab_size"]),
            origin=None if origin is None else from_json(ProbeSetOrigin, origin, "its origin"),
        )
        if probe_set.fingerprint != metadata["fingerprint"]:
            raise ValueError(f"its contents have {probe_set.fingerprint}")
        return probe_set
