"""`megatron-tokscale forecast`: the nats that a run has still to learn, with back-tests."""

from megatron_tokscale.cli.parsing import Arguments, Verbs, add_resampling, add_run, open_run
from megatron_tokscale.core.progress import ProgressOnStderr


def add_verb(verbs: Verbs) -> None:
    """Add `forecast`."""
    parser = verbs.add_parser(
        "forecast",
        help="nats still to come by 2, 4 and 10 times the training, and in which tokens",
        description="Forecast how much the mean loss of a fitted run falls by 2, 4 and 10 times "
        "its training, if the learning rate stays as it is, and in which tokens: by the hazard of "
        "falls, the power law of the mean loss, and the mean of both. The same forecasts from a "
        "quarter and from half of the training are compared with what came; a forecast that they "
        "refute says so.",
    )
    add_run(parser)
    parser.add_argument(
        "--tokens",
        type=int,
        default=40_000,
        metavar="N",
        help="tokens that are drawn and fitted on the losses up to four times",
    )
    add_resampling(parser)
    parser.set_defaults(verb=_forecast)


def _forecast(arguments: Arguments) -> None:
    from megatron_tokscale.compare.forecast import describe_forecast, forecast_run

    found = forecast_run(
        open_run(arguments.run),
        tokens=arguments.tokens,
        n_resamples=arguments.resamples,
        seed=arguments.seed,
        progress=ProgressOnStderr(),
    )
    print(describe_forecast(found))
