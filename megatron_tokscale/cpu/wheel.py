"""Mend the megatron-core wheel: it has the compiled dataset helpers, but not their Makefile.

`compile_helpers` runs `make` in the installed package and exits when there is no Makefile, although
`helpers_cpp` is there already. This concerns every user of the wheel, with a GPU or without.
"""

import importlib.util
from pathlib import Path


def mend_compile_helpers() -> None:
    """Skip Megatron's helper compilation where it could only fail and is not needed.

    Does nothing in a source checkout (it has the Makefile) or if the helpers are not built.
    """
    import megatron.core.datasets.utils as dataset_utils

    has_makefile = (Path(dataset_utils.__file__).parent / "Makefile").is_file()
    is_built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_built and not has_makefile:
        dataset_utils.compile_helpers = _already_compiled


def _already_compiled() -> None:
    """Stand in for `compile_helpers`: the wheel's helpers are compiled."""
