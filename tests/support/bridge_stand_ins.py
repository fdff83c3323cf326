"""Modules that Megatron-Bridge imports and that only a GPU can use, stood in for by empty ones."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

STOOD_IN = ("transformer_engine", "modelopt", "nvidia_resiliency_ext", "megatron.energon")


class EmptyType(type):
    """The type of the empty classes: every attribute is another one."""

    def __getattr__(cls, name: str) -> type:
        return empty_class(name)


def empty_class(name: str) -> type:
    """A class that has no instances: a call gives None, and nothing is an instance of it."""
    if name.startswith("__"):
        raise AttributeError(name)
    return EmptyType(name, (), {"__new__": lambda cls, *args, **kwargs: None})


class EmptyModule(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        return empty_class(name)


class StandIns(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_stood_in = any(f"{name}.".startswith(f"{each}.") for each in STOOD_IN)
        return ModuleSpec(name, self, is_package=True) if is_stood_in else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def stand_in() -> None:
    """Install the empty modules; Megatron is imported first, so that it finds none of them."""
    import megatron.core.extensions.transformer_engine
    import megatron.training.training  # noqa: F401

    from megatron_tokscale.training.upstream import mend_compile_helpers

    mend_compile_helpers()
    sys.meta_path.insert(0, StandIns())
