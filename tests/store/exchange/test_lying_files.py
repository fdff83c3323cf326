"""Files whose headers lie, or whose arrays do not fit, are refused in one line."""

import json
import struct
import tracemalloc
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matrices import write_interchange

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store.exchange.import_run import import_run
from megatron_tokscale.store.exchange.sources import ImportSettings


def imported(source, out, **settings):
    import_run(source, out, ImportSettings(**settings))


def npy(shape, content=b"", header="{{'descr': '<f4', 'fortran_order': False, 'shape': {}}}"):
    """An .npy file whose header may lie."""
    text = header.format(shape).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


def tensors(header, content=b""):
    """A safetensors file whose header may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(shape, offsets, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


LIES = {
    "a negative number of rows": ("m.npy", npy("(-1, 7)", bytes(280)), "the shape"),
    "a truth value": ("m.npy", npy("(True, 7)", bytes(28)), "the shape"),
    "more rows than memory": (
        "m.npy",
        npy("(10**12, 7)".replace("10**12", "1" + "0" * 12)),
        "early",
    ),
    "more rows than 64 bits": ("m.npy", npy("(1" + "0" * 30 + ", 7)", bytes(280)), "early"),
    "a nested header": ("m.npy", npy("", header="(" * 5000), "header of an array is damaged"),
    "a long header": ("m.npy", npy("(1, 7)" + " " * 20000, bytes(28)), "header of an array"),
    "two negative sizes": (
        "m.safetensors",
        tensors(tensor([-4, -7], [0, 112]), bytes(112)),
        "shape",
    ),
    "a negative place": ("m.safetensors", tensors(tensor([1, 7], [-28, 0]), bytes(28)), "byte -28"),
    "a size without end": (
        "m.safetensors",
        tensors(b'{"x":{"dtype":"F32","shape":[1e400,7],"data_offsets":[0,4]}}'),
        "infinity",
    ),
    "nested JSON": ("m.safetensors", tensors(b"[" * 100_000), "recursion"),
    "a type that numpy lacks": (
        "m.safetensors",
        tensors(tensor([4, 7], [0, 56], "BF16"), bytes(56)),
        "arrays are of BF16",
    ),
}


@pytest.mark.parametrize(("name", "content", "words"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokscaleError, match=f"cannot be read .*{words}"):
        imported(tmp_path / name, tmp_path / "run", axis="T", values="1,2,3,4,5,6,7")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_archive_with_a_password_or_two_arrays_of_one_name_is_refused(tmp_path):
    path = write_interchange(tmp_path / "in")
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(mark, at + 1)
    (tmp_path / "locked.npz").write_bytes(content)
    with pytest.raises(TokscaleError, match="encrypted"):
        imported(tmp_path / "locked.npz", tmp_path / "run")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("loss_matrix.npy", archive.read("loss_matrix.npy"))
    with pytest.raises(TokscaleError, match="two of its arrays have one name"):
        imported(path, tmp_path / "run")


def test_values_of_a_deflated_axis_are_counted_before_they_are_read(tmp_path):
    path = write_interchange(tmp_path / "in", axis_values=None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("axis_values.npy", npy("(10000000,)", bytes(40_000_000)))
    tracemalloc.start()
    with pytest.raises(TokscaleError, match="10000000 values of the axis"):
        imported(path, tmp_path / "run")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("lengths", [(3, 3, 2, 4), (3, None, 3, 3), (None, 3, 3, 3)])
def test_lists_of_other_lengths_do_not_move_to_other_tokens(tmp_path, lengths):
    rows = [None if n is None else [1.0] * n for n in lengths]
    pq.write_table(pa.table({"l": rows}), tmp_path / "m.parquet")
    with pytest.raises(TokscaleError, match=r"missing, or not of 3 numbers|shape"):
        imported(tmp_path / "m.parquet", tmp_path / "run", axis="T", values="1,2,3", array="l")
    assert not (tmp_path / "run").exists()
