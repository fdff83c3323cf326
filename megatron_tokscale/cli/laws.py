"""`megatron-tokscale laws`: scaling laws of runs or of tables, beside the theories of others."""

from pathlib import Path

from megatron_tokscale.cli.parsing import (
    Arguments,
    Parser,
    Verbs,
    add_data,
    add_resampling,
    open_runs,
)
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.progress import ProgressOnStderr

_OF_TABLES = ("curves", "manifest", "out", "step_column", "tokens_column", "lr_column")
_OF_RUNS = ("runs", "data_path", "data_args_path", "per_split_data_args_path", "split")


def add_verb(verbs: Verbs) -> None:
    """Add `laws`."""
    parser = verbs.add_parser(
        "laws",
        help="scaling laws of a run's loss and of its spectrum, or of tables of loss curves",
        description="Fit laws to the first RUN's losses and to its spectrum, beside the theories "
        "of others, each measured as its authors did. Further runs with the same probe set add "
        "the laws over runs. With --curves or --manifest, fit the laws of loss curves in tables "
        "instead, which need no run.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="run directory (holds tokscale/)"
    )
    _add_tables(parser)
    add_data(parser, "optional, for a RUN: adds the laws of the data's language")
    add_resampling(parser)
    parser.set_defaults(verb=_laws)


def _add_tables(parser: Parser) -> None:
    tables = parser.add_argument_group(
        "tables of loss curves, as W&B and TensorBoard export them",
        "Each table is CSV or parquet of one run, with a row per logged step and a column for each "
        "of step, tokens, learning rate and losses. Columns are found by their names (see the "
        "guide); rows without a loss are left out, rows of one step are merged.",
    )
    tables.add_argument(
        "--curves", type=Path, nargs="+", metavar="FILE", help="tables, instead of a RUN"
    )
    tables.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="CSV or JSON with a row per table: file, and optionally name, parameters (without "
        "embeddings) and tokens_per_step; all its files are read if it is given instead of "
        "--curves",
    )
    tables.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of curve_laws.json (required with tables; default: none)",
    )
    for flag, what in (("step", "step"), ("tokens", "tokens"), ("lr", "learning rate")):
        tables.add_argument(
            f"--{flag}-column",
            metavar="NAME",
            help=f"column of the {what} (default: found by its name)",
        )
    tables.add_argument(
        "--loss-column",
        nargs="+",
        default=[],
        metavar="NAME",
        help="columns of losses in nats (default: all columns named loss; without one, all other "
        "columns of numbers)",
    )


def _laws(arguments: Arguments) -> None:
    is_of_tables = any(getattr(arguments, name) for name in (*_OF_TABLES, "loss_column"))
    if not is_of_tables:
        _laws_of_runs(arguments)
        return
    given = [name for name in _OF_RUNS if getattr(arguments, name)]
    if given:
        what = "RUN" if given[0] == "runs" else f"--{given[0].replace('_', '-')}"
        raise TokscaleError(
            f"{what} is given together with tables of curves; expected one of the two; run `laws` "
            "once for each"
        )
    _laws_of_tables(arguments)


def _laws_of_runs(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.laws import describe_laws, laws_run

    if not arguments.runs:
        raise TokscaleError(
            "there is nothing to fit laws to; give a RUN, or tables of loss curves by --curves"
        )
    run, *others = open_runs(arguments.runs)
    source = DataSource.from_flags(arguments) if DataSource.is_given(arguments) else None
    result = laws_run(
        run,
        others,
        corpus=source.words if source else (),
        split=source.split if source else None,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_laws(result))


def _laws_of_tables(arguments: Arguments) -> None:
    from megatron_tokscale.laws import describe_curves, laws_curves
    from megatron_tokscale.laws.tables.columns import ColumnNames

    if arguments.out is None:
        raise TokscaleError("--out is missing; expected a folder for curve_laws.json; give --out")
    result = laws_curves(
        arguments.curves or (),
        manifest=arguments.manifest,
        columns=ColumnNames(
            arguments.step_column,
            arguments.tokens_column,
            arguments.lr_column,
            tuple(arguments.loss_column),
        ),
        out=arguments.out,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_curves(result))
