"""Flags that the policies of `megatron-tokscale plan build` share: of the job and of the guards."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, add_data, add_seed

if TYPE_CHECKING:
    from megatron_tokscale.reweight import CutSettings, GainSettings, Guards, Job
    from megatron_tokscale.reweight.cutting import Order


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add the flags that describe the training job."""
    add_data(parser)
    parser.add_argument(
        "--seq-length", type=int, required=True, metavar="N", help="sequence length of the job"
    )
    parser.add_argument(
        "--train-samples", type=int, required=True, metavar="N", help="samples of the job"
    )
    add_seed(parser, "seed of the order of the samples")


def add_window(parser: argparse.ArgumentParser) -> None:
    """Add the flags of policies that look ahead."""
    parser.add_argument(
        "--window",
        type=float,
        default=4.0,
        metavar="FACTOR",
        help="how far to look ahead, as a factor of training time",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="POWER",
        help="0 keeps the base weights, 1 weights in proportion to what is about to be learned",
    )
    add_stages(parser)


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Add --stages."""
    parser.add_argument(
        "--stages", type=int, default=24, metavar="N", help="stages of constant weights"
    )


def add_scores(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a policy by scores: --control and --scores."""
    parser.add_argument(
        "--control",
        choices=["uniform", "permuted", "frequency", "easy-first"],
        help="make a control of the policy instead: the base weights on the same strata; each "
        "stratum with the weight of another; the policy's weights on strata by token frequency; a "
        "curriculum by learning time (default: the policy itself)",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FOLDER",
        help="folder of the scores (default: beside each .bin/.idx)",
    )


def add_strata(parser: argparse.ArgumentParser, by: str) -> None:
    """Add the flags of strata of documents, whose default score is `by`."""
    parser.add_argument(
        "--by",
        choices=["fall", "target", "learning-time", "frequency"],
        default=by,
        help="score that ranks documents into strata",
    )
    parser.add_argument(
        "--quantiles",
        type=int,
        metavar="N",
        help="strata per dataset (default: 16 of documents, 8 of samples)",
    )


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """Add --held-out."""
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="N",
        help="documents of each stratum that the training leaves out, for live weights of strata",
    )


def add_share_limit(parser: argparse.ArgumentParser) -> None:
    """Add --share-limit."""
    parser.add_argument(
        "--share-limit",
        type=float,
        default=2.0,
        metavar="FACTOR",
        help="largest factor by which a dataset's share departs from its base share, either way; "
        "1 keeps the shares",
    )


def add_gain(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the estimate of what a plan can gain."""
    add_parameters(parser).add_argument(
        "--seed-sd",
        type=float,
        default=2.5,
        metavar="POINTS",
        help="standard deviation over seeds of a paired difference, in percent of the training",
    )


def add_parameters(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --parameters; return its group."""
    gain = parser.add_argument_group("what the plan can gain")
    gain.add_argument(
        "--parameters",
        type=int,
        metavar="N",
        help="parameters of the model to train, for the reference's cost (default: as many as the "
        "reference run's)",
    )
    return gain


def add_guards_and_out(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the guards, and --out."""
    guards = parser.add_argument_group(
        "guards",
        "Base weights and manual weights must keep to --max-epochs; the other two guards limit "
        "them only where --tokscale-replan-interval changes them.",
    )
    guards.add_argument(
        "--floor",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="smallest weight of a stratum, as a share of its base weight; that share of the base "
        "weights is mixed into the policy's",
    )
    guards.add_argument(
        "--max-change",
        type=float,
        default=1.5,
        metavar="FACTOR",
        help="largest change of a weight from one stage to the next",
    )
    guards.add_argument(
        "--max-epochs",
        type=float,
        default=4.0,
        metavar="N",
        help="largest number of epochs of a stratum over the whole plan",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="new file for the plan"
    )


def read_job(arguments: Arguments) -> "Job":
    """Return the training job that the flags describe.

    --out is checked first, so that a path in use is refused before any data are read.
    """
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight import job_of
    from megatron_tokscale.reweight.planning import check_new_plan

    check_new_plan(arguments.out)
    data = DataSource.from_flags(arguments)
    return job_of(data, arguments.train_samples, arguments.seq_length, arguments.seed)


def read_guards(arguments: Arguments) -> "Guards":
    """Return the guards that the flags give."""
    from megatron_tokscale.reweight import Guards

    return Guards(arguments.floor, arguments.max_change, arguments.max_epochs)


def read_settings(arguments: Arguments) -> "CutSettings":
    """Return the settings of the strata that the flags give.

    The control `easy-first` takes documents in the order of their learning times.
    """
    from megatron_tokscale.reweight import CutSettings

    by: Order = "learning-time" if arguments.control == "easy-first" else arguments.by
    return CutSettings(
        arguments.quantiles, arguments.unlearned, arguments.strata, by, arguments.held_out
    )


def read_gain(arguments: Arguments) -> "GainSettings":
    """Return the settings of the estimate of what the plan can gain."""
    from megatron_tokscale.reweight import GainSettings

    if "seed_sd" not in arguments:
        return GainSettings(arguments.parameters)
    return GainSettings(arguments.parameters, arguments.seed_sd)
