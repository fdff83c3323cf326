"""`megatron-tokscale plan`: make and show data plans."""

from pathlib import Path

from megatron_tokscale.cli.parsing import Arguments, Verbs
from megatron_tokscale.cli.plan_build import add_policies, print_plan


def add_verb(verbs: Verbs) -> None:
    """Add `plan build` with a verb per policy, `plan prepare`, and `plan show`."""
    plan = verbs.add_parser("plan", help="make and show data plans")
    plan_verbs = plan.add_subparsers(required=True, metavar="VERB")
    build = plan_verbs.add_parser(
        "build",
        help="make a plan for a training job",
        description="Make a plan: weights of datasets and of their strata over consumed samples.",
    )
    add_policies(build.add_subparsers(required=True, metavar="POLICY"))
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


def _prepare(arguments: Arguments) -> None:
    from megatron_tokscale.doctor.plan_files import prepare_plan

    print(f"the plan's files are in {prepare_plan(arguments.job)}")


def _show(arguments: Arguments) -> None:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.data.history import first_unplanned_sample, followed_plan

    path: Path = arguments.file
    if not path.is_dir():
        print_plan(Plan.load(path))
        return
    print_plan(followed_plan(path))
    start = first_unplanned_sample(path)
    if start is not None:
        print(f"  from sample {start:,} on the run has not followed it: its job had no plan")
