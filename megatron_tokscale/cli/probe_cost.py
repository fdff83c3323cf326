"""`megatron-tokscale probe cost`, and the flags of a training on which the cost depends."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron_tokscale.cli.parsing import Arguments, Verbs
from megatron_tokscale.core.errors import TokscaleError

if TYPE_CHECKING:
    from megatron_tokscale.probe import ProbeSchedule
    from megatron_tokscale.probe.cost import TrainingLength

_TRAINING: Final = (
    *("global_batch_size", "train_iters", "train_samples", "save_interval"),
    "tokscale_probe_schedule",
)
"""Training flags without a default, so that the verb sees which ones are set."""

_REQUIRED_MODEL: Final = {
    "num-layers": "layers of the transformer",
    "hidden-size": "width of a layer",
    "num-attention-heads": "heads of queries",
    "seq-length": "tokens of a sequence",
    "vocab-size": "vocabulary size of the tokenizer, before padding",
}
_OPTIONAL_MODEL: Final = {
    "ffn-hidden-size": (
        None,
        "width of the feed-forward layer (default: 4 times --hidden-size; with --swiglu 8/3 times)",
    ),
    "kv-channels": (
        None,
        "width of an attention head (default: --hidden-size over --num-attention-heads)",
    ),
    "num-query-groups": (None, "heads of keys and values (default: --num-attention-heads)"),
    "num-experts": (None, "experts of a mixture-of-experts layer (default: no such layers)"),
    "moe-router-topk": (2, "experts that a token is routed to"),
    "moe-ffn-hidden-size": (None, "width of an expert (default: --ffn-hidden-size)"),
    "moe-shared-expert-intermediate-size": (
        None,
        "width of the shared expert (default: no shared expert)",
    ),
    "make-vocab-size-divisible-by": (128, "factor of the padded vocabulary"),
    "tensor-model-parallel-size": (1, "another factor of the padded vocabulary"),
}
"""Default and help of Megatron's flags that may be left out."""


def add_cost(verbs: Verbs) -> None:
    """Add `probe cost`."""
    cost = verbs.add_parser(
        "cost",
        help="say what probing costs a job",
        description="Print what probes cost: FLOPs as Megatron counts them, and bytes on disk. "
        "Flags of the model and of the training are Megatron's; of the training this verb needs "
        "--global-batch-size and --train-iters or --train-samples. --tokens counts full "
        "sequences; --probe-set counts the padding of short documents too.",
    )
    group = cost.add_argument_group("watched tokens (one of these is required)")
    size = group.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--probe-set", type=Path, nargs="+", metavar="FILE", help="the job's probe sets"
    )
    size.add_argument(
        "--tokens", type=int, metavar="N", help="number of tokens, instead of --probe-set"
    )
    _add_model(cost.add_argument_group("model"))
    add_training(
        cost.add_argument_group("training (--train-iters or --train-samples is required)"),
        is_required=True,
    )
    cost.set_defaults(verb=_cost)


def _add_model(group: argparse._ArgumentGroup) -> None:
    for name, text in _REQUIRED_MODEL.items():
        group.add_argument(f"--{name}", type=int, required=True, metavar="N", help=text)
    for name, (default, text) in _OPTIONAL_MODEL.items():
        group.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    group.add_argument(
        "--moe-layer-freq",
        default="1",
        metavar="PATTERN",
        help="a mixture-of-experts layer every so many layers, or a pattern like [0]+[1]*23",
    )
    group.add_argument("--swiglu", action="store_true", help="gated feed-forward layers")


def add_training(group: argparse._ArgumentGroup, *, is_required: bool) -> None:
    """Add the flags of a training; `is_required` demands its batch size and its length."""
    without = "" if is_required else " (default: none; required with --budget)"
    group.add_argument(
        "--global-batch-size",
        type=int,
        required=is_required,
        metavar="N",
        help=f"sequences of a training step{without}",
    )
    length = group.add_mutually_exclusive_group(required=is_required)
    length.add_argument(
        "--train-iters",
        type=int,
        metavar="N",
        help="steps of the training, instead of --train-samples",
    )
    length.add_argument(
        "--train-samples",
        type=int,
        metavar="N",
        help="sequences of the training, instead of --train-iters",
    )
    group.add_argument(
        "--save-interval",
        type=int,
        metavar="N",
        help="steps between checkpoints, for schedules with `checkpoints` (default: none)",
    )
    for name, what in (
        ("micro-batch-size", "sequences of a microbatch"),
        ("data-parallel-size", "data-parallel ranks"),
    ):
        group.add_argument(
            f"--{name}",
            type=int,
            default=1,
            metavar="N",
            help=f"{what}; a probe fills whole microbatches on every rank",
        )
    group.add_argument(
        "--tokscale-probe-schedule",
        metavar="SPEC",
        help="the job's probe schedule (default: log:per-octave=8)",
    )


def _cost(arguments: Arguments) -> None:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.probe.cost import GptShape, SetSize, describe_cost

    model = GptShape(**{field.name: getattr(arguments, field.name) for field in fields(GptShape)})
    batch, schedule = _batch(arguments), _schedule(arguments)
    if arguments.probe_set is None:
        sizes = [SetSize(-(-arguments.tokens // model.seq_length), arguments.tokens)]
    else:
        sizes = []
        for file in arguments.probe_set:
            probe_set = ProbeSet.load(file)
            if probe_set.seq_length != model.seq_length:
                raise TokscaleError(
                    f"{file} has sequences of {probe_set.seq_length} tokens, not of --seq-length "
                    f"{model.seq_length}; give the job's probe set"
                )
            sizes.append(SetSize(probe_set.n_sequences, probe_set.n_tokens))
    print(describe_cost(model, batch, schedule, sizes))


def sequences_of_budget(arguments: Arguments) -> int:
    """Return how many sequences --budget allows, and print it.

    Raises:
        TokscaleError: the training is not given, or the budget is too small for it.
    """
    from megatron_tokscale.probe.cost import sequences_within, share_of_training

    if arguments.global_batch_size is None:
        raise TokscaleError(
            "--budget is given without the job's --global-batch-size, on which the cost depends; "
            "give both"
        )
    schedule, batch = _schedule(arguments), _batch(arguments)
    n_sequences = sequences_within(arguments.budget, schedule, batch)
    n_probes = len(batch.probe_steps(schedule))
    share = share_of_training(n_sequences, n_probes, batch)
    print(f"budget: {n_probes:,} probes of {n_sequences:,} sequences, {share:.3%} of the training")
    return n_sequences


def refuse_training(arguments: Arguments) -> None:
    """Refuse a training flag that is set without --budget, which alone reads it."""
    for name in _TRAINING:
        if getattr(arguments, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise TokscaleError(f"{flag} is given without --budget; give both, or neither")


def _schedule(arguments: Arguments) -> "ProbeSchedule":
    from megatron_tokscale.probe import DEFAULT_SCHEDULE, ProbeSchedule

    return ProbeSchedule.parse(arguments.tokscale_probe_schedule or DEFAULT_SCHEDULE)


def _batch(arguments: Arguments) -> "TrainingLength":
    from megatron_tokscale.probe.cost import TrainingLength

    return TrainingLength(
        **{field.name: getattr(arguments, field.name) for field in fields(TrainingLength)}
    )
