"""The documents that a run's training has drawn, and so has seen.

Shapes: Q documents of a dataset's file.
"""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_tokscale.core.arrays import Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.corpus.names import listed, match_prefixes, whole_prefix
from megatron_tokscale.data.record import BlendRecord, DatasetRecord
from megatron_tokscale.store import Identity, RunPaths
from megatron_tokscale.trace.orders import UntracedOrder
from megatron_tokscale.trace.trace import Span, Trace, open_index


@dataclass(frozen=True, eq=False)
class DrawnDocuments:
    """The documents of a dataset that a run's training has drawn.

    Attributes:
        is_drawn_Q: true for a document of which a sample has read a token.
        epochs: tokens that the samples read, over the tokens of the dataset's training part.
    """

    is_drawn_Q: Mask
    epochs: float


def drawn_documents(trace: Trace, portions: Sequence[Portion], until: int) -> list[DrawnDocuments]:
    """Return what a job's training has drawn from each dataset.

    Args:
        trace: the origin of the job's samples.
        portions: the training part of each dataset of a job's data.
        until: the first sample that does not count, e.g. `planned_samples`.

    Raises:
        TokscaleError: the job was trained on none of these datasets or on another version of one,
            or its order of samples is not known.
    """
    for span in trace.spans:
        if isinstance(span.order, UntracedOrder) and span.start < until:
            raise span.order.refusal("the documents that the run has drawn are not all known")
    known = list(dict.fromkeys(row.prefix for row in trace.datasets))
    wanted = [whole_prefix(portion.tokens.prefix) for portion in portions]
    matched = match_prefixes(wanted, known, "the run's record of its data")
    if all(place is None for place in matched):
        raise TokscaleError(
            f"the run was trained on {listed(known)}, the data are "
            f"{listed(wanted)}; expected the same; give the data of that run, or another run"
        )
    return [
        _drawn(trace, portion, None if place is None else known[place], until)
        for portion, place in zip(portions, matched, strict=True)
    ]


def planned_samples(run: Path, trace: Sized) -> int:
    """Return the number of samples at the planned end of a run's training.

    A run without a record of its settings counts as trained to the end of its samples.
    """
    identity = RunPaths(run).identity
    launches = Identity.load(identity).launches if identity.is_file() else ()
    return (launches[-1].planned_samples() if launches else None) or len(trace)


def _drawn(trace: Trace, portion: Portion, prefix: str | None, until: int) -> DrawnDocuments:
    is_drawn_Q, n_tokens = np.zeros(portion.tokens.n_sequences, np.bool_), 0
    for span in trace.spans:
        for number, row in enumerate(span.record.datasets):
            if row.prefix != prefix or not row.size or span.start >= until:
                continue
            index = open_index(row)
            if not np.array_equal(index.lengths_Q, portion.tokens.lengths):
                raise TokscaleError(
                    f"{row.prefix}, which the run was trained on, has other documents than "
                    f"{portion.tokens.prefix}; expected the same; give the data of that run"
                )
            numbers = span.numbers(number, until)
            _check_numbers(span, row, numbers)
            is_drawn_Q |= index.read_by(numbers)
            n_tokens += int(index.n_labels_of(numbers).sum())
    return DrawnDocuments(is_drawn_Q, n_tokens / max(portion.n_tokens, 1))


def _check_numbers(span: Span, row: DatasetRecord, numbers: Integers) -> None:
    """Refuse samples that a dataset does not have; Megatron's index of a blend has no checksum."""
    order = span.record.order
    if isinstance(order, BlendRecord) and not ((numbers >= 0) & (numbers < row.size)).all():
        raise TokscaleError(
            f"{order.dataset_sample_index} names samples that {row.name} does not have; expected "
            f"some of its {row.size}; remove it and start the job, which makes the same"
        )
