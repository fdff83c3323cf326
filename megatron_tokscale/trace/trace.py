"""Which documents is sample k of a job made of, and which samples hold document d?

k counts the job's training samples from 0, in the order in which they are consumed. That is the
order of the job's dataset under Megatron's --dataloader-type single, its default; samples that a
job has drawn otherwise are refused.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.names import base_name, listed, numbered, whole_prefix
from megatron_tokscale.data.array_files import blocks, check_array
from megatron_tokscale.data.history import followed
from megatron_tokscale.data.index import load_or_compute_index
from megatron_tokscale.data.plan import Plan
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    PlanRecord,
    UntracedRecord,
    load_records,
    record_path,
)
from megatron_tokscale.data.samples import Piece, SampleIndex
from megatron_tokscale.data.strata import map_strata
from megatron_tokscale.store import RunPaths
from megatron_tokscale.trace.megatron_cache import find_record, map_cached

type ShowText = Callable[[Sequence[int]], str]
"""From token ids to text that is safe on a terminal."""

_SHOWN_TOKENS, _SHOWN_IDS, _SHOWN_TEXT = 24, 8, 60


class Place(NamedTuple):
    """Where a sample is from: sample `number` of dataset `dataset`, and under a plan its stratum.

    `epoch` counts how often the stratum was gone through before.
    """

    dataset: int
    number: int
    stratum: str | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class SampleTrace:
    """What sample k is made of.

    Attributes:
        k: number of the sample in the job.
        stratum: name of its stratum; None without a plan.
        epoch: how often the stratum was gone through before; None without a plan.
        number: number of the sample in its dataset.
        pieces: the tokens that it reads, with the one behind its end that is only a label.
        name: tells the dataset from the others of the job; namesakes are numbered.
    """

    k: int
    stratum: str | None
    epoch: int | None
    dataset: DatasetRecord
    number: int
    pieces: tuple[Piece, ...]
    name: str = ""


class Order(Protocol):
    """In which order samples are drawn from the datasets."""

    def __len__(self) -> int: ...

    def place(self, k: int) -> Place:
        """Where sample k is from."""

    def reading(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        """The samples from `start` to `stop` that are these of a dataset, ascending."""


class _Single:
    """One dataset as it is."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def place(self, k: int) -> Place:
        return Place(0, k)

    def reading(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        return np.sort(numbers[(numbers >= start) & (numbers < stop)])


class _Blend:
    """Megatron's BlendedDataset."""

    def __init__(self, record: BlendRecord) -> None:
        if record.dataset_index is None or record.dataset_sample_index is None:
            raise TokscaleError(
                "Megatron kept no index of this job's blend, as the job had no --data-cache-path; "
                "start it with one to trace its samples"
            )
        self.dataset_N = map_cached(record.dataset_index)
        self.number_N = map_cached(record.dataset_sample_index)
        if not len(self.dataset_N) == len(self.number_N) == record.size:
            raise TokscaleError(
                f"{record.dataset_index} is not of the blend of {record.size} samples that the job "
                "read; restore it"
            )

    def __len__(self) -> int:
        return len(self.dataset_N)

    def place(self, k: int) -> Place:
        return Place(int(self.dataset_N[k]), int(self.number_N[k]))

    def reading(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            own = block.start + np.flatnonzero(self.dataset_N[block] == dataset)
            found.append(own[np.isin(self.number_N[own], numbers)])
        return np.concatenate(found)


class _Planned:
    """The dataset that follows a plan."""

    def __init__(self, plan: Plan, record: PlanRecord, sizes_D: Sequence[int]) -> None:
        self.plan = plan
        # The index of a plan that was extended while the job trained is in no file.
        self.index = load_or_compute_index(plan, record.n_samples, Path(record.cache_dir))
        files = [None if file is None else Path(file) for file in record.strata]
        self.strata = map_strata(plan, sizes_D, files)
        for path in files:
            if path is not None:
                check_array(path)

    def __len__(self) -> int:
        return len(self.index)

    def place(self, k: int) -> Place:
        stratum = int(self.index.stratum_N[k])
        dataset, epoch, number = self.strata.locate(stratum, int(self.index.draw_N[k]))
        return Place(dataset, number, self.plan.strata[stratum].name, epoch)

    def reading(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        strata = [
            stratum
            for stratum in self.plan.strata_of(dataset)
            if np.isin(numbers, self.strata.numbers(stratum)).any()
        ]
        found = [np.empty(0, np.int64)]
        for block in blocks(start, stop):
            for stratum in strata:
                own = block.start + np.flatnonzero(self.index.stratum_N[block] == stratum)
                _, number_N = self.strata.locate_many(stratum, self.index.draw_N[own])
                found.append(own[np.isin(number_N, numbers)])
        return np.sort(np.concatenate(found))


class _Untraced:
    """An order that the job's record does not know; it has no end."""

    def __init__(self, reason: str, start: int) -> None:
        self.reason, self.start = reason, start

    def __len__(self) -> int:
        return sys.maxsize

    def place(self, k: int) -> Place:
        raise self.refusal(f"sample {k} is not known")

    def reading(self, dataset: int, numbers: Integers, start: int, stop: int) -> Integers:
        raise self.refusal("the samples that read a document are not known")

    def refusal(self, what: str) -> TokscaleError:
        """Return the error that says why nothing is known."""
        return TokscaleError(
            f"{what}: from sample {self.start} on {self.reason} orders the job's samples; expected "
            "Megatron's GPT datasets and --dataloader-type single"
        )


@dataclass(frozen=True, eq=False)
class Span:
    """Samples of a job that are drawn in one order from the same data.

    Attributes:
        order: the order; its sample i is sample `record.offset` + i of the job.
        stop: the first sample of the job that is not in this span.
    """

    record: DataRecord
    order: Order
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

    def place(self, k: int) -> Place:
        """Where sample k of the job is from."""
        return self.order.place(k - self.record.offset)

    def reading(self, dataset: int, numbers: Integers, until: int) -> Integers:
        """The job's samples before `until` that are these of a dataset, ascending."""
        offset, stop = self.record.offset, max(min(until, self.stop), self.start)
        return offset + self.order.reading(dataset, numbers, self.start - offset, stop - offset)


@dataclass(frozen=True, eq=False)
class Trace:
    """What a job's training samples are made of. Make one with `Trace.open` or `Trace.from_cache`.

    Attributes:
        spans: by ascending start, one after the other.
    """

    spans: tuple[Span, ...]

    @staticmethod
    def open(run: Path | str) -> "Trace":
        """The training data of a run with the plugin.

        Raises:
            TokscaleError: the run has no record of its data, or a file that this names is missing,
                damaged or another.
        """
        path = record_path(run)
        if not path.is_file():
            raise TokscaleError(
                f"{path} is not there: only a job that trains with the plugin writes it, and a "
                "replay trains nothing; give the --data-cache-path of the training job instead of "
                "the run"
            )
        return Trace.from_records(load_records(path), RunPaths(Path(run)).plan)

    @staticmethod
    def from_cache(cache_dir: Path | str, match: Sequence[str] = (), extra: int = 1) -> "Trace":
        """The training data of a job without the plugin, from Megatron's data cache.

        Args:
            cache_dir: the --data-cache-path of a job with --dataloader-type single, Megatron's
                default; the cache does not tell, so that of another job gets wrong answers.
            match: words that only the job's description holds, if the cache holds several.
            extra: tokens that a sample reads behind its stretch.

        Raises:
            TokscaleError: there is none, or more than one that matches; or a file is damaged.
        """
        return Trace.from_records([find_record(Path(cache_dir), match, extra)])

    @staticmethod
    def from_records(records: Sequence[DataRecord], plan: Path | None = None) -> "Trace":
        """What the records tell, by ascending start; `plan` is the file of the plan, if any.

        Raises:
            TokscaleError: a file that they name is missing, damaged or another.
        """
        orders = [_order(record, plan) for record in records]
        ends = [record.offset + len(order) for record, order in zip(records, orders, strict=True)]
        stops = [record.start for record in records[1:]] + ends[-1:]
        return Trace(
            tuple(
                Span(record, order, min(stop, end))
                for record, order, stop, end in zip(records, orders, stops, ends, strict=True)
            )
        )

    def __len__(self) -> int:
        """Samples of the job, consumed or not, up to those whose order is not known."""
        last = self.spans[-1]
        return last.start if isinstance(last.order, _Untraced) else last.stop

    @cached_property
    def datasets(self) -> list[DatasetRecord]:
        """All datasets that the job has drawn from."""
        return list(dict.fromkeys(row for span in self.spans for row in span.record.datasets))

    def sample(self, k: int) -> SampleTrace:
        """The documents that sample k reads.

        Raises:
            TokscaleError: there is no such sample, or a file is missing or damaged.
        """
        span = next((span for span in self.spans if span.start <= k < span.stop), None)
        if span is None:
            known = "none"
            if len(self) > self.spans[0].start:
                known = f"from {self.spans[0].start} to {len(self) - 1}"
            raise TokscaleError(
                f"sample {k} is not among those that are known of this job: {known}"
            )
        place = span.place(k)
        dataset = span.record.datasets[place.dataset]
        pieces = tuple(_open_index(dataset).pieces(place.number))
        name = span.names[dataset.prefix]
        return SampleTrace(k, place.stratum, place.epoch, dataset, place.number, pieces, name)

    def document(self, dataset: str, document: int, until: int | None = None) -> Integers:
        """The samples that read a token of a document, ascending.

        Args:
            dataset: name (of namesakes NAME#N) or prefix of the dataset.
            document: number of the document in the .idx file, from 0, all splits counted.
            until: only samples before this one, e.g. the consumed samples of a checkpoint.

        Raises:
            TokscaleError: there is no such dataset or document, or a file is missing or damaged.
        """
        stop = self.spans[-1].stop if until is None else until
        for number, span in enumerate(self.spans):
            if isinstance(span.order, _Untraced) and span.start < stop:
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
                    numbers = _open_index(record).holding(document)
                    found.append(span.reading(number, numbers, stop))
        return np.sort(np.concatenate(found))

    def prefix(self, dataset: str) -> str:
        """The prefix of the dataset with this name or prefix.

        Raises:
            TokscaleError: there is none, or several of this name.
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


def _order(record: DataRecord, plan_file: Path | None) -> Order:
    if isinstance(record.order, BlendRecord):
        return _Blend(record.order)
    if record.order is None:
        return _Single(record.datasets[0].size)
    if isinstance(record.order, UntracedRecord):
        return _Untraced(record.order.reason, record.start)
    if plan_file is None or not plan_file.is_file():
        raise TokscaleError(f"the plan that the job follows is not in {plan_file}; restore it")
    plan = followed(plan_file.parent.parent)
    if plan.fingerprint != record.order.fingerprint:
        raise TokscaleError(
            f"{plan_file} is plan {plan.fingerprint}, the job follows {record.order.fingerprint}; "
            "restore that one"
        )
    return _Planned(plan, record.order, [row.size for row in record.datasets])


@lru_cache(maxsize=1024)
def _open_index(record: DatasetRecord) -> SampleIndex:
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
    """An index in Megatron's cache, which has no checksums: numbers that cannot be are refused."""

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

    @contextmanager
    def _refused_if_damaged(self) -> Iterator[None]:
        try:
            yield
        except (IndexError, ValueError) as error:
            raise TokscaleError(
                f"one of {', '.join(map(str, self.files))} is damaged, or not of its data; remove "
                "it and start the job, which makes the same"
            ) from error


def describe_sample(trace: Trace, k: int, text: ShowText | None = None) -> str:
    """Sample k in words: its documents, and how what it reads of each begins.

    Args:
        trace: of the job.
        k: the sample.
        text: shows tokens; None shows their ids.

    Raises:
        TokscaleError: as `Trace.sample`.
    """
    found = trace.sample(k)
    tokens = IndexedTokens.open(found.dataset.prefix)
    head = f"sample {k}: sample {found.number} of {found.name}"
    if found.stratum is not None:
        head += f", stratum {found.stratum}, epoch {found.epoch}"
    lines = [head, f"  {'document':>10}  {'tokens':>15}  {'of':>8}"]
    for piece in found.pieces:
        span, length = f"{piece.start}-{piece.stop - 1}", int(tokens.lengths[piece.document])
        ids = tokens.sequence(piece.document)[piece.start : piece.stop][:_SHOWN_TOKENS]
        shown = _shown(ids.tolist(), piece.stop - piece.start, text)
        lines.append(f"  {piece.document:>10}  {span:>15}  {length:>8}  {shown}")
    return "\n".join(lines) + "\n"


def _shown(ids: list[int], n_tokens: int, text: ShowText | None) -> str:
    if text is None:
        more = " …" if n_tokens > _SHOWN_IDS else ""
        return " ".join(map(str, ids[:_SHOWN_IDS])) + more
    words = text(ids)
    return words if len(words) <= _SHOWN_TEXT else words[:_SHOWN_TEXT] + "…"


def describe_document(trace: Trace, dataset: str, document: int, until: int | None = None) -> str:
    """The samples that read a document, in words: one line each, with the tokens they read.

    Raises:
        TokscaleError: as `Trace.document`.
    """
    samples = trace.document(dataset, document, until)
    length = int(IndexedTokens.open(trace.prefix(dataset)).lengths[document])
    among = f"the {len(trace)} samples of the job" if until is None else f"the first {until}"
    lines = [
        f"document {document} of {dataset}, {length} tokens, is read by {len(samples)} of {among}"
    ]
    if not len(samples):
        lines[0] += "; it may be of another part of --split, or not reached"
    for k in samples.tolist():
        found = trace.sample(k)
        spans = ", ".join(
            f"{piece.start}-{piece.stop - 1}"
            for piece in found.pieces
            if piece.document == document
        )
        where = "" if found.stratum is None else f", stratum {found.stratum}, epoch {found.epoch}"
        lines.append(f"  sample {k}: tokens {spans}{where}")
    return "\n".join(lines) + "\n"
