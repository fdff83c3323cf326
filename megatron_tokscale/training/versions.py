"""Which Megatron is imported: its version, and where it comes from."""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple


class Megatron(NamedTuple):
    """The megatron.core that `import` finds."""

    version: str
    folder: Path
    is_wheel: bool


def find_megatron() -> Megatron | None:
    """Find megatron.core without importing it; None if there is none.

    A checkout may stand before an installed wheel on the path, and has no metadata. It states its
    version in a file, with the commit; in a wheel that would be the commit of any repository around
    the environment.
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
        return Megatron(_stated_version(folder), folder, is_wheel=False)
    if Path(str(wheel.locate_file("megatron/core"))).resolve() == folder.resolve():
        return Megatron(wheel.version, folder, is_wheel=True)
    return Megatron(_stated_version(folder), folder, is_wheel=False)


def _stated_version(folder: Path) -> str:
    spec = importlib.util.spec_from_file_location("package_info", folder / "package_info.py")
    if spec is None or spec.loader is None or not (folder / "package_info.py").is_file():
        return "of unknown version"
    package_info = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package_info)
    return str(package_info.__version__)
