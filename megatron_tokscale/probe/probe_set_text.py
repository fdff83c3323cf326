"""What is in a probe set, for people to read. Names come from files: they are shown escaped."""

from typing import Any

import numpy as np

from megatron_tokscale.probe.probe_set import ProbeSet


def describe(probe_set: ProbeSet) -> str:
    """What is in the probe set and where it is from, a line per dataset."""
    details = probe_set.details
    lines = [
        f"probe set {probe_set.fingerprint}: {_tokens(probe_set.n_tokens)} in "
        f"{probe_set.n_sequences:,} sequences of {probe_set.seq_length}, vocabulary "
        f"{probe_set.vocab_size}",
        _origin(details),
    ]
    for dataset, name in enumerate(probe_set.datasets):
        lines.append(f"  {printable(name)}: {_dataset(probe_set, dataset)}")
    duplicates = details.get("duplicates")
    if not isinstance(duplicates, dict):
        return "\n".join([*lines, "duplicates of training text: not looked for"])
    return "\n".join([*lines, *_duplicates(probe_set, duplicates)])


def printable(text: object) -> str:
    """`text` with everything escaped that a terminal would not just show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _origin(details: dict[str, Any]) -> str:
    part, split = details.get("part", "?"), details.get("split")
    of = f"split {printable(split)}" if split else "per-split data"
    origin = f"from the {printable(part)} part of {of}, seed {printable(details.get('seed', '?'))}"
    if part == "train":
        origin += ": TRAINED ON; this set watches memorisation, not what is learned of unseen text"
    if details.get("eod") is None:
        origin += "; ends of documents are watched (no --eod)"
    return origin


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


def _duplicates(probe_set: ProbeSet, duplicates: dict[str, Any]) -> list[str]:
    passage = printable(duplicates.get("passage_tokens"))
    is_dropped = bool(duplicates.get("dropped"))
    lines = [
        f"duplicates of training text (whole documents, or passages of {passage} tokens), "
        + ("passed over:" if is_dropped else "kept:")
    ]
    for name, found in zip(probe_set.datasets, duplicates.get("datasets", ()), strict=False):
        line = (
            f"  {printable(name)}: {found['duplicate_documents']:,} of {found['documents']:,} "
            f"documents whole; {found['duplicate_windows']:,} of {found['windows']:,} windows"
        )
        if not is_dropped:
            line += f", which hold {_tokens(found['duplicate_tokens'])} of the set"
        lines.append(line)
    return lines


def _tokens(n: int) -> str:
    return f"{n:,} tokens"
