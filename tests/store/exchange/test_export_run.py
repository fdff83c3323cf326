"""A run in the interchange format, and back: other programs read it, and the fits are the same."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from matrices import write_interchange
from runs import PEAK_LEARNING_RATE, log_time, write_run
from scipy.special import expit

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.fit import fit_run
from megatron_tokscale.store import Run
from megatron_tokscale.store.exchange.export_run import export_run
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128]


@pytest.fixture
def run(tmp_path):
    generator = np.random.default_rng(0)
    midpoint_N = generator.uniform(0.5, 4, 64)
    curve_NK = expit((midpoint_N[:, None] - log_time(STEPS)) / 0.3)
    loss_NK = 0.5 + 3 * curve_NK + generator.normal(0, 0.05, (64, len(STEPS)))
    loss_NK[5, 3] = np.nan
    return write_run(tmp_path / "run", STEPS, loss_NK)


def columns_of(run):
    """The table of fits as columns."""
    return pq.read_table(run.paths.fits).to_pydict()


def assert_same(one, other):
    assert list(one) == list(other)
    for name, column in one.items():
        np.testing.assert_array_equal(np.array(column), np.array(other[name]), err_msg=name)


def test_numpy_reads_the_losses(run, tmp_path):
    path = export_run(run, tmp_path / "out.npz")
    with np.load(path, allow_pickle=False) as file:
        assert file["axis_values"].tolist() == STEPS
        assert file["axis_name"].tolist() == ["T"]
        np.testing.assert_array_equal(file["loss_matrix"], run.read_losses())
        assert file["loss_matrix"].dtype == np.float32
        assert file["token_pos"].tolist() == [n % 8 for n in range(64)]
        assert file["sample_id"].tolist() != []
        assert len(np.unique(file["sample_id"])) == 8
        datasets = run.probe_set.datasets
        assert file["dataset"].tolist() == [datasets[d] for d in run.probe_set.dataset_N]
        for name in ("document", "context", "label"):
            np.testing.assert_array_equal(file[name], getattr(run.tokens, f"{name}_N"))


def test_samples_are_documents(run, tmp_path):
    with np.load(export_run(run, tmp_path / "out.npz")) as file:
        sample_N = file["sample_id"]
    tokens = run.probe_set
    document_N = [(d, q) for d, q in zip(tokens.dataset_N, tokens.document_N, strict=True)]
    pairs = set(zip(sample_N.tolist(), document_N, strict=True))
    assert len(pairs) == len(set(sample_N.tolist())) == len(set(document_N))


def test_a_folder_has_a_manifest_of_the_file(run, tmp_path):
    path = export_run(run, tmp_path / "out")
    (entry,) = yaml.safe_load((tmp_path / "out/manifest.yaml").read_text())["files"]
    content = path.read_bytes()
    assert (entry["path"], entry["bytes"]) == ("losses.npz", len(content))
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["arrays"]["loss_matrix"] == {"shape": [64, 9], "dtype": "float32"}


def test_the_same_fits_to_the_bit_after_export_and_import(run, tmp_path):
    fit_run(run)
    summary = import_run(export_run(run, tmp_path / "out"), tmp_path / "back", ImportSettings())
    back = Run.open(tmp_path / "back")
    fit_run(back)
    assert summary.manifest is not None and "SHA-256" in summary.manifest
    assert back.tokens.fingerprint == run.tokens.fingerprint
    assert back.x_K()[0] == -np.inf and back.step_K.tolist() == STEPS
    assert back.tokens.datasets == run.tokens.datasets
    assert_same(columns_of(run), columns_of(back))
    assert "document" in columns_of(back)


@pytest.mark.parametrize("time", ["tokens", "lr-sum"])
def test_the_same_fits_in_another_time(run, tmp_path, time):
    fit_run(run, time=time)
    import_run(export_run(run, tmp_path / "out", time=time), tmp_path / "back", ImportSettings())
    back = Run.open(tmp_path / "back")
    np.testing.assert_array_equal(back.x_K(), run.x_K(time))
    fit_run(back)
    assert_same(columns_of(run), columns_of(back))
    assert PEAK_LEARNING_RATE > 0


def test_an_imported_run_comes_back_as_it_was(tmp_path):
    value_K = np.array([0.1, 1 / 3, 0.7, 0.7, 12.5])
    loss_NK = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float16)
    source = write_interchange(tmp_path / "in", loss_NK, value_K, name="D")
    import_run(source, tmp_path / "one", ImportSettings(unit="billion-tokens"))
    one = Run.open(tmp_path / "one")
    import_run(export_run(one, tmp_path / "out.npz"), tmp_path / "two", ImportSettings())
    two = Run.open(tmp_path / "two")
    assert two.imported.axis == "D" and two.imported.unit == "billion-tokens"
    np.testing.assert_array_equal(two.time_K(), value_K)
    np.testing.assert_array_equal(two.tokens.sample_N, one.tokens.sample_N)
    assert two.tokens.fingerprint == one.tokens.fingerprint
    with np.load(tmp_path / "out.npz") as file:
        assert file["loss_matrix"].tobytes() == loss_NK.tobytes()


def test_what_exists_is_not_replaced(run, tmp_path):
    (tmp_path / "out.npz").write_text("x")
    (tmp_path / "out").mkdir()
    for out in ("out.npz", "out"):
        with pytest.raises(TokscaleError, match="exists"):
            export_run(run, tmp_path / out)
    assert (tmp_path / "out.npz").read_text() == "x"


def test_a_time_without_a_record_is_refused(run, tmp_path):
    with pytest.raises(TokscaleError, match="no record of its axis"):
        export_run(run, tmp_path / "out.npz", time="axis")
    assert not (tmp_path / "out.npz").exists()
