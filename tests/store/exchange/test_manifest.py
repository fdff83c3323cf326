"""The manifest beside a file is compared with it, in the layouts that its description allows."""

import hashlib
import sys

import pytest
import yaml
from matrices import write_interchange

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings

WRONG = "0" * 64


@pytest.fixture
def source(tmp_path):
    return write_interchange(tmp_path / "mano")


def checked(source, content, **settings):
    source.with_name("manifest.yaml").write_text(yaml.safe_dump(content))
    out = source.parents[1] / "run"
    return import_run(source, out, ImportSettings(**settings)).manifest


def layouts(path, sha256, n_bytes, shape):
    """Layouts with a hash, a size and a shape."""
    arrays = {"loss_matrix": {"shape": shape, "dtype": "float32"}}
    facts = {"bytes": n_bytes, "sha256": sha256}
    return {
        "a list of files": {"files": [{"path": "losses.npz", **facts, "arrays": arrays}]},
        "a mapping of files": {"files": {"losses.npz": {**facts, "arrays": arrays}}},
        "one file": {"file": "losses.npz", **facts, "shapes": {"loss_matrix": shape}},
        "no name": {"size_bytes": n_bytes, "SHA256": sha256, "loss_matrix": {"shape": shape}},
        "of a whole repository": {
            "experiments": [
                {"name": "other", "file": "other/losses.npz", "sha256": WRONG, "bytes": 1},
                {"name": "mano", "file": "mano/losses.npz", **facts, "arrays": arrays},
            ]
        },
        "a list of arrays": {
            "losses.npz": {**facts, "arrays": [{"name": "loss_matrix", "shape": shape}]}
        },
    }


NAMES = list(layouts(None, "", 0, []))


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_agrees(source, name):
    content = source.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    found = checked(source, layouts(source, sha256, len(content), [40, 7])[name])
    for words in ("SHA-256 of losses.npz", "size of losses.npz", "shapes of loss_matrix"):
        assert words in found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["hash", "size", "shape"])
def test_a_manifest_that_contradicts_the_file_is_refused(source, name, fault):
    content = source.read_bytes()
    sha256 = WRONG if fault == "hash" else hashlib.sha256(content).hexdigest()
    n_bytes = len(content) + (fault == "size")
    shape = [41, 7] if fault == "shape" else [40, 7]
    with pytest.raises(TokscaleError, match=r"manifest.yaml gives"):
        checked(source, layouts(source, sha256, n_bytes, shape)[name])
    assert not (source.parents[1] / "run").exists()


def test_a_manifest_that_is_not_to_be_checked(source):
    content = {"losses.npz": {"sha256": WRONG}}
    assert checked(source, content, checks_manifest=False) is None


def test_a_manifest_of_other_files_says_so(source):
    assert "says nothing of losses.npz" in checked(source, {"files": [{"path": "a.txt"}]})


def test_a_manifest_that_is_no_yaml_is_refused(source):
    source.with_name("manifest.yaml").write_text("a: [1")
    with pytest.raises(TokscaleError, match="expected YAML") as caught:
        import_run(source, source.parents[1] / "run", ImportSettings())
    assert "\n" not in str(caught.value)


def test_a_manifest_without_pyyaml_is_refused_with_the_way_out(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    source.with_name("manifest.yaml").write_text("a: 1")
    with pytest.raises(TokscaleError, match=r"pip install pyyaml.*--no-manifest"):
        import_run(source, source.parents[1] / "run", ImportSettings())
    settings = ImportSettings(checks_manifest=False)
    assert import_run(source, source.parents[1] / "run", settings).manifest is None


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x]\n" + "".join(f"{c}{c}: &b{c} [*a, *a]\n" for c in "bcd") + "e: &e {f: *e}",
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{f'*a{n}, ' * 9}]\n" for n in range(9)),
    ],
    ids=["holds itself", "grows by its aliases"],
)
def test_aliases_do_not_make_a_manifest_without_end(source, text):
    source.with_name("manifest.yaml").write_text(text)
    with pytest.raises(TokscaleError, match="more than 100,000 values, or holds itself"):
        import_run(source, source.parent.parent / "run", ImportSettings())
