"""`megatron-tokscale demo`: the whole loop on this machine."""

from pathlib import Path

from megatron_tokscale.cli.parsing import Arguments, Verbs


def add_verb(verbs: Verbs) -> None:
    """Add `demo`."""
    parser = verbs.add_parser(
        "demo",
        help="run the whole loop on this machine, without a GPU",
        description="Train a small GPT on real text with probes, fit it, plan its data, train it "
        "again under the plan, and write a report. A demo that was stopped resumes.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-run"),
        metavar="FOLDER",
        help="folder of all that the demo makes",
    )
    parser.add_argument("--quick", action="store_true", help="run a toy, in a minute or two")
    parser.set_defaults(verb=_demo)


def _demo(arguments: Arguments) -> None:
    from megatron_tokscale.demo import run_demo

    run_demo(arguments.out, quick=arguments.quick)
