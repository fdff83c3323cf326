"""`megatron-tokscale plan build`: one verb per policy."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Verbs, open_run
from megatron_tokscale.cli.plan_flags import (
    add_gain,
    add_guards_and_out,
    add_held_out,
    add_job,
    add_parameters,
    add_scores,
    add_share_limit,
    add_stages,
    add_strata,
    add_window,
    read_gain,
    read_guards,
    read_job,
    read_settings,
)
from megatron_tokscale.core.errors import TokscaleError, say

if TYPE_CHECKING:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.reweight import (
        ByFall,
        ByTarget,
        CutDataset,
        CutSettings,
        Frontier,
        Job,
    )

_MOST_HELD_OUT = 0.1
"""Share of a stratum's documents that may be held out without a note. Our choice: a tenth of the
data costs more than live weights have been shown to give."""

_JOB = "Give the data flags, --split and --seq-length as the training job has them."


def add_policies(policies: Verbs) -> None:
    """Add a verb per policy."""
    _add_fall(policies)
    _add_target(policies)
    _add_frontier(policies)
    _add_dataset(policies)
    _add_manual(policies)
    _add_keep(policies)


def _add_fall(policies: Verbs) -> None:
    parser = policies.add_parser(
        "fall",
        help="favour the documents whose losses still fall late in a reference run",
        description="Cut each dataset's documents into strata by their falls (`score`), and weight "
        f"each stratum by its mean fall. {_JOB}",
    )
    add_job(parser)
    add_scores(parser)
    add_strata(parser, by="fall")
    add_held_out(parser)
    parser.add_argument(
        "--strength",
        type=float,
        default=0.8,
        metavar="POWER",
        help="0 keeps the base weights, 1 weights in proportion to the mean fall",
    )
    add_stages(parser)
    add_share_limit(parser)
    add_gain(parser)
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_fall, strata="documents", unlearned=0.5)


def _add_target(policies: Verbs) -> None:
    parser = policies.add_parser(
        "target",
        help="favour the documents that are most like a target",
        description="Cut each dataset's documents into strata by their target scores (`score "
        "--tuned`), and draw from the strata with the highest ones. No document is held out for "
        f"live weights: these follow falls, and would undo the weights by target scores. {_JOB}",
    )
    add_job(parser)
    add_scores(parser)
    add_strata(parser, by="target")
    parser.add_argument(
        "--top",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of the pool that is drawn from; the rest has the floor",
    )
    add_stages(parser)
    add_share_limit(parser)
    add_parameters(parser)
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_target, strata="documents", unlearned=0.5, held_out=0)


def _add_frontier(policies: Verbs) -> None:
    parser = policies.add_parser(
        "frontier",
        help="favour the strata of each dataset that are about to be learned",
        description="Cut each dataset into strata by the scores of its documents (`score`), and "
        f"favour the strata that are about to be learned. {_JOB}",
    )
    add_job(parser)
    add_scores(parser)
    parser.add_argument(
        "--strata",
        choices=["samples", "documents"],
        default="samples",
        help="strata of packed samples, or of documents",
    )
    add_strata(parser, by="learning-time")
    add_held_out(parser)
    parser.add_argument(
        "--unlearned",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="samples whose share of never-learned tokens is larger form a separate stratum",
    )
    parser.add_argument(
        "--time-map",
        type=Path,
        metavar="RUN",
        help="a run with its spectrum, of the size to train (its first part, or a trial), whose "
        "learning order maps the training to the reference run's time (default: the same number "
        "of tokens)",
    )
    add_window(parser)
    parser.add_argument(
        "--move-shares", action="store_true", help="change the datasets' own shares too"
    )
    add_gain(parser)
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_frontier)


def _add_dataset(policies: Verbs) -> None:
    parser = policies.add_parser(
        "dataset",
        help="favour the datasets that are about to be learned",
        description="Favour the datasets whose spectra in a reference run lie just ahead. It needs "
        f"no scores. {_JOB}",
    )
    add_job(parser)
    parser.add_argument(
        "--run", type=Path, required=True, metavar="RUN", help="reference run, with its spectrum"
    )
    _add_control(parser)
    add_window(parser)
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_dataset)


def _add_manual(policies: Verbs) -> None:
    parser = policies.add_parser(
        "manual",
        help="follow weights by hand",
        description=f"Follow weights by hand. {_JOB}",
    )
    add_job(parser)
    parser.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="SAMPLE:W,W,...",
        help="weight of each dataset from a consumed sample on, e.g. 0:0.5,0.5 100000:0.9,0.1",
    )
    parser.add_argument(
        "--interpolation",
        choices=["step", "linear"],
        default="step",
        help="hold the weights until the next point, or interpolate linearly between points",
    )
    _add_control(parser)
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_manual)


def _add_keep(policies: Verbs) -> None:
    parser = policies.add_parser(
        "keep",
        help="keep the plan that a run follows, and leave samples or documents out of it",
        description="Keep the plan that a run follows, and leave named samples or documents out "
        "from a sample on. Their places get the next samples of their strata that the training "
        "would not have drawn; all other places keep theirs. Resume the run with the new plan from "
        "a checkpoint before that sample.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="run directory of a run that follows a plan"
    )
    parser.add_argument(
        "--skip",
        type=Path,
        required=True,
        metavar="FILE",
        help="names what to leave out: a line K for a sample, NAME:ID for a document with all "
        "samples that hold it; or JSON, as `trace --spikes --out` writes it",
    )
    parser.add_argument(
        "--from-sample",
        type=int,
        metavar="K",
        help="leave them out from this sample of the job on (default: the first that is named)",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="leave them out of this plan, which takes over from the run's at that sample "
        "(default: the run's own)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="new file for the plan"
    )
    parser.set_defaults(verb=_build_keep)


def _add_control(parser: argparse.ArgumentParser) -> None:
    """Add --control of a policy that weighs datasets."""
    parser.add_argument(
        "--control",
        choices=["uniform", "permuted"],
        help="make a control of the policy instead: the base weights; the weights of another "
        "dataset (default: the policy itself)",
    )


def _build_fall(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import ByFall

    job, datasets = _cut(arguments)
    policy = ByFall(datasets, arguments.strength, arguments.share_limit, arguments.stages)
    _build(arguments, job, policy)


def _build_target(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import ByTarget

    job, datasets = _cut(arguments)
    policy = ByTarget(datasets, arguments.top, arguments.share_limit, arguments.stages)
    _build(arguments, job, policy)


def _build_frontier(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import Frontier, time_map_of

    job, datasets = _cut(arguments)
    run = open_run(arguments.time_map) if arguments.time_map else None
    policy = Frontier(
        datasets,
        time_map_of(datasets, job, run),
        job.seq_length,
        arguments.window,
        arguments.strength,
        arguments.stages,
        move_shares=arguments.move_shares,
    )
    _build(arguments, job, policy)


def _cut(arguments: Arguments) -> tuple["Job", "list[CutDataset]"]:
    """Return the job, and its datasets in the strata of the policy."""
    job = read_job(arguments)
    return job, _strata(arguments, job, read_settings(arguments))


def _strata(arguments: Arguments, job: "Job", settings: "CutSettings") -> "list[CutDataset]":
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight import cut_job

    data = DataSource.from_flags(arguments)
    return cut_job(data, job.seq_length, job.seed, scores=arguments.scores, settings=settings)


def _build(arguments: Arguments, job: "Job", policy: "ByFall | ByTarget | Frontier") -> None:
    """Make the plan of a policy by scores, or a control of it, and print it."""
    from megatron_tokscale.reweight import PlanOptions, plan_by_scores

    by_frequency: Sequence[CutDataset] = ()
    if arguments.control == "frequency":
        settings = replace(read_settings(arguments), by="frequency")
        by_frequency = _strata(arguments, job, settings)
    options = PlanOptions(
        arguments.control, read_guards(arguments), read_gain(arguments), by_frequency
    )
    print_plan(plan_by_scores(policy, job, arguments.out, options))
    _print_live(arguments, by_frequency or policy.datasets)


def _build_dataset(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import plan_run

    job, guards, run = read_job(arguments), read_guards(arguments), open_run(arguments.run)
    plan = plan_run(
        run,
        job,
        arguments.out,
        guards=guards,
        window=arguments.window,
        strength=arguments.strength,
        n_stages=arguments.stages,
        control=arguments.control,
    )
    print_plan(plan)


def _build_manual(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import Manual, plan_by_hand

    manual = Manual(_read_weights(arguments.weights), arguments.interpolation)
    job, guards = read_job(arguments), read_guards(arguments)
    plan = plan_by_hand(manual, job, arguments.out, guards=guards, control=arguments.control)
    print_plan(plan)


def _build_keep(arguments: Arguments) -> None:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.reweight.leave_out import leave_out
    from megatron_tokscale.trace.named import Named

    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    made = leave_out(
        arguments.run,
        Named.load(arguments.skip),
        arguments.out,
        plan=plan,
        start=arguments.from_sample,
    )
    print_plan(made.plan)
    print(
        f"\nnewly left out from sample {made.start:,} on: {made.n_samples:,}; places of the "
        f"training that get others: {made.n_replaced:,}"
    )


def _read_weights(words: list[str]) -> dict[int, list[float]]:
    """Return the manual weights of the datasets, by the sample from which they hold."""
    points: dict[int, list[float]] = {}
    for word in words:
        start, _, weights = word.partition(":")
        try:
            sample, values = int(start), [float(weight) for weight in weights.split(",")]
        except ValueError as error:
            raise TokscaleError(
                f"--weights: cannot read '{word}'; give SAMPLE:WEIGHT,WEIGHT,..."
            ) from error
        if sample in points:
            raise TokscaleError(
                f"--weights has two entries for sample {sample}; expected one; leave one out"
            )
        points[sample] = values
    return points


def print_plan(plan: "Plan") -> None:
    """Print a plan as weights, a picture over training, and what it can gain."""
    from megatron_tokscale.reweight import describe_plan

    print(describe_plan(plan), end="")


def _print_live(arguments: Arguments, datasets: "Sequence[CutDataset]") -> None:
    """Say how a job watches the documents that the plan keeps out, and corrects its weights.

    A note on stderr says where the plan keeps out too many.
    """
    from megatron_tokscale.corpus.names import listed

    held_out = sum(sum(dataset.held_out) for dataset in datasets)
    if not held_out:
        return
    documents = held_out + sum(sum(dataset.documents) for dataset in datasets)
    share_of = {
        name: out / (out + kept)
        for dataset in datasets
        for name, out, kept in zip(dataset.names, dataset.held_out, dataset.documents, strict=True)
    }
    if over := [name for name, share in share_of.items() if share > _MOST_HELD_OUT]:
        say(
            f"--held-out keeps up to {max(share_of.values()):.0%} of a stratum's documents out of "
            f"the training ({listed(over)}); expected {_MOST_HELD_OUT:.0%} at most; give a lower "
            "one, or fewer --quantiles"
        )
    scores = f" --scores-dir {arguments.scores}" if arguments.scores else ""
    print(
        f"\nIt keeps {held_out:,} of {documents:,} documents out of the training. To correct its "
        "weights by them while\nthe job trains, build a probe set of them, and give the job both "
        "sets and a twentieth of its steps as N:\n"
        f"  megatron-tokscale probe build --plan {arguments.out}{scores} --out strata.safetensors\n"
        f"  --tokscale-plan {arguments.out} --tokscale-probe-set probe.safetensors "
        "strata.safetensors \\\n  --tokscale-replan-interval N"
    )
