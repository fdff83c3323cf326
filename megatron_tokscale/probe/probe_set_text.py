"""A probe set in words, for a terminal; names come from files and are shown escaped."""

import numpy as np

from megatron_tokscale.probe.probe_set import DuplicateSearch, ProbeSet, ProbeSetOrigin


def describe(probe_set: ProbeSet) -> str:
    """Return the content and the origin of the probe set in words, with a line per dataset."""
    origin = probe_set.origin
    lines = [
        f"probe set {probe_set.fingerprint}: {_tokens(probe_set.n_tokens)} in "
        f"{probe_set.n_sequences:,} sequences of {probe_set.seq_length}, vocabulary "
        f"{probe_set.vocab_size}",
        _origin(origin),
    ]
    for dataset, name in enumerate(probe_set.datasets):
        lines.append(f"  {printable(name)}: {_dataset(probe_set, dataset)}")
    if origin is None or origin.duplicates is None:
        return "\n".join([*lines, "duplicates of training text: not looked for"])
    return "\n".join([*lines, *_duplicates(probe_set, origin.duplicates)])


def printable(text: object) -> str:
    """Return the text with every character escaped that a terminal would not print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _origin(origin: ProbeSetOrigin | None) -> str:
    if origin is None:
        return "of unknown origin"
    if origin.plan is not None:
        text = f"from documents that plan {printable(origin.plan)} keeps out of the training, seed "
        return text + str(origin.seed) + _ends(origin)
    data = f"split {printable(origin.split)}" if origin.split else "per-split data"
    text = f"from the {printable(origin.part)} part of {data}, seed {origin.seed}"
    if origin.unseen_by:
        text += f", of documents that run {printable(origin.unseen_by)} has not drawn"
    elif origin.part == "train":
        text += ": TRAINED ON; this set watches memorisation, not what is learned of unseen text"
    return text + _ends(origin)


def _ends(origin: ProbeSetOrigin) -> str:
    return "; ends of documents are watched (no --eod)" if origin.eod is None else ""


def _dataset(probe_set: ProbeSet, dataset: int) -> str:
    is_dataset_N = probe_set.dataset_N == dataset
    is_dataset_B = probe_set.dataset_BS[:, 0] == dataset
    n_tokens, n_sequences = int(is_dataset_N.sum()), int(is_dataset_B.sum())
    if not n_tokens:
        return "no tokens"
    n_documents = np.unique(probe_set.document_N[is_dataset_N]).size
    masked = 1 - n_tokens / (n_sequences * probe_set.seq_length)
    return (
        f"{_tokens(n_tokens)} in {n_sequences:,} sequences of {n_documents:,} documents, "
        f"mean context {probe_set.context_N[is_dataset_N].mean():,.0f}, "
        f"{masked:.1%} of the positions masked"
    )


def _duplicates(probe_set: ProbeSet, search: DuplicateSearch) -> list[str]:
    lines = [
        "duplicates of training text (whole documents, or passages of "
        f"{search.passage_tokens} tokens), {'passed over' if search.dropped else 'kept'}:"
    ]
    for name, found in zip(probe_set.datasets, search.datasets, strict=False):
        line = (
            f"  {printable(name)}: {found.duplicate_documents:,} of {found.documents:,} "
            f"documents whole; {found.duplicate_windows:,} of {found.windows:,} windows"
        )
        if not search.dropped:
            line += f", which hold {_tokens(found.duplicate_tokens)} of the set"
        lines.append(line)
    return lines


def _tokens(n: int) -> str:
    return f"{n:,} tokens"
