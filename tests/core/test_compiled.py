"""The cache of compiled code: whole, damaged, of other code, or absent."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from megatron_tokscale.core import compiled as compiled_module
from megatron_tokscale.core.compiled import FAST
from megatron_tokscale.data import draws, feistel
from megatron_tokscale.fit import kernel_rows, kernels
from megatron_tokscale.spectrum import kernels as spectrum_kernels

LOOP = """
from megatron_tokscale.core.compiled import EXACT, compiled

@compiled(**EXACT)
def total(n):
    sum_ = 0
    for i in range(n):
        sum_ += i * i
    return sum_
"""

TERM = """
from megatron_tokscale.core.compiled import EXACT, compiled

@compiled(**EXACT)
def term(i):
    return {}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads the loop as a new process would, calls it, and returns two values.

    They are the result, and true if the compiled code came from the cache.
    """
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "loop.py"
    source.write_text(LOOP)

    def fresh(argument=10):
        spec = importlib.util.spec_from_file_location("loop", source)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "loop", module)
        spec.loader.exec_module(module)
        value = module.total(argument)
        return value, sum(module.total.stats.cache_hits.values()) == 1

    return fresh


def kept(tmp_path, ending) -> Path:
    (path,) = (tmp_path / "cache").rglob(f"*.{ending}")
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path):
    path.write_bytes(b"\x80\x05no pickle of ours")


def removed(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def unreadable(path):
    path.unlink()
    path.symlink_to("/proc/self/mem")


def test_compiled_code_is_found_again(load):
    assert load() == (285, False)
    assert load() == (285, True)


@pytest.mark.parametrize(
    "damage", [truncated, emptied, zeroed, replaced, removed, a_folder, unreadable]
)
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_file_is_compiled_anew_and_replaced(load, tmp_path, ending, damage):
    load()
    damage(kept(tmp_path, ending))
    assert load() == (285, False)
    assert load() == (285, damage is not a_folder)


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_code_with_a_flipped_byte_is_never_run(load, tmp_path, ending):
    load()
    path = kept(tmp_path, ending)
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 20)):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        assert load() == (285, False)
        assert load() == (285, True)


def test_a_cache_entry_of_another_signature_is_ignored(load, tmp_path):
    """Two processes that compile at once may write two entries of one name."""
    load()
    of_integers = kept(tmp_path, "nbc").read_bytes()
    removed(kept(tmp_path, "nbi"))
    assert load(10.0) == (285.0, False)
    kept(tmp_path, "nbc").write_bytes(of_integers)
    assert load(10.0) == (285.0, False)


def test_code_of_another_version_is_compiled_anew(load, monkeypatch):
    load()
    monkeypatch.setattr(compiled_module, "__version__", "0.0.0")
    assert load() == (285, False)


def test_a_change_in_a_called_loop_of_another_file_compiles_anew(load, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loop.py").write_text("from term import term\n" + LOOP.replace("i * i", "term(i)"))

    def load_with(term):
        (tmp_path / "term.py").write_text(TERM.format(term))
        monkeypatch.delitem(sys.modules, "term", raising=False)
        return load()

    assert load_with("i * i") == (285, False)
    assert load() == (285, True)
    assert load_with("i * i * i") == (2025, False)


def test_a_full_disk_caches_nothing(load, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled_module._SealedFiles, "_seal", full)
    assert load() == (285, False)
    assert load() == (285, False)


def test_without_a_cache_folder_nothing_is_cached(load, monkeypatch):
    locators = "numba.core.caching.CompileResultCacheImpl._locator_classes"
    monkeypatch.setattr(locators, [])
    assert load() == (285, False)


@pytest.mark.parametrize("name", ["FunctionCache", "IndexDataCacheFile"])
def test_with_another_numba_nothing_is_cached(load, monkeypatch, name):
    """Another numba may lack the private classes, or have others of the same names."""
    kind = "_Cache" if name == "FunctionCache" else "_SealedFiles"
    monkeypatch.setattr(compiled_module, kind, type(kind, (), {}))
    assert load() == (285, False)


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    script = tmp_path / "main.py"
    (tmp_path / "loop.py").write_text(LOOP)
    script.write_text("import sys, loop; print(loop.total(int(sys.argv[1])), loop.total(4.0))")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run(_):
        command = [sys.executable, str(script), "10"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(3) as pool:
        assert {done.stdout for done in pool.map(run, range(3))} == {"285 14\n"}


@pytest.mark.parametrize("module", [draws, feistel, kernel_rows, kernels, spectrum_kernels])
def test_every_compiled_loop_uses_the_sealed_cache(module):
    loops = [value for value in vars(module).values() if isinstance(value, Dispatcher)]
    assert loops
    assert all(isinstance(loop._cache, compiled_module._Cache) for loop in loops)


def test_quotients_are_no_estimates_that_differ_between_makes_of_processor():
    @numba.njit(**FAST)
    def quotients(x):
        for i in range(x.shape[0]):
            x[i] = np.float32(1) / (np.float32(1) + x[i])

    values = np.linspace(0, 9, 1000, dtype=np.float32)
    expected = np.float32(1) / (np.float32(1) + values)
    quotients(values)
    assert np.array_equal(values, expected)
    assert not any("rcp" in code for code in quotients.inspect_asm().values())
