"""`megatron-tokscale plan`: make and show data plans; one verb per policy."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Verbs, open_run
from megatron_tokscale.cli.plan_flags import (
    add_guards_and_out,
    add_job,
    add_window,
    read_guards,
    read_job,
)
from megatron_tokscale.core.errors import TokscaleError

if TYPE_CHECKING:
    from megatron_tokscale.data import Plan

_JOB = "Give the data flags, --split and --seq-length as the training job has them."


def add_verb(verbs: Verbs) -> None:
    """Add `plan build` with a verb per policy, `plan prepare`, and `plan show`."""
    plan = verbs.add_parser("plan", help="make and show data plans")
    plan_verbs = plan.add_subparsers(required=True, metavar="VERB")
    build = plan_verbs.add_parser(
        "build",
        help="make a plan for a training job",
        description="Make a plan: weights of datasets and of their strata over consumed samples.",
    )
    policies = build.add_subparsers(required=True, metavar="POLICY")
    _add_frontier(policies)
    _add_dataset(policies)
    _add_manual(policies)
    prepare = plan_verbs.add_parser(
        "prepare",
        usage="%(prog)s -- [SCRIPT] FLAG ...",
        help="make the files of a job's plan before the job",
        description="Make the files that a job of these flags makes at its start, on rank 0, while "
        "its other ranks wait: Megatron's indices of one epoch, the strata and the index of the "
        "plan. Needs no GPU. Files that are there stay.",
    )
    prepare.add_argument("job", nargs="+", metavar="WORD", help="a training job's script and flags")
    prepare.set_defaults(verb=_prepare)
    show = plan_verbs.add_parser("show", help="draw a plan in the terminal")
    show.add_argument(
        "file", type=Path, metavar="PLAN", help="a plan, or the run that follows one so far"
    )
    show.set_defaults(verb=_show)


def _add_frontier(policies: Verbs) -> None:
    parser = policies.add_parser(
        "frontier",
        help="favour the strata of each dataset that are about to be learned",
        description="Cut each dataset into strata by the scores of its documents (`score`), and "
        f"favour the strata that are about to be learned. {_JOB}",
    )
    add_job(parser)
    parser.add_argument(
        "--control",
        choices=["uniform", "easy-first", "frequency"],
        help="make a control of the policy instead: the base weights; a curriculum; the policy's "
        "weights for strata by token frequency (default: the policy itself)",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FOLDER",
        help="folder of the scores (default: beside each .bin/.idx)",
    )
    parser.add_argument(
        "--quantiles",
        type=int,
        default=8,
        metavar="N",
        help="strata per dataset, by learning time",
    )
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
    parser.add_argument(
        "--control",
        choices=["uniform"],
        help="make a control of the policy instead: the base weights (default: the policy itself)",
    )
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
    add_guards_and_out(parser)
    parser.set_defaults(verb=_build_manual)


def _build_frontier(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight import CutSettings, cut_job, plan_frontier, plan_uniform

    job, guards = read_job(arguments), read_guards(arguments)
    if arguments.control == "uniform":
        _print(plan_uniform(job, arguments.out, guards=guards))
        return
    datasets = cut_job(
        DataSource.from_flags(arguments),
        job.seq_length,
        job.seed,
        scores=arguments.scores,
        settings=CutSettings(arguments.quantiles, arguments.unlearned),
    )
    plan = plan_frontier(
        datasets,
        job,
        arguments.out,
        control=arguments.control,
        time_map=open_run(arguments.time_map) if arguments.time_map else None,
        guards=guards,
        window=arguments.window,
        strength=arguments.strength,
        n_stages=arguments.stages,
        move_shares=arguments.move_shares,
    )
    _print(plan)


def _build_dataset(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import plan_run, plan_uniform

    job, guards, run = read_job(arguments), read_guards(arguments), open_run(arguments.run)
    if arguments.control == "uniform":
        _print(plan_uniform(job, arguments.out, guards=guards))
        return
    plan = plan_run(
        run,
        job,
        arguments.out,
        guards=guards,
        window=arguments.window,
        strength=arguments.strength,
        n_stages=arguments.stages,
    )
    _print(plan)


def _build_manual(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import Manual, plan_by_hand

    manual = Manual(_read_weights(arguments.weights), arguments.interpolation)
    plan = plan_by_hand(manual, read_job(arguments), arguments.out, guards=read_guards(arguments))
    _print(plan)


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


def _print(plan: "Plan") -> None:
    from megatron_tokscale.reweight import describe_plan

    print(describe_plan(plan), end="")


def _prepare(arguments: Arguments) -> None:
    from megatron_tokscale.doctor.plan_files import prepare_plan

    print(f"the plan's files are in {prepare_plan(arguments.job)}")


def _show(arguments: Arguments) -> None:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.data.history import first_unplanned_sample, followed_plan

    path: Path = arguments.file
    if not path.is_dir():
        _print(Plan.load(path))
        return
    _print(followed_plan(path))
    start = first_unplanned_sample(path)
    if start is not None:
        print(f"  from sample {start:,} on the run has not followed it: its job had no plan")
