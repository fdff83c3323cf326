"""Where a job's training samples come from: written by the job, read by `megatron-tokscale trace`.

Nothing is copied: the record names the index files that Megatron and the plan keep in the job's
data cache. A job that is resumed with other data, or to another length (which reorders Megatron's
own samples), adds a record that holds from its first sample on. So does one whose samples come in
an order that is not known here; its record names what makes the order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import (
    check_schema,
    check_seal,
    is_there,
    read_json,
    sealed,
    write_json,
)
from megatron_tokscale.core.schemas import DATA_SCHEMA
from megatron_tokscale.corpus.names import match_prefixes
from megatron_tokscale.store import RunPaths

KIND: Final = "tokscale-data"


@dataclass(frozen=True)
class DatasetRecord:
    """A GPT dataset of the job; all paths are absolute.

    Attributes:
        name: base name of the prefix.
        prefix: of its .bin/.idx.
        document_index: .npy file in Megatron's cache; None, as the other two, for a dataset of a
            plan that is not drawn from.
        sample_index: likewise.
        shuffle_index: likewise.
        extra: tokens that a sample reads behind its stretch: 1, or 0 where Megatron is told so.
        size: number of samples.
        key: Megatron's `unique_description_hash`.
        order: what, beside the documents themselves, decides which tokens a sample is; empty where
            it is not known.
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

    @staticmethod
    def from_gpt_dataset(dataset: Any) -> "DatasetRecord":
        """Record Megatron's GPTDataset `dataset`, whose indices it has saved."""
        kind = type(dataset).__name__
        # Without --data-cache-path a GPTDataset keeps its indices beside its data.
        beside = Path(dataset.dataset.path_prefix) / "cache" / f"{kind}_indices"
        record = DatasetRecord.from_cache(
            dataset.config.path_to_cache or beside,
            dataset.dataset_path,
            f"{dataset.unique_description_hash}-{kind}-{dataset.index_split.name}",
            int(dataset.config.add_extra_token_to_sequence),
            len(dataset),
        )
        config = dataset.config
        return replace(record, order=DatasetRecord.order_of(config.random_seed, config.split))

    @staticmethod
    def order_of(seed: int, split: str | None) -> str:
        """Return the order of the samples of a job with this --seed and --split."""
        return f"--seed {seed}, --split {split or 'parts of their own'}"

    @staticmethod
    def from_cache(
        cache_dir: Path | str, prefix: str, stem: str, extra: int, size: int
    ) -> "DatasetRecord":
        """Record the dataset whose files in `cache_dir` begin with `stem`: KEY-CLASS-SPLIT."""
        return DatasetRecord(
            name=Path(prefix).name,
            prefix=str(Path(prefix).absolute()),
            document_index=_file(cache_dir, stem, "document"),
            sample_index=_file(cache_dir, stem, "sample"),
            shuffle_index=_file(cache_dir, stem, "shuffle"),
            extra=extra,
            size=size,
            key=stem.partition("-")[0],
        )

    @staticmethod
    def unused(prefix: str) -> "DatasetRecord":
        """Record a dataset of a plan that is not drawn from."""
        whole = str(Path(prefix).absolute())
        return DatasetRecord(Path(prefix).name, whole, None, None, None, 1, 0, "")


@dataclass(frozen=True)
class BlendRecord:
    """Megatron's blend of the datasets.

    Attributes:
        dataset_index: .npy file in Megatron's cache; None where it keeps none, as the job has no
            --data-cache-path.
        dataset_sample_index: likewise.
        size: number of samples.
    """

    dataset_index: str | None
    dataset_sample_index: str | None
    size: int

    @staticmethod
    def from_blended_dataset(blended: Any) -> "BlendRecord":
        """Record Megatron's BlendedDataset `blended`."""
        cache = blended.config.path_to_cache
        if not cache:
            return BlendRecord(None, None, len(blended))
        stem = f"{blended.unique_description_hash}-{type(blended).__name__}-{blended.split.name}"
        return BlendRecord.from_cache(cache, stem, len(blended))

    @staticmethod
    def from_cache(cache_dir: Path | str, stem: str, size: int) -> "BlendRecord":
        """Record the blend whose files in `cache_dir` begin with `stem`: KEY-CLASS-SPLIT."""
        return BlendRecord(
            _file(cache_dir, stem, "dataset"), _file(cache_dir, stem, "dataset_sample"), size
        )


@dataclass(frozen=True)
class PlanRecord:
    """The plan that orders the samples; itself it is RUN/tokscale/plan.json.

    Attributes:
        cache_dir: where the plan's index is.
        fingerprint: of the plan.
        n_samples: how many the index is built for, counted from the first of the plan.
        strata: of each dataset the file that ranks its samples; None for one that is not cut.
    """

    cache_dir: str
    fingerprint: str
    n_samples: int
    strata: tuple[str | None, ...]


@dataclass(frozen=True)
class UntracedRecord:
    """An order of samples that the record does not know.

    Attributes:
        reason: the flag or the dataset that makes the order.
    """

    reason: str


type Order = PlanRecord | BlendRecord | UntracedRecord | None


@dataclass(frozen=True)
class DataRecord:
    """The training data of a job from a sample on.

    Attributes:
        datasets: in the order of the plan, or of the blend; none of an unknown order.
        order: what draws from them; None for a job on one dataset, which reads it as it is.
        start: consumed samples from which on this holds.
        offset: the global number of the first sample of the blend or of the one dataset: 0, but
            for jobs with phase transitions. A plan's index counts global samples: 0.
    """

    datasets: tuple[DatasetRecord, ...]
    order: Order = None
    start: int = 0
    offset: int = 0

    @property
    def kind(self) -> Literal["plan", "blend", "untraced", "single"]:
        """What orders the samples."""
        if isinstance(self.order, PlanRecord):
            return "plan"
        if isinstance(self.order, UntracedRecord):
            return "untraced"
        return "single" if self.order is None else "blend"

    def save(self, path: Path) -> None:
        """Note in `path` that this holds from sample `start` on; what is before stays.

        Raises:
            TokscaleError: what is there cannot be read.
            OSError: it cannot be written.
        """
        known = load_records(path) if self.start and is_there(path) else ()
        records = _continued(known, self)
        if records != list(known):
            rows = [_to_json(record) for record in records]
            content: dict[str, Any] = {"kind": KIND, "schema_version": DATA_SCHEMA, "records": rows}
            write_json(path, sealed(content))


def check_order(path: Path, datasets: Sequence[DatasetRecord]) -> None:
    """Refuse to go on with datasets whose samples are others than those recorded in `path`.

    Raises:
        TokscaleError: naming what has changed.
    """
    known = load_records(path)[-1].datasets if is_there(path) else ()
    for row, past in zip(datasets, _past_of(datasets, known), strict=True):
        before = known[past].order if past is not None else ""
        if before and row.order and before != row.order:
            raise TokscaleError(
                f"the samples of {row.name} that the run has consumed are of {before}, this job's "
                f"are of {row.order}: some would come twice; go on with the former"
            )


def record_path(run: Path | str) -> Path:
    """Where a run directory has its record."""
    return RunPaths(Path(run)).data_record


def load_records(path: Path) -> tuple[DataRecord, ...]:
    """Read the records in `path`, by ascending `start`.

    Raises:
        TokscaleError: the file is missing, newer, or of something else.
    """
    content: dict[str, Any] = read_json(path)
    if content.get("kind") != KIND:
        raise TokscaleError(f"{path} does not say what data a job reads; restore or remove it")
    version = content.get("schema_version")
    check_schema(path, version if isinstance(version, int) else 0, DATA_SCHEMA)
    try:
        records = tuple(_from_json(row) for row in content["records"])
    except (KeyError, TypeError, ValueError) as error:
        raise TokscaleError(f"{path} is malformed ({error!r}); restore or remove it") from error
    if not records:
        raise TokscaleError(f"{path} has no record; restore or remove it")
    check_seal(path, content)
    return records


def _file(cache_dir: Path | str, stem: str, what: str) -> str:
    return str((Path(cache_dir) / f"{stem}-{what}_index.npy").absolute())


def _continued(known: Sequence[DataRecord], record: DataRecord) -> list[DataRecord]:
    kept = [other for other in known if other.start < record.start]
    if kept and isinstance(kept[-1].order, PlanRecord) and isinstance(record.order, PlanRecord):
        # A plan that goes on from another has the same past: a job is refused that changes it.
        return [*kept[:-1], _with_past(kept[-1], record)]
    if kept and replace(kept[-1], start=record.start) == record:
        return kept
    return [*kept, record]


def _with_past(before: DataRecord, record: DataRecord) -> DataRecord:
    """The record of a plan from the start of the one before, with datasets it has left out."""
    assert isinstance(before.order, PlanRecord) and isinstance(record.order, PlanRecord)
    past = list(zip(before.datasets, before.order.strata, strict=True))
    present = zip(record.datasets, record.order.strata, strict=True)
    rows = [
        now if now[0].size or place is None else past[place]
        for now, place in zip(present, _past_of(record.datasets, before.datasets), strict=True)
    ]
    order = replace(record.order, strata=tuple(strata for _, strata in rows))
    return replace(record, datasets=tuple(row for row, _ in rows), order=order, start=before.start)


def _past_of(datasets: Sequence[DatasetRecord], known: Sequence[DatasetRecord]) -> list[int | None]:
    """Find datasets in an earlier record, by their prefixes."""
    return match_prefixes(
        [row.prefix for row in datasets], [row.prefix for row in known], "the run's record"
    )


def _to_json(record: DataRecord) -> dict[str, Any]:
    return {"kind": record.kind, **asdict(record)}


def _from_json(row: Mapping[str, Any]) -> DataRecord:
    orders: dict[str, type[PlanRecord | BlendRecord | UntracedRecord]] = {
        "plan": PlanRecord,
        "blend": BlendRecord,
        "untraced": UntracedRecord,
    }
    order: Order = None
    if row["kind"] != "single":
        order = orders[row["kind"]](**row["order"])
    if isinstance(order, PlanRecord):
        order = replace(order, strata=tuple(order.strata))
    datasets = tuple(DatasetRecord(**dataset) for dataset in row["datasets"])
    return DataRecord(datasets, order, int(row["start"]), int(row["offset"]))
