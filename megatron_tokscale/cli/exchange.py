"""`megatron-tokscale import` and `export`: losses of other people's files, and files for them."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Parser, Verbs, add_run, open_run
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.model_size import SIZE_KEYS
from megatron_tokscale.core.progress import ProgressOnStderr

if TYPE_CHECKING:
    from megatron_tokscale.store.exchange.sources import ImportSettings


def add_verb(verbs: Verbs) -> None:
    """Add `import` and `export`."""
    _add_import(verbs)
    _add_export(verbs)


def _add_import(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "import",
        help="make a run from a matrix of token losses",
        description="Make a run directory from losses of N tokens at K values of an axis: a "
        "losses.npz of the interchange format, or its folder; a matrix in .npy, .npz, "
        ".safetensors or .parquet; or a run directory of an older schema. Several files, or a "
        "manifest (.json or .csv with file, name, size, tokens, seed), become one run each in the "
        "folder --out. "
        "docs/guides/import.md describes the formats.",
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="file of losses, folder or manifest"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="RUN",
        help="new run directory, or folder of runs",
    )
    _add_axis(parser)
    _add_tokens(parser)
    _add_run_of_matrix(parser)
    parser.add_argument(
        "--no-manifest",
        action="store_true",
        help="do not compare the file with the manifest.yaml beside it",
    )
    parser.set_defaults(verb=_import)


def _add_axis(parser: Parser) -> None:
    axis = parser.add_argument_group("the axis (where the file does not say it)")
    axis.add_argument(
        "--axis",
        choices=["T", "D", "M"],
        help="T: training time of one run; D: training tokens, M: model size, a column per run "
        "(default: by axis_name in FILE)",
    )
    axis.add_argument(
        "--values",
        metavar="LIST",
        help="values of the axis: numbers between commas, a file of numbers, or the name of an "
        "array in FILE (default: axis_values; in a table the names of the columns)",
    )
    axis.add_argument(
        "--unit",
        metavar="WORD",
        help="unit of the values; step, tokens and billion-tokens are understood, other words are "
        "only shown (default: unknown)",
    )
    axis.add_argument(
        "--array",
        metavar="NAME",
        help="matrix in FILE (default: loss_matrix, or the only matrix)",
    )


def _add_tokens(parser: Parser) -> None:
    tokens = parser.add_argument_group(
        "the tokens (names of arrays in FILE with a value per token)"
    )
    tokens.add_argument("--datasets", metavar="NAME", help="dataset (default: all are one)")
    tokens.add_argument("--documents", metavar="NAME", help="document (default: unknown)")
    tokens.add_argument(
        "--samples", metavar="NAME", help="sample (default: sample_id, if it is there)"
    )
    tokens.add_argument(
        "--positions",
        metavar="NAME",
        help="position in document or sample (default: token_pos, if it is there)",
    )
    tokens.add_argument(
        "--contexts", metavar="NAME", help="tokens predicted from (default: unknown)"
    )
    tokens.add_argument("--labels", metavar="NAME", help="token id (default: unknown)")
    tokens.add_argument(
        "--vocab-size", type=int, metavar="V", help="size of the vocabulary (default: unknown)"
    )
    tokens.add_argument(
        "--tokens",
        metavar="NAME",
        help="a name for the watched tokens: runs that are imported with one name watch the same "
        "(default: positions or labels tell; without them no other import is comparable)",
    )


def _add_run_of_matrix(parser: Parser) -> None:
    run = parser.add_argument_group("the run of a matrix along T")
    run.add_argument("--size", type=float, metavar="N", help="size of its model (default: unknown)")
    run.add_argument(
        "--size-measure",
        choices=list(SIZE_KEYS),
        default="non-embedding",
        help="the measure of --size and of a manifest's sizes; flops are per token",
    )
    run.add_argument(
        "--training-tokens",
        type=float,
        metavar="N",
        help="training tokens by the last column (default: unknown, or by --unit)",
    )
    run.add_argument(
        "--training-seed", type=int, metavar="N", help="seed of its training (default: unknown)"
    )


def _add_export(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a run's token losses in the interchange format",
        description="Write axis_values, loss_matrix, axis_name, sample_id, token_pos and further "
        "arrays that `import` reads back. A folder gets losses.npz and a manifest.yaml with its "
        "size and SHA-256.",
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="new file with the end .npz, or folder",
    )
    parser.add_argument(
        "--time",
        choices=["step", "tokens", "lr-sum", "axis"],
        help="time of the axis (default: step; of imported losses their axis)",
    )
    parser.set_defaults(verb=_export)


def _import(arguments: Arguments) -> None:
    from megatron_tokscale.store.exchange.import_run import import_run
    from megatron_tokscale.store.exchange.import_text import describe_imports
    from megatron_tokscale.store.exchange.old_run import import_old_run, is_run_directory
    from megatron_tokscale.store.exchange.several import MANIFESTS, import_runs

    files: list[Path] = arguments.files
    settings, progress = _settings(arguments), ProgressOnStderr()
    if len(files) > 1 or files[0].suffix in MANIFESTS:
        measure = SIZE_KEYS[arguments.size_measure]
        summaries = import_runs(files, arguments.out, settings, measure, progress)
    elif is_run_directory(files[0]):
        summaries = [import_old_run(files[0], arguments.out, progress)]
    else:
        summaries = [import_run(files[0], arguments.out, settings, progress)]
    print(describe_imports(summaries))


def _settings(arguments: Arguments) -> "ImportSettings":
    from megatron_tokscale.store.exchange.sources import ImportSettings
    from megatron_tokscale.store.exchange.token_arrays import TokenArrays

    if arguments.axis in ("D", "M") and (arguments.size or arguments.training_tokens):
        raise TokscaleError(
            f"--size and --training-tokens are of one run, but along {arguments.axis} every column "
            "is a run; give sizes or tokens as --values"
        )
    size = {SIZE_KEYS[arguments.size_measure]: round(arguments.size)} if arguments.size else {}
    return ImportSettings(
        axis=arguments.axis,
        unit=arguments.unit,
        array=arguments.array,
        values=arguments.values,
        arrays=TokenArrays(
            datasets=arguments.datasets,
            documents=arguments.documents,
            samples=arguments.samples,
            positions=arguments.positions,
            contexts=arguments.contexts,
            labels=arguments.labels,
        ),
        vocab_size=arguments.vocab_size,
        size=size,
        training_tokens=round(arguments.training_tokens) if arguments.training_tokens else None,
        seed=arguments.training_seed,
        tokens_name=arguments.tokens,
        checks_manifest=not arguments.no_manifest,
    )


def _export(arguments: Arguments) -> None:
    from megatron_tokscale.store.exchange.export_run import export_run

    run = open_run(arguments.run)
    path = export_run(run, arguments.out, time=arguments.time, progress=ProgressOnStderr())
    print(f"{path}: {run.n_tokens:,} tokens at {len(run.records)} probes")
