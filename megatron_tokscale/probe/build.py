"""A probe set made from Megatron's .bin/.idx files: windows of held-out documents.

Shapes: B sequences, S sequence length, W windows of one dataset, P passages, L their length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_tokscale.core.arrays import AnyArray, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import NoProgress, Progress
from megatron_tokscale.core.seed import DEFAULT_SEED
from megatron_tokscale.corpus.bin_idx import IndexedTokens, Portion
from megatron_tokscale.corpus.names import listed, whole_prefix
from megatron_tokscale.corpus.source import DataPath, DataSource, split_range
from megatron_tokscale.probe.draw import Unit, Windows, available, count_until, draw, quotas
from megatron_tokscale.probe.duplicates import PASSAGE, Duplicates, find_duplicates
from megatron_tokscale.probe.probe_set import (
    DuplicateCounts,
    DuplicateSearch,
    ProbeSet,
    ProbeSetOrigin,
)
from megatron_tokscale.probe.probe_set_text import describe

__all__ = ["ProbeSettings", "build_held_out_set", "build_probe_set", "describe"]

_FLAGS = {"tokens": "--tokens", "sequences": "--sequences, or a smaller --budget"}
_RESERVE = 2
"""Windows that are searched for duplicates for each window to keep, if duplicates are dropped; our
choice: enough if at most half of the windows are duplicates."""


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """Settings of the draw of a probe set.

    Attributes:
        data_path: Megatron's --data-path words; with per-split arguments, the words of each part.
        split: Megatron's --split of the job, so that held-out means held out; None with per-split
            arguments, where each part is the whole of its own datasets.
        part: the part of the data to draw from: train, valid or test.
        seq_length: sequence length of the job in tokens.
        vocab_size: vocabulary size of the job's tokenizer (its --vocab-size).
        n_tokens: approximate number of tokens to watch.
        n_sequences: exact number of sequences. Set this or `n_tokens`.
        unseen_by: ids or paths of runs whose trainings have drawn none of the documents, for the
            origin of the set; None if no run is named.
        per_dataset: "equal": the datasets have equal shares of these; "proportional": shares in
            proportion to their weights.
        eod: id of the end-of-document token, which is not watched; None if there is none.
        seed: seed of the draw.
        duplicates: "ignore", "report" (count) or "drop" (pass over and draw others) windows whose
            text is in the training part as well. A window is a duplicate if its whole document is
            in the training part, or if any of its passages of 64 tokens, cut at multiples of 64,
            is. A window that shares 127 consecutive tokens with the training part is always found.

    Raises:
        TokscaleError: on construction, if the size is given twice or not at all, or the sequence
            length is below 1.
    """

    data_path: DataPath
    split: str | None = None
    seq_length: int
    vocab_size: int
    n_tokens: int | None = None
    n_sequences: int | None = None
    part: str = "valid"
    per_dataset: Literal["equal", "proportional"] = "equal"
    eod: int | None = None
    seed: int = DEFAULT_SEED
    unseen_by: str | None = None
    duplicates: Literal["ignore", "report", "drop"] = "ignore"

    def __post_init__(self) -> None:
        if (self.n_tokens is None) == (self.n_sequences is None):
            raise TokscaleError("give the size of a probe set in --tokens or in --sequences")
        if self.seq_length < 1:
            raise TokscaleError(
                f"--seq-length {self.seq_length} is too small; expected 1 token or more; give the "
                "job's --seq-length"
            )

    @property
    def source(self) -> DataSource:
        """The job's data."""
        return DataSource(self.data_path, self.split)

    @property
    def size(self) -> int:
        """The size of the set to draw, in `unit`."""
        return self.n_sequences or self.n_tokens or 0

    @property
    def unit(self) -> Unit:
        """The unit of the size: tokens or sequences."""
        return "tokens" if self.n_sequences is None else "sequences"


def build_probe_set(
    settings: ProbeSettings,
    progress: Progress | None = None,
    left_out: Mapping[str, Mask] | None = None,
) -> ProbeSet:
    """Draw windows of documents, dataset by dataset, with a fixed seed.

    Windows begin at multiples of the sequence length in their document, so a drawn window does not
    depend on the others. A window shorter than a sequence is padded; padding and end-of-document
    tokens are not watched.

    Args:
        settings: settings of the draw.
        progress: receiver of the progress of the search for duplicates; None for none.
        left_out: by a dataset's whole prefix, a mask of the documents of its file that are not
            watched.

    Raises:
        TokscaleError: a dataset is missing, has ids outside of the vocabulary, or too few held-out
            tokens.
    """
    portions = _open(settings, left_out or {})
    files = [portion.tokens for portion in portions]
    quota_D = _quotas(portions, settings)
    if settings.duplicates == "ignore":
        windows = _draw(portions, quota_D, settings)
        return _cut(portions, windows[windows.file_order()], settings)
    # Draw more than the quotas, and search the training part for all drawn windows.
    training = _open_training(settings)
    windows = _draw(portions, quota_D, settings, _RESERVE if settings.duplicates == "drop" else 1)
    found = find_duplicates(windows, files, settings.seq_length, training, progress or NoProgress())
    # Keep windows in the order of the draw until the quotas are full.
    is_met_W = _until_enough(windows, found, portions, quota_D, settings)
    is_chosen_W = is_met_W & ~found.either_W if settings.duplicates == "drop" else is_met_W
    chosen = np.flatnonzero(is_chosen_W)
    chosen = chosen[windows[chosen].file_order()]
    probe_set = _cut(portions, windows[chosen], settings)
    # Count the duplicates found so far, and the watched tokens in those that were kept.
    watched_twice_B = probe_set.mask_BS.sum(axis=1) * found.either_W[chosen]
    counts = []
    for dataset in range(len(files)):
        is_met_here_W = is_met_W & (windows.dataset_W == dataset)
        n_tokens = int(watched_twice_B[windows.dataset_W[chosen] == dataset].sum())
        counts.append(_counts(windows[is_met_here_W], found[is_met_here_W], n_tokens))
    search = DuplicateSearch(
        dropped=settings.duplicates == "drop",
        passage_tokens=PASSAGE,
        training=tuple(whole_prefix(portion.tokens.prefix) for portion in training),
        datasets=tuple(counts),
    )
    assert probe_set.origin is not None
    return replace(probe_set, origin=replace(probe_set.origin, duplicates=search))


def build_held_out_set(portions: Sequence[Portion], settings: ProbeSettings, plan: str) -> ProbeSet:
    """Draw windows of documents that a plan keeps out of the training, stratum by stratum.

    Each stratum is a dataset of the set and gives the same number of tokens, or all that it has.

    Args:
        portions: the documents of each stratum, under its name.
        settings: settings of the draw; its data are those of the strata.
        plan: fingerprint of the plan.

    Raises:
        TokscaleError: a dataset has ids outside of the vocabulary, or the set would be empty.
    """
    quota = settings.size // max(len(portions), 1)
    if quota < 1:
        raise TokscaleError(
            f"{settings.size} tokens are too few for {len(portions)} strata; expected one of each "
            "at least; ask for more: --tokens"
        )
    parts = [
        draw(
            portion,
            stratum,
            settings.seq_length,
            min(quota, available(portion, settings.seq_length, "tokens")),
            "tokens",
            settings.seed,
        )
        for stratum, portion in enumerate(portions)
    ]
    windows = Windows.concatenate(parts)
    probe_set = _cut(portions, windows[windows.file_order()], settings)
    assert probe_set.origin is not None
    return replace(probe_set, origin=replace(probe_set.origin, plan=plan))


def _open(settings: ProbeSettings, left_out: Mapping[str, Mask]) -> list[Portion]:
    portions = [
        _without(portion, left_out.get(whole_prefix(portion.tokens.prefix)))
        for portion in settings.source.portions(settings.part)
    ]
    if settings.per_dataset == "proportional":
        portions = [portion for portion in portions if portion.weight > 0] or portions
    lacking = [portion for portion in portions if not (portion.lengths > 1).any()]
    if lacking:
        raise TokscaleError(_why_lacking(lacking, len(portions), settings))
    return portions


def _without(portion: Portion, is_left_out_Q: Mask | None) -> Portion:
    """Return a part without the documents in a mask."""
    if is_left_out_Q is None:
        return portion
    part = slice(portion.sequences.start, portion.sequences.stop)
    chosen = portion.sequences.start + np.flatnonzero(~is_left_out_Q[part])
    return replace(portion, chosen=chosen.astype(np.int32))


def _why_lacking(lacking: Sequence[Portion], n_datasets: int, settings: ProbeSettings) -> str:
    """Return a message that names the datasets without a document to watch in the part."""
    place, part = settings.source.place(settings.part), settings.part
    if settings.split is not None and not any(split_range(settings.split, part, 2**40)):
        return (
            f"--split {settings.split} has no {part} part; expected a share above 0 for it; give "
            "another --split, or draw from another part with --part"
        )
    has_documents = all(len(portion.sequences) for portion in lacking)
    what = "document of 2 tokens or more" if has_documents else "document"
    prefixes = listed([portion.tokens.prefix for portion in lacking])
    others = "" if settings.split is None else ", give a larger share in --split, or per-split data"
    return (
        f"{len(lacking)} of {n_datasets} datasets have no {what} in {place}: {prefixes}; leave "
        f"them out of {settings.source.flag(part)}{others}"
    )


def _open_training(settings: ProbeSettings) -> list[Portion]:
    if settings.part == "train":
        raise TokscaleError(
            "the set is drawn from the training part (--part train): all of it is trained on; "
            "leave out --report-duplicates and --drop-duplicates"
        )
    return settings.source.portions("train")


def _quotas(portions: Sequence[Portion], settings: ProbeSettings) -> list[int]:
    """Return the number of tokens or sequences that each dataset is to give to the set."""
    quota_D = quotas(settings.size, _shares(portions, settings))
    if min(quota_D, default=0) < 1:
        raise TokscaleError(
            f"{settings.size} {settings.unit} are too few for {len(portions)} datasets; "
            "ask for more"
        )
    return quota_D


def _shares(portions: Sequence[Portion], settings: ProbeSettings) -> list[float]:
    return [1.0 if settings.per_dataset == "equal" else portion.weight for portion in portions]


def _draw(
    portions: Sequence[Portion], quota_D: Sequence[int], settings: ProbeSettings, factor: int = 1
) -> Windows:
    """Draw `factor` times its quota from each dataset, or all windows if there are fewer."""
    unit = settings.unit
    parts = []
    for dataset, (portion, quota) in enumerate(zip(portions, quota_D, strict=True)):
        n_available = available(portion, settings.seq_length, unit)
        if n_available < quota:
            raise TokscaleError(
                f"{portion.tokens.prefix} has {n_available} {unit} in "
                f"{settings.source.place(settings.part)}; expected {quota}; "
                f"{_advice(portions, settings)}"
            )
        at_most = min(factor * quota, n_available)
        parts.append(draw(portion, dataset, settings.seq_length, at_most, unit, settings.seed))
    return Windows.concatenate(parts)


def _advice(portions: Sequence[Portion], settings: ProbeSettings) -> str:
    """Return advice that names the largest size of a set that the data can fill."""
    sizes_D = [available(portion, settings.seq_length, settings.unit) for portion in portions]
    share_D = _shares(portions, settings)
    most = int(
        min(size / share for size, share in zip(sizes_D, share_D, strict=True)) * sum(share_D)
    )
    for size in range(most, max(most - len(portions), 0), -1):
        fits = zip(quotas(size, share_D), sizes_D, strict=True)
        if all(1 <= quota <= n_available for quota, n_available in fits):
            return f"ask for fewer, {size} at most: {_FLAGS[settings.unit]}"
    of = "" if settings.per_dataset == "equal" else ", or give --per-dataset equal"
    return (
        f"no number of {settings.unit} helps: leave it out of {settings.source.flag(settings.part)}"
        + of
    )


def _until_enough(
    windows: Windows,
    found: Duplicates,
    portions: Sequence[Portion],
    quota_D: Sequence[int],
    settings: ProbeSettings,
) -> Mask:
    """Return a mask of the windows that are drawn until the quotas are full."""
    size_W = windows.size_W(settings.unit)
    if settings.duplicates == "drop":
        size_W = size_W * ~found.either_W
    is_met_W = np.zeros(len(windows), np.bool_)
    for dataset, (portion, quota) in enumerate(zip(portions, quota_D, strict=True)):
        index = np.flatnonzero(windows.dataset_W == dataset)
        n = count_until(size_W[index], quota)
        if n > index.size:
            fewer = f"ask for fewer: {_FLAGS[settings.unit]}, " if size_W[index].any() else ""
            raise TokscaleError(
                f"{portion.tokens.prefix}: {int(found.either_W[index].sum())} of {index.size} "
                f"windows are duplicates of training text, too many to find {quota} "
                f"{settings.unit} of others; {fewer}leave it out, or keep them with "
                "--report-duplicates"
            )
        is_met_W[index[:n]] = True
    return is_met_W


def _counts(windows: Windows, found: Duplicates, n_tokens: int) -> DuplicateCounts:
    return DuplicateCounts(
        documents=np.unique(windows.document_W).size,
        duplicate_documents=np.unique(windows.document_W[found.is_whole_W]).size,
        windows=len(windows),
        duplicate_windows=int(found.either_W.sum()),
        duplicate_tokens=n_tokens,
    )


def _cut(portions: Sequence[Portion], windows: Windows, settings: ProbeSettings) -> ProbeSet:
    files = [portion.tokens for portion in portions]
    shape = len(windows), settings.seq_length
    tokens_BS = np.zeros(shape, np.int32)
    labels_BS = np.zeros(shape, np.int32)
    mask_BS = np.zeros(shape, np.bool_)
    rows = zip(windows.dataset_W, windows.document_W, windows.start_W, strict=True)
    for row, (dataset, document, start) in enumerate(rows):
        ids = files[dataset].sequence(document)[start : start + settings.seq_length + 1]
        _check_vocabulary(files[dataset], ids, settings.vocab_size)
        n = len(ids) - 1
        tokens_BS[row, :n] = ids[:-1]
        labels_BS[row, :n] = ids[1:]
        mask_BS[row, :n] = True if settings.eod is None else ids[1:] != settings.eod
    position_BS = windows.start_W[:, None] + 1 + np.arange(settings.seq_length)
    return ProbeSet(
        tokens_BS,
        labels_BS,
        mask_BS,
        np.broadcast_to(windows.document_W[:, None], shape).astype(np.int32),
        position_BS.astype(np.int32),
        np.broadcast_to(windows.dataset_W[:, None], shape).astype(np.int16),
        tuple(portion.name for portion in portions),
        settings.vocab_size,
        ProbeSetOrigin(
            split=settings.split,
            part=settings.part,
            per_dataset=settings.per_dataset,
            seed=settings.seed,
            eod=settings.eod,
            prefixes=tuple(whole_prefix(file.prefix) for file in files),
            unseen_by=settings.unseen_by,
        ),
    )


def _check_vocabulary(file: IndexedTokens, ids: AnyArray, vocab_size: int) -> None:
    lowest, highest = int(ids.astype(np.int64).min()), int(ids.astype(np.int64).max())
    if not 0 <= lowest <= highest < vocab_size:
        found = lowest if lowest < 0 else highest
        raise TokscaleError(
            f"{file.prefix}.bin has token id {found}, the vocabulary ends at {vocab_size - 1}; "
            "give the --vocab-size of the tokenizer that made it"
        )
