"""`megatron-tokscale laws`: scaling laws of runs, beside the theories of others."""

from megatron_tokscale.cli.parsing import (
    Arguments,
    Verbs,
    add_data,
    add_resampling,
    add_runs,
    open_run,
)
from megatron_tokscale.core.progress import ProgressOnStderr


def add_verb(verbs: Verbs) -> None:
    """Add `laws`."""
    parser = verbs.add_parser(
        "laws",
        help="scaling laws of a run's loss and of its spectrum",
        description="Fit laws to the first RUN's losses and to its spectrum, beside the theories "
        "of others, each measured as its authors did. Further runs with the same probe set add "
        "the laws over runs.",
    )
    add_runs(parser)
    add_data(parser, "optional: adds the laws of the data's language")
    add_resampling(parser)
    parser.set_defaults(verb=_laws)


def _laws(arguments: Arguments) -> None:
    from megatron_tokscale.corpus.source import DataSource
    from megatron_tokscale.laws import describe_laws, laws_run

    run, *others = (open_run(path) for path in arguments.runs)
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
