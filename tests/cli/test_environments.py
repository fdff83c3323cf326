"""Verbs and a job in the environments of other machines, one by one and all at once.

Every environment must give the result of the plain one: exit code 0, the same text, the same files.
One case is one command of `verb_world` in one environment. The environments:

    no fsync       folders cannot be synced, as on CIFS and FUSE
    latin-1        a terminal that cannot show the plan's and the datasets' names
    a pod's        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in every shell
    read-only      the data and Megatron's cache of them cannot be written, even by root
    all            these at once, in a process of its own, and numba's cache of `data` is damaged

24 commands in 5 environments are 120 cases; two more are a job with a probe set and a plan, in the
plain environment and in all at once.
"""

import errno
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import Corpus, free_port, job_environment, job_flags
from planned_jobs import plan_of
from privileges import plain_permissions
from verb_world import make_world

import megatron_tokscale
from megatron_tokscale.cli import main
from megatron_tokscale.store import Run
from megatron_tokscale.trace import trace as trace_module

pytestmark = pytest.mark.slow

OWN_FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

POD = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29777",
}
WIDE = "neu→🚀"  # the name of every file that a verb writes with --out
# Times and speeds differ from run to run, and checksums over them; an import draws its run's id.
VARYING = re.compile(
    r"[\d,.]+ tokens/s|[\d.]+ s\b"
    r"|\"(seconds|tokens_per_second|checksum|fit_id|run_id|arrays_crc32)\": .*"
)


def refuse_folders(monkeypatch) -> None:
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)


def in_a_pod(monkeypatch) -> None:
    for name, value in POD.items():
        monkeypatch.setenv(name, value)


def run_all(world: dict[str, list[str]], encoding: str) -> dict[str, tuple[int, str, dict]]:
    """Run every command from the world as it is, and return its exit code, text and files."""
    pristine, folders = files_in(Path()), folders_in(Path())
    ends = {}
    for name, argv in world.items():
        code, text = run_verb(argv, encoding)
        found = files_in(Path())
        made = {path: found[path] for path in found if found[path] != pristine.get(path)}
        ends[name] = (code, VARYING.sub("", text), {path: told(path) for path in sorted(made)})
        for path in made:
            if path in pristine:
                Path(path).write_bytes(pristine[path])
            else:
                Path(path).unlink()
        for folder in sorted(folders_in(Path()) - folders, reverse=True):
            folder.rmdir()
    return ends


def run_verb(argv: list[str], encoding: str) -> tuple[int, str]:
    """Run a verb on a terminal of this encoding, and return its exit code and what it printed."""
    trace_module.open_index.cache_clear()
    streams = sys.stdout, sys.stderr
    printed = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in streams]
    sys.stdout, sys.stderr = printed
    code = 0
    try:
        main(list(argv))
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout, sys.stderr = streams
    for stream in printed:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in printed)
    return code, out + (err if code else "")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folders_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_dir()}


def shown(text: str, encoding: str) -> str:
    """Return the text that a terminal of this encoding shows; shades of a plan stay apart."""
    if encoding == "latin-1":
        text = text.translate(str.maketrans("░▒▓█", ".:+#"))
    return text.encode(encoding, "replace").decode(encoding)


def told(path: str) -> str:
    """Return the content of a written file without times and the checksums over them."""
    content = Path(path).read_bytes()
    if path.endswith((".json", ".html")):
        return VARYING.sub("", content.decode())
    if path.endswith(".npz"):
        with np.load(io.BytesIO(content)) as arrays:
            return str({name: array.tobytes() for name, array in sorted(arrays.items())})
    if path.endswith(".safetensors"):  # whose header has no order
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(json.loads(content[8:start]), sort_keys=True)
        return header.rstrip() + content[start:].hex()
    return content.hex()


def commands_in(folder: Path) -> dict[str, list[str]]:
    """Make the world in a folder; return its commands, with output names outside latin-1."""
    return {
        name: [re.sub("^new", WIDE, word) for word in command.argv]
        for name, command in make_world(folder).items()
    }


def make_read_only(*folders: Path) -> None:
    """Remove the permission to write from folders and from the files in them."""
    for folder in folders:
        for path in (*folder.glob("*"), folder):
            path.chmod(path.stat().st_mode & ~0o222)


def assert_same(ends, plain, encoding) -> None:
    for name, (code, text, files) in plain.items():
        assert code == 0, (name, text)
        assert ends[name][0] == 0, (name, ends[name][1])
        assert ends[name][1] == shown(text, encoding), name
        assert ends[name][2].keys() == files.keys(), name
        for path, content in files.items():
            assert ends[name][2][path] == content, (name, path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Commands of a world whose folder is the working directory, and their ends without faults."""
    folder, before = tmp_path_factory.mktemp("world"), Path.cwd()
    os.chdir(folder)
    table = commands_in(folder)
    yield table, run_all(table, "utf-8")
    os.chdir(before)


ENVIRONMENTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "no fsync": ("utf-8", refuse_folders),
    "latin-1": ("latin-1", lambda _: None),
    "a pod's": ("utf-8", in_a_pod),
    "read-only": ("utf-8", lambda _: make_read_only(Path("cache"), Path("plancache"))),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_verb_does_the_same_in_an_environment(world, monkeypatch, name):
    encoding, enter = ENVIRONMENTS[name]
    enter(monkeypatch)
    with plain_permissions():
        ends = run_all(world[0], encoding)
    assert_same(ends, world[1], encoding)


SITE = f"""
import sys
sys.path += {OWN_FOLDERS!r}
import errno, os, stat
from privileges import drop_overrides
_fsync = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    _fsync(descriptor)
os.fsync = fsync
drop_overrides()
"""
RUN_ALL = """
import json, sys
from test_environments import run_all
json.dump(run_all(json.loads(sys.argv[1]), "latin-1"), open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Variables of all environments at once, and a package whose numba cache is damaged.

    The damaged files are those of one room: to compile all loops again takes 20 seconds.
    """
    folder = tmp_path_factory.mktemp("everything")
    package = Path(megatron_tokscale.__file__).parent
    shutil.copytree(package, folder / "megatron_tokscale", symlinks=True)
    for index in (folder / "megatron_tokscale/data").rglob("*.nbi"):
        index.write_bytes(b"")
    (folder / "sitecustomize.py").write_text(SITE)
    kept = {name: value for name, value in job_environment().items() if name != "NUMBA_CACHE_DIR"}
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "latin-1"} | POD


def test_every_verb_does_the_same_in_all_environments_at_once(world, everything, tmp_path):
    package = Path(everything["PYTHONPATH"].split(os.pathsep)[0]) / "megatron_tokscale"
    assert list((package / "data").rglob("*.nbi"))
    make_read_only(Path("cache"), Path("plancache"))
    ends = tmp_path / "ends.json"
    words = [sys.executable, "-c", RUN_ALL, json.dumps(world[0]), str(ends)]
    done = subprocess.run(words, env=everything, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(json.loads(ends.read_text()), world[1], "latin-1")


def run_job(corpus: Corpus, environment: dict[str, str], *flags: str) -> None:
    """Run the only rank of a job, without torchrun."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags)]
    job = subprocess.run(command, env=environment | own, capture_output=True, check=False)
    assert job.returncode == 0, job.stderr[-3000:]
    assert b"WITHOUT" not in job.stdout


@pytest.mark.megatron
def test_a_job_does_the_same_in_all_environments_at_once(corpus, everything, tmp_path):
    plan = plan_of(corpus.prefixes, {0: (1, 1), 9: (3, 1)})
    plan.save(tmp_path / f"{WIDE}.json")
    cache = tmp_path / "cache"
    flags = ["--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "linear:1"]
    flags += ["--tokscale-plan", str(tmp_path / f"{WIDE}.json"), "--data-cache-path", str(cache)]
    flags += ["--train-iters", "4", "--tokscale-dir"]
    run_job(corpus, job_environment(), *flags, str(tmp_path / "plain"))
    for file in cache.glob("tokscale-*"):
        file.unlink()
    make_read_only(cache)
    run_job(corpus, everything, *flags, str(tmp_path / WIDE))
    plain, other = (Run.open(tmp_path / name) for name in ("plain", WIDE))
    assert other.step_K.tolist() == plain.step_K.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(other.read_losses(), plain.read_losses())
    copies = [(run.path / "tokscale/plan.json").read_bytes() for run in (plain, other)]
    assert copies[0] == copies[1]
    assert list((other.path / "tokscale/cache").glob("tokscale-*"))
    assert not list(cache.glob("tokscale-*"))
