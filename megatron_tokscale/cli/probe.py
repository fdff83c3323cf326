"""`megatron-tokscale probe`: make and show probe sets."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_data, add_seed
from megatron_tokscale.cli.probe_cost import (
    add_cost,
    add_training,
    refuse_training,
    sequences_of_budget,
)
from megatron_tokscale.cli.probe_of_plan import add_plan, build_from_plan
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import ProgressOnStderr

if TYPE_CHECKING:
    from megatron_tokscale.core.arrays import Mask
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.probe import ProbeSet


def add_verb(verbs: Verbs) -> None:
    """Add `probe build`, `probe show` and `probe cost`."""
    probe = verbs.add_parser("probe", help="make and show probe sets, and say what they cost")
    probe_verbs = probe.add_subparsers(required=True, metavar="VERB")
    _add_build(probe_verbs)
    show = probe_verbs.add_parser("show", help="print what is in a probe set")
    show.add_argument("file", type=Path, metavar="FILE", help="the probe set")
    show.set_defaults(verb=_show)
    add_cost(probe_verbs)


def _add_build(verbs: Verbs) -> None:
    build = verbs.add_parser(
        "build",
        help="choose the tokens to watch",
        description="Draw windows of held-out documents from Megatron's .bin/.idx files. Give the "
        "data flags, --split and --seq-length as the training job has them.",
    )
    add_data(build, "needed without --plan, or where its data have moved")
    build.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="sequence length of the job; needed without --plan (default: the plan's)",
    )
    build.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary size of the job's tokenizer, before padding; needed without --plan "
        "(default: that of the plan's scores)",
    )
    size = build.add_argument_group("size (one of these)").add_mutually_exclusive_group()
    size.add_argument(
        "--tokens", type=int, default=1_000_000, metavar="N", help="tokens to watch, about"
    )
    size.add_argument(
        "--sequences", type=int, metavar="N", help="sequences to watch, instead of --tokens"
    )
    size.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="share of the training FLOPs that all probes together may cost, instead of --tokens, "
        "e.g. 0.001; requires --global-batch-size and --train-iters or --train-samples",
    )
    build.add_argument(
        "--per-dataset",
        choices=["equal", "proportional"],
        default="equal",
        help="share the watched tokens equally among the datasets, or by their weights in the "
        "blend",
    )
    build.add_argument(
        "--part",
        choices=["train", "valid", "test"],
        default="valid",
        help="part of the data to draw from; 'train' watches memorisation",
    )
    build.add_argument(
        "--unseen-by",
        type=Path,
        nargs="+",
        metavar="REF",
        help="with --part train: watch only documents of which the training of no run REF draws a "
        "token until its planned end; needs the data cache of that job (default: all documents)",
    )
    build.add_argument(
        "--eod",
        type=int,
        metavar="ID",
        help="end-of-document token, which is not watched (default: watch all tokens)",
    )
    add_seed(build, "seed that decides which windows are drawn")
    _add_duplicates(build)
    add_plan(build)
    add_training(
        build.add_argument_group("training (with --budget alone; the job's own flags)"),
        is_required=False,
    )
    build.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="new file for the probe set"
    )
    build.set_defaults(verb=_build)


def _add_duplicates(build: argparse.ArgumentParser) -> None:
    duplicates = build.add_mutually_exclusive_group()
    for action, what in (("report", "count"), ("drop", "pass over")):
        duplicates.add_argument(
            f"--{action}-duplicates",
            dest="duplicates",
            action="store_const",
            const=action,
            default="ignore",
            help=f"{what} windows that the training part holds too: their whole document, or a "
            "passage of 64 tokens; reads the training part once",
        )


def _build(arguments: Arguments) -> None:
    from megatron_tokscale.core.writable import check_new_file
    from megatron_tokscale.probe.build import describe

    check_new_file(arguments.out, "runs may depend on it")
    probe_set = build_from_plan(arguments) if arguments.plan else _build_from_part(arguments)
    probe_set.save(arguments.out)
    print(describe(probe_set))


def _build_from_part(arguments: Arguments) -> "ProbeSet":
    """Return the probe set of documents of a part of the data.

    Raises:
        TokscaleError: a flag is missing or does nothing, or the documents are too few.
    """
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.probe.build import ProbeSettings, build_probe_set

    for name in ("seq_length", "vocab_size"):
        if getattr(arguments, name) is None:
            raise TokscaleError(
                f"--{name.replace('_', '-')} is missing; expected the job's; give it, or --plan"
            )
    if arguments.scores_dir is not None:
        raise TokscaleError("--scores-dir does nothing without --plan; give both, or neither")
    source = DataSource.from_flags(arguments)
    n_sequences = arguments.sequences
    if arguments.budget is not None:
        n_sequences = sequences_of_budget(arguments)
    else:
        refuse_training(arguments)
    left_out: dict[str, Mask] = {}
    names = []
    for run in arguments.unseen_by or ():
        seen, name = _seen(run, source, arguments.part)
        left_out = {prefix: mask | left_out.get(prefix, mask) for prefix, mask in seen.items()}
        names.append(name)
    return build_probe_set(
        ProbeSettings(
            data_path=source.words,
            split=source.split,
            part=arguments.part,
            seq_length=arguments.seq_length,
            vocab_size=arguments.vocab_size,
            n_tokens=arguments.tokens if n_sequences is None else None,
            n_sequences=n_sequences,
            per_dataset=arguments.per_dataset,
            eod=arguments.eod,
            seed=arguments.seed,
            unseen_by=", ".join(names) or None,
            duplicates=arguments.duplicates,
        ),
        ProgressOnStderr(),
        left_out or None,
    )


def _seen(run: Path, source: "DataSource", part: str) -> "tuple[dict[str, Mask], str]":
    """Return the documents that a run's training draws, by their datasets, and the run's id.

    Raises:
        TokscaleError: they are not known, or they are all documents of a dataset.
    """
    from megatron_tokscale.corpus.names import whole_prefix
    from megatron_tokscale.data.record import record_path
    from megatron_tokscale.store import Identity, RunPaths
    from megatron_tokscale.trace.drawn import drawn_documents, planned_samples
    from megatron_tokscale.trace.trace import Trace

    if part != "train":
        raise TokscaleError(
            f"--unseen-by {run} is given with --part {part}; expected --part train, as training "
            "draws from no other part; give it, or leave out --unseen-by"
        )
    if not (record := record_path(run)).is_file():
        raise TokscaleError(
            f"{record} is not there, so it is not known which documents {run} has drawn; expected "
            "a run that trained with the plugin, which writes it; name such a run"
        )
    portions, trace = source.portions("train"), Trace.open(run)
    found = drawn_documents(trace, portions, planned_samples(run, trace))
    seen = {}
    for portion, drawn in zip(portions, found, strict=True):
        train = slice(portion.sequences.start, portion.sequences.stop)
        if (drawn.is_drawn_Q[train] | (portion.lengths < 2)).all():
            raise TokscaleError(
                f"the training of {run} draws every document of {portion.name}, in "
                f"{drawn.epochs:.2f} epochs; expected some that it does not draw; leave the "
                "dataset out, or name a shorter run"
            )
        seen[whole_prefix(portion.tokens.prefix)] = drawn.is_drawn_Q
    identity = RunPaths(run).identity
    return seen, Identity.load(identity).run_id if identity.is_file() else str(run)


def _show(arguments: Arguments) -> None:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.probe.build import describe

    print(describe(ProbeSet.load(arguments.file)))
