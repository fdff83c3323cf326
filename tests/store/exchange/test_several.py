"""One matrix along T per run becomes a folder of runs that watch the same tokens."""

import json

import numpy as np
import pytest
from matrices import losses, write_interchange

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run, check_same_tokens
from megatron_tokscale.store.exchange.several import import_runs, listed_runs
from megatron_tokscale.store.exchange.sources import ImportSettings

SETTINGS = ImportSettings(axis="T", values="1,2,4,8,16,32,64", unit="step")
ROWS = [
    {"file": "a.npy", "name": "small", "size": 1300000000, "tokens": 20000000000, "seed": 0},
    {"file": "b.npy", "seed": 7},
]
CSV = "file, name, size, tokens, seed\na.npy, small, 1.3e9, 20000000000, 0\nb.npy,,,,7\n"


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", losses(seed=seed))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    (tmp_path / "runs.json").write_text(json.dumps({"runs": ROWS}))
    (tmp_path / "list.csv").write_text(CSV)
    return tmp_path


@pytest.mark.parametrize("manifest", ["list.json", "runs.json", "list.csv"])
def test_a_manifest_gives_names_sizes_tokens_and_seeds(folder, manifest):
    import_runs([folder / manifest], folder / "out", SETTINGS, "parameters")
    small, other = runs = [Run.open(folder / "out" / name) for name in ("small", "b")]
    check_same_tokens(runs)
    assert small.info.size == {"parameters": 1300000000}
    assert small.records[-1].consumed_tokens == 20000000000
    assert [run.imported.seed for run in runs] == [0, 7]
    assert other.info.size == {} and other.records[-1].consumed_tokens is None
    np.testing.assert_array_equal(other.read_losses(), losses(seed=1))


def test_files_and_folders_may_be_listed_as_they_are(folder):
    paths = [write_interchange(folder / name, losses(seed=s)).parent for s, name in enumerate("xy")]
    import_runs(paths, folder / "out", ImportSettings(), "parameters")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.json", "[]", "lists no run"),
        ("m.json", "{", "cannot be read"),
        ("m.json", '[{"file": "a.npy", "sizes": 3}]', "sizes is unknown"),
        ("m.json", '[{"name": "a"}]', "file is missing"),
        ("m.json", '[{"file": "a.npy"}, {"file": "sub/a.npy"}]', "another run has it"),
        ("m.json", '[{"file": "a.npy", "name": "../a"}]', "is no name"),
        ("m.csv", "file,size\na.npy,1.5\n", "size is 1.5; expected a whole number"),
        ("m.csv", "file\na.npy,3\n", "more cells than the header"),
        ("m.csv", "file,size\na.npy,1e400\n", "size is 1e400; expected a whole number"),
        ("m.csv", "file,name\na.npy,..\n", "is no name"),
        ("m.json", '[{"file": "a.npy", "size": -5}]', "size of a.npy is -5; expected 0 to"),
        ("m.json", '[{"file": "a.npy", "tokens": 1e40}]', "tokens of a.npy is 1e\\+40"),
        ("m.json", '[{"file": "a.npy", "name": "a\\u0000b"}]', "is no name"),
        ("m.json", '[{"file": "a.npy", "name": "a\\nb"}]', "is no name"),
    ],
)
def test_a_bad_manifest_gets_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(TokscaleError, match=words) as caught:
        listed_runs([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_all_runs_are_made_or_none(folder):
    (folder / "m.csv").write_text("file\na.npy\nc.npy\n")
    np.save(folder / "c.npy", losses(n_tokens=39))
    with pytest.raises(TokscaleError, match="has 39 tokens"):
        import_runs([folder / "m.csv"], folder / "out", SETTINGS, "parameters")
    (folder / "m.csv").write_text("file\na.npy\nd.npy\n")
    with pytest.raises(TokscaleError, match=r"d.npy is not there"):
        import_runs([folder / "m.csv"], folder / "out", SETTINGS, "parameters")
    assert not (folder / "out").exists()


def test_numbers_of_json_may_have_an_exponent(tmp_path):
    (tmp_path / "m.json").write_text('[{"file": "a.npy", "size": 1.3e9, "tokens": 2e10}]')
    (run,) = listed_runs([tmp_path / "m.json"])
    assert (run.size, run.tokens) == (1_300_000_000, 20_000_000_000)


def test_a_table_of_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "m.csv").write_bytes(b'\xef\xbb\xbffile,name\r\n"a,b.npy","first run"\r\n')
    (run,) = listed_runs([tmp_path / "m.csv"])
    assert (run.file, run.folder) == ("a,b.npy", "first run")
