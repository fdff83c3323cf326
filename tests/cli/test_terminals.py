"""Verbs in real shells, terminals and containers."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from runs import write_run
from verb_world import STEPS, planted_losses

from megatron_tokscale.cli import fit as fit_verb
from megatron_tokscale.cli import main
from megatron_tokscale.probe import ProbeSet

WIDE = "Größe→🚀"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose datasets have names that few terminals can print."""
    folder = tmp_path_factory.mktemp("run")
    rows = np.arange(30, dtype=np.int32)[:, None] * np.ones(8, dtype=np.int32)
    probe_set = ProbeSet(
        tokens_BS=np.zeros((30, 8), np.int32),
        labels_BS=np.arange(240, dtype=np.int32).reshape(30, 8),
        mask_BS=np.ones((30, 8), bool),
        document_BS=rows,
        position_BS=np.tile(np.arange(8, dtype=np.int32), (30, 1)),
        dataset_BS=(rows % 2).astype(np.int16),
        datasets=(WIDE, "code"),
        vocab_size=240,
    )
    return write_run(folder / WIDE, STEPS, planted_losses(240), probe_set)


def shell(*words, **variables):
    """Run a verb in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_tokscale.cli", *map(str, words)],
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
    )


TERMINALS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "dumb": {"TERM": "dumb", "NO_COLOR": "1"},
    "comma": {"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"},
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_name_that_the_terminal_cannot_show_is_shown_in_part(run, terminal):
    shown = shell("probe", "show", run.path / "tokscale/probe.safetensors", **TERMINALS[terminal])
    assert shown.returncode == 0, shown.stderr
    assert b"code: " in shown.stdout
    assert shown.stderr == b""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:strict"])
def test_the_shades_of_a_plan_stay_apart_where_they_cannot_be_shown(encoding):
    line = "from megatron_tokscale.core.progress import *; replace_unprintable(); print('░▒▓█→ö')"
    shown = subprocess.run(
        [sys.executable, "-c", line],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    last = "ö".encode("latin-1") if encoding == "latin-1" else b"?"
    assert shown.stdout.strip() == b".:+#?" + last


def test_an_error_that_the_terminal_cannot_show_is_one_line(tmp_path):
    shown = shell("fit", tmp_path / WIDE, PYTHONIOENCODING="ascii")
    assert shown.returncode == 2
    assert shown.stderr.startswith(b"megatron-tokscale: no run in ")
    assert shown.stderr.count(b"\n") == 1


def test_a_file_name_that_is_not_utf8_is_printed(run, tmp_path):
    """File names are bytes on Linux."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.symlink_to(run.path)
    shown = shell("probe", "show", folder / "nothing")
    assert shown.returncode == 2
    assert shown.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_a_verb_in_a_bare_container(run, tmp_path):
    """There is no home and no temporary folder, and the working directory cannot be written."""
    bare = {"TMPDIR": str(tmp_path / "gone"), "XDG_CACHE_HOME": "/proc", "MPLCONFIGDIR": "/proc/x"}
    lost = ("HOME", "USER", "LOGNAME")
    script = tmp_path / "verbs.py"
    script.write_text(
        "import sys\nfrom megatron_tokscale.cli import main\n"
        "main(['fit', sys.argv[1]])\nmain(['spectrum', sys.argv[1], '--resamples', '2'])\n"
        "main(['report', sys.argv[1]])\n"
    )
    kept = {name: value for name, value in os.environ.items() if name not in lost}
    done = subprocess.run(
        [sys.executable, str(script), str(run.path)],
        env=kept | bare,
        cwd="/proc",
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert run.paths.report.exists()


def test_written_files_have_the_permissions_of_the_umask(run):
    before = os.umask(0o027)
    try:
        main(["fit", str(run.path)])
    finally:
        os.umask(before)
    assert run.paths.fits.stat().st_mode & 0o777 == 0o640


def in_bash(line, *words):
    command = f"{sys.executable} -m megatron_tokscale.cli {' '.join(map(str, words))}"
    return subprocess.run(
        ["bash", "-c", line.replace("VERB", command)], capture_output=True, text=True, check=False
    )


LEAVING = "VERB | true; echo ${PIPESTATUS[0]}"


def test_a_reader_that_leaves_ends_a_verb_quietly(run):
    left = in_bash(LEAVING, "probe", "show", run.path / "tokscale/probe.safetensors")
    assert (left.stdout, left.stderr) == ("141\n", "")
    left = in_bash(LEAVING, "--help")  # argparse does not tell that nobody has read it
    assert (left.stdout, left.stderr) == ("0\n", "")


def test_a_verb_whose_readers_leave_has_written_its_file(run, monkeypatch):
    """Both streams are pipes whose readers are gone."""
    run.paths.fits.unlink(missing_ok=True)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, os.fdopen(os.dup(writer), "w") as other:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", other)
        with pytest.raises(SystemExit) as end:
            main(["fit", str(run.path)])
    assert end.value.code == 141
    assert run.paths.fits.exists()


@pytest.mark.parametrize("line", ["VERB >&-", "VERB 2>&-", "VERB >&- 2>&-", "VERB <&-"])
def test_a_verb_succeeds_with_closed_streams(run, line):
    done = in_bash(line, "probe", "show", run.path / "tokscale/probe.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_for_a_closed_stream_goes_to_no_other(run, monkeypatch, capsys, name):
    """Python sets a closed stream to None, which `print` takes for stdout."""
    monkeypatch.setattr(sys, name, None)
    main(["fit", str(run.path)])
    monkeypatch.undo()
    printed = capsys.readouterr()
    assert ("240 tokens at" in printed.out) == (name == "stderr")
    assert ("fit: 240 of 240 tokens" in printed.err) == (name == "stdout")
    assert "fit: " not in printed.out


def test_a_full_disk_behind_stdout_is_one_line(run):
    done = in_bash("VERB > /dev/full", "probe", "show", run.path / "tokscale/probe.safetensors")
    assert done.returncode == 2
    assert done.stderr == "megatron-tokscale: output: No space left on device\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("term", ["xterm", "dumb", "narrow"])
def test_a_fit_on_a_terminal_shows_its_progress(run, monkeypatch, encoding, term):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", term)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80 * (term != "narrow"), 0, 0))
    with os.fdopen(theirs, "w", encoding=encoding) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        main(["fit", str(run.path)])
        shown = os.read(ours, 10_000)
    os.close(ours)
    assert b"240" in shown
    assert (b"\r" in shown.replace(b"\r\n", b"")) == (term == "xterm"), "a bar is drawn over"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError("the library gives no number"), 2, "output: the library gives no number"),
        (OSError(28, "No space left on device"), 2, "output: No space left on device"),
        (PermissionError(13, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
        (MemoryError("Unable to allocate 8 TiB"), 2, "out of memory (Unable to allocate 8 TiB)"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_ends_with_one_line(run, monkeypatch, capsys, error, code, line):
    def end(_):
        raise error

    monkeypatch.setattr(fit_verb, "_fit", end)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", str(run.path)])
    told = capsys.readouterr().err
    assert exit_.value.code == code
    assert told.startswith(f"megatron-tokscale: {line}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["fit"], ["no-verb"], ["fit", "run", "--time", "never"]])
def test_an_unreadable_command_line_gets_one_line(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    told = capsys.readouterr().err
    assert exit_.value.code == 2
    assert told.startswith("megatron-tokscale: ")
    assert told.count("\n") == 1


def test_an_interrupted_fit_leaves_no_partial_file(run, monkeypatch):
    run.paths.fits.unlink(missing_ok=True)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", str(run.path)])
    assert exit_.value.code == 130
    assert not [path for path in run.path.rglob("*") if path.name.endswith(".tmp")]
