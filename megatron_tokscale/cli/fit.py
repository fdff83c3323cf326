"""`megatron-tokscale fit`: fit a sigmoid to every watched token of a run."""

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_run, tell_left_out
from megatron_tokscale.core.progress import ProgressOnStderr


def add_verb(verbs: Verbs) -> None:
    """Add `fit`."""
    parser = verbs.add_parser(
        "fit",
        help="fit a sigmoid to every watched token of a run",
        description="Fit every watched token, block by block; a fit that was stopped resumes. In "
        "several processes: torchrun --nnodes M --nproc-per-node N -m megatron_tokscale.cli fit "
        "RUN",
    )
    add_run(parser)
    parser.add_argument(
        "--time",
        choices=["step", "tokens", "lr-sum", "axis"],
        help="training time in optimizer steps, consumed tokens, summed learning rate, or the "
        "values of an imported axis (default: step; axis where imported losses count no steps)",
    )
    parser.add_argument(
        "--keep-common-shifts",
        action="store_true",
        help="fit the losses as they are; by default the shift that all tokens of a dataset share "
        "at a probe is taken out first",
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        help="device that computes; 'cuda' is every process's own GPU (default: cpu)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes that another launcher than torchrun has started with RANK, "
        "WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
    )
    parser.set_defaults(verb=_fit)


def _fit(arguments: Arguments) -> None:
    from megatron_tokscale.fit import fit_run
    from megatron_tokscale.fit.fit_text import describe_fit
    from megatron_tokscale.fit.parts import Ranks
    from megatron_tokscale.store import Run

    with Ranks.joined(arguments.distributed) as ranks:
        run = ranks.together(lambda: Run.open(arguments.run))
        summary = fit_run(
            run,
            time=arguments.time,
            keep_common_shifts=arguments.keep_common_shifts,
            device=arguments.device,
            progress=ProgressOnStderr(),
            ranks=ranks,
        )
    if ranks.leads:
        tell_left_out(run)
        print(describe_fit(summary))
