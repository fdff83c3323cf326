"""The plugin inside a training job: flags, hooks, probes, data plans, replay."""

from collections.abc import Sequence

_PREFIX = "--tokscale-"
_HELP = {"-h", "--help"}
_is_installed = False


def install(argv: Sequence[str]) -> None:
    """Install the hooks, once, if the command line has a --tokscale-* flag or asks for help.

    Without such a flag nothing is wrapped: off means off.

    Raises:
        TokscaleError: this Megatron lacks a hook.
    """
    global _is_installed  # noqa: PLW0603 - Megatron's functions are wrapped for the whole process
    if not _is_installed and any(word.startswith(_PREFIX) or word in _HELP for word in argv):
        from megatron_tokscale.training.plugin import Plugin

        Plugin().install()
        _is_installed = True
