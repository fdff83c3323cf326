"""Steps that stand out as text for a terminal."""

from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.samples import Piece
from megatron_tokscale.trace.spikes import LEAST_DEVIATIONS, Spike, Spikes, SpikeSample
from megatron_tokscale.trace.text import ShowText, show_piece
from megatron_tokscale.trace.trace import Trace


def describe_spikes(
    spikes: Spikes, trace: Trace | None, text: ShowText | None = None, *, is_full: bool = False
) -> str:
    """Return the steps that stand out, and of each its datasets and samples.

    Args:
        spikes: the steps.
        trace: trace of the job; None where its data are not known.
        text: shows tokens; None shows their ids.
        is_full: show all that a sample reads, not the beginning alone.
    """
    lines = []
    if spikes.n_steps:
        lines.append(
            f"steps of {spikes.n_steps:,} whose loss stands out most from the median of the "
            f"{spikes.window} steps around"
        )
    lines += [f"  note: {note}" for note in spikes.notes]
    of_training = [each for each in spikes.spikes if each.checkpoint is None]
    if spikes.n_steps and all(each.deviations < LEAST_DEVIATIONS for each in of_training):
        lines.append(
            f"  no step stands out by {LEAST_DEVIATIONS:g} robust standard deviations: these are "
            "within the noise of the steps, and leaving out their samples does not help"
        )
    for spike in spikes.spikes:
        lines += ["", *_step(spike), *_datasets(spike)]
        for sample in spike.samples:
            lines += _sample(sample, trace, text, is_full=is_full)
        if not spike.named:
            lines.append("  no sample has a twentieth of the excess: it is in the whole batch")
    return "\n".join(lines).lstrip("\n") + "\n"


def _step(spike: Spike) -> list[str]:
    excess = spike.loss - spike.level
    head = f"step {spike.step}: loss {spike.loss:.4f}, {excess:+.4f} nats from {spike.level:.4f}"
    if spike.checkpoint is None:
        return [f"{head} ({spike.deviations:.1f} robust standard deviations)"]
    return [
        f"{head}, the median of its datasets, under the weights of the checkpoint of step "
        f"{spike.checkpoint}"
    ]


def _datasets(spike: Spike) -> list[str]:
    if not spike.datasets:
        return ["  the origin of the samples is not known, so they have no datasets and documents"]
    width = max(len("dataset"), *(len(each.name) for each in spike.datasets))
    lines = [f"  {'dataset':<{width}}  samples     loss    level  share of the excess"]
    for each in spike.datasets:
        lines.append(
            f"  {each.name:<{width}}  {each.n_samples:>7}  {each.loss:7.4f}  {each.level:7.4f}  "
            f"{each.share:>6.1%}"
        )
    return lines


def _sample(
    sample: SpikeSample, trace: Trace | None, text: ShowText | None, *, is_full: bool
) -> list[str]:
    head = (
        f"  sample {sample.sample}: {sample.share:.1%} of the excess; loss {sample.loss:.4f} "
        f"(expected {sample.expected:.4f}), largest {sample.largest:.4f} at token {sample.position}"
    )
    if trace is None or sample.dataset is None:
        return [head]
    stratum = "" if sample.stratum is None else f", stratum {sample.stratum}, epoch {sample.epoch}"
    lines = [head, f"    sample {sample.number} of {sample.dataset}{stratum}"]
    tokens = IndexedTokens.open(trace.sample(sample.sample).dataset.prefix)
    for each in sample.pieces:
        piece = Piece(each.document, each.start, each.stop)
        span, length = f"{piece.start}-{piece.stop - 1}", int(tokens.lengths[piece.document])
        shown = show_piece(tokens, piece, text, is_full=is_full)
        lines.append(f"    document {piece.document}, tokens {span} of {length}: {shown}")
    return lines
