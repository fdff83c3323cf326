"""`megatron-tokscale VERB`: everything that is done outside a training job."""

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_tokscale import __version__
from megatron_tokscale.errors import TokscaleError, exit_with_one_line
from megatron_tokscale.progress import Progress

Arguments = argparse.Namespace
Verb = Callable[[Arguments], None]


def main(argv: list[str] | None = None) -> None:
    """Run the verb that the command line names; bad input ends with one line and exit code 2."""
    arguments = _parser().parse_args(argv)
    with exit_with_one_line():
        try:
            arguments.verb(arguments)
        except OSError as error:
            raise TokscaleError(f"{error.filename or 'output'}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-tokscale",
        description="Learning-time spectra for Megatron-LM: what is the model learning now, when "
        "will it learn the rest, and what should it be fed next?",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_probe(verbs.add_parser("probe", help="make and show probe sets"))
    _add_fit(verbs.add_parser("fit", help="fit a sigmoid to every watched token of a run"))
    _add_spectrum(verbs.add_parser("spectrum", help="learning-time spectrum of a fitted run"))
    _add_laws(verbs.add_parser("laws", help="scaling laws of a run's loss, and its tail"))
    _add_plan(verbs.add_parser("plan", help="make and show data plans"))
    _add_report(verbs.add_parser("report", help="one self-contained HTML page about a run"))
    _add_demo(verbs.add_parser("demo", help="the whole loop on this machine, without a GPU"))
    return parser


def _add_probe(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    build = verbs.add_parser(
        "build",
        help="choose the tokens to watch",
        description="Draw windows of held-out documents from Megatron's .bin/.idx files. Give "
        "--data-path, --split and --seq-length as the training job has them.",
    )
    _add_data(build)
    build.add_argument("--vocab-size", type=int, required=True, help="as the job's tokenizer has")
    build.add_argument("--tokens", type=int, default=1_000_000, help="tokens to watch, about")
    build.add_argument(
        "--from",
        dest="part",
        choices=["train", "valid", "test"],
        default="valid",
        help="part of the split to draw from; 'train' watches memorisation",
    )
    build.add_argument("--eod", type=int, help="id of the end-of-document token, not watched")
    build.add_argument("--seed", type=int, default=1234)
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    build.set_defaults(verb=_probe_build)
    show = verbs.add_parser("show", help="print what is in a probe set")
    show.add_argument("file", type=Path)
    show.set_defaults(verb=_probe_show)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-path",
        nargs="+",
        required=True,
        metavar="WORD",
        help="prefixes, or weights and prefixes in turn",
    )
    parser.add_argument("--split", default="969,30,1", help="train, validation and test parts")
    parser.add_argument("--seq-length", type=int, required=True)


def _probe_build(arguments: Arguments) -> None:
    from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe

    _refuse_to_overwrite(arguments.out)
    probe_set = build_probe_set(
        ProbeSettings(
            data_path=arguments.data_path,
            split=arguments.split,
            part=arguments.part,
            seq_length=arguments.seq_length,
            vocab_size=arguments.vocab_size,
            n_tokens=arguments.tokens,
            eod=arguments.eod,
            seed=arguments.seed,
        )
    )
    probe_set.save(arguments.out)
    print(describe(probe_set))


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise TokscaleError(f"{path} exists, and runs may depend on it; choose another name")


def _probe_show(arguments: Arguments) -> None:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.probe.build import describe

    print(describe(ProbeSet.load(arguments.file)))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds tokscale/)")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--time",
        choices=["step", "tokens", "lr-sum"],
        default="step",
        help="training time in optimizer steps, consumed tokens, or the sum of learning rates",
    )
    parser.add_argument("--device", help="where to compute, e.g. cuda (default: cpu)")
    parser.set_defaults(verb=_fit)


def _fit(arguments: Arguments) -> None:
    from megatron_tokscale.fit import fit_run
    from megatron_tokscale.fit.describe import describe_fit
    from megatron_tokscale.store import Run

    run = Run.open(arguments.run)
    progress = Progress("fit", run.n_tokens, "tokens")
    summary = fit_run(run, time=arguments.time, device=arguments.device, progress=progress)
    print(describe_fit(summary))


def _add_spectrum(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--seed", type=int, default=0, help="for the null and the held-out half")
    parser.set_defaults(verb=_spectrum)


def _spectrum(arguments: Arguments) -> None:
    from megatron_tokscale.spectrum import spectrum_run
    from megatron_tokscale.spectrum.describe import describe_spectrum
    from megatron_tokscale.store import Run

    print(describe_spectrum(spectrum_run(Run.open(arguments.run), seed=arguments.seed)))


def _add_laws(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.set_defaults(verb=_laws)


def _laws(arguments: Arguments) -> None:
    from megatron_tokscale.laws import describe_laws, laws_run
    from megatron_tokscale.store import Run

    print(describe_laws(laws_run(Run.open(arguments.run))))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    build = verbs.add_parser(
        "build",
        help="make a plan for a training job",
        description="Weights per dataset over consumed samples. Give --data-path, --split and "
        "--seq-length as the training job has them.",
    )
    _add_data(build)
    build.add_argument("--train-samples", type=int, required=True, help="samples of the job")
    build.add_argument(
        "--policy",
        choices=["dataset", "shuffled", "uniform", "manual"],
        default="dataset",
        help="'dataset' follows the spectra of --run; 'shuffled' (the same, but for other "
        "datasets) and 'uniform' are its controls; 'manual' follows --schedule",
    )
    build.add_argument("--run", type=Path, help="reference run, with its spectrum")
    build.add_argument(
        "--schedule",
        nargs="+",
        metavar="SAMPLE:W,W,...",
        help="weights by hand from a consumed sample on, e.g. 0:0.5,0.5 100000:0.9,0.1",
    )
    build.add_argument("--interpolation", choices=["step", "linear"], default="step")
    build.add_argument("--window", type=float, default=4.0, help="how far ahead, as a factor")
    build.add_argument("--strength", type=float, default=1.0, help="0: none, 1: proportional")
    build.add_argument("--stages", type=int, default=24)
    build.add_argument("--floor", type=float, default=0.25, help="of a dataset's own weight")
    build.add_argument("--max-change", type=float, default=1.5, help="factor per stage")
    build.add_argument("--max-epochs", type=float, default=4.0, help="per dataset")
    build.add_argument("--seed", type=int, default=1234, help="keys the order of the samples")
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    build.set_defaults(verb=_plan_build)
    show = verbs.add_parser("show", help="print a plan")
    show.add_argument("file", type=Path)
    show.set_defaults(verb=_plan_show)


def _plan_build(arguments: Arguments) -> None:
    from megatron_tokscale.reweight import Guards, Manual, describe, plan_by_hand, plan_run
    from megatron_tokscale.reweight.jobs import job_of
    from megatron_tokscale.store import Run

    job = job_of(
        arguments.data_path,
        arguments.split,
        arguments.train_samples,
        arguments.seq_length,
        arguments.seed,
    )
    guards = Guards(arguments.floor, arguments.max_change, arguments.max_epochs)
    if arguments.policy == "manual":
        points = _read_schedule(arguments.schedule or [])
        plan = plan_by_hand(
            Manual(points, arguments.interpolation), job, arguments.out, guards=guards
        )
    else:
        plan = plan_run(
            Run.open(arguments.run) if arguments.run else None,
            arguments.policy,
            job,
            arguments.out,
            guards=guards,
            window=arguments.window,
            strength=arguments.strength,
            n_stages=arguments.stages,
        )
    print(describe(plan), end="")


def _read_schedule(words: list[str]) -> dict[int, list[float]]:
    points = {}
    for word in words:
        start, _, weights = word.partition(":")
        try:
            points[int(start)] = [float(weight) for weight in weights.split(",")]
        except ValueError as error:
            raise TokscaleError(
                f"--schedule: cannot read '{word}'; give SAMPLE:WEIGHT,WEIGHT,..."
            ) from error
    return points


def _plan_show(arguments: Arguments) -> None:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.reweight import describe

    print(describe(Plan.load(arguments.file)), end="")


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--compare", type=Path, metavar="RUN", help="another run, e.g. of a plan")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, to show tokens as text")
    parser.add_argument("--out", type=Path, help="default: RUN/analysis/report.html")
    parser.set_defaults(verb=_report)


def _report(arguments: Arguments) -> None:
    from megatron_tokscale.report import report_run
    from megatron_tokscale.store import Run

    other = Run.open(arguments.compare) if arguments.compare else None
    path = report_run(
        Run.open(arguments.run), compare=other, tokenizer=arguments.tokenizer, out=arguments.out
    )
    print(path)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="where everything goes")
    parser.add_argument("--quick", action="store_true", help="a toy of 2 minutes")
    parser.set_defaults(verb=_demo)


def _demo(arguments: Arguments) -> None:
    from megatron_tokscale.demo import run_demo

    run_demo(arguments.out, quick=arguments.quick)


if __name__ == "__main__":
    main()
