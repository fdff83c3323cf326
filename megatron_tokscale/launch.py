"""What all three entry points do before Megatron starts."""

import sys

from megatron_tokscale import cpu
from megatron_tokscale.core.errors import exit_with_one_line
from megatron_tokscale.core.progress import replace_unprintable


def prepare() -> None:
    """Read `sys.argv`: the CPU runtime if it is asked for, the wheel mended, the hooks installed.

    Bad flags end the process with one line and exit code 2.
    """
    if any(word.startswith("--tokscale-") for word in sys.argv):
        replace_unprintable()
    with exit_with_one_line():
        if cpu.is_requested(sys.argv):
            cpu.enable()
            sys.argv += cpu.required_flags(sys.argv)
        cpu.mend_compile_helpers()
        from megatron_tokscale.training import install

        install(sys.argv)
