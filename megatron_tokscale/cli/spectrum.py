"""`megatron-tokscale spectrum`: the learning-time spectrum of a run, and spectra over runs."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_resampling, add_runs, open_runs
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.model_size import SIZE_KEYS
from megatron_tokscale.core.progress import ProgressOnStderr

if TYPE_CHECKING:
    from megatron_tokscale.store import Run


def add_verb(verbs: Verbs) -> None:
    """Add `spectrum`."""
    parser = verbs.add_parser(
        "spectrum",
        help="learning-time spectrum of a fitted run",
        description="Along training time (--axis T): the spectrum of one fitted run, the part of "
        "-dL/dx that it reconstructs, and tests that can fail; --source tests another run's "
        "learning times on it. Along D (training tokens) or M (model size): how far the clock of "
        "three or more runs with one probe set is shifted, and what smaller runs never learn. "
        "Every number has a 95% interval over documents and is corrected for bias.",
    )
    add_runs(parser)
    parser.add_argument(
        "--axis",
        choices=["T", "D", "M"],
        default="T",
        help="steps of one run, training tokens over runs, or model size over runs",
    )
    parser.add_argument(
        "--source",
        dest="sources",
        type=Path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="fitted runs whose learning times are tested on RUN (default: test none); with D or M "
        "one run whose learning times group the tokens (default: the largest, if it is fitted)",
    )
    parser.add_argument(
        "--size",
        choices=list(SIZE_KEYS),
        default="non-embedding",
        help="model size that M counts; flops are per token",
    )
    parser.add_argument(
        "--trunk",
        type=Path,
        metavar="RUN",
        help="with D, the run that the other runs are branches of (default: found by their losses)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the result; required with D and M (default: with T, RUN/analysis)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="NATS",
        help="of an imported matrix along D or M: loss at or below which a token is learned "
        "(default: ln 2, a probability of one half)",
    )
    add_resampling(parser)
    parser.set_defaults(verb=_spectrum)


def _spectrum(arguments: Arguments) -> None:
    trunks = [arguments.trunk] if arguments.trunk and arguments.axis == "D" else []
    paths = [*arguments.runs, *arguments.sources, *trunks]
    run_of = dict(zip(paths, open_runs(paths), strict=True))
    runs = [run_of[path] for path in arguments.runs]
    sources = [run_of[path] for path in arguments.sources]
    trunk = run_of.get(arguments.trunk)
    if any(run.imported and run.imported.axis != "T" for run in runs):
        _spectrum_of_matrix(arguments, runs, sources)
    elif arguments.threshold is not None:
        raise TokscaleError(
            "--threshold is of an imported matrix along D or M; leave it out, or name such a run"
        )
    elif arguments.axis == "T":
        _spectrum_of_run(arguments, runs, sources)
    else:
        _spectrum_over_runs(arguments, runs, sources, trunk)


def _spectrum_of_matrix(arguments: Arguments, runs: list["Run"], sources: list["Run"]) -> None:
    from megatron_tokscale.spectrum.matrix import THRESHOLD, matrix_run
    from megatron_tokscale.spectrum.matrix_text import describe_matrix

    if len(runs) > 1 or sources or arguments.out or arguments.axis != "T":
        raise TokscaleError(
            "an imported matrix along D or M has its runs as columns; expected it alone, without "
            "--axis, --source and --out; give one RUN"
        )
    result = matrix_run(
        runs[0],
        threshold=arguments.threshold or THRESHOLD,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_matrix(result.summary))
    if runs[0].paths.fit.is_file():  # enough columns for a fit per token
        _spectrum_of_run(arguments, runs, sources)


def _spectrum_of_run(arguments: Arguments, runs: list["Run"], sources: list["Run"]) -> None:
    from megatron_tokscale.results import SpectrumResult
    from megatron_tokscale.spectrum import spectrum_run, transfer_run
    from megatron_tokscale.spectrum.evidence.run_transfer import FittedPair
    from megatron_tokscale.spectrum.evidence_text import describe_transfer
    from megatron_tokscale.spectrum.spectrum_text import describe_datasets, describe_spectrum

    if len(runs) > 1 or arguments.out or arguments.trunk:
        raise TokscaleError(
            "--axis T takes one RUN and writes to RUN/analysis; give one RUN without --out and "
            "--trunk, or --axis D or M"
        )
    target, n_resamples, seed = runs[0], arguments.resamples, arguments.seed
    progress = ProgressOnStderr()
    for source in sources:
        FittedPair.open(source, target)  # refuses an unsuitable source before the long work
    spectrum = spectrum_run(target, n_resamples=n_resamples, seed=seed, progress=progress)
    print(describe_spectrum(spectrum, has_second_run=bool(sources)))
    print(describe_datasets(SpectrumResult.open(target).summary))
    for source in sources:
        transfer = transfer_run(
            source, target, n_resamples=n_resamples, seed=seed, progress=progress
        )
        print(describe_transfer(transfer))


def _spectrum_over_runs(
    arguments: Arguments, runs: list["Run"], sources: list["Run"], trunk: "Run | None"
) -> None:
    from megatron_tokscale.spectrum import axis_run
    from megatron_tokscale.spectrum.axes.axis_text import describe_axis

    if arguments.out is None:
        raise TokscaleError(
            f"--axis {arguments.axis} is given without --out; name a folder for its result"
        )
    if len(sources) > 1:
        raise TokscaleError(
            f"--source has {len(sources)} runs; expected one with --axis {arguments.axis}"
        )
    if arguments.trunk and arguments.axis == "M":
        raise TokscaleError("--trunk is given with --axis M; expected it with --axis D alone")
    result = axis_run(
        runs,
        arguments.axis,
        arguments.out,
        size=arguments.size,
        source=sources[0] if sources else None,
        trunk=trunk,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_axis(result))
