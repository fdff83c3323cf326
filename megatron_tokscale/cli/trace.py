"""`megatron-tokscale trace`: from samples to their documents, and back."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_tokenizer
from megatron_tokscale.core.errors import TokscaleError


def add_verb(verbs: Verbs) -> None:
    """Add `trace`."""
    parser = verbs.add_parser(
        "trace",
        help="show which documents a training sample is made of",
        description="Show which documents sample K of a job is made of, or which samples hold "
        "document ID. Samples are counted from 0 in the order in which the job consumes them, "
        "documents as in the .idx file. For a job that never ran with the plugin, Megatron's own "
        "data cache is enough.",
    )
    job = parser.add_argument_group("job (one of these is required)")
    job.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="run directory (holds tokscale/)"
    )
    job.add_argument(
        "--data-cache-path",
        type=Path,
        metavar="DIR",
        help="the job's data cache, instead of RUN; samples are taken to be in the order of "
        "--dataloader-type single, as the cache does not record their order",
    )
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="WORD",
        help="words that choose a job in the cache: its description or key holds all of them "
        "(default: the only job)",
    )
    wanted = parser.add_argument_group("what to show (one of these is required)")
    wanted.add_argument(
        "--sample",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="the documents of these samples (default: none)",
    )
    wanted.add_argument(
        "--step",
        nargs="+",
        default=[],
        metavar="N|A-B",
        help="the samples that these optimizer steps consumed, and their documents (default: none)",
    )
    wanted.add_argument(
        "--spikes",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="the N steps (default: 10) whose loss stands out most, and the samples that make it "
        "stand out, of a run with --tokscale-sample-losses; and its replayed steps",
    )
    wanted.add_argument(
        "--document",
        metavar="NAME:ID",
        help="the samples that hold this document of the dataset NAME; NAME may be the whole "
        "prefix, and is NAME#N among namesakes (default: none)",
    )
    parser.add_argument(
        "--until-sample",
        type=int,
        metavar="N",
        help="show only those samples of a document that come before N (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="new JSON file for what --spikes shows, which `plan build keep --skip` reads "
        "(default: no file)",
    )
    add_tokenizer(parser, "samples")
    parser.add_argument(
        "--full", action="store_true", help="show all that a sample reads, not the beginning alone"
    )
    parser.set_defaults(verb=_trace)


def _trace(arguments: Arguments) -> None:
    from megatron_tokscale.trace.named import read_document
    from megatron_tokscale.trace.steps import Steps, read_steps
    from megatron_tokscale.trace.text import describe_document, describe_sample, describe_step
    from megatron_tokscale.trace.trace import Trace

    _check(arguments)
    document = (
        None if arguments.document is None else read_document(arguments.document, "--document")
    )
    steps = [read_steps(word) for word in arguments.step]
    text = _decoder(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.spikes is not None:
        _print_spikes(arguments, text)
        if not (arguments.sample or steps or document):
            return
    if arguments.run is None:
        trace = Trace.from_cache(arguments.data_cache_path, arguments.match)
    else:
        trace = Trace.open(arguments.run)
    if steps:
        of_run = Steps.open(arguments.run)
        batches = [(step, of_run.samples(step)) for each in steps for step in each]
    for k in arguments.sample:
        print(describe_sample(trace, k, text, is_full=arguments.full), end="")
    for step, samples in batches if steps else ():
        print(describe_step(trace, step, samples, text, is_full=arguments.full), end="")
    if document:
        print(describe_document(trace, *document, arguments.until_sample), end="")


def _print_spikes(arguments: Arguments, text: Callable[[Sequence[int]], str] | None) -> None:
    from megatron_tokscale.core.files import is_there
    from megatron_tokscale.core.writable import check_new_file
    from megatron_tokscale.data.record import record_path
    from megatron_tokscale.trace.spikes import find_spikes
    from megatron_tokscale.trace.spikes_text import describe_spikes
    from megatron_tokscale.trace.trace import Trace

    run, out = arguments.run, arguments.out
    if out is not None:
        check_new_file(out, "it is not replaced")
    found = find_spikes(run, arguments.spikes)
    trace = Trace.open(run) if is_there(record_path(run)) else None
    shown = describe_spikes(found, trace, text, is_full=arguments.full)
    if out is not None:
        found.save(out)
    print(shown, end="")


def _check(arguments: Arguments) -> None:
    run, cache = arguments.run, arguments.data_cache_path
    if run is None and cache is None:
        raise TokscaleError("no job is named; give RUN, or the job's --data-cache-path")
    if run is not None and cache is not None:
        raise TokscaleError("RUN and --data-cache-path are both given; give one job, not both")
    if arguments.match and cache is None:
        raise TokscaleError(
            "--match chooses in --data-cache-path, and RUN is one job; leave out --match"
        )
    if run is None and arguments.step:
        raise TokscaleError(
            "--step needs the batch sizes of the job, which --data-cache-path does not hold; give "
            "RUN, or --sample"
        )
    if run is None and arguments.spikes is not None:
        raise TokscaleError(
            "--spikes needs losses of samples, which --data-cache-path does not hold; give RUN"
        )
    if arguments.out is not None and arguments.spikes is None:
        raise TokscaleError("--out is for what --spikes shows; give --spikes, or drop --out")
    wanted = (arguments.sample, arguments.step, arguments.document, arguments.spikes)
    if not any(wanted):
        raise TokscaleError(
            "there is nothing to show; give --step N, --spikes, --sample K or --document NAME:ID"
        )


def _decoder(path: Path) -> Callable[[Sequence[int]], str]:
    """Return a function from token ids to text in which control characters are visible."""
    from megatron_tokscale.probe.text import marked, read_tokenizer

    tokenizer = read_tokenizer(path)
    return lambda ids: marked(tokenizer.decode(list(ids), skip_special_tokens=False))
