"""Any .idx that Megatron reads is read as Megatron reads it; one it cannot read is refused."""

import struct
import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus import bin_idx as indexed
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.scores import data_digest
from megatron_tokscale.probe.duplicates import documents_in, passages_in

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_raw(prefix, ids, lengths, starts, dtype="uint16", documents=None, tail=b""):
    """A dataset whose sequences lie at these tokens of the .bin file, in any order."""
    ids = np.asarray(ids, dtype)
    with open(f"{prefix}.bin", "wb") as file:  # noqa: PTH123
        file.write(ids.tobytes() + tail)
    documents = np.arange(len(lengths) + 1) if documents is None else documents
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(lengths), len(documents))
    arrays = (
        np.asarray(lengths, np.int32),
        np.asarray(starts, np.int64) * ids.itemsize,
        np.asarray(documents, np.int64),
    )
    with open(f"{prefix}.idx", "wb") as file:  # noqa: PTH123
        file.write(header + b"".join(array.tobytes() for array in arrays))
    return str(prefix)


def megatron_sequences(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return [dataset[i].copy() for i in range(len(dataset))]  # its map goes with it


def layouts():
    """Lengths and starts: end to end, backwards, with gaps, overlapping, the same place twice."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 30, 40)
    starts = np.cumsum(lengths) - lengths
    order = generator.permutation(40)
    return {
        "end to end": (lengths, starts),
        "in another order": (lengths[order], starts[order]),
        "with gaps": (lengths, starts + np.arange(40)),
        "overlapping": (lengths, starts // 2),
        "one place": (np.full(40, 7), np.zeros(40)),
        "a gap in the last": (lengths, starts + 3 * (np.arange(40) == 39)),
    }


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("layout", layouts())
def test_sequences_and_streams_are_megatrons(tmp_path, monkeypatch, layout, dtype):
    monkeypatch.setattr(indexed, "_BLOCK", 7)  # blocks of sequences and of tokens, several of each
    monkeypatch.setattr(indexed, "_GATHERED", 11)
    lengths, starts = layouts()[layout]
    ids = np.random.default_rng(1).integers(0, 120, 1000)
    prefix = write_raw(tmp_path / "data", ids, lengths, starts, dtype, tail=b"odd")
    expected, found = megatron_sequences(prefix), IndexedTokens.open(prefix)
    assert found.is_end_to_end == (layout == "end to end")
    assert found.n_tokens == sum(map(len, expected))
    for i, sequence in enumerate(expected):
        assert_array_equal(found.sequence(i), sequence)
    for chosen in (range(40), range(3, 29), range(39, 40), range(5, 5)):
        together = np.concatenate([np.empty(0, dtype), *(expected[i] for i in chosen)])
        assert_array_equal(found.stream(chosen), together)


def test_two_orders_of_the_same_text_are_told_apart_and_both_searched(tmp_path):
    ids = np.arange(1000)
    straight = write_raw(tmp_path / "a", ids, [400, 600], [0, 400])
    crossed = write_raw(tmp_path / "b", ids, [600, 400], [400, 0])
    one, other = IndexedTokens.open(straight), IndexedTokens.open(crossed)
    assert data_digest(one) != data_digest(other)
    portions = DataSource({"train": [crossed]}, None).portions("train")
    assert documents_in(portions, [ids[400:], ids[:400], ids], lambda _: None).tolist() == [1, 1, 0]
    border = np.concatenate([ids[-32:], ids[:32]])  # the end of its first, the start of its second
    passages = np.stack([border, ids[368:432], ids[10:74]]).astype(np.uint16)
    assert passages_in(portions, passages, lambda _: None).tolist() == [True, False, True]


def faulty(folder):
    """Messages, and what is done to a good dataset of 2 sequences of 3 and 4 uint16 ids."""

    def bytes_of(suffix, change):
        path = folder / f"data.{suffix}"
        path.write_bytes(change(path.read_bytes()))

    def raw(**changes):
        write_raw(
            folder / "data", **{"ids": range(7), "lengths": [3, 4], "starts": [0, 3]} | changes
        )

    header = 34
    return {
        "data.bin is not there": lambda: (folder / "data.bin").unlink(),
        "data.idx is not there": lambda: (folder / "data.idx").unlink(),
        "data.bin is empty": lambda: bytes_of("bin", lambda _: b""),
        "data.idx is empty": lambda: bytes_of("idx", lambda _: b""),
        "data.idx is not a Megatron index": lambda: bytes_of("idx", lambda b: b[:20]),
        "not a Megatron index file": lambda: bytes_of("idx", lambda b: b"x" + b[1:]),
        "has version 7 and type 8; expected version 1": lambda: bytes_of(
            "idx", lambda b: b[:9] + b"\7" + b[10:]
        ),
        "and type 9; expected": lambda: bytes_of("idx", lambda b: b[:17] + b"\x09" + b[18:]),
        "and type 0; expected": lambda: bytes_of("idx", lambda b: b[:17] + b"\0" + b[18:]),
        "data.idx is truncated": lambda: bytes_of("idx", lambda b: b[:-1]),
        "idx is truncated": lambda: bytes_of("idx", lambda b: b[: header + 5]),
        "shorter than its index": lambda: bytes_of("bin", lambda b: b[:-1]),
        "sequence 1 of .* ends behind its 14 bytes": lambda: raw(starts=[0, 4]),
        "sequence 0 of .* ends behind": lambda: raw(starts=[2**60, 3]),
        "of .* ends behind its": lambda: raw(starts=[2**62 - 2, 3], lengths=[2**31 - 1, 4]),
        "begins before the file": lambda: raw(starts=[0, -1]),
        "negative length": lambda: raw(lengths=[-3, 4]),
        "between two ids": lambda: bytes_of(
            "idx", lambda b: b[: header + 8] + b"\1" + b[header + 9 :]
        ),
        "document indices end at": lambda: raw(documents=[0, 1]),
        "its document indices end": lambda: raw(documents=[]),
        "data.bin is not a file": lambda: [
            (folder / "data.bin").unlink(),
            (folder / "data.bin").mkdir(),
        ],
        "idx is not a file": lambda: [
            (folder / "data.idx").unlink(),
            (folder / "data.idx").mkdir(),
        ],
    }


@pytest.mark.parametrize("message", faulty(None))
def test_damaged_files_get_one_line(tmp_path, message):
    prefix = write_raw(tmp_path / "data", range(7), [3, 4], [0, 3])
    assert IndexedTokens.open(prefix).n_tokens == 7
    time.sleep(0.01)  # a file that changes in size or time is looked at again
    faulty(tmp_path)[message]()
    with pytest.raises(TokscaleError, match=message) as caught:
        IndexedTokens.open(prefix)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/dev/null/data", "x" * 5000, "nul\0byte", "/proc/self/mem"])
def test_a_path_that_cannot_be_opened_gets_one_line(path):
    with pytest.raises(TokscaleError) as caught:
        IndexedTokens.open(path)
    assert "\n" not in str(caught.value)


def test_files_without_permission_get_one_line(tmp_path, monkeypatch):
    prefix = write_raw(tmp_path / "data", range(7), [3, 4], [0, 3])

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(TokscaleError, match=r"data.idx cannot be read: Permission denied"):
        IndexedTokens.open(prefix)


def test_an_index_is_checked_once(tmp_path, monkeypatch):
    prefix = write_raw(tmp_path / "data", range(7), [4, 3], [3, 0])
    assert not IndexedTokens.open(prefix).is_end_to_end
    monkeypatch.setattr(indexed, "_check", None)
    assert not IndexedTokens.open(prefix).is_end_to_end
