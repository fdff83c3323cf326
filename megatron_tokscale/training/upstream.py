"""Differences between Megatron's versions, and fixes of its faults, found by names and signatures.

Nothing here asks for a version number.
"""

import importlib.util
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Final

_STEPS: Final = ("iteration", "step")
_SAMPLES: Final = ("consumed_train_samples",)
_OF_THE_LOADER: Final = ("dataloader_type", "num_workers")


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


def steps_taken(args: Namespace) -> int:
    """Return the optimizer steps that the training has completed."""
    return int(_counter(args, _STEPS))


def samples_consumed(args: Namespace) -> int:
    """Return the training samples that the training has consumed."""
    return int(_counter(args, _SAMPLES))


def forget_samples(args: Namespace) -> None:
    """Set the counts of consumed samples to 0: Megatron loads a checkpoint's only into zeros."""
    for holder in (args, _train_state()):
        for name in ("consumed_train_samples", "consumed_valid_samples"):
            if hasattr(holder, name):
                setattr(holder, name, 0)


def _counter(args: Namespace, names: tuple[str, ...]) -> Any:
    """Return a counter of the training, from Megatron's state object or from its arguments."""
    for holder in (_train_state(), args):
        for name in names:
            if hasattr(holder, name):
                return getattr(holder, name)
    raise AttributeError(f"neither Megatron's train state nor its arguments hold {names[0]}")


def _train_state() -> Any:
    """Return the object that holds the counters in a Megatron newer than 0.19; None before it."""
    from megatron.training import global_vars

    get_train_state = getattr(global_vars, "get_train_state", None)
    return None if get_train_state is None else get_train_state()


def adopt_loader_settings(args: Namespace, config: Any) -> None:
    """Put the data loader's settings among the arguments, where Megatron's config holds them.

    So every reader of the arguments sees the settings that are used.

    Args:
        args: Megatron's arguments.
        config: the container of its config; None in a Megatron that has none.
    """
    dataset = getattr(config, "dataset", None)
    for name in _OF_THE_LOADER:
        if hasattr(dataset, name):
            setattr(args, name, getattr(dataset, name))


def ways() -> dict[str, str]:
    """Return in words the places where this Megatron has what its versions have in several."""
    import inspect

    import megatron.training
    from megatron.training import global_vars

    has_services = hasattr(global_vars, "initialize_runtime_services")
    has_state = hasattr(global_vars, "get_train_state")
    calls_back = "callbacks" in inspect.signature(megatron.training.pretrain).parameters
    return {
        "timers, tokenizer": "made by the script" if has_services else "made with the flags",
        "counters": "in the train state" if has_state else "among the arguments",
        "callbacks": "of pretrain, as megatron_tokscale.callback" if calls_back else "none",
    }


def initialize_runtime_services(args: Namespace) -> None:
    """Make Megatron's timers, writers and tokenizer, which 0.19 and earlier make with the flags.

    A newer Megatron leaves it to each script, between the making of its config and `pretrain`.
    """
    from megatron.training import global_vars

    if hasattr(global_vars, "initialize_runtime_services"):
        global_vars.initialize_runtime_services(args)
