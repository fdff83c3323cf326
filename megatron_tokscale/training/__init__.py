"""What runs inside the training job: flags, hooks, the probe pass, isolation, gathering, data."""

from collections.abc import Sequence

_PREFIX = "--tokscale-"
_HELP = {"-h", "--help"}


def install(argv: Sequence[str]) -> None:
    """Hook into Megatron if the command line has a --tokscale-* flag (or asks for help).

    With no flag nothing is wrapped: off means off.

    Raises:
        TokscaleError: this Megatron lacks a hook.
    """
    if any(word.startswith(_PREFIX) or word in _HELP for word in argv):
        from megatron_tokscale.training.plugin import Plugin

        Plugin().install()
