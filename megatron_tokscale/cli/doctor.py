"""`megatron-tokscale doctor`: what is installed, and whether a job would be refused."""

from megatron_tokscale.cli.parsing import Arguments, Verbs


def add_verb(verbs: Verbs) -> None:
    """Add `doctor`."""
    parser = verbs.add_parser(
        "doctor",
        usage="%(prog)s [-- [SCRIPT] FLAG ...]",
        help="show what is installed, and whether a job would be refused",
        description="Show what is installed, which Megatron functions the plugin hooks into exist, "
        "and, for a job's script and flags, every reason to refuse the job; exit code 2 if there "
        "is one. Starts nothing and writes nothing.",
    )
    parser.add_argument("job", nargs="*", metavar="WORD", help="a training job's script and flags")
    parser.set_defaults(verb=_doctor)


def _doctor(arguments: Arguments) -> None:
    from megatron_tokscale.doctor.doctor import examine

    examine(arguments.job)
