"""`megatron-tokscale compare`: two runs on one probe set, token by token."""

from pathlib import Path

from megatron_tokscale.cli.parsing import (
    Arguments,
    Verbs,
    add_resampling,
    add_tokenizer,
    open_runs,
)
from megatron_tokscale.core.progress import ProgressOnStderr


def add_verb(verbs: Verbs) -> None:
    """Add `compare`."""
    parser = verbs.add_parser(
        "compare",
        help="tokens that one run has learned and another has not, and how much sooner",
        description="Compare run B with run A, both fitted, on one probe set: tokens gained and "
        "lost beyond the noise between seeds, at a false discovery rate of 5%; by which factor B "
        "learns sooner; whether the learning-time spectra differ. Without --noise every call is "
        "undecided. The runs are compared at their common end, the earliest last probe.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="run directory of the baseline")
    parser.add_argument("b", type=Path, metavar="B", help="run directory of the other run")
    parser.add_argument(
        "--noise",
        type=Path,
        nargs="+",
        default=[],
        metavar="C",
        help="run directories of further seeds of A (default: none, and calls are undecided)",
    )
    parser.add_argument(
        "--clock",
        choices=["tokens", "step", "lr-sum", "axis"],
        help="time in which the runs are compared (default: tokens, else steps, else the axis of "
        "imported runs)",
    )
    add_tokenizer(parser, "tokens")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for compare.json (default: A/analysis/compare/NAME-OF-B, the name with the "
        "folders above B that A is not in)",
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write one self-contained HTML page too, a new file or an earlier such page (default: "
        "none)",
    )
    add_resampling(parser)
    parser.set_defaults(verb=_compare)


def _compare(arguments: Arguments) -> None:
    from megatron_tokscale.compare.compare_text import describe_comparison
    from megatron_tokscale.compare.run_compare import compare_runs
    from megatron_tokscale.report import check_page, report_comparison
    from megatron_tokscale.report.html import COMPARISON_TITLE

    if arguments.page is not None:
        check_page(arguments.page, COMPARISON_TITLE, "--page")
    a, b, *noise = open_runs([arguments.a, arguments.b, *arguments.noise])
    comparison = compare_runs(
        a,
        b,
        noise,
        out=arguments.out,
        clock=arguments.clock,
        tokenizer=arguments.tokenizer,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_comparison(comparison))
    if arguments.page is not None:
        print(report_comparison(comparison, arguments.page))
