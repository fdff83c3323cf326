"""Versions of the packages that a job runs on, and the folder that Megatron is imported from."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_tokscale import __version__


class MegatronInstall(NamedTuple):
    """The installation of megatron.core that `import` finds."""

    version: str
    folder: Path
    is_wheel: bool


def installed_versions() -> dict[str, str]:
    """Return the versions that a run's record holds, by package."""
    import torch

    megatron = find_megatron()
    versions = {
        "megatron-tokscale": __version__,
        "megatron-core": megatron.version if megatron else "of unknown version",
        "torch": str(torch.__version__),
    }
    if bridge := sys.modules.get("megatron.bridge"):
        versions["megatron-bridge"] = str(bridge.__version__)
    return versions


def find_megatron() -> MegatronInstall | None:
    """Find megatron.core without importing it; None if there is none.

    A checkout may precede an installed wheel on the path, and has no metadata. Its version file
    gives version and commit; in a wheel that commit could belong to any repository around the
    environment.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        wheel = importlib.metadata.distribution("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return MegatronInstall(_stated_version(folder), folder, is_wheel=False)
    if Path(str(wheel.locate_file("megatron/core"))).resolve() == folder.resolve():
        return MegatronInstall(wheel.version, folder, is_wheel=True)
    return MegatronInstall(_stated_version(folder), folder, is_wheel=False)


def _stated_version(folder: Path) -> str:
    spec = importlib.util.spec_from_file_location("package_info", folder / "package_info.py")
    if spec is None or spec.loader is None or not (folder / "package_info.py").is_file():
        return "of unknown version"
    package_info = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package_info)
    return str(package_info.__version__)
