"""File systems of their own, which root can mount; elsewhere the test is skipped."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def small_disk(path, size, *options):
    """A file system of `size` bytes at `path`."""
    with _mounted(path, ["-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs"]):
        yield path


@contextmanager
def read_only(source, path):
    """The folder `source`, at `path`, where nobody can write, root included."""
    with _mounted(path, ["--bind", str(source)]):
        command = ["mount", "-o", "remount,bind,ro", str(path)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("cannot mount a folder read-only here")
        yield path


@contextmanager
def _mounted(path, words):
    path.mkdir()
    if subprocess.run(["mount", *words, str(path)], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
