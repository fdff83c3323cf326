"""Files of sample losses: what is written is read, a torn end is left out, damage is named.

Shapes: Q samples, T steps.
"""

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.store import sample_losses
from megatron_tokscale.store.sample_losses import (
    RECORD,
    Records,
    SampleLosses,
    SamplesFile,
    SamplesHeader,
    abandon_samples,
    make_records,
    replayed_name,
    samples_name,
    write_replayed,
)

_RANKS = 2
_PER_STEP = 3  # samples of a rank


def _header(first_step: int = 0, rank: int = 0, checkpoint: int | None = None) -> SamplesHeader:
    return SamplesHeader(
        run_id="1234567890abcdef",
        launch_id="fedcba0987654321",
        first_step=first_step,
        rank=rank,
        ranks=_RANKS,
        seq_length=16,
        checkpoint=checkpoint,
    )


def _records(first_step: int, last_step: int, rank: int) -> Records:
    """Return a rank's records of the steps after `first_step`, whose values tell their sample."""
    step_Q = np.repeat(np.arange(first_step + 1, last_step + 1), _PER_STEP)
    slot_Q = np.tile(np.arange(_PER_STEP), last_step - first_step)
    sample_Q = (step_Q - 1) * _PER_STEP * _RANKS + rank * _PER_STEP + slot_Q
    mean_Q = 1 + sample_Q / 1024
    return make_records(step_Q, sample_Q, mean_Q, 2 * mean_Q, slot_Q, 10 + slot_Q)


def _write_launch(folder: Path, first_step: int, last_step: int) -> None:
    """Write the files of a launch, in two flushes each."""
    for rank in range(_RANKS):
        file = SamplesFile(
            folder / samples_name(rank, first_step), _header(first_step=first_step, rank=rank)
        )
        file.create()
        middle = (first_step + last_step) // 2
        file.append(_records(first_step, middle, rank))
        file.append(_records(middle, last_step, rank))


def _expected(first: int, last: int) -> Records:
    found = np.concatenate([_records(first - 1, last, rank) for rank in range(_RANKS)])
    return found[np.argsort(found["sample"])]


def test_steps_are_read_back_by_sample_over_ranks_and_launches(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 8)
    _write_launch(tmp_path, 8, 12)
    losses = SampleLosses.of_training(tmp_path)
    np.testing.assert_array_equal(losses.read(3, 10), _expected(3, 10))
    np.testing.assert_array_equal(losses.read(1, 12), _expected(1, 12))
    assert len(losses.read(13, 20)) == 0
    assert losses.n_samples == 12 * _PER_STEP * _RANKS
    assert losses.missing_ranks == []


def test_each_record_has_the_crc_of_zlib() -> None:
    for record in _records(0, 4, 1):
        assert record["crc32"] == zlib.crc32(record.tobytes()[:-4])


def test_blocks_cover_each_record_once_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_launch(tmp_path, 0, 7)
    monkeypatch.setattr(sample_losses, "_RECORDS_AT_ONCE", 4)
    blocks = list(SampleLosses.of_training(tmp_path).blocks())
    assert max(len(block) for block in blocks) == 4
    found = np.concatenate(blocks)
    np.testing.assert_array_equal(found[np.argsort(found["sample"])], _expected(1, 7))


def test_sums_of_steps_weight_each_sample_by_its_tokens(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 5)
    sums = SampleLosses.of_training(tmp_path).step_sums()
    np.testing.assert_array_equal(sums.step_T, np.arange(1, 6))
    for step, mean, n_samples in zip(sums.step_T, sums.mean_T, sums.n_samples_T, strict=True):
        records_Q = _expected(step, step)
        assert n_samples == len(records_Q)
        assert mean == pytest.approx(np.average(records_Q["mean"], weights=records_Q["n_tokens"]))


def test_a_sample_without_tokens_does_not_spoil_its_step(tmp_path: Path) -> None:
    file = SamplesFile(tmp_path / samples_name(0, 0), _header())
    file.create()
    one, two = np.array([1.5, np.nan]), np.array([7, 0])
    file.append(make_records(1, np.array([0, 1]), one, one, two, two))
    assert SampleLosses.of_training(tmp_path).step_sums().mean_T.tolist() == [1.5]


@pytest.mark.parametrize("torn", [b"x", b"x" * 31, bytes(32), bytes(32 * 5 + 3)])
def test_the_torn_end_that_a_kill_leaves_is_left_out(tmp_path: Path, torn: bytes) -> None:
    _write_launch(tmp_path, 0, 4)
    path = tmp_path / samples_name(1, 0)
    path.write_bytes(path.read_bytes() + torn)
    np.testing.assert_array_equal(SampleLosses.of_training(tmp_path).read(1, 4), _expected(1, 4))


def test_a_file_killed_within_its_header_has_no_records(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 4)
    (tmp_path / samples_name(0, 4)).write_bytes(b'{"kind"')
    assert SampleLosses.of_training(tmp_path).n_samples == 4 * _PER_STEP * _RANKS


def test_a_changed_byte_among_the_records_is_named(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 4)
    path = tmp_path / samples_name(1, 0)
    content = bytearray(path.read_bytes())
    content[512 + 32 * 5 + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokscaleError, match=r"rank_00001.* is damaged: record 5 has a wrong check"):
        SampleLosses.of_training(tmp_path).read(1, 4)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"schema_version": 1', b'"schema_version": 9', "has schema version 9"),
        (b'"ranks": 2', b'"ranks": 3', "its header's checksum is wrong"),
        (b"tokscale-samples", b"tokscale-numbers", "its header cannot be read"),
    ],
)
def test_a_header_of_another_kind_is_refused(
    tmp_path: Path, old: bytes, new: bytes, reason: str
) -> None:
    _write_launch(tmp_path, 0, 2)
    path = tmp_path / samples_name(0, 0)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(TokscaleError, match=reason):
        SampleLosses.of_training(tmp_path)


def test_a_run_without_records_says_which_flag_makes_them(tmp_path: Path) -> None:
    with pytest.raises(TokscaleError, match="--tokscale-sample-losses"):
        SampleLosses.of_training(tmp_path / "samples")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 2)
    (tmp_path / samples_name(1, 0)).unlink()
    assert SampleLosses.of_training(tmp_path).missing_ranks == [(0, 1)]


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 2)
    other = replace(_header(first_step=2), run_id="another0another0")
    SamplesFile(tmp_path / samples_name(0, 2), other).create()
    with pytest.raises(TokscaleError, match="is of run another0another0"):
        SampleLosses.of_training(tmp_path)


def test_a_second_copy_of_a_file_is_refused(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 2)
    copy = tmp_path / samples_name(2, 0)
    copy.write_bytes((tmp_path / samples_name(1, 0)).read_bytes())
    with pytest.raises(TokscaleError, match=f"{copy.name} has the losses of {samples_name(1, 0)}"):
        SampleLosses.of_training(tmp_path)


def test_a_cut_keeps_earlier_steps_and_moves_later_ones(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 6)
    _write_launch(tmp_path, 6, 9)
    torn = tmp_path / samples_name(0, 0)
    torn.write_bytes(torn.read_bytes() + b"torn")
    abandon_samples(tmp_path, 4)
    losses = SampleLosses.of_training(tmp_path)
    np.testing.assert_array_equal(losses.read(1, 9), _expected(1, 4))
    assert torn.stat().st_size == 512 + 32 * 4 * _PER_STEP
    abandoned = SampleLosses(sorted((tmp_path / "abandoned").iterdir()))
    np.testing.assert_array_equal(abandoned.read(1, 9), _expected(5, 9))


def test_only_the_files_of_the_latest_launch_are_read_for_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has as many files as ranks and restarts; each launch has cut those before it."""
    for first, last in ((0, 6), (4, 9), (8, 12)):
        abandon_samples(tmp_path, first)
        _write_launch(tmp_path, first, last)
    opened, stored = [], sample_losses._StoredSamples
    monkeypatch.setattr(
        sample_losses, "_StoredSamples", lambda path: opened.append(path.name) or stored(path)
    )
    abandon_samples(tmp_path, 10)
    assert opened == [samples_name(rank, 8) for rank in range(_RANKS)]
    monkeypatch.undo()
    np.testing.assert_array_equal(SampleLosses.of_training(tmp_path).read(1, 12), _expected(1, 10))


def test_a_launch_that_resumes_where_the_one_before_did_replaces_its_file(tmp_path: Path) -> None:
    _write_launch(tmp_path, 0, 4)
    _write_launch(tmp_path, 4, 8)
    for _ in range(2):
        abandon_samples(tmp_path, 4)
        _write_launch(tmp_path, 4, 6)
    np.testing.assert_array_equal(SampleLosses.of_training(tmp_path).read(1, 8), _expected(1, 6))
    names = {path.name for path in (tmp_path / "abandoned").iterdir()}
    assert names == {
        f"{samples_name(rank, 4)}.{count}" for rank in range(_RANKS) for count in (0, 1)
    }


def test_nothing_is_abandoned_where_all_steps_stay(tmp_path: Path) -> None:
    abandon_samples(tmp_path / "absent", 4)
    _write_launch(tmp_path, 0, 4)
    abandon_samples(tmp_path, 4)
    assert not (tmp_path / "abandoned").exists()
    assert SampleLosses.of_training(tmp_path).n_samples == 4 * _PER_STEP * _RANKS


def test_a_replayed_step_names_its_checkpoint_and_is_no_record_of_the_training(
    tmp_path: Path,
) -> None:
    _write_launch(tmp_path, 0, 4)
    header = _header(checkpoint=2)
    write_replayed(tmp_path / "replayed" / replayed_name(3), header, _records(2, 3, 0))
    found = SampleLosses.replayed(tmp_path)
    assert list(found) == [3]
    assert found[3].headers[0].checkpoint == 2
    np.testing.assert_array_equal(found[3].read(3, 3), _records(2, 3, 0))
    assert SampleLosses.of_training(tmp_path).n_samples == 4 * _PER_STEP * _RANKS


def test_a_record_has_32_bytes() -> None:
    assert RECORD.itemsize == 32
