"""`megatron-tokscale report`: one self-contained HTML page about a run."""

from pathlib import Path

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_run, add_tokenizer, open_runs


def add_verb(verbs: Verbs) -> None:
    """Add `report`."""
    parser = verbs.add_parser("report", help="write one self-contained HTML page about a run")
    add_run(parser)
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="RUN",
        help="another run to show beside it, e.g. one under a plan (default: none)",
    )
    parser.add_argument(
        "--axis-dir",
        dest="axes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders that `spectrum --axis D` or `M` wrote, of runs on the same probe set "
        "(default: none)",
    )
    add_tokenizer(parser, "tokens")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page, a new file or an earlier report (default: RUN/analysis/report.html)",
    )
    parser.set_defaults(verb=_report)


def _report(arguments: Arguments) -> None:
    from megatron_tokscale.report import report_run

    run, *others = open_runs(path for path in (arguments.run, arguments.beside) if path)
    path = report_run(
        run,
        beside=others[0] if others else None,
        axes=arguments.axes,
        tokenizer=arguments.tokenizer,
        out=arguments.out,
    )
    print(path)
