"""Check that watched tokens are held out of the training data: a line for the log and the doctor.

The check compares prefixes and document numbers, and reads no token. Text that occurs twice in the
data is found by `megatron-tokscale probe build --report-duplicates`.

Shapes: N watched tokens, M of them in the datasets of one prefix.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from megatron_tokscale.core.arrays import Integers32, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.training.events import BuiltDatasets, JobPart, TrainingState

_MOST_NAMES: Final = 3  # datasets that a line names; more make it too long to read


class TrainedPart(NamedTuple):
    """Documents of one dataset that a job trains on, ascending."""

    prefix: str
    documents: range | Integers32

    def holds(self, document_N: Integers32) -> Mask:
        """Return which of some documents the job trains on."""
        if isinstance(self.documents, range):
            return (document_N >= self.documents.start) & (document_N < self.documents.stop)
        if not len(self.documents):
            return np.zeros(document_N.size, np.bool_)
        place_N = np.searchsorted(self.documents, document_N).clip(max=len(self.documents) - 1)
        return np.asarray(self.documents[place_N] == document_N)


class HeldOutFinding(NamedTuple):
    """The finding, and the line that reports it."""

    state: Literal["held out", "trained on", "unknown"]
    line: str


class HeldOutNote(JobPart):
    """Reports at a job's start whether the watched tokens are held out of its training data."""

    def __init__(self, probe_sets: Mapping[str, ProbeSet], *, replans: bool = False) -> None:
        """Report on probe sets, by their names in the log; `replans`: weights follow their losses.

        With it, the strata of another plan are refused before anything is written.
        """
        self._probe_sets, self._replans = probe_sets, replans
        self._train: Any = None
        self._is_checked = False

    def on_data(self, state: TrainingState, built: BuiltDatasets) -> BuiltDatasets:
        """Remember the training dataset, which may follow a plan.

        Raises:
            AgreedError: weights would follow strata of another plan.
        """
        from megatron_tokscale.training.ranks import together

        if self._train is None:
            self._train = built.train
        if self._replans:
            together(self._check_strata, where=self._train is not None)
        return built

    def _check_strata(self) -> None:
        """Check this rank's data, once for all model chunks."""
        from megatron_tokscale.training.data.megatron_datasets import trained_parts

        if self._is_checked:
            return
        self._is_checked = True
        parts = trained_parts(self._train)
        of_plans = [each for each in self._probe_sets.values() if each.origin and each.origin.plan]
        for probe_set in of_plans:
            if refusal := other_strata(probe_set, held_out(probe_set, parts)):
                raise TokscaleError(refusal)

    def on_train_start(self, state: TrainingState) -> None:
        """Print a line for each probe set, on rank 0."""
        import torch
        from megatron.training import print_rank_0

        from megatron_tokscale.training.data.megatron_datasets import trained_parts

        if torch.distributed.get_rank() == 0:
            parts = trained_parts(self._train)
            for name, probe_set in self._probe_sets.items():
                of_set = f"{name}: " if name else ""
                print_rank_0(f"tokscale: {of_set}{held_out(probe_set, parts).line}")


def held_out(probe_set: ProbeSet, parts: Sequence[TrainedPart] | None) -> HeldOutFinding:
    """Return the finding: the number of watched documents and tokens that a job trains on.

    Args:
        probe_set: the watched tokens.
        parts: documents that the job trains on; None if they are not known.
    """
    if parts is None:
        return HeldOutFinding(
            "unknown",
            "whether the watched tokens are held out is not known: the training data are not "
            "Megatron's GPT datasets on .bin/.idx files",
        )
    # Strata of one dataset have its prefix: it is compared once.
    watched: dict[str, list[int]] = defaultdict(list)
    for dataset, prefix in enumerate(_prefixes(probe_set)):
        watched[prefix].append(dataset)
    trained_parts: dict[str, list[TrainedPart]] = defaultdict(list)
    for part in parts:
        trained_parts[part.prefix].append(part)
    is_trained_N = np.zeros(probe_set.n_tokens, np.bool_)
    is_unclear_N = is_trained_N.copy()
    trained: dict[str, None] = {}
    unclear: dict[str, None] = {}
    for prefix, datasets in watched.items():
        watched_M = np.flatnonzero(np.isin(probe_set.dataset_N, datasets))
        document_M = probe_set.document_N[watched_M]
        for trained_prefix, same in trained_parts.items():
            is_same = _is_same(prefix, trained_prefix)
            if is_same is False:
                continue
            is_in_M = np.zeros(len(watched_M), np.bool_)
            for part in same:
                is_in_M |= part.holds(document_M)
            if is_in_M.any():
                (trained if is_same else unclear)[trained_prefix] = None
                (is_trained_N if is_same else is_unclear_N)[watched_M[is_in_M]] = True
    if is_trained_N.any():
        return HeldOutFinding("trained on", _trained_line(probe_set, is_trained_N, list(trained)))
    if is_unclear_N.any():
        return HeldOutFinding(
            "unknown",
            f"whether the watched tokens are held out is not known: the job trains on "
            f"{_listed(list(unclear))}, and the probe set's data of that name are not on this "
            "machine",
        )
    n_documents = _n_documents(probe_set, np.ones_like(is_trained_N))
    return HeldOutFinding(
        "held out",
        f"held out: the job trains on none of the {n_documents} watched documents",
    )


def other_strata(probe_set: ProbeSet, finding: HeldOutFinding) -> str:
    """Return why live weights may not follow a probe set: its strata are of another plan.

    Strata of two plans may have the same names. Two plans may keep the same documents out.
    """
    if probe_set.origin is None or not probe_set.origin.plan or finding.state != "trained on":
        return ""
    return f"--tokscale-replan-interval would weigh strata by those of another plan: {finding.line}"


def _trained_line(probe_set: ProbeSet, is_trained_N: Mask, prefixes: Sequence[str]) -> str:
    every_N = np.ones_like(is_trained_N)
    line = (
        f"{int(is_trained_N.sum())} of the {probe_set.n_tokens} watched tokens "
        f"({_n_documents(probe_set, is_trained_N)} of {_n_documents(probe_set, every_N)} "
        f"documents) are in the training part of the job's data ({_listed(prefixes)}): "
    )
    if probe_set.origin is not None and probe_set.origin.plan is not None:
        return line + (
            f"plan {probe_set.origin.plan} keeps them out, and the job does not follow it; give "
            "the job that plan, or build the probe set of its own"
        )
    if probe_set.origin is not None and probe_set.origin.part == "train":
        return line + "the probe set was built from a training part, and watches memorisation"
    return line + (
        "their losses are not of unseen text; give the job the probe set's --split, or build the "
        "probe set with the job's"
    )


def _prefixes(probe_set: ProbeSet) -> list[str]:
    """Return the prefix of each dataset, or its name if the probe set has no prefix."""
    prefixes = probe_set.origin.prefixes if probe_set.origin else ()
    return list(prefixes if len(prefixes) == len(probe_set.datasets) else probe_set.datasets)


def _is_same(known: str, found: str) -> bool | None:
    """Return True if two prefixes are of the same data, None if this machine cannot tell."""
    if os.path.realpath(known) == os.path.realpath(found):
        return True
    is_namesake = Path(known).name == Path(found).name
    files = [Path(f"{prefix}{suffix}") for prefix in (known, found) for suffix in (".idx", ".bin")]
    try:
        stats = [file.stat() for file in files]
    except OSError:  # missing, or in a folder that this user may not enter
        return None if is_namesake else False
    if os.path.samestat(stats[0], stats[2]):
        return True
    sizes = [stat.st_size for stat in stats]
    return is_namesake and sizes[:2] == sizes[2:]


def _n_documents(probe_set: ProbeSet, is_chosen_N: Mask) -> int:
    pairs = np.stack([probe_set.dataset_N[is_chosen_N], probe_set.document_N[is_chosen_N]])
    return int(np.unique(pairs, axis=1).shape[1])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
