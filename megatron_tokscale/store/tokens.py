"""The questions that every analysis may ask about a run's watched tokens, with or without text.

A run of a job with the plugin has a probe set, which answers all of them. An imported run has only
the columns that its file had; a column that is missing is None, and is never guessed.

Shapes: N watched tokens, V vocabulary, B sequences.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final, Self

import numpy as np

from megatron_tokscale.core.arrays import AnyArray, Integers, Integers16, Integers32
from megatron_tokscale.core.resampling import MOST_UNITS, UnitKind, Units
from megatron_tokscale.probe import ProbeSet

LONGEST_BLOCK: Final = 256
"""Most consecutive tokens of a block that stands in for a document. Our choice: losses of
neighbours in a text are alike, so a block should be long; longer blocks leave few units."""
_LEAST_BLOCKS: Final = 64
"""Blocks of a short matrix, whose blocks are shorter; our choice: fewer give no percentiles."""


@dataclass(frozen=True)
class TokenColumns:
    """One row per watched token; a column that is not known is None.

    Attributes:
        dataset_N: index into the datasets' names.
        document_N: number of the token's document within its dataset.
        sample_N: number of the token's sample within its dataset.
        position_N: position in its document, or in its sample where documents are not known.
        context_N: number of tokens that it is predicted from.
        label_N: its token id.
    """

    dataset_N: Integers16
    document_N: Integers32 | None = None
    sample_N: Integers32 | None = None
    position_N: Integers32 | None = None
    context_N: Integers32 | None = None
    label_N: Integers32 | None = None

    def rows(self, part: slice) -> Self:
        """Return the rows of a slice of the tokens."""
        known = {name: array_N[part] for name, array_N in self.known().items()}
        return type(self)(**known)  # type: ignore[arg-type] # one column of each type by its name

    def known(self) -> dict[str, AnyArray]:
        """Return the columns that are known, by their names."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array_N for name, array_N in columns.items() if array_N is not None}


@dataclass(frozen=True)
class ImportedTokens:
    """The watched tokens of an imported run.

    Attributes:
        n_tokens: number of tokens N.
        fingerprint: equal for runs that watch the same tokens.
        datasets: names of the datasets; one, "all", if they are not known.
        columns: what is known of each token.
        vocab_size: size of the vocabulary; None if it is not known.
    """

    n_tokens: int
    fingerprint: str
    datasets: tuple[str, ...]
    columns: TokenColumns
    vocab_size: int | None = None


@dataclass(frozen=True)
class WatchedTokens:
    """The watched tokens of a run.

    Attributes:
        source: the probe set, or what an imported run knows of its tokens.
    """

    source: ProbeSet | ImportedTokens

    @property
    def probe_set(self) -> ProbeSet | None:
        """The probe set, which has the text; None for an imported run."""
        return self.source if isinstance(self.source, ProbeSet) else None

    @property
    def n_tokens(self) -> int:
        """Number of watched tokens N."""
        return self.source.n_tokens

    @property
    def fingerprint(self) -> str:
        """Fingerprint that runs have in common if they watch the same tokens."""
        return self.source.fingerprint

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets; one, "all", if they are not known."""
        return self.source.datasets

    @property
    def vocab_size(self) -> int | None:
        """Size of the vocabulary; None if it is not known."""
        return self.source.vocab_size

    @property
    def dataset_N(self) -> Integers16:
        """Dataset of each token, an index into `datasets`."""
        return self._columns.dataset_N

    @property
    def document_N(self) -> Integers32 | None:
        """Document of each token within its dataset; None if documents are not known."""
        return self._columns.document_N

    @property
    def sample_N(self) -> Integers32 | None:
        """Sample of each token within its dataset; None without samples."""
        return self._columns.sample_N

    @property
    def position_N(self) -> Integers32 | None:
        """Position of each token in its document or sample; None if it is not known."""
        return self._columns.position_N

    @property
    def context_N(self) -> Integers32 | None:
        """Number of tokens that each token is predicted from; None if it is not known."""
        return self._columns.context_N

    @property
    def label_N(self) -> Integers32 | None:
        """Id of each token; None if labels are not known."""
        return self._columns.label_N

    @cached_property
    def label_count_V(self) -> Integers | None:
        """Count of each id among all labels that are known, watched or not; None without labels."""
        if self.probe_set is not None:
            labels = self.probe_set.labels_BS.ravel()
            return np.bincount(labels, minlength=self.probe_set.vocab_size)
        if self.label_N is None:
            return None
        return np.bincount(self.label_N, minlength=self.vocab_size or 0)

    @cached_property
    def _columns(self) -> TokenColumns:
        if isinstance(self.source, ImportedTokens):
            return self.source.columns
        tokens = self.source
        return TokenColumns(
            dataset_N=tokens.dataset_N,
            document_N=tokens.document_N,
            position_N=tokens.position_N,
            context_N=tokens.context_N,
            label_N=tokens.label_N,
        )

    def rows(self, part: slice) -> TokenColumns:
        """Return the columns of a slice of the tokens.

        Of a probe set, only the sequences that hold the slice are read.
        """
        if isinstance(self.source, ImportedTokens):
            return self.source.columns.rows(part)
        return _rows_of(self.source, part)

    @property
    def unit_kind(self) -> UnitKind:
        """The units that are resampled: documents, else samples, else blocks of tokens."""
        if isinstance(self.source, ProbeSet) or self.source.columns.document_N is not None:
            return "documents"
        return "blocks" if self.source.columns.sample_N is None else "samples"

    @property
    def block_length(self) -> int:
        """Number of consecutive tokens in a block that stands in for a document."""
        return max(min(self.n_tokens // _LEAST_BLOCKS, LONGEST_BLOCK), 1)

    @property
    def cluster_N(self) -> Integers:
        """Number of each token's document, sample or block, unique over the datasets."""
        return self.dataset_N.astype(np.int64) << 32 | self._member_N

    @property
    def _member_N(self) -> Integers32:
        """Number of each token's document, sample or block within its dataset."""
        for member_N in (self.document_N, self.sample_N):
            if member_N is not None:
                return member_N
        return np.arange(self.n_tokens, dtype=np.int32) // np.int32(self.block_length)

    def units(self, seed: int, most: int = MOST_UNITS) -> Units:
        """Return the resampling units of the tokens.

        The units are documents; without documents, samples; without either, blocks of consecutive
        tokens (`block_length`). A unit is of one dataset: a sample with tokens of two datasets is
        two units. Above `most` of them, they are dealt into `most` units.

        Args:
            seed: seed of the dealing.
            most: most units.
        """
        return Units.from_documents(self.dataset_N, self._member_N, seed, most, kind=self.unit_kind)

    def note_on_units(self) -> str | None:
        """Return a sentence on what stands in for documents; None where documents are known."""
        match self.unit_kind:
            case "documents":
                return None
            case "samples":
                return "documents are not known: intervals resample samples"
            case "blocks":
                return (
                    "documents and samples are not known: intervals resample blocks of "
                    f"{self.block_length} consecutive tokens, and are too narrow if the tokens of "
                    "several blocks are alike"
                )


def _rows_of(tokens: ProbeSet, part: slice) -> TokenColumns:
    """Return the columns of a slice of a probe set's watched tokens."""
    first_B = np.concatenate([[0], tokens.mask_BS.sum(axis=1).cumsum()])
    low = int(np.searchsorted(first_B, part.start, side="right")) - 1
    sequences = slice(low, int(np.searchsorted(first_B, part.stop)))
    part = slice(part.start - int(first_B[low]), part.stop - int(first_B[low]))
    mask_BS = tokens.mask_BS[sequences]
    context_N = (np.nonzero(mask_BS)[1] + 1).astype(np.int32)
    return TokenColumns(
        dataset_N=tokens.dataset_BS[sequences][mask_BS][part],
        document_N=tokens.document_BS[sequences][mask_BS][part],
        position_N=tokens.position_BS[sequences][mask_BS][part],
        context_N=context_N[part],
        label_N=tokens.labels_BS[sequences][mask_BS][part],
    )
