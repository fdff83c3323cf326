"""`megatron-tokscale score`: score training documents by a reference run."""

from pathlib import Path

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_data, add_run, open_run
from megatron_tokscale.core.errors import say
from megatron_tokscale.core.progress import ProgressOnStderr


def add_verb(verbs: Verbs) -> None:
    """Add `score`."""
    parser = verbs.add_parser(
        "score",
        help="score a job's training documents by how far their loss falls",
        description="Score the documents of a job's training data by a reference run whose probe "
        "set watches some of them (probe build --part train --unseen-by REF): the fall of their "
        "loss from a quarter of the training to its end, and, if the run is fitted, when their "
        "tokens are learned. Falls are shrunk by their reliability, which is printed. Documents "
        "that were not watched are predicted from their words. Writes PREFIX.tokscale.safetensors "
        "beside each .bin/.idx.",
    )
    add_run(parser)
    parser.add_argument(
        "--tuned",
        type=Path,
        metavar="TUNED",
        help="a run on the same probe set, of the reference tuned on a sample of a target: score "
        "documents too by how much lower their loss is there (default: no target scores)",
    )
    parser.add_argument(
        "--second",
        type=Path,
        metavar="RUN",
        help="a run on the same probe set, of another seed of the reference: measure every other "
        "token of a document by it, so that what one seed alone shows does not count as "
        "reliability (default: both halves by one seed)",
    )
    add_data(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for the scores (default: beside each .bin/.idx)",
    )
    parser.add_argument(
        "--min-tokens",
        type=int,
        default=16,
        metavar="N",
        help="watched tokens that a document needs to be scored by them",
    )
    parser.add_argument(
        "--no-predict",
        dest="predict",
        action="store_false",
        help="leave documents that were not watched without a score; no plan can use such scores",
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing scores")
    parser.set_defaults(verb=_score)


def _score(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.reweight.score_text import describe_scores
    from megatron_tokscale.reweight.scoring import score_run

    summaries = score_run(
        open_run(arguments.run),
        DataSource.from_flags(arguments),
        tuned=None if arguments.tuned is None else open_run(arguments.tuned),
        second=None if arguments.second is None else open_run(arguments.second),
        out=arguments.out,
        predict=arguments.predict,
        min_tokens=arguments.min_tokens,
        force=arguments.force,
        progress=ProgressOnStderr(),
        tell=say,
    )
    print(describe_scores(summaries), end="")
