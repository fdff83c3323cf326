"""The probe set: fixed sequences, and which of their tokens are watched.

Shapes: B sequences, S sequence length, N watched tokens: the true entries of `mask_BS`, by rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
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
class ProbeSet:
    """Fixed sequences whose token losses are followed through training.

    Attributes:
        tokens_BS: int32 input ids.
        labels_BS: int32 ids to predict; the loss of a watched token is that of its label.
        mask_BS: bool, true where the label is watched.
        document_BS: int32 index of the label's document in its dataset.
        position_BS: int32 position of the label in its document, from 0.
        dataset_BS: int16 index into `datasets`.
        datasets: names of the datasets, each unique.
        vocab_size: size of the vocabulary the ids are drawn from.
        details: how the set was made (split, seed, prefixes), plain JSON values.
    """

    tokens_BS: NDArray[np.int32]
    labels_BS: NDArray[np.int32]
    mask_BS: NDArray[np.bool_]
    document_BS: NDArray[np.int32]
    position_BS: NDArray[np.int32]
    dataset_BS: NDArray[np.int16]
    datasets: tuple[str, ...]
    vocab_size: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def prefixes(self) -> list[str]:
        """Return the whole prefixes of the datasets; names in a set that does not know them."""
        prefixes = self.details.get("prefixes")
        if not isinstance(prefixes, list) or len(prefixes) != len(self.datasets):
            return list(self.datasets)
        names = [base_name(str(prefix)) for prefix in prefixes]
        is_own = all(
            dataset == name or dataset.startswith(f"{name}#")
            for dataset, name in zip(self.datasets, names, strict=True)
        )
        return [str(prefix) for prefix in prefixes] if is_own else list(self.datasets)

    def datasets_of(self, prefixes: Sequence[str]) -> list[int | None]:
        """Find datasets of a job among those of the set, by their prefixes.

        Returns:
            For each its index into `datasets`; None for one that the set does not watch.

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
    def label_N(self) -> NDArray[np.int32]:
        """Ids of the watched tokens."""
        return self.labels_BS[self.mask_BS]

    @cached_property
    def document_N(self) -> NDArray[np.int32]:
        """Document of each watched token, within its dataset."""
        return self.document_BS[self.mask_BS]

    @cached_property
    def position_N(self) -> NDArray[np.int32]:
        """Position of each watched token in its document."""
        return self.position_BS[self.mask_BS]

    @cached_property
    def dataset_N(self) -> NDArray[np.int16]:
        """Dataset of each watched token, an index into `datasets`."""
        return self.dataset_BS[self.mask_BS]

    @cached_property
    def context_N(self) -> NDArray[np.int32]:
        """Number of tokens that each watched token is predicted from."""
        return (np.nonzero(self.mask_BS)[1] + 1).astype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) of everything that decides what a loss file means."""
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
            details=json.dumps(self.details),
        )
        arrays = {name: np.ascontiguousarray(getattr(self, f"{name}_BS")) for name in _ARRAYS}
        with whole_or_absent(path) as temporary:
            temporary.write_bytes(save(arrays, metadata))

    @staticmethod
    def load(path: Path) -> "ProbeSet":
        """Read a probe set and check it against its own fingerprint.

        Raises:
            TokscaleError: the file is missing, truncated, altered, newer, or no probe set.
        """
        read, metadata = _FILE.read(path, list(_ARRAYS))
        try:
            return ProbeSet._checked(read, metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise TokscaleError(
                f"probe set {path} does not match its fingerprint ({error}); make it again"
            ) from error

    @staticmethod
    def _checked(read: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> "ProbeSet":
        """Return the probe set of these arrays; a ValueError says what is wrong with them."""
        for name, dtype in _ARRAYS.items():
            if read[name].dtype != dtype or read[name].ndim != 2:
                raise ValueError(f"{name} has type {read[name].dtype}, shape {read[name].shape}")
        if len({array.shape for array in read.values()}) > 1:
            raise ValueError("its arrays have different shapes")
        _FILE.check_details(metadata, "datasets", "vocab_size")
        arrays: dict[str, Any] = {f"{name}_BS": array for name, array in read.items()}
        probe_set = ProbeSet(
            **arrays,
            datasets=tuple(json.loads(metadata["datasets"])),
            vocab_size=int(metadata["vocab_size"]),
            details=dict(json.loads(metadata["details"])),
        )
        if probe_set.fingerprint != metadata["fingerprint"]:
            raise ValueError(f"its contents have {probe_set.fingerprint}")
        return probe_set
