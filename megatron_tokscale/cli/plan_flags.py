"""Flags that the policies of `megatron-tokscale plan build` share: of the job and of the guards."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, add_data, add_seed

if TYPE_CHECKING:
    from megatron_tokscale.reweight import Guards, Job


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
    parser.add_argument(
        "--stages", type=int, default=24, metavar="N", help="stages of constant weights"
    )


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
        help="smallest weight of a stratum, as a share of its base weight",
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
