"""Every verb against damaged files in the place of each that it reads, and against odd options.

A damaged file ends a verb with exit code 2 and one line that names it; nothing is written.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from verb_world import Command, make_world

from megatron_tokscale.cli import main

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


@dataclass(frozen=True)
class World:
    folder: Path
    commands: dict[str, Command]
    pristine: dict[str, bytes]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    commands = make_world(folder)
    yield World(folder, commands, tree(folder))
    os.chdir(before)


def tree(folder: Path) -> dict[str, bytes]:
    """Every path in a folder, with what it holds."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            what = bytes(path.readlink())
        else:
            what = b"" if path.is_dir() else path.read_bytes()
        found[str(path.relative_to(folder))] = what
    return found


def restore(world: World) -> None:
    """Put the folder back as it was made."""
    now = tree(world.folder)
    for name in sorted(now.keys() - world.pristine.keys(), reverse=True):
        path = world.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name, content in world.pristine.items():
        if now.get(name) != content:
            path = world.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            put(path, content)


def put(path: Path, content: bytes) -> None:
    """Replace a file by another, so that what has mapped it keeps what it has."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def in_place(path: Path, action) -> None:
    path.unlink()
    action(path)


def flip(position: float, mask: int):
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(position * len(content)), len(content) - 1)] ^= mask
        put(path, content)

    return damage


def cut(share: float):
    def damage(path: Path) -> None:
        content = path.read_bytes()
        put(path, content[: min(int(share * len(content)), len(content) - 1)])

    return damage


DAMAGES = {
    "empty": lambda path: put(path, b""),
    "zeros": lambda path: put(path, bytes(path.stat().st_size)),
    "cut at half": cut(0.5),
    "cut at a tenth": cut(0.1),
    "a byte short": cut(1.0),
    "picture": lambda path: put(path, PICTURE),
    "words": lambda path: put(path, b"not what is expected here\n"),
    "object": lambda path: put(path, b"{}"),
    "list": lambda path: put(path, b"[1, 2]"),
    "null": lambda path: put(path, b"null"),
    "deep": lambda path: put(path, b'{"a":' + b"[" * 100_000),
    "directory": lambda path: in_place(path, Path.mkdir),
    "dangling": lambda path: in_place(path, lambda path: path.symlink_to("nowhere")),
    "read error": lambda path: in_place(path, lambda path: path.symlink_to("/proc/self/mem")),
    **{f"flip at {position:.2f}": flip(position, 0x80) for position in (0, 0.02, 0.3, 0.6, 0.9, 1)},
    **{f"bit at {position:.2f}": flip(position, 0x01) for position in (0.001, 0.1, 0.5, 0.97)},
}


def outcome(world, argv, capsys) -> tuple[int, str]:
    capsys.readouterr()
    try:
        main(list(argv))
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err
