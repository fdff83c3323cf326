"""Make a probe set from Megatron .bin/.idx files: windows of held-out documents.

Shapes: B sequences, S sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tokscale.errors import TokscaleError
from megatron_tokscale.indexed import IndexedTokens, parse_data_path, split_range
from megatron_tokscale.probe.probe_set import ProbeSet


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How a probe set is drawn.

    Attributes:
        data_path: Megatron's --data-path words.
        split: Megatron's --split of the job, so that held-out means held out.
        part: the part of the split to draw from.
        seq_length: sequence length of the job in tokens.
        vocab_size: vocabulary size of the job's tokenizer (its --vocab-size).
        n_tokens: number of tokens to watch, about; divided equally over the datasets.
        eod: id of the end-of-document token, which is not watched; None if there is none.
        seed: decides which windows are drawn.
    """

    data_path: Sequence[str]
    split: str
    seq_length: int
    vocab_size: int
    n_tokens: int
    part: str = "valid"
    eod: int | None = None
    seed: int = 1234


@dataclass(frozen=True)
class _Window:
    """`seq_length` + 1 tokens of one document, from `start`."""

    domain: int
    document: int
    start: int


def build_probe_set(settings: ProbeSettings) -> ProbeSet:
    """Draw windows from the held-out documents, equally from every dataset, with a fixed seed.

    Windows begin at multiples of the sequence length in their document, so a drawn window is the
    same whatever else is drawn. A window shorter than a sequence is padded; padding and
    end-of-document tokens are not watched.

    Raises:
        TokscaleError: a dataset is missing, has other ids than the vocabulary, or too few
            held-out tokens.
    """
    prefixes, _ = parse_data_path(settings.data_path)
    datasets = [IndexedTokens.open(prefix) for prefix in prefixes]
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise TokscaleError(f"--data-path has two datasets of one name: {', '.join(names)}")
    if settings.n_tokens < len(datasets):
        raise TokscaleError(f"--tokens {settings.n_tokens} is too few for {len(datasets)} datasets")
    windows = [
        window
        for domain, dataset in enumerate(datasets)
        for window in _draw(dataset, domain, settings, settings.n_tokens // len(datasets))
    ]
    return _cut(datasets, windows, settings)


def _draw(
    dataset: IndexedTokens, domain: int, settings: ProbeSettings, n_tokens: int
) -> list[_Window]:
    """Choose windows at random until they hold `n_tokens` labels, then put them in file order."""
    documents = split_range(settings.split, settings.part, dataset.n_sequences)
    windows = [
        (_Window(domain, document, start), min(settings.seq_length, length - 1 - start))
        for document in documents
        for length in [int(dataset.lengths[document])]
        for start in range(0, length - 1, settings.seq_length)
    ]
    generator = np.random.default_rng([settings.seed, domain])
    order = generator.permutation(len(windows))
    held = np.cumsum([windows[i][1] for i in order])
    if not windows or held[-1] < n_tokens:
        raise TokscaleError(
            f"{dataset.prefix} has {int(held[-1]) if windows else 0} tokens in the {settings.part} "
            f"part of --split {settings.split}, {n_tokens} are asked of it; ask for fewer --tokens"
        )
    chosen = order[: int(np.searchsorted(held, n_tokens)) + 1]
    return [windows[i][0] for i in sorted(chosen)]


def _cut(
    datasets: Sequence[IndexedTokens], windows: Sequence[_Window], settings: ProbeSettings
) -> ProbeSet:
    shape = len(windows), settings.seq_length
    tokens_BS = np.zeros(shape, np.int32)
    labels_BS = np.zeros(shape, np.int32)
    mask_BS = np.zeros(shape, np.bool_)
    document_BS = np.zeros(shape, np.int32)
    position_BS = np.zeros(shape, np.int32)
    domain_BS = np.zeros(shape, np.int16)
    for row, window in enumerate(windows):
        dataset = datasets[window.domain]
        stop = window.start + settings.seq_length + 1
        ids = dataset.sequence(window.document)[window.start : stop].astype(np.int64)
        _check_vocabulary(dataset, ids, settings.vocab_size)
        n = len(ids) - 1
        tokens_BS[row, :n] = ids[:-1]
        labels_BS[row, :n] = ids[1:]
        mask_BS[row, :n] = True if settings.eod is None else ids[1:] != settings.eod
        document_BS[row] = window.document
        position_BS[row] = window.start + 1 + np.arange(settings.seq_length)
        domain_BS[row] = window.domain
    return ProbeSet(
        tokens_BS,
        labels_BS,
        mask_BS,
        document_BS,
        position_BS,
        domain_BS,
        tuple(dataset.name for dataset in datasets),
        settings.vocab_size,
        {
            "split": settings.split,
            "part": settings.part,
            "seed": settings.seed,
            "eod": settings.eod,
            "prefixes": [str(Path(dataset.prefix)) for dataset in datasets],
        },
    )


def _check_vocabulary(dataset: IndexedTokens, ids: NDArray[np.int64], vocab_size: int) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise TokscaleError(
            f"{dataset.prefix} has token id {int(ids.max())}, the vocabulary ends at "
            f"{vocab_size - 1}; give the --vocab-size of the tokenizer that made it"
        )


def describe(probe_set: ProbeSet) -> str:
    """A table of what is in the probe set, a line per dataset."""
    lines = [
        f"probe set {probe_set.fingerprint}: {probe_set.n_tokens} tokens in "
        f"{probe_set.n_sequences} sequences of {probe_set.seq_length}, "
        f"vocabulary {probe_set.vocab_size}, from the {probe_set.details.get('part', '?')} part "
        f"of split {probe_set.details.get('split', '?')}"
    ]
    for domain, name in enumerate(probe_set.domains):
        is_domain = probe_set.domain_N == domain
        n_documents = len(np.unique(probe_set.document_N[is_domain]))
        lines.append(f"  {name}: {int(is_domain.sum())} tokens of {n_documents} documents")
    return "\n".join(lines)
