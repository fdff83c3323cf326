"""Files that are whole or absent, on file systems that lack what a local disk has."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import read_json, whole_or_absent, write_json, write_text
from megatron_tokscale.store.lock import RunLock

UNSUPPORTED = ("EINVAL", "ENOTSUP", "EACCES", "EPERM", "EBADF", "ENOSYS", "EISDIR", "ENOTTY")


def fsync_fails(monkeypatch, code, of_folders):
    """Let os.fsync fail with this error for folders, or for files."""
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


def names(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_folder_that_cannot_be_synced_keeps_its_file(tmp_path, monkeypatch, name):
    fsync_fails(monkeypatch, getattr(errno, name), of_folders=True)
    write_json(tmp_path / "file.json", {"a": 1})
    assert names(tmp_path) == ["file.json"]
    assert read_json(tmp_path / "file.json") == {"a": 1}


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "ENOSYS"])
def test_a_file_system_without_fsync_keeps_its_files(tmp_path, monkeypatch, name):
    fsync_fails(monkeypatch, getattr(errno, name), of_folders=False)
    write_json(tmp_path / "file.json", {"a": 1})
    assert read_json(tmp_path / "file.json") == {"a": 1}


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
def test_a_file_that_is_not_synced_is_an_error_that_names_it(tmp_path, monkeypatch, name):
    write_text(tmp_path / "file", "before")
    fsync_fails(monkeypatch, getattr(errno, name), of_folders=False)
    with pytest.raises(OSError, match=r"/file'$") as error:
        write_text(tmp_path / "file", "after")
    assert error.value.errno == getattr(errno, name)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_rename_that_is_not_synced_is_an_error(tmp_path, monkeypatch, name):
    fsync_fails(monkeypatch, getattr(errno, name), of_folders=True)
    with pytest.raises(OSError, match=r"/file'$"):
        write_text(tmp_path / "file", "text")


def test_a_folder_that_cannot_be_opened_keeps_its_file(tmp_path, monkeypatch):
    """The test itself refuses to open folders, since root may open one without permission."""
    open_ = os.open

    def refusing(path, flags, *rest, **names):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", refusing)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_files_are_open_for_writing_when_synced_as_cifs_needs(tmp_path, monkeypatch):
    fsync = os.fsync

    def only_writers(descriptor):
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and mode == os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_writers)
    write_text(tmp_path / "file", "text")


def test_a_rename_that_nfs_repeats_is_no_error(tmp_path, monkeypatch):
    replace = os.replace

    def twice(source, target):
        replace(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", twice)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_temporary_file_that_is_gone_is_an_error(tmp_path):
    write_text(tmp_path / "file", "before")
    with (
        pytest.raises(FileNotFoundError, match=r"/file'$"),
        whole_or_absent(tmp_path / "file") as temporary,
    ):
        assert not temporary.exists()
    assert (tmp_path / "file").read_text() == "before"


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/file'$"),
        whole_or_absent(tmp_path / "file"),
        Path("/dev/full").open("w") as full,
    ):
        full.write("x")
        full.flush()
    assert not any(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match=r"/file'$") as error:
        write_text(tmp_path / "file", "text")
    assert error.value.filename2 is None
    assert names(tmp_path) == ["file"]


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(TokscaleError, match=r"deep\.json is not JSON"):
        read_json(tmp_path / "deep.json")


def test_a_path_that_is_not_utf8_can_be_written_to_a_file(tmp_path):
    write_text(tmp_path / "file", "a\udcffb")
    assert (tmp_path / "file").read_text() == "a?b"


@pytest.mark.parametrize(
    ("name", "is_held"),
    [("EAGAIN", True), ("EACCES", True), ("ENOLCK", False), ("ENOSYS", False), ("EPERM", False)],
)
def test_a_held_lock_is_refused_and_a_system_without_locks_is_reported(
    tmp_path, monkeypatch, name, is_held
):
    def refusing(*_):
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(fcntl, "lockf", refusing)
    monkeypatch.setattr(os, "read", refusing)  # CIFS lets nobody read what another has locked
    lock = RunLock(tmp_path / ".lock")
    if is_held:
        with pytest.raises(TokscaleError, match="in use by another job"):
            lock.acquire()
    else:
        assert lock.acquire() is False


def test_a_full_disk_does_not_cost_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    lock = RunLock(tmp_path / ".lock")
    assert lock.acquire() is True
    lock.release()
