"""The record of where a job's training samples come from (data.json), which `trace` reads.

Nothing is copied: the record names the index files that Megatron and the plan keep in the job's
data cache. A job that is resumed with other data, or to another length (which reorders Megatron's
own samples), adds a record that holds from its first sample on. So does a job whose samples come in
an order that this package cannot trace; its record names the flag or dataset that makes the order.

The record is written by the job, so its format lies in this room, beside the plan's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    is_there,
    read_json,
    schema_version,
    sealed,
    write_json,
)
from megatron_tokscale.core.records import JSON, read_as, to_json
from megatron_tokscale.core.schemas import DATA_SCHEMA
from megatron_tokscale.corpus.names import match_prefixes
from megatron_tokscale.store import RunPaths

KIND: Final = "tokscale-data"
_RECORD: Final = "the run's record"  # its name in messages
_KINDS_UNTIL: Final = 2  # the last schema version whose records had a "kind" beside their order


@dataclass(frozen=True)
class DatasetRecord:
    """A GPT dataset of the job, or of a packing of its plan; all paths are absolute.

    Attributes:
        name: base name of the prefix.
        prefix: path of its .bin/.idx without the ending.
        document_index: .npy file in Megatron's cache; None, as the other two, for a dataset of a
            plan that is not drawn from.
        sample_index: likewise.
        shuffle_index: likewise.
        extra: tokens that a sample reads beyond its sequence length: 1 for the last label, or 0
            with `add_extra_token_to_sequence=False`.
        size: number of samples.
        key: Megatron's `unique_description_hash`.
        order: the flags that, with the documents, determine the tokens of a sample; empty if not
            known.
        stratum: name of the stratum whose documents it holds; empty for a whole training part.
    """

    name: str
    prefix: str
    document_index: str | None
    sample_index: str | None
    shuffle_index: str | None
    extra: int
    size: int
    key: str
    order: str = ""
    stratum: str = ""

    @classmethod
    def from_gpt_dataset(cls, dataset: Any, stratum: str = "") -> Self:
        """Return the record of Megatron's GPTDataset `dataset`, whose indices it has saved."""
        kind = type(dataset).__name__
        # Without --data-cache-path a GPTDataset keeps its indices beside its data.
        beside = Path(dataset.dataset.path_prefix) / "cache" / f"{kind}_indices"
        record = cls.from_cache(
            dataset.config.path_to_cache or beside,
            dataset.dataset_path,
            f"{dataset.unique_description_hash}-{kind}-{dataset.index_split.name}",
            int(dataset.config.add_extra_token_to_sequence),
            len(dataset),
        )
        config = dataset.config
        order = cls.order_of(config.random_seed, config.split)
        return replace(record, order=order, stratum=stratum)

    @classmethod
    def of_job(cls, dataset: Any) -> Self:
        """Return the record of a job's GPTDataset `dataset`, before the plan's own indices."""
        config = dataset.config
        order = cls.order_of(config.random_seed, config.split)
        return replace(cls.unused(dataset.dataset_path), order=order)

    @staticmethod
    def order_of(seed: int, split: str | None) -> str:
        """Return the order of the samples of a job with this --seed and --split."""
        return f"--seed {seed}, --split {split or 'parts of their own'}"

    @classmethod
    def from_cache(
        cls, cache_dir: Path | str, prefix: str, stem: str, extra: int, size: int
    ) -> Self:
        """Return the record of the dataset whose files in `cache_dir` begin with `stem`.

        Args:
            cache_dir: Megatron's data cache.
            prefix: path of the dataset's .bin/.idx without the ending.
            stem: KEY-CLASS-SPLIT.
            extra: as in `DatasetRecord`.
            size: number of samples.
        """
        return cls(
            name=Path(prefix).name,
            prefix=str(Path(prefix).absolute()),
            document_index=_index_file(cache_dir, stem, "document"),
            sample_index=_index_file(cache_dir, stem, "sample"),
            shuffle_index=_index_file(cache_dir, stem, "shuffle"),
            extra=extra,
            size=size,
            key=stem.partition("-")[0],
        )

    @classmethod
    def unused(cls, prefix: str, stratum: str = "") -> Self:
        """Return the record of a dataset of a plan that is not drawn from."""
        whole = str(Path(prefix).absolute())
        return cls(Path(prefix).name, whole, None, None, None, 1, 0, "", stratum=stratum)


@dataclass(frozen=True)
class BlendRecord:
    """Megatron's blend of the datasets.

    Attributes:
        dataset_index: .npy file in Megatron's cache; None where Megatron keeps none, as the job
            has no --data-cache-path.
        dataset_sample_index: likewise.
        size: number of samples.
    """

    dataset_index: str | None
    dataset_sample_index: str | None
    size: int

    @classmethod
    def from_blended_dataset(cls, blended: Any) -> Self:
        """Return the record of Megatron's BlendedDataset `blended`."""
        cache = blended.config.path_to_cache
        if not cache:
            return cls(None, None, len(blended))
        stem = f"{blended.unique_description_hash}-{type(blended).__name__}-{blended.split.name}"
        return cls.from_cache(cache, stem, len(blended))

    @classmethod
    def from_cache(cls, cache_dir: Path | str, stem: str, size: int) -> Self:
        """Return the record of the blend whose files in `cache_dir` begin with KEY-CLASS-SPLIT."""
        dataset_index = _index_file(cache_dir, stem, "dataset")
        return cls(dataset_index, _index_file(cache_dir, stem, "dataset_sample"), size)


@dataclass(frozen=True)
class PlanRecord:
    """The plan that orders the samples; the plan itself is RUN/tokscale/plan.json.

    Attributes:
        cache_dir: folder of the plan's index.
        fingerprint: fingerprint of the plan.
        n_samples: samples that the index is built for, counted from the first of the plan.
        strata: of each packing the file that ranks its samples; None for one of a single stratum.
    """

    cache_dir: str
    fingerprint: str
    n_samples: int
    strata: tuple[str | None, ...]


@dataclass(frozen=True)
class UntracedRecord:
    """An order of samples that this package cannot trace.

    Attributes:
        reason: the flag or the dataset that makes the order.
    """

    reason: str


type Order = PlanRecord | BlendRecord | UntracedRecord | None


@dataclass(frozen=True)
class DataRecord:
    """The training data of a job from a sample on.

    Attributes:
        datasets: of a plan its packings, else the datasets of the blend; in that order, and empty
            for an unknown order.
        order: the plan or blend that draws from them; None for a job on one dataset, which reads
            it as it is.
        start: consumed samples from which on the record holds.
        offset: the global number of the first sample of the blend or of the one dataset: 0, but
            for jobs with phase transitions. A plan's index counts global samples: 0.
    """

    datasets: tuple[DatasetRecord, ...]
    order: Order = None
    start: int = 0
    offset: int = 0

    @property
    def kind(self) -> Literal["plan", "blend", "untraced", "single"]:
        """Kind of the order."""
        if isinstance(self.order, PlanRecord):
            return "plan"
        if isinstance(self.order, UntracedRecord):
            return "untraced"
        return "single" if self.order is None else "blend"

    def save(self, path: Path) -> None:
        """Add this record to `path`, to hold from sample `start` on; earlier records stay.

        Raises:
            TokscaleError: the records in `path` cannot be read.
            OSError: the file cannot be written.
        """
        known = load_records(path) if self.start and is_there(path) else ()
        records = _continued(known, self)
        if records != list(known):
            content: dict[str, JSON] = {
                "kind": KIND,
                "schema_version": DATA_SCHEMA,
                "records": to_json(records),
            }
            write_json(path, sealed(content))


def check_order(path: Path, datasets: Sequence[DatasetRecord]) -> None:
    """Refuse to resume with datasets whose samples are others than those recorded in `path`.

    Raises:
        TokscaleError: naming the dataset and the two orders.
    """
    known = load_records(path)[-1].datasets if is_there(path) else ()
    prefixes = [row.prefix for row in known]
    places = match_prefixes([row.prefix for row in datasets], prefixes, _RECORD)
    for row, past in zip(datasets, places, strict=True):
        before = known[past].order if past is not None else ""
        if before and row.order and before != row.order:
            raise TokscaleError(
                f"the samples of {row.name} that the run has consumed are of {before}, this job's "
                f"are of {row.order}, so some would come twice; resume with {before}"
            )


def record_path(run: Path | str) -> Path:
    """Return the path of a run directory's record of its data."""
    return RunPaths(Path(run)).data_record


def load_records(path: Path) -> tuple[DataRecord, ...]:
    """Read the records in `path`, by ascending `start`.

    Raises:
        TokscaleError: the file is missing, damaged, newer, or holds something else.
    """
    content: dict[str, Any] = read_json(path)
    if content.get("kind") != KIND:
        raise TokscaleError(
            f"{path} is no record of a job's data; expected kind {KIND!r}; restore or remove it"
        )
    version = schema_version(path, content)
    check_schema(path, version, DATA_SCHEMA)
    rows: JSON = content.get("records")
    if version <= _KINDS_UNTIL and isinstance(rows, list):
        rows = [_without_kind(row) for row in rows]
    records = read_as(tuple[DataRecord, ...], rows, path, "restore or remove it")
    if not records:
        raise TokscaleError(f"{path} has no record; expected one or more; restore or remove it")
    check_seal(path, content)
    return records


def _without_kind(row: JSON) -> JSON:
    if not isinstance(row, Mapping):
        return row
    return {name: value for name, value in row.items() if name != "kind"}


def _index_file(cache_dir: Path | str, stem: str, what: str) -> str:
    return str((Path(cache_dir) / f"{stem}-{what}_index.npy").absolute())


def _continued(known: Sequence[DataRecord], record: DataRecord) -> list[DataRecord]:
    """Return the records that hold once `record` is added."""
    kept = [other for other in known if other.start < record.start]
    if kept and isinstance(kept[-1].order, PlanRecord) and isinstance(record.order, PlanRecord):
        # The later plan has the same past: a job that would change it is refused.
        return [*kept[:-1], _with_past(kept[-1], record)]
    if kept and replace(kept[-1], start=record.start) == record:
        return kept
    return [*kept, record]


def _with_past(before: DataRecord, record: DataRecord) -> DataRecord:
    """Return a plan's record from the start of the one before, with datasets it has left out."""
    assert isinstance(before.order, PlanRecord) and isinstance(record.order, PlanRecord)
    past = list(zip(before.datasets, before.order.strata, strict=True))
    present = zip(record.datasets, record.order.strata, strict=True)
    rows = [
        now if now[0].size or place is None else past[place]
        for now, place in zip(present, _earlier_rows(record.datasets, before.datasets), strict=True)
    ]
    order = replace(record.order, strata=tuple(strata for _, strata in rows))
    return replace(record, datasets=tuple(row for row, _ in rows), order=order, start=before.start)


def _earlier_rows(
    datasets: Sequence[DatasetRecord], known: Sequence[DatasetRecord]
) -> list[int | None]:
    """Return the place of each dataset in an earlier record, found by its stratum and prefix."""
    places: list[int | None] = [None] * len(datasets)
    own, theirs = (_by_stratum(rows) for rows in (datasets, known))
    for stratum, wanted in own.items():
        among = theirs.get(stratum, [])
        found = match_prefixes(
            [datasets[i].prefix for i in wanted], [known[i].prefix for i in among], _RECORD
        )
        for i, place in zip(wanted, found, strict=True):
            places[i] = None if place is None else among[place]
    return places


def _by_stratum(rows: Sequence[DatasetRecord]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.stratum, []).append(i)
    return places
