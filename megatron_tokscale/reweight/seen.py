"""The note on scored documents that the reference run was trained on.

Shapes: W watched documents of a dataset.
"""

from collections.abc import Callable, Sequence
from typing import Final

from megatron_tokscale.core.arrays import Integers
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import Portion
from megatron_tokscale.data.record import record_path
from megatron_tokscale.store import Run
from megatron_tokscale.trace.drawn import drawn_documents
from megatron_tokscale.trace.trace import Trace

_REMEDY: Final = (
    "watch them with `megatron-tokscale probe build --part train --unseen-by {run}`, and replay"
)


def tell_seen(
    run: Run,
    portions: Sequence[Portion],
    documents: Sequence[Integers],
    tell: Callable[[str], None],
) -> None:
    """Tell how many of the watched documents a run has drawn until its last probe.

    A replay has no record of its data: there the origin of its probe set has to say it.

    Args:
        run: the run.
        portions: the training part of each dataset.
        documents: the watched documents of each dataset, document_W.
        tell: receiver of the note.
    """
    if not record_path(run.path).is_file():
        origin = run.probe_set.origin
        if run.info.is_replay and not (origin and origin.unseen_by):
            tell(
                f"{run.path} does not tell if its checkpoints were trained on the watched "
                f"documents; expected unseen ones; {_REMEDY.format(run='REF')}"
            )
        return
    try:
        found = drawn_documents(Trace.open(run.path), portions, run.records[-1].consumed_samples)
    except TokscaleError as error:
        tell(f"it is not known which documents {run.path} was trained on: {error}")
        return
    n_watched = sum(len(document_W) for document_W in documents)
    n_seen = sum(
        int(drawn.is_drawn_Q[document_W].sum())
        for drawn, document_W in zip(found, documents, strict=True)
    )
    if n_seen:
        tell(
            f"{run.path} was trained on {n_seen} of the {n_watched} watched documents, so their "
            f"losses fall by memory too; expected unseen ones; {_REMEDY.format(run=run.path)}"
        )
