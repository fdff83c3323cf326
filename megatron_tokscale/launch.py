"""Preparation of a process that is about to start Megatron, shared by the three entry points."""

import sys

from megatron_tokscale import cpu
from megatron_tokscale.core.errors import exit_with_one_line
from megatron_tokscale.core.progress import replace_unprintable


def prepare() -> None:
    """Switch on the CPU runtime if `sys.argv` requests it, mend Megatron, install the hooks.

    Bad flags end the process with one line and exit code 2.
    """
    if any(word.startswith("--tokscale-") for word in sys.argv):
        replace_unprintable()
    with exit_with_one_line():
        if cpu.is_requested(sys.argv):
            cpu.enable()
            sys.argv += cpu.required_flags(sys.argv)
        from megatron_tokscale.training import install
        from megatron_tokscale.training.upstream import mend_compile_helpers

        mend_compile_helpers()
        install(sys.argv)
