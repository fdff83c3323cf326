"""A folder in which verbs run, ways to damage a file of it, and the end of a verb on it."""

import os
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path

from privileges import plain_permissions
from verb_world import Command, make_world

from megatron_tokscale.cli import main
from megatron_tokscale.trace import trace as trace_module

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4


type Stamps = dict[str, tuple[int, int, int]]


@dataclass
class World:
    """A folder with the verbs' world, and its files as they were made."""

    folder: Path
    commands: dict[str, Command]
    pristine: dict[str, bytes]
    stamps: Stamps


def world_in(folder: Path) -> World:
    commands = make_world(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    pristine = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return World(folder, commands, pristine, tree(folder))


def tree(folder: Path) -> Stamps:
    """Return every path in a folder, and a stamp that changes when the file is written to."""
    found, folders = {}, [str(folder)]
    for directory in folders:
        for entry in os.scandir(directory):
            stat = entry.stat(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            stamp = (0, 0, 0) if is_folder else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            found[entry.path.removeprefix(f"{folder}/")] = stamp
            if is_folder:
                folders.append(entry.path)
    return found


def restore(world: World) -> None:
    """Restore the folder as it was made."""
    now = tree(world.folder)
    for name in sorted(now.keys() - world.stamps.keys(), reverse=True):
        path = world.folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name, content in world.pristine.items():
        if now.get(name) != world.stamps[name]:
            path = world.folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            put(path, content)
    world.stamps = tree(world.folder)


def put(path: Path, content: bytes) -> None:
    """Replace a file by a new one, so that a process that has mapped the old one keeps it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def in_place(path: Path, action) -> None:
    path.unlink()
    action(path)


def unreadable(path: Path) -> None:
    put(path, path.read_bytes())
    path.chmod(0)


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


PARTS = (b'{"a":' + b"[" * 100_000, b"{}", b"[1, 2]", b"null", b"not what is expected here\n")
STRUCTURE = {
    "empty": lambda path: put(path, b""),
    "zeros": lambda path: put(path, bytes(path.stat().st_size)),
    "cut at half": cut(0.5),
    "cut at a tenth": cut(0.1),
    "picture": lambda path: put(path, PICTURE),
    "deep": lambda path: put(path, PARTS[0]),
    "object": lambda path: put(path, PARTS[1]),
    "list": lambda path: put(path, PARTS[2]),
    "null": lambda path: put(path, PARTS[3]),
    "words": lambda path: put(path, PARTS[4]),
    "directory": lambda path: in_place(path, Path.mkdir),
    "dangling": lambda path: in_place(path, lambda path: path.symlink_to("nowhere")),
    "unreadable": lambda path: unreadable(path),
    "read error": lambda path: in_place(path, lambda path: path.symlink_to("/proc/self/mem")),
}
FLIPS = {f"byte at {position:.2f}": flip(position, 0x80) for position in (0, 0.02, 0.3, 0.6, 1)}
FLIPS |= {f"bit at {position:.2f}": flip(position, 0x01) for position in (0.1, 0.5, 0.97)}
DAMAGES = STRUCTURE | FLIPS


def end_of(command: Command, capsys) -> tuple[object, str]:
    """Return the exit code of a verb, or the exception that it raises, and its stderr."""
    trace_module.open_index.cache_clear()
    capsys.readouterr()
    try:
        with plain_permissions():
            main(list(command.argv))
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    except Exception as error:
        return repr(error)[:200], traceback.format_exc()
    return 0, capsys.readouterr().err
