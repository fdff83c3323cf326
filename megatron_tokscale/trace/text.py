"""Traced samples and documents as text for a terminal."""

from collections.abc import Callable, Sequence
from typing import Final

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.samples import Piece
from megatron_tokscale.trace.trace import Trace

type ShowText = Callable[[Sequence[int]], str]
"""Turns token ids into text that is safe on a terminal."""

_SHOWN_TOKENS: Final = 24  # tokens of a document that are decoded: enough for a line of text
_SHOWN_IDS: Final = 8  # token ids that are shown without a tokenizer
_SHOWN_TEXT: Final = 60  # characters of decoded text


def describe_sample(
    trace: Trace, k: int, text: ShowText | None = None, *, is_full: bool = False
) -> str:
    """Return a table of the documents that sample k reads, and the beginning of each.

    Args:
        trace: trace of the job.
        k: number of the sample.
        text: shows tokens; None shows their ids.
        is_full: show all that the sample reads of each document, not its beginning alone.

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
        shown = show_piece(tokens, piece, text, is_full=is_full)
        lines.append(f"  {piece.document:>10}  {span:>15}  {length:>8}  {shown}")
    return "\n".join(lines) + "\n"


def show_piece(
    tokens: IndexedTokens, piece: Piece, text: ShowText | None, *, is_full: bool = False
) -> str:
    """Return a piece of a document as text or ids: its beginning, or all of it."""
    ids = tokens.sequence(piece.document)[piece.start : piece.stop]
    if is_full:
        return " ".join(map(str, ids.tolist())) if text is None else text(ids.tolist())
    return _beginning(ids[:_SHOWN_TOKENS].tolist(), len(ids), text)


def _beginning(ids: list[int], n_tokens: int, text: ShowText | None) -> str:
    """Return the first of `n_tokens` tokens as text or ids, with an ellipsis for the others."""
    if text is None:
        more = " …" if n_tokens > _SHOWN_IDS else ""
        return " ".join(map(str, ids[:_SHOWN_IDS])) + more
    words = text(ids)
    return words if len(words) <= _SHOWN_TEXT else words[:_SHOWN_TEXT] + "…"


def describe_step(
    trace: Trace, step: int, samples: range, text: ShowText | None = None, *, is_full: bool = False
) -> str:
    """Return the samples of a step as text: its numbers, and the documents of each.

    Args:
        trace: trace of the job.
        step: number of the optimizer step.
        samples: its samples, as `Steps.samples` returns them.
        text: as in `describe_sample`; so is is_full.

    Raises:
        TokscaleError: as `Trace.sample`.
    """
    head = f"step {step}: samples {samples[0]} to {samples[-1]} ({len(samples)})\n"
    return head + "".join(describe_sample(trace, k, text, is_full=is_full) for k in samples)


def describe_document(trace: Trace, dataset: str, document: int, until: int | None = None) -> str:
    """Return the samples that read a document, one line each, with the tokens they read.

    Args:
        trace: trace of the job.
        dataset: as in `Trace.document`; so are document and until.
        document: number of the document.
        until: only samples before this one.

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
        lines[0] += "; it may be of another part of --split, kept out by the plan, or not reached"
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
