"""Run-time fixes of faults in Megatron, for every user, with or without a GPU."""

import importlib.util
from argparse import ArgumentParser
from pathlib import Path


def mend_compile_helpers() -> None:
    """Skip Megatron's compilation of its dataset helpers where it could only fail.

    The megatron-core wheel has the compiled helpers but not their Makefile, so `compile_helpers`
    fails in `make` and exits. Nothing is changed in a source checkout, which has the Makefile, nor
    where the helpers are not compiled.
    """
    import megatron.core.datasets.utils as dataset_utils

    has_makefile = (Path(dataset_utils.__file__).parent / "Makefile").is_file()
    is_compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_compiled and not has_makefile:
        dataset_utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    """Do nothing in the place of `compile_helpers`: the wheel's helpers are compiled."""


def escape_percent_signs(parser: ArgumentParser) -> None:
    """Escape '%' in each help text that argparse cannot format, so that `--help` prints.

    Megatron 0.18.2 and 0.19.2 have "10%" in the help of --moe-paged-stash-buffer-size-factor-cuda,
    at which `--help` ends in a ValueError.
    """
    for action in parser._actions:
        if action.help:
            try:
                action.help % {**vars(action), "prog": parser.prog}
            except (KeyError, TypeError, ValueError):
                action.help = action.help.replace("%", "%%")
