"""`megatron-tokscale VERB`: everything that is done outside a training job."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_tokscale import __version__
from megatron_tokscale.cli.options import check_numbers
from megatron_tokscale.core.errors import TokscaleError, exit_with_one_line, say
from megatron_tokscale.core.progress import Progress, mute, print_what_can_be
from megatron_tokscale.core.seed import DEFAULT_SEED

if TYPE_CHECKING:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.data import Plan
    from megatron_tokscale.probe import ProbeSchedule
    from megatron_tokscale.probe.budget import Batch
    from megatron_tokscale.reweight import Guards, Job
    from megatron_tokscale.store import Run

Arguments = argparse.Namespace
Verb = Callable[[Arguments], None]
_SIGINT, _SIGPIPE = 130, 141  # as a shell sees a program that a signal has ended


def main(argv: list[str] | None = None) -> None:
    """Run the verb that the command line names; bad input ends with one line and exit code 2."""
    with _ends_in_order():
        is_one_of_several = "TORCHELASTIC_RUN_ID" in os.environ or "--distributed" in (
            argv or sys.argv
        )
        if not (is_one_of_several and os.environ.get("LOCAL_RANK", "").isdecimal()):
            os.environ.pop("LOCAL_RANK", None)  # a pod's, whose verbs have their say none the less
        arguments = _parser().parse_args(argv)
        # scipy's L-BFGS-B calls BLAS on few numbers, where its threads only wait for another.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        arguments.verb(arguments)


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Print what the terminal can show, and end with at most one line on stderr."""
    print_what_can_be()
    with exit_with_one_line():
        try:
            yield
            _flush()
        except BrokenPipeError:
            mute(sys.stdout)
            raise SystemExit(_SIGPIPE) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise SystemExit(_SIGINT) from None
        except OSError as error:
            reason = error.strerror or error
            raise TokscaleError(f"{error.filename or 'output'}: {reason}") from error
        except MemoryError as error:
            raise TokscaleError(
                f"out of memory ({error or 'no more of it'}); give the process more"
            ) from error


def _flush() -> None:
    """Print what is still to be printed.

    Raises:
        OSError: nobody reads it, or it has no room.
    """
    if sys.stdout:
        try:
            sys.stdout.flush()
        except OSError:
            mute(sys.stdout)
            raise


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise TokscaleError(f"{message}; `{self.prog} --help` says what it takes")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown flags here, where the verb that was given is known, not in the root."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _flush()
        super().exit(status, message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megatron-tokscale",
        description="Learning-time spectra for Megatron-LM: what is the model learning now, when "
        "will it learn the rest, and what should it be fed next?",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_probe(verbs.add_parser("probe", help="make and show probe sets, and what they cost"))
    _add_fit(verbs.add_parser("fit", help="fit a sigmoid to every watched token of a run"))
    _add_spectrum(verbs.add_parser("spectrum", help="learning-time spectrum of a fitted run"))
    _add_laws(verbs.add_parser("laws", help="scaling laws of a run's loss, and its tail"))
    _add_score(verbs.add_parser("score", help="when a job's training documents are learned"))
    _add_plan(verbs.add_parser("plan", help="make and show data plans"))
    _add_trace(verbs.add_parser("trace", help="which documents a training sample is made of"))
    _add_report(verbs.add_parser("report", help="one self-contained HTML page about a run"))
    _add_demo(verbs.add_parser("demo", help="the whole loop on this machine, without a GPU"))
    _add_doctor(verbs.add_parser("doctor", help="what is installed, and if a job would be refused"))
    check_numbers(parser)
    return parser


def _add_probe(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    build = verbs.add_parser(
        "build",
        help="choose the tokens to watch",
        description="Draw windows of held-out documents from Megatron's .bin/.idx files. Give the "
        "data flags, --split and --seq-length as the training job has them.",
    )
    _add_data(build)
    build.add_argument("--seq-length", type=int, required=True)
    build.add_argument("--vocab-size", type=int, required=True, help="as the job's tokenizer has")
    size = build.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=int, help="tokens to watch, about (default: 1000000)")
    size.add_argument("--sequences", type=int, help="sequences to watch")
    size.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="as many as all probes together may cost, as a share of the training FLOPs, e.g. "
        "0.001; needs --global-batch-size and --train-iters or --train-samples",
    )
    build.add_argument(
        "--per-dataset",
        choices=["equal", "proportional"],
        default="equal",
        help="what each dataset gets of these: the same, or its weight in the blend",
    )
    build.add_argument(
        "--part",
        choices=["train", "valid", "test"],
        default="valid",
        help="part of the data to draw from; 'train' watches memorisation",
    )
    build.add_argument("--eod", type=int, help="id of the end-of-document token, not watched")
    build.add_argument("--seed", type=int, default=DEFAULT_SEED)
    duplicates = build.add_mutually_exclusive_group()
    for action, what in (("report", "count"), ("drop", "pass over")):
        duplicates.add_argument(
            f"--{action}-duplicates",
            dest="duplicates",
            action="store_const",
            const=action,
            default="ignore",
            help=f"{what} windows that the training part holds too: their whole document, or a "
            "passage of 64 tokens; reads the training part once",
        )
    _add_batch(build.add_argument_group("for --budget"))
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    build.set_defaults(verb=_probe_build)
    show = verbs.add_parser("show", help="print what is in a probe set")
    show.add_argument("file", type=Path)
    show.set_defaults(verb=_probe_show)
    plan = verbs.add_parser(
        "cost",
        help="what probing costs a job",
        description="FLOPs as Megatron counts them, and bytes on disk. Flags of the model and of "
        "the batch are Megatron's. --tokens counts full sequences; --probe-set counts the padding "
        "of short documents too.",
    )
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--probe-set", type=Path, metavar="FILE")
    size.add_argument("--tokens", type=int, help="tokens watched")
    _add_model(plan.add_argument_group("model"))
    _add_batch(plan.add_argument_group("training"))
    plan.set_defaults(verb=_probe_plan)


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data, as Megatron takes them (one of these ways)")
    words = "prefixes, or weights and prefixes in turn"
    data.add_argument("--data-path", nargs="+", metavar="WORD", help=words)
    data.add_argument("--data-args-path", type=Path, metavar="FILE", help="these words in a file")
    for part in ("train", "valid", "test"):
        data.add_argument(
            f"--{part}-data-path", nargs="+", metavar="WORD", help=f"{words}, of this part alone"
        )
    data.add_argument(
        "--per-split-data-args-path", type=Path, metavar="JSON", help="these of all parts in a file"
    )
    data.add_argument(
        "--split",
        help="train, validation and test parts of --data-path (default: Megatron's)",
    )


def _add_batch(group: Any) -> None:
    group.add_argument("--global-batch-size", type=int, help="sequences of a training step")
    group.add_argument("--train-iters", type=int)
    group.add_argument("--train-samples", type=int)
    group.add_argument("--save-interval", type=int, help="for schedules with checkpoints")
    group.add_argument("--micro-batch-size", type=int)
    group.add_argument("--data-parallel-size", type=int)
    group.add_argument(
        "--tokscale-probe-schedule",
        dest="schedule",
        metavar="SPEC",
        help="the job's --tokscale-probe-schedule (default: log:per-octave=8)",
    )


def _add_model(group: Any) -> None:
    for name in ("num-layers", "hidden-size", "num-attention-heads", "seq-length", "vocab-size"):
        group.add_argument(f"--{name}", type=int, required=True)
    for name in (
        *("ffn-hidden-size", "kv-channels", "num-query-groups", "num-experts", "moe-router-topk"),
        *("moe-ffn-hidden-size", "moe-shared-expert-intermediate-size"),
        *("make-vocab-size-divisible-by", "tensor-model-parallel-size"),
    ):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--moe-layer-freq")
    group.add_argument("--swiglu", action="store_true")


def _probe_build(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.probe.build import ProbeSettings, build_probe_set, describe

    _refuse_to_overwrite(arguments.out)
    source = DataSource.from_flags(arguments)
    n_tokens, n_sequences = arguments.tokens, arguments.sequences
    if arguments.budget is not None:
        n_sequences = _sequences_of_budget(arguments)
    elif arguments.global_batch_size or arguments.schedule:
        raise TokscaleError("flags of the training and the schedule do nothing without --budget")
    elif n_tokens is None and n_sequences is None:
        n_tokens = 1_000_000
    probe_set = build_probe_set(
        ProbeSettings(
            data_path=source.words,
            split=source.split,
            part=arguments.part,
            seq_length=arguments.seq_length,
            vocab_size=arguments.vocab_size,
            n_tokens=n_tokens,
            n_sequences=n_sequences,
            per_dataset=arguments.per_dataset,
            eod=arguments.eod,
            seed=arguments.seed,
            duplicates=arguments.duplicates,
        ),
        Progress,
    )
    probe_set.save(arguments.out)
    print(describe(probe_set))


def _sequences_of_budget(arguments: Arguments) -> int:
    from megatron_tokscale.probe.budget import sequences_within, share_of_training

    schedule, batch = _schedule(arguments), _batch(arguments)
    n_sequences = sequences_within(arguments.budget, schedule, batch)
    n_probes = len(batch.probe_steps(schedule))
    share = share_of_training(n_sequences, n_probes, batch)
    print(f"budget: {n_probes:,} probes of {n_sequences:,} sequences, {share:.3%} of the training")
    return n_sequences


def _schedule(arguments: Arguments) -> "ProbeSchedule":
    from megatron_tokscale.probe import DEFAULT_SCHEDULE, ProbeSchedule

    return ProbeSchedule.parse(arguments.schedule or DEFAULT_SCHEDULE)


def _batch(arguments: Arguments) -> "Batch":
    from megatron_tokscale.probe.budget import Batch

    if arguments.global_batch_size is None:
        raise TokscaleError("the cost depends on the training: give its --global-batch-size")
    return Batch(**_given(arguments, Batch))


def _given(arguments: Arguments, kind: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line gives."""
    values = {field.name: getattr(arguments, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _refuse_to_overwrite(path: Path) -> None:
    if path.exists():
        raise TokscaleError(f"{path} exists, and runs may depend on it; choose another name")


def _probe_show(arguments: Arguments) -> None:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.probe.build import describe

    print(describe(ProbeSet.load(arguments.file)))


def _probe_plan(arguments: Arguments) -> None:
    from megatron_tokscale.probe import ProbeSet
    from megatron_tokscale.probe.budget import Model, describe_plan

    model, batch, schedule = (
        Model(**_given(arguments, Model)),
        _batch(arguments),
        _schedule(arguments),
    )
    if arguments.probe_set is None:
        n_tokens = max(arguments.tokens, 1)
        n_sequences = -(-n_tokens // model.seq_length)
    else:
        probe_set = ProbeSet.load(arguments.probe_set)
        if probe_set.seq_length != model.seq_length:
            raise TokscaleError(
                f"{arguments.probe_set} has sequences of {probe_set.seq_length} tokens, not of "
                f"--seq-length {model.seq_length}"
            )
        n_tokens, n_sequences = probe_set.n_tokens, probe_set.n_sequences
    print(describe_plan(model, batch, schedule, n_sequences, n_tokens))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory (holds tokscale/)")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fit every watched token, by blocks; a fit that was stopped goes on where it was. In "
        "several processes: torchrun --nnodes M --nproc-per-node N -m megatron_tokscale.cli fit RUN"
    )
    _add_run(parser)
    parser.add_argument(
        "--time",
        choices=["step", "tokens", "lr-sum"],
        default="step",
        help="training time in optimizer steps, consumed tokens, or the sum of learning rates",
    )
    parser.add_argument(
        "--device",
        help="where to compute; 'cuda' is every process's own GPU (default: cpu)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that another launcher than torchrun has started with RANK, "
        "WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
    )
    parser.set_defaults(verb=_fit)


def _fit(arguments: Arguments) -> None:
    from megatron_tokscale.fit import fit_run
    from megatron_tokscale.fit.fit_text import describe_fit
    from megatron_tokscale.fit.parts import Ranks
    from megatron_tokscale.store import Run

    # What is left to fit is known at the first call.
    bar = cache(lambda total: Progress("fit", total, "tokens"))
    with Ranks.joined(arguments.distributed) as ranks:
        run = ranks.together(lambda: Run.open(arguments.run))
        summary = fit_run(
            run,
            time=arguments.time,
            device=arguments.device,
            progress=lambda done, total: bar(total)(done),
            ranks=ranks,
        )
    if ranks.leads:
        _tell_left_out(run)
        print(describe_fit(summary))


def _add_spectrum(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Along training time (--axis T): the spectrum of one fitted run, what it reconstructs of "
        "-dL/dx, and the tests that could fail; --source tests another run's learning times on it. "
        "Along D or M: the last losses of four or more runs with one probe set. Every number has "
        "a 95% interval over documents, and is corrected for the bias that they show."
    )
    _add_runs(parser)
    parser.add_argument("--axis", choices=["T", "D", "M"], default="T")
    parser.add_argument(
        "--source",
        dest="sources",
        type=Path,
        nargs="+",
        default=[],
        metavar="OTHER",
        help="fitted runs whose learning times are tested on RUN; with D or M one run",
    )
    parser.add_argument(
        "--size",
        choices=["parameters", "non-embedding", "flops"],
        default="non-embedding",
        help="what M is (flops: per token)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for D and M: where to write")
    _add_resampling(parser)
    parser.set_defaults(verb=_spectrum)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run directory (holds tokscale/)"
    )


def _add_resampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resamples", type=int, default=200, help="of documents (default: 200)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of all draws")


def _spectrum(arguments: Arguments) -> None:

    drawn = {"n_resamples": _resamples(arguments), "seed": arguments.seed, "progress": say}
    runs = [_opened(path) for path in arguments.runs]
    sources = [_opened(path) for path in arguments.sources]
    if arguments.axis == "T":
        _spectrum_of_run(arguments, runs, sources, drawn)
    else:
        _spectrum_over_runs(arguments, runs, sources, drawn)


def _spectrum_of_run(
    arguments: Arguments, runs: list["Run"], sources: list["Run"], drawn: dict[str, Any]
) -> None:
    from megatron_tokscale.spectrum import spectrum_run, transfer_run
    from megatron_tokscale.spectrum.evidence.run_transfer import FittedPair
    from megatron_tokscale.spectrum.spectrum_text import describe_spectrum, describe_transfer

    if len(runs) > 1 or arguments.out:
        raise TokscaleError("--axis T is of one RUN and writes beside it; give --axis D or M")
    for source in sources:
        FittedPair.open(source, runs[0])
    print(describe_spectrum(spectrum_run(runs[0], **drawn)))
    for source in sources:
        print(describe_transfer(transfer_run(source, runs[0], **drawn)))


def _spectrum_over_runs(
    arguments: Arguments, runs: list["Run"], sources: list["Run"], drawn: dict[str, Any]
) -> None:
    from megatron_tokscale.spectrum import axis_run
    from megatron_tokscale.spectrum.spectrum_text import describe_axis

    if arguments.out is None:
        raise TokscaleError(f"--axis {arguments.axis} is of several runs; say where to with --out")
    if len(sources) > 1:
        raise TokscaleError(f"--source takes one run with --axis {arguments.axis}")
    source = sources[0] if sources else None
    result = axis_run(
        runs, arguments.axis, arguments.out, size=arguments.size, source=source, **drawn
    )
    print(describe_axis(result))


def _resamples(arguments: Arguments) -> int:
    if arguments.resamples < 2:
        raise TokscaleError(f"--resamples {arguments.resamples} give no interval; give 2 or more")
    return int(arguments.resamples)


def _opened(path: Path) -> "Run":
    """Open a run, and say which of its probes are left out."""
    from megatron_tokscale.store import Run

    run = Run.open(path)
    _tell_left_out(run)
    return run


def _tell_left_out(run: "Run") -> None:
    if run.left_out:
        steps = ", ".join(map(str, run.left_out))
        say(f"the probes of {run.path} at steps {steps} have no finite loss and are left out")


def _add_laws(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Laws of the first RUN's losses and of its spectrum, beside the rival theories, each as "
        "its authors measured it. Further runs with the same probe set add the laws over runs."
    )
    _add_runs(parser)
    _add_data(parser)
    _add_resampling(parser)
    parser.set_defaults(verb=_laws)


def _laws(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.laws import describe_laws, laws_run

    run, *others = (_opened(path) for path in arguments.runs)
    data: dict[str, Any] = {}
    if DataSource.is_given(arguments):
        source = DataSource.from_flags(arguments)
        data = {"corpus": source.words, "split": source.split}
    result = laws_run(
        run,
        others,
        **data,
        n_resamples=_resamples(arguments),
        seed=arguments.seed,
        progress=say,
    )
    print(describe_laws(result))


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score the documents of a job's training data by a fitted reference run whose probe set "
        "watches some of them (probe build --part train): when their tokens are learned, how much "
        "there is to learn, what is never learned. Documents that were not watched are predicted "
        "from their words, and the error of that on watched ones is stated. Writes "
        "PREFIX.tokscale.safetensors beside each .bin/.idx."
    )
    _add_run(parser)
    _add_data(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="instead of beside the data")
    parser.add_argument(
        "--min-tokens", type=int, default=16, help="fewer watched tokens score no document"
    )
    parser.add_argument(
        "--no-predict",
        dest="predict",
        action="store_false",
        help="leave documents that were not watched without a score; no plan can use these",
    )
    parser.add_argument("--force", action="store_true", help="overwrite scores that are there")
    parser.set_defaults(verb=_score)


def _score(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight.describe_scores import describe_scores
    from megatron_tokscale.reweight.scoring import score_run

    source = DataSource.from_flags(arguments)
    summaries = score_run(
        _opened(arguments.run),
        source.words,
        source.split,
        out=arguments.out,
        predict=arguments.predict,
        min_tokens=arguments.min_tokens,
        force=arguments.force,
        progress=say,
    )
    print(describe_scores(summaries), end="")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_plan_build(
        verbs.add_parser(
            "build",
            help="make a plan for a training job",
            description="Weights of datasets and of their strata over consumed samples. Give the "
            "data flags, --split and --seq-length as the training job has them.",
        )
    )
    show = verbs.add_parser("show", help="draw a plan in the terminal")
    show.add_argument("file", type=Path, help="a plan, or a run: what it has followed so far")
    show.set_defaults(verb=_plan_show)


def _add_plan_build(build: argparse.ArgumentParser) -> None:
    _add_data(build)
    build.add_argument("--seq-length", type=int, required=True)
    build.add_argument("--train-samples", type=int, required=True, help="samples of the job")
    build.add_argument(
        "--policy",
        choices=["frontier", "dataset", "manual"],
        default="frontier",
        help="'frontier' favours the strata of each dataset that are about to be learned, by the "
        "scores of its documents (default); 'dataset' the datasets, by the spectra of --run; "
        "'manual' follows --weights",
    )
    build.add_argument(
        "--control",
        choices=["uniform", "easy-first", "frequency"],
        help="make a control of the policy instead: base weights; a curriculum; the same weights "
        "for strata by frequency",
    )
    build.add_argument("--scores", type=Path, metavar="FOLDER", help="default: beside the data")
    build.add_argument(
        "--time-map",
        type=Path,
        metavar="RUN",
        help="frontier: a run with its spectrum, of the size to train (its first part, or a "
        "trial), whose learning order tells when the training is where (default: the reference "
        "run's tokens tell)",
    )
    build.add_argument(
        "--quantiles", type=int, default=8, help="strata per dataset by learning time (default: 8)"
    )
    build.add_argument(
        "--unlearned",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="samples of which more than this is never learned are a stratum (default: 0.5)",
    )
    build.add_argument(
        "--move-shares", action="store_true", help="frontier: tilt the datasets' shares too"
    )
    build.add_argument("--run", type=Path, help="dataset: reference run, with its spectrum")
    build.add_argument(
        "--weights",
        nargs="+",
        metavar="SAMPLE:W,W,...",
        help="weights by hand from a consumed sample on, e.g. 0:0.5,0.5 100000:0.9,0.1",
    )
    build.add_argument("--interpolation", choices=["step", "linear"], default="step")
    build.add_argument("--window", type=float, default=4.0, help="how far ahead, as a factor")
    build.add_argument("--strength", type=float, default=1.0, help="0: none, 1: proportional")
    build.add_argument("--stages", type=int, default=24)
    build.add_argument("--floor", type=float, default=0.25, help="of a stratum's own weight")
    build.add_argument("--max-change", type=float, default=1.5, help="factor per stage")
    build.add_argument("--max-epochs", type=float, default=4.0, help="per stratum")
    build.add_argument("--seed", type=int, default=DEFAULT_SEED, help="keys the samples' order")
    build.add_argument("--out", type=Path, required=True, metavar="FILE")
    build.set_defaults(verb=_plan_build)


def _plan_build(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight import (
        Guards,
        Manual,
        describe,
        job_of,
        plan_by_hand,
        plan_uniform,
    )

    _check_plan_flags(arguments)
    _refuse_to_overwrite(arguments.out)
    source = DataSource.from_flags(arguments)
    job = job_of(
        source.words, source.split, arguments.train_samples, arguments.seq_length, arguments.seed
    )
    guards = Guards(arguments.floor, arguments.max_change, arguments.max_epochs)
    if arguments.policy == "manual":
        manual = Manual(_read_weights(arguments.weights), arguments.interpolation)
        plan = plan_by_hand(manual, job, arguments.out, guards=guards)
    elif arguments.control == "uniform":
        plan = plan_uniform(job, arguments.out, guards=guards)
    elif arguments.policy == "dataset":
        plan = _plan_by_dataset(arguments, job, guards)
    else:
        plan = _plan_by_stratum(arguments, source, job, guards)
    print(describe(plan), end="")


def _check_plan_flags(arguments: Arguments) -> None:
    policy, control = arguments.policy, arguments.control
    if policy != "manual" and arguments.weights:
        raise TokscaleError("--weights is for --policy manual")
    if policy == "manual" and not arguments.weights:
        raise TokscaleError("--policy manual needs --weights")
    if policy == "manual" and control:
        raise TokscaleError("a plan by hand has no controls; give --policy frontier or dataset")
    if policy != "dataset" and arguments.run:
        raise TokscaleError(
            "--run is for --policy dataset; frontier follows the scores that `megatron-tokscale "
            "score RUN` left beside the data"
        )
    if policy == "dataset" and control in ("easy-first", "frequency"):
        raise TokscaleError(
            f"--policy dataset has no control {control}; its only control is uniform"
        )
    if policy == "dataset" and not arguments.run and control != "uniform":
        raise TokscaleError("--policy dataset needs a reference run with its spectrum (--run)")


def _plan_by_dataset(arguments: Arguments, job: "Job", guards: "Guards") -> "Plan":
    from megatron_tokscale.reweight import plan_run

    return plan_run(
        _opened(arguments.run),
        job,
        arguments.out,
        guards=guards,
        window=arguments.window,
        strength=arguments.strength,
        n_stages=arguments.stages,
    )


def _plan_by_stratum(
    arguments: Arguments, source: "DataSource", job: "Job", guards: "Guards"
) -> "Plan":
    from megatron_tokscale.reweight import Cutting, cut_job, plan_frontier

    clock = _opened(arguments.time_map) if arguments.time_map else None
    datasets = cut_job(
        source.words,
        source.split,
        job.seq_length,
        job.seed,
        scores=arguments.scores,
        cutting=Cutting(arguments.quantiles, arguments.unlearned),
    )
    return plan_frontier(
        datasets,
        job,
        arguments.out,
        control=arguments.control,
        clock=clock,
        guards=guards,
        window=arguments.window,
        strength=arguments.strength,
        n_stages=arguments.stages,
        move_shares=arguments.move_shares,
    )


def _read_weights(words: list[str]) -> dict[int, list[float]]:
    points = {}
    for word in words:
        start, _, weights = word.partition(":")
        try:
            points[int(start)] = [float(weight) for weight in weights.split(",")]
        except ValueError as error:
            raise TokscaleError(
                f"--weights: cannot read '{word}'; give SAMPLE:WEIGHT,WEIGHT,..."
            ) from error
    return points


def _plan_show(arguments: Arguments) -> None:
    from megatron_tokscale.data import Plan
    from megatron_tokscale.data.history import followed, left_at
    from megatron_tokscale.reweight import describe

    path: Path = arguments.file
    print(describe(followed(path) if path.is_dir() else Plan.load(path)), end="")
    start = left_at(path) if path.is_dir() else None
    if start is not None:
        print(f"  from sample {start:,} on the run has not followed it: its job had no plan")


def _add_trace(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Which documents is sample K of a job made of, and which samples hold document ID? Samples "
        "are counted from 0 as the job consumes them, documents as the .idx file has them. Of a "
        "job that never ran with the plugin, Megatron's own data cache tells it."
    )
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="run directory (holds tokscale/)"
    )
    parser.add_argument(
        "--data-cache-path",
        type=Path,
        metavar="DIR",
        help="the job's, in the place of RUN; it "
        "does not tell the order of the samples, which is taken to be --dataloader-type single's",
    )
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="WORD",
        help="of the jobs in this cache the one whose description or key holds all of these",
    )
    parser.add_argument("--sample", type=int, nargs="+", default=[], metavar="K")
    parser.add_argument(
        "--document",
        metavar="NAME:ID",
        help="name of a dataset (of namesakes NAME#N) or its prefix, and a document of it",
    )
    parser.add_argument(
        "--until-sample", type=int, metavar="N", help="of the document only samples before N"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, to show samples as text")
    parser.set_defaults(verb=_trace)


def _trace(arguments: Arguments) -> None:
    from megatron_tokscale.trace.trace import Trace, describe_document, describe_sample

    run, cache = arguments.run, arguments.data_cache_path
    if (run is None) == (cache is None):
        raise TokscaleError("give RUN, or the job's --data-cache-path, and not both")
    if arguments.match and cache is None:
        raise TokscaleError("--match chooses in --data-cache-path; a RUN has its own record")
    if not arguments.sample and arguments.document is None:
        raise TokscaleError("give --sample K or --document NAME:ID")
    dataset, _, document = (arguments.document or ":0").rpartition(":")
    if not document.isdecimal() or (arguments.document and not dataset):
        raise TokscaleError(f"--document {arguments.document}: give NAME:ID, e.g. web_text:17")
    text = _decoder(arguments.tokenizer) if arguments.tokenizer else None
    trace = Trace.from_cache(cache, arguments.match) if run is None else Trace.open(run)
    for k in arguments.sample:
        print(describe_sample(trace, k, text), end="")
    if arguments.document:
        found = describe_document(trace, dataset, int(document), arguments.until_sample)
        print(found, end="")


def _decoder(path: Path) -> Callable[[Sequence[int]], str]:
    """From token ids to text in which control characters are visible."""
    from megatron_tokscale.probe.text import marked, read_tokenizer

    tokenizer = read_tokenizer(path)
    return lambda ids: marked(tokenizer.decode(list(ids), skip_special_tokens=False))


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--beside", type=Path, metavar="RUN", help="another run, e.g. of a plan")
    parser.add_argument(
        "--axis-dir",
        dest="axes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="what `spectrum --axis D` or `M` wrote, of runs on the same probe set",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, to show tokens as text")
    parser.add_argument("--out", type=Path, help="default: RUN/analysis/report.html")
    parser.set_defaults(verb=_report)


def _report(arguments: Arguments) -> None:
    from megatron_tokscale.report import report_run

    other = _opened(arguments.beside) if arguments.beside else None
    path = report_run(
        _opened(arguments.run),
        beside=other,
        axes=arguments.axes,
        tokenizer=arguments.tokenizer,
        out=arguments.out,
    )
    print(path)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="where everything goes")
    parser.add_argument("--quick", action="store_true", help="a toy, in a minute or two")
    parser.set_defaults(verb=_demo)


def _demo(arguments: Arguments) -> None:
    from megatron_tokscale.demo import run_demo

    run_demo(arguments.out, quick=arguments.quick)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [-- [SCRIPT] FLAG ...]"
    parser.add_argument("job", nargs="*", metavar="WORD", help="a training job's script and flags")
    parser.set_defaults(verb=_doctor)


def _doctor(arguments: Arguments) -> None:
    from megatron_tokscale.doctor.doctor import examine

    examine(arguments.job)
