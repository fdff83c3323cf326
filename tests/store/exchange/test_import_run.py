"""Losses of other people's files become runs that hold the same numbers."""

import datetime
import json
import tracemalloc
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matrices import N_TOKENS, VALUES_T, losses, write_interchange
from runs import plain_probe_set
from safetensors.numpy import save_file

from megatron_tokscale.cli.parsing import tell_left_out
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import Run, RunWriter
from megatron_tokscale.store import losses as store_losses
from megatron_tokscale.store.exchange import export_run, raw_arrays, sources
from megatron_tokscale.store.exchange import import_run as module
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings
from megatron_tokscale.store.exchange.token_arrays import TokenArrays
from megatron_tokscale.store.losses import read_stored_losses


def stored(run):
    """The losses in their stored type, (N, K)."""
    return np.stack([read_stored_losses(run.paths.losses_at(s)) for s in run.step_K], axis=1)


def imported(source, out, **settings):
    summary = import_run(source, out, ImportSettings(**settings))
    return Run.open(out), summary


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_interchange_format_keeps_every_bit(tmp_path, dtype):
    loss_NK = losses(dtype=dtype)
    loss_NK[3, 2], loss_NK[5, 1] = np.nan, np.inf
    run, summary = imported(write_interchange(tmp_path / "in", loss_NK), tmp_path / "run")
    found = stored(run)
    assert found.dtype == dtype and found.tobytes() == loss_NK.tobytes()
    assert summary.non_finite == 2
    np.testing.assert_array_equal(run.time_K(), VALUES_T)
    assert run.x_K()[0] == -np.inf
    assert run.tokens.sample_N.tolist() == [n // 8 for n in range(N_TOKENS)]
    assert run.tokens.position_N.tolist() == [n % 8 for n in range(N_TOKENS)]
    run.verify()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_negative_losses_are_kept_and_counted_unless_rounding_made_them(
    tmp_path, dtype, monkeypatch
):
    monkeypatch.setattr(raw_arrays, "PIECE_VALUES", 9)
    loss_NK = losses(dtype=dtype)
    loss_NK[[0, 7, 39], [6, 0, 3]] = -0.25, -3, -0.002  # in three pieces and columns
    loss_NK[[1, 2, 3], 1] = -0.0005, -np.inf, np.nan
    run, summary = imported(write_interchange(tmp_path / "in", loss_NK), tmp_path / "run")
    assert (summary.negative, summary.non_finite) == (3, 2)
    assert stored(run).tobytes() == loss_NK.tobytes()


def test_the_name_of_the_axis_may_have_no_dimensions(tmp_path):
    source = write_interchange(tmp_path / "in", axis_name="T")  # np.savez makes it so of a string
    run, _ = imported(source, tmp_path / "run")
    assert (run.imported.axis, run.imported.axis_name) == ("T", "T")


def test_pieces_of_one_row_make_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_arrays, "PIECE_VALUES", 1)
    loss_NK = losses()
    run, _ = imported(write_interchange(tmp_path / "in", loss_NK), tmp_path / "run")
    np.testing.assert_array_equal(stored(run), loss_NK)


def _npz_deflated(folder, loss_NK):
    np.savez_compressed(folder / "m.npz", a=loss_NK, other=np.zeros(3))
    return folder / "m.npz"


def _npy(folder, loss_NK):
    np.save(folder / "m.npy", loss_NK)
    return folder / "m.npy"


def _npy_by_columns(folder, loss_NK):
    return _npy(folder, np.asfortranarray(loss_NK))


def _npy_big_endian(folder, loss_NK):
    return _npy(folder, loss_NK.astype(">f4"))


def _safetensors(folder, loss_NK):
    save_file({"losses": loss_NK, "names": np.zeros(2, np.uint8)}, folder / "m.safetensors")
    return folder / "m.safetensors"


def _parquet_of_lists(folder, loss_NK):
    table = pa.table({"losses": pa.array(loss_NK.tolist(), pa.list_(pa.float32()))})
    pq.write_table(table, folder / "m.parquet", row_group_size=7)
    return folder / "m.parquet"


@pytest.mark.parametrize(
    "write",
    [_npz_deflated, _npy, _npy_by_columns, _npy_big_endian, _safetensors, _parquet_of_lists],
)
def test_a_plain_matrix_in_every_format(tmp_path, write):
    loss_NK = losses()
    path = write(tmp_path, loss_NK)
    values = ",".join(map(str, VALUES_T))
    run, _ = imported(path, tmp_path / "run", axis="T", values=values, unit="step")
    np.testing.assert_array_equal(stored(run), loss_NK)
    assert run.step_K.tolist() == VALUES_T.tolist()
    assert (run.default_time, run.tokens.unit_kind) == ("step", "blocks")


def test_a_table_has_its_axis_in_the_names_of_its_columns(tmp_path):
    loss_NK = losses(n_columns=3)
    columns = {"40": loss_NK[:, 1], "2.5": loss_NK[:, 0], "600": loss_NK[:, 2]}
    words = {"doc": [f"d{n // 5}" for n in range(N_TOKENS)], "kind": ["b", "a"] * 20}
    pq.write_table(pa.table(columns | words), tmp_path / "m.parquet", row_group_size=9)
    arrays = TokenArrays(documents="doc", datasets="kind")
    run, _ = imported(tmp_path / "m.parquet", tmp_path / "run", axis="T", arrays=arrays)
    np.testing.assert_array_equal(stored(run), loss_NK)
    assert run.time_K().tolist() == [2.5, 40, 600]
    assert run.tokens.datasets == ("a", "b")
    assert run.tokens.dataset_N.tolist() == [1, 0] * 20
    assert run.tokens.document_N.tolist() == [n // 5 for n in range(N_TOKENS)]


def test_columns_are_sorted_and_values_kept_to_the_bit(tmp_path):
    value_K = np.array([0.3, 0.1, 1 / 3, 2e9 / 7])
    loss_NK = losses(n_columns=4)
    source = write_interchange(tmp_path / "in", loss_NK, value_K)
    run, _ = imported(source, tmp_path / "run", unit="billion-tokens")
    order = np.argsort(value_K)
    assert run.time_K().tolist() == value_K[order].tolist()
    np.testing.assert_array_equal(stored(run), loss_NK[:, order])
    np.testing.assert_allclose(run.x_K("tokens"), np.log(value_K[order] * 1e9), rtol=1e-6)
    with pytest.raises(TokscaleError, match=r"no record of its step.*use the time 'axis'"):
        run.x_K("step")


def test_runs_of_one_size_may_be_tied_on_d_and_m_but_not_on_t(tmp_path):
    value_K = np.array([2.0, 1, 2, 5])
    loss_NK = losses(n_columns=4)
    source = write_interchange(tmp_path / "in", loss_NK, value_K, name="M")
    run, _ = imported(source, tmp_path / "run")
    assert run.time_K().tolist() == [1, 2, 2, 5]
    np.testing.assert_array_equal(stored(run), loss_NK[:, [1, 0, 2, 3]])
    np.testing.assert_allclose(run.x_K(), np.log([1, 2, 2, 5]))
    with pytest.raises(TokscaleError, match="has the value 2 twice"):
        imported(write_interchange(tmp_path / "t", loss_NK, value_K), tmp_path / "other")


def test_ids_of_any_kind_are_numbered_in_their_order(tmp_path):
    words = np.array([f"s{9 - n // 20}" for n in range(N_TOKENS)])
    run, _ = imported(write_interchange(tmp_path / "in", sample_id=words), tmp_path / "run")
    assert run.tokens.sample_N.tolist() == [n // 20 for n in range(N_TOKENS)]
    large = np.arange(N_TOKENS) // 20 + 2**40
    run, _ = imported(write_interchange(tmp_path / "in", sample_id=large), tmp_path / "again")
    assert run.tokens.sample_N.tolist() == [n // 20 for n in range(N_TOKENS)]


def _with_gaps(kind):
    """Return ids of 40 tokens of which number 3 and the last two are missing."""
    ids = {
        "integers": [n // 10 for n in range(N_TOKENS)],
        "numbers": [n // 10 + 0.5 for n in range(N_TOKENS)],
        "words": [f"d{n // 10}" for n in range(N_TOKENS)],
        "days": [datetime.date(2024, 1, 1 + n // 10) for n in range(N_TOKENS)],
    }[kind]
    return [None if n in (3, 38, 39) else value for n, value in enumerate(ids)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("role", "kind", "end"),
    [
        ("documents", "integers", "parquet"),
        ("documents", "numbers", "parquet"),
        ("documents", "words", "parquet"),
        ("documents", "days", "parquet"),
        ("documents", "numbers", "npz"),
        ("documents", "days", "npz"),
        ("datasets", "words", "parquet"),
        ("samples", "integers", "parquet"),
        ("positions", "integers", "parquet"),
        ("contexts", "numbers", "npz"),
        ("labels", "integers", "parquet"),
    ],
)
def test_missing_ids_are_counted_and_refused(tmp_path, role, kind, end):
    source, ids = tmp_path / f"m.{end}", _with_gaps(kind)
    if end == "parquet":
        loss_NK = {str(k + 1): column_N for k, column_N in enumerate(losses().T)}
        pq.write_table(pa.table(loss_NK | {"ids": ids}), source, row_group_size=7)
    else:
        array_N = np.array(ids, "M8[D]" if kind == "days" else np.float64)
        np.savez(source, loss_matrix=losses(), axis_values=VALUES_T, ids=array_N)
    words = r"array 'ids' of .* has 3 missing values; .* leave out the tokens .* give them an id$"
    with pytest.raises(TokscaleError, match=words) as caught:
        imported(source, tmp_path / "run", axis="T", arrays=TokenArrays(**{role: "ids"}))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_what_runs_watch_is_told_by_positions_or_by_a_name(tmp_path):
    def fingerprint(out, seed, *, named=None, **arrays):
        source = write_interchange(tmp_path / f"in-{out}", losses(seed=seed), **arrays)
        run, _ = imported(source, tmp_path / out, tokens_name=named)
        return run.tokens.fingerprint

    assert fingerprint("a", 0) == fingerprint("b", 1)
    assert fingerprint("c", 0) != fingerprint("d", 0, sample_id=np.arange(N_TOKENS))
    bare = {"sample_id": None, "token_pos": None}
    assert fingerprint("e", 0, **bare) != fingerprint("f", 1, **bare)
    assert fingerprint("g", 0, named="x", **bare) == fingerprint("h", 1, named="x", **bare)
    assert fingerprint("i", 0, named="y", **bare) != fingerprint("j", 0, named="x", **bare)


def test_size_tokens_and_seed_are_kept(tmp_path):
    source = write_interchange(tmp_path / "in")
    run, _ = imported(
        source,
        tmp_path / "run",
        unit="step",
        size={"non_embedding": 1200},
        training_tokens=5000,
        seed=3,
    )
    assert run.info.size == {"non_embedding": 1200}
    assert run.records[-1].consumed_tokens == 5000
    assert run.imported.seed == 3


def test_an_imported_run_says_that_it_has_no_text(tmp_path):
    run, _ = imported(write_interchange(tmp_path / "in"), tmp_path / "run")
    with pytest.raises(TokscaleError, match="was imported and has no text"):
        run.probe_set  # noqa: B018


BAD = {
    "a name that leaves doubt": ({"name": "data"}, {}, "names its axis 'data'"),
    "another axis": ({"name": "D"}, {"axis": "M"}, "names its axis 'D', --axis is M"),
    "no axis": ({"axis_name": None}, {}, "does not name its axis"),
    "two names": ({"axis_name": np.array(["T", "D"])}, {}, "shape \\(2,\\) .* expected one string"),
    "a negative time": ({"value_K": VALUES_T - 1}, {}, "has the value -1"),
    "a size of 0": ({"name": "M"}, {}, "has the value 0; expected numbers above 0"),
    "NaN": ({"value_K": np.where(VALUES_T == 4, np.nan, VALUES_T)}, {}, "has the value nan"),
    "half a step": ({"value_K": VALUES_T / 2}, {"unit": "step"}, "not whole numbers"),
    "too few values": ({}, {"values": "1,2"}, "2 values of the axis .* 7 columns"),
    "words as values": ({}, {"values": "a,b"}, "no list"),
    "a long list": ({}, {"values": "0.125," * 500}, "500 values of the axis"),
    "a folder as values": ({}, {"values": "/"}, "Is a directory"),
    "no values": ({"axis_values": None}, {}, "no array axis_values"),
    "integers": ({"loss_matrix": np.ones((4, 7), int)}, {}, "type int64"),
    "a row": ({"loss_matrix": np.ones(7)}, {}, "shape \\(7,\\)"),
    "no tokens": ({"loss_matrix": np.ones((0, 7))}, {}, "shape \\(0, 7\\)"),
    "no such matrix": ({}, {"array": "x"}, "has no array 'x'"),
    "no such documents": (
        {},
        {"arrays": TokenArrays(documents="x")},
        "has no array 'x'",
    ),
    "documents of others": (
        {"doc": np.arange(3)},
        {"arrays": TokenArrays(documents="doc")},
        "shape \\(3,\\); expected \\(40,\\)",
    ),
    "a negative position": ({"token_pos": -np.ones(40)}, {}, "not whole numbers from 0"),
    "words as labels": (
        {"label": np.array(["a"] * 40)},
        {"arrays": TokenArrays(labels="label")},
        "not whole numbers",
    ),
    "a label beyond the vocabulary": (
        {"label": np.arange(40)},
        {"arrays": TokenArrays(labels="label"), "vocab_size": 39},
        "has the label 39; expected ids below the vocabulary's size of 39",
    ),
    "objects": ({"loss_matrix": np.array([[None]])}, {}, "cannot be read|Python objects"),
    "a matrix on its side": (
        {"loss_matrix": np.ones((7, 40)), "sample_id": None, "token_pos": None},
        {},
        "has 40 columns; its rows are as many: transpose it",
    ),
    "steps that no integer holds": (
        {"value_K": VALUES_T * 1e30},
        {"unit": "step"},
        "has the value 3.2e\\+31; expected at most",
    ),
}


@pytest.mark.parametrize(("content", "settings", "words"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, content, settings, words):
    source = write_interchange(tmp_path / "in", **content)
    with pytest.raises(TokscaleError, match=words) as caught:
        imported(source, tmp_path / "run", **settings)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_name_of_the_axis_may_have_no_dimension(tmp_path):
    path = write_interchange(tmp_path / "in", axis_name=np.array("step"))
    run, _ = imported(path, tmp_path / "run")
    assert (run.imported.axis, run.imported.unit) == ("T", "step")


@pytest.mark.parametrize("cut", ["half", "crc", "text"])
def test_a_damaged_file_leaves_nothing(tmp_path, cut):
    source = write_interchange(tmp_path / "in", losses(n_tokens=4000))
    content = bytearray(source.read_bytes())
    with zipfile.ZipFile(source) as archive:
        start = archive.getinfo("loss_matrix.npy").header_offset
    if cut == "half":
        content = content[: len(content) // 2]
    elif cut == "crc":
        content[start + 5000] ^= 1
    else:
        content = b"losses"
    source.write_bytes(content)
    with pytest.raises(TokscaleError, match="cannot be read"):
        imported(source, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupted_import_leaves_no_run(tmp_path, monkeypatch):
    def interrupt(*_):
        assert list(tmp_path.glob(".run.*/tokscale/losses/step_*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_tokens", interrupt)
    with pytest.raises(KeyboardInterrupt):
        imported(write_interchange(tmp_path / "in"), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_that_exists_is_refused(tmp_path):
    source = write_interchange(tmp_path / "in")
    (tmp_path / "run").mkdir()
    with pytest.raises(TokscaleError, match="run exists"):
        imported(source, tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_a_damaged_file_of_tokens_is_refused(tmp_path):
    run, _ = imported(write_interchange(tmp_path / "in"), tmp_path / "run")
    content = bytearray(run.paths.tokens.read_bytes())
    content[-1] ^= 1
    run.paths.tokens.write_bytes(content)
    with pytest.raises(TokscaleError, match=r"tokens.safetensors is damaged"):
        Run.open(run.path)


def test_memory_does_not_grow_with_the_matrix(tmp_path, monkeypatch):
    for each in (raw_arrays, export_run):
        monkeypatch.setattr(each, "PIECE_VALUES", 2**14)
    monkeypatch.setattr(store_losses, "_CHECKED_AT_ONCE", 2**12)
    monkeypatch.setattr(sources, "_HASHED_AT_ONCE", 2**12)
    peaks = []
    for n_tokens in (2**12, 2**16):
        bare = {"sample_id": None, "token_pos": None}
        source = write_interchange(tmp_path / f"in-{n_tokens}", losses(n_tokens), **bare)
        tracemalloc.start()
        run, _ = imported(source, tmp_path / f"run-{n_tokens}")
        export_run.export_run(run, tmp_path / f"out-{n_tokens}.npz")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = 2**16 * len(VALUES_T) * 4
    assert peaks[1] < peaks[0] + size / 2  # the datasets take 2 bytes per token


def test_run_json_says_where_the_losses_come_from(tmp_path):
    source = write_interchange(tmp_path / "in")
    run, _ = imported(source, tmp_path / "run", unit="step")
    content = json.loads(run.paths.identity.read_text())["imported"]
    assert (content["source"], content["axis"], content["unit"]) == ("losses.npz", "T", "step")
    assert [column["value"] for column in content["columns"]] == VALUES_T.tolist()


def test_a_job_does_not_write_into_an_imported_run(tmp_path):
    run, _ = imported(write_interchange(tmp_path / "in"), tmp_path / "run")
    with pytest.raises(TokscaleError, match="holds imported losses"):
        RunWriter(run.path).check(plain_probe_set(16), {})


def test_a_column_without_a_finite_loss_is_left_out_and_named(tmp_path, capsys):
    loss_NK = losses(n_columns=4)
    loss_NK[:, 2] = np.nan
    value_K = np.array([0.5, 1.5, 2.5, 3.5])
    run, _ = imported(write_interchange(tmp_path / "in", loss_NK, value_K), tmp_path / "run")
    assert run.time_K().tolist() == [0.5, 1.5, 3.5]
    tell_left_out(run)
    assert "at value 2.5 of the axis has no finite loss" in capsys.readouterr().err
