"""From sample k of a job to the documents it reads, and from a document to the samples.

k counts the job's training samples from 0, in the order in which they are consumed. That is the
order of the job's dataset under Megatron's --dataloader-type single, its default; samples that a
job has drawn otherwise are refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from megatron_tokscale.core.arrays import Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.names import base_name, listed, numbered, whole_prefix
from megatron_tokscale.data.record import DataRecord, DatasetRecord, load_records, record_path
from megatron_tokscale.data.samples import Piece, SampleIndex
from megatron_tokscale.trace.megatron_cache import find_record, map_cached
from megatron_tokscale.trace.orders import SampleOrder, SampleOrigin, UntracedOrder, open_order


@dataclass(frozen=True)
class SampleTrace:
    """The origin of sample k, and the documents that it reads.

    Attributes:
        k: number of the sample in the job.
        stratum: name of its stratum; None without a plan.
        epoch: epochs of the stratum before this one; None without a plan.
        dataset: its dataset.
        number: number of the sample in its dataset.
        pieces: the tokens that it reads, with the one behind its end that is only a label.
        name: name of the dataset, unique in the job: namesakes are numbered.
    """

    k: int
    stratum: str | None
    epoch: int | None
    dataset: DatasetRecord
    number: int
    pieces: tuple[Piece, ...]
    name: str = ""


@dataclass(frozen=True, eq=False)
class Span:
    """Samples of a job that are drawn in one order from the same data.

    Attributes:
        record: the job's record of these samples.
        order: the order; its sample i is sample `record.offset` + i of the job.
        stop: the first sample of the job that is not in this span.
    """

    record: DataRecord
    order: SampleOrder
    stop: int

    @cached_property
    def names(self) -> dict[str, str]:
        """Names of the datasets by their prefixes, each unique: in the order of the job's data."""
        rows = {row.prefix: row.name for row in self.record.datasets}
        return dict(zip(rows, numbered(list(rows.values())), strict=True))

    @property
    def start(self) -> int:
        """The first sample of the job that is in this span."""
        return self.record.start

    def origin(self, k: int) -> SampleOrigin:
        """Return the origin of sample k of the job."""
        return self.order.origin(k - self.record.offset)

    def find(self, dataset: int, numbers: Integers, until: int) -> Integers:
        """Return the job's samples before `until` that are any of `numbers` of a dataset."""
        offset, stop = self.record.offset, max(min(until, self.stop), self.start)
        return offset + self.order.find(dataset, numbers, self.start - offset, stop - offset)

    def numbers(self, dataset: int, until: int) -> Integers:
        """Return the numbers in a dataset of the samples before `until` that it gives."""
        offset, stop = self.record.offset, max(min(until, self.stop), self.start)
        return self.order.numbers(dataset, self.start - offset, stop - offset)


@dataclass(frozen=True, eq=False)
class Trace:
    """The origin of a job's training samples. Make one with `Trace.open` or `Trace.from_cache`.

    Attributes:
        spans: by ascending start, one after the other.
    """

    spans: tuple[Span, ...]

    @classmethod
    def open(cls, run: Path | str) -> Self:
        """Return the trace of a run that was trained with the plugin.

        Raises:
            TokscaleError: the run has no record of its data, or a file that the record names is
                missing, damaged or another.
        """
        path = record_path(run)
        if not path.is_file():
            raise TokscaleError(
                f"{path} is not there: only a job that trains with the plugin writes it, and a "
                "replay trains nothing; give the --data-cache-path of the training job instead of "
                "the run"
            )
        return cls.from_records(load_records(path), path.parent / "plan.json")

    @classmethod
    def from_cache(cls, cache_dir: Path | str, match: Sequence[str] = (), extra: int = 1) -> Self:
        """Return the trace of a job without the plugin, from Megatron's data cache.

        Args:
            cache_dir: the --data-cache-path of a job with --dataloader-type single, Megatron's
                default; the cache does not hold that flag, and for another type the trace is wrong.
            match: words that only the job's description holds, if the cache holds several.
            extra: tokens that a sample reads beyond its sequence length.

        Raises:
            TokscaleError: no job matches, or more than one does; or a file is damaged.
        """
        return cls.from_records([find_record(Path(cache_dir), match, extra)])

    @classmethod
    def from_records(cls, records: Sequence[DataRecord], plan: Path | None = None) -> Self:
        """Return the trace of a job from its records.

        Args:
            records: by ascending start.
            plan: the file of the plan that the job follows, if it follows one.

        Raises:
            TokscaleError: a file that they name is missing, damaged or another.
        """
        orders = [open_order(record, plan) for record in records]
        ends = [record.offset + len(order) for record, order in zip(records, orders, strict=True)]
        stops = [record.start for record in records[1:]] + ends[-1:]
        return cls(
            tuple(
                Span(record, order, min(stop, end))
                for record, order, stop, end in zip(records, orders, stops, ends, strict=True)
            )
        )

    def __len__(self) -> int:
        """Return the number of samples, consumed or not, before the first one of unknown order."""
        last = self.spans[-1]
        return last.start if isinstance(last.order, UntracedOrder) else last.stop

    @cached_property
    def datasets(self) -> list[DatasetRecord]:
        """All datasets that the job has drawn from."""
        return list(dict.fromkeys(row for span in self.spans for row in span.record.datasets))

    def names_of(self, k_N: Integers) -> list[str]:
        """Return the name of the dataset of each of some samples.

        Raises:
            TokscaleError: there is no such sample, or its order is not known.
        """
        names = np.full(len(k_N), "", object)
        for span in self.spans:
            is_in_N = (k_N >= span.start) & (k_N < span.stop)
            if is_in_N.any():
                of_row = np.array([span.names[row.prefix] for row in span.record.datasets], object)
                names[is_in_N] = of_row[span.order.datasets(k_N[is_in_N] - span.record.offset)]
        if "" in names:
            self.sample(int(k_N[names == ""][0]))  # raises the error that says why
        return [str(name) for name in names]

    def sample(self, k: int) -> SampleTrace:
        """Return the origin of sample k and the documents that it reads.

        Raises:
            TokscaleError: there is no such sample, or a file is missing or damaged.
        """
        span = next((span for span in self.spans if span.start <= k < span.stop), None)
        if span is None:
            known = "none"
            if len(self) > self.spans[0].start:
                known = f"from {self.spans[0].start} to {len(self) - 1}"
            raise TokscaleError(f"sample {k} is not among the known samples of this job: {known}")
        origin = span.origin(k)
        dataset = span.record.datasets[origin.dataset]
        pieces = tuple(open_index(dataset).pieces(origin.number))
        name = span.names[dataset.prefix]
        return SampleTrace(k, origin.stratum, origin.epoch, dataset, origin.number, pieces, name)

    def document(self, dataset: str, document: int, until: int | None = None) -> Integers:
        """Return the samples that read a token of a document, ascending.

        Args:
            dataset: name (of namesakes NAME#N) or prefix of the dataset.
            document: number of the document in the .idx file, from 0, all splits counted.
            until: only samples before this one, e.g. the consumed samples of a checkpoint.

        Raises:
            TokscaleError: there is no such dataset or document, or a file is missing or damaged.
        """
        stop = self.spans[-1].stop if until is None else until
        for number, span in enumerate(self.spans):
            if isinstance(span.order, UntracedOrder) and span.start < stop:
                what = f"the samples that read {dataset} are not all known"
                if number:
                    what += f" (those before are: --until-sample {span.start})"
                raise span.order.refusal(what)
        prefix = self.prefix(dataset)
        n_documents = IndexedTokens.open(prefix).n_sequences
        if not 0 <= document < n_documents:
            raise TokscaleError(
                f"{prefix} has no document {document}; it has {n_documents}, counted from 0"
            )
        found = [np.empty(0, np.int64)]
        for span in self.spans:
            for number, record in enumerate(span.record.datasets):
                if record.prefix == prefix and record.size:
                    numbers = open_index(record).holding(document)
                    found.append(span.find(number, numbers, stop))
        return np.sort(np.concatenate(found))

    def prefix(self, dataset: str) -> str:
        """Return the prefix of the dataset with this name or prefix.

        Raises:
            TokscaleError: no dataset has the name, or several have it.
        """
        names = list(dict.fromkeys(pair for span in self.spans for pair in span.names.items()))
        found = {
            prefix: name
            for prefix, name in names
            if dataset in (name, base_name(prefix), prefix)
            or whole_prefix(dataset) == whole_prefix(prefix)
        }
        if not found:
            known = listed([name for _, name in names])
            raise TokscaleError(f"the job reads no dataset {dataset}; it reads {known}")
        if len(found) > 1:
            choices = listed([f"{name} ({prefix})" for prefix, name in found.items()])
            raise TokscaleError(
                f"the job reads {len(found)} datasets that are named {dataset}; give the prefix "
                f"(or the number, where one is named so): {choices}"
            )
        return next(iter(found))


@lru_cache(maxsize=1024)
def open_index(record: DatasetRecord) -> SampleIndex:
    """Map the three indices of a dataset in Megatron's cache.

    Raises:
        TokscaleError: a file is missing, damaged, or of another number of samples.
    """
    files = (record.document_index, record.sample_index, record.shuffle_index)
    document_P, bound_N12, shuffle_N = (map_cached(str(file)) for file in files)
    if bound_N12.shape != (record.size + 1, 2) or shuffle_N.shape != (record.size,):
        raise TokscaleError(
            f"{record.sample_index} is not of the {record.size} samples of {record.name} that the "
            "job read; restore it"
        )
    lengths_Q = IndexedTokens.open(record.prefix).lengths
    return _CachedIndex(lengths_Q, document_P, bound_N12, shuffle_N, record.extra, files)


@dataclass(frozen=True, eq=False)
class _CachedIndex(SampleIndex):
    """An index in Megatron's cache; as it has no checksums, impossible numbers are refused."""

    files: tuple[str | None, ...] = ()

    def pieces(self, sample: int) -> list[Piece]:
        with self._refused_if_damaged():
            pieces = super().pieces(sample)
            for document, start, stop in pieces:
                if document < 0 or not 0 <= start < stop <= self.lengths_Q[document]:
                    raise IndexError
        return pieces

    def holding(self, document: int) -> Integers:
        with self._refused_if_damaged():
            if self.document_P.min(initial=0) < 0:
                raise IndexError
            return super().holding(document)

    def read_by(self, numbers: Integers) -> Mask:
        with self._refused_if_damaged():
            if self.document_P.min(initial=0) < 0:
                raise IndexError
            return super().read_by(numbers)

    @contextmanager
    def _refused_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except (IndexError, ValueError) as error:
            raise TokscaleError(
                f"one of {', '.join(map(str, self.files))} is damaged, or not of its data; remove "
                "it and start the job, which makes the same"
            ) from error
