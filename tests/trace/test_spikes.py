"""Steps that stand out, against loops and planted samples in real Megatron datasets.

Shapes: T steps, Q samples.
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gpt_datasets import gpt_config, gpt_dataset, write_unique_tokens

from megatron_tokscale.cli import main
from megatron_tokscale.data.record import (
    BlendRecord,
    DataRecord,
    DatasetRecord,
    UntracedRecord,
    load_records,
    record_path,
)
from megatron_tokscale.store import RunPaths
from megatron_tokscale.store.sample_losses import (
    SamplesFile,
    SamplesHeader,
    make_records,
    replayed_name,
    samples_name,
    write_replayed,
)
from megatron_tokscale.trace import spikes as spikes_file
from megatron_tokscale.trace.named import Named
from megatron_tokscale.trace.spikes import WINDOW, find_spikes, stand_out
from megatron_tokscale.trace.trace import Trace

RUN_ID = "0123456789abcdef"
BATCH, N_STEPS, SEQ_LENGTH = 8, 120, 8
LEVELS = {"easy": 2.0, "hard": 6.0}


def header(checkpoint=None, ranks=1):
    return SamplesHeader(
        run_id=RUN_ID,
        launch_id="f" * 16,
        first_step=0,
        rank=0,
        ranks=ranks,
        seq_length=SEQ_LENGTH,
        checkpoint=checkpoint,
    )


def by_hand(loss_T, t):
    """Level and deviations of step t, from the definition."""
    before = min(WINDOW // 2, t)
    places = [i for i in range(t - before, t + before + 1) if i != t and i < len(loss_T)]
    near = [loss_T[i] for i in places if math.isfinite(loss_T[i])]
    level = statistics.median(near) if near else math.nan
    if len(near) < 8:
        return level, math.nan
    if not math.isfinite(loss_T[t]):
        return level, math.inf
    mad = statistics.median([abs(loss - level) for loss in near])
    return level, (loss_T[t] - level) / max(1.4826 * mad, 1e-6)


@pytest.mark.parametrize("n_steps", [0, 5, 30, 200])
def test_steps_stand_out_from_the_median_of_those_around_them(n_steps, monkeypatch):
    rng = np.random.default_rng(n_steps)
    loss_T = 3 + rng.normal(size=n_steps) / 10
    loss_T[::17] += 2
    loss_T[4:5], loss_T[50:51] = np.nan, np.inf
    expected = np.array([by_hand(loss_T.tolist(), t) for t in range(n_steps)]).reshape(-1, 2)
    for rows in (2**14, 7):
        monkeypatch.setattr(spikes_file, "_ROWS_AT_ONCE", rows)
        np.testing.assert_allclose(np.stack(stand_out(loss_T), axis=1), expected, rtol=1e-12)


def test_a_loss_that_falls_at_the_start_does_not_stand_out():
    step_T = np.arange(1, 300)
    _, deviations_T = stand_out(10 / step_T**0.3 + np.random.default_rng(0).normal(size=299) / 50)
    assert np.nanmax(deviations_T[:30]) < 6


class World:
    """A run on a blend of two datasets, with a record of its data, and losses to be written."""

    def __init__(self, folder: Path):
        from megatron.core.datasets.blended_dataset import BlendedDataset

        self.run = folder / "run"
        config = gpt_config(folder / "cache", SEQ_LENGTH)
        lengths = np.random.default_rng(0).integers(3, 30, (2, 40)).tolist()
        parts = [
            gpt_dataset(write_unique_tokens(folder / name, row, 10_000 * i), config, 600)
            for i, (name, row) in enumerate(zip(LEVELS, lengths, strict=True))
        ]
        n_samples = BATCH * N_STEPS
        self.blend = BlendedDataset(parts, [1.0, 1.0], n_samples, config)
        RunPaths(self.run).folder.mkdir(parents=True)
        rows = tuple(DatasetRecord.from_gpt_dataset(part) for part in parts)
        DataRecord(rows, BlendRecord.from_blended_dataset(self.blend)).save(record_path(self.run))
        level = np.array(list(LEVELS.values()))[np.asarray(self.blend.dataset_index)]
        self.mean_Q = level + np.random.default_rng(1).normal(size=n_samples) / 20

    def samples_of(self, name):
        return np.flatnonzero(np.asarray(self.blend.dataset_index) == list(LEVELS).index(name))

    def records(self):
        sample_Q = np.arange(len(self.mean_Q))
        n_tokens_Q = np.full(len(sample_Q), SEQ_LENGTH)
        steps = 1 + sample_Q // BATCH
        return make_records(
            steps, sample_Q, self.mean_Q, self.mean_Q + 1, sample_Q % SEQ_LENGTH, n_tokens_Q
        )

    def write(self, ranks=1):
        file = SamplesFile(RunPaths(self.run).samples / samples_name(0, 0), header(ranks=ranks))
        file.create()
        file.append(self.records())

    def write_replayed(self, step, checkpoint):
        records_Q = self.records()
        path = RunPaths(self.run).samples / "replayed" / replayed_name(step)
        path.parent.mkdir(parents=True)
        write_replayed(path, header(checkpoint), records_Q[records_Q["step"] == step])


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def trace(world, *flags):
    main(["trace", str(world.run), *map(str, flags)])


def test_a_planted_sample_is_the_first_that_is_named(world, tmp_path, capsys):
    """Its loss is below the level of the hard dataset: a sample counts against its own dataset."""
    k = int(world.samples_of("easy")[150])
    world.mean_Q[k] = 5.5
    world.write()
    first = find_spikes(world.run, 3).spikes[0]
    assert first.step == 1 + k // BATCH
    assert first.named == [k]
    sample, traced = first.samples[0], Trace.open(world.run).sample(k)
    assert (sample.dataset, sample.number) == ("easy", traced.number)
    assert [(p.document, p.start, p.stop) for p in sample.pieces] == list(traced.pieces)
    assert first.datasets[0].name == "easy"

    out = tmp_path / "spikes.json"
    trace(world, "--spikes", 1, "--out", out)
    assert Named.load(out) == Named((k,), (), RUN_ID)
    shown = capsys.readouterr().out
    assert f"sample {k}: " in shown
    assert f"document {traced.pieces[0].document}, tokens" in shown
    assert json.loads(out.read_text())["spikes"][0]["step"] == first.step


def test_shares_are_of_the_excess_of_the_batch_by_tokens(world):
    k = int(world.samples_of("easy")[150])
    world.mean_Q[k] += 3
    world.write()
    spike = find_spikes(world.run, 1).spikes[0]
    own = slice((spike.step - 1) * BATCH, spike.step * BATCH)
    mean_Q = world.mean_Q.astype(np.float32).astype(float)
    assert spike.loss == pytest.approx(mean_Q[own].mean())
    of_step = [mean_Q[s * BATCH : (s + 1) * BATCH].mean() for s in range(N_STEPS)]
    level, deviations = by_hand(of_step, spike.step - 1)
    assert (spike.level, spike.deviations) == pytest.approx((level, deviations))
    sample = spike.samples[0]
    share = (mean_Q[k] - sample.expected) / (BATCH * (spike.loss - level))
    assert sample.share == pytest.approx(share)
    steps = range(max(0, spike.step - 33), min(N_STEPS, spike.step + 32))
    easy = {*world.samples_of("easy").tolist()}
    means = [
        statistics.mean(mean_Q[i] for i in range(s * BATCH, (s + 1) * BATCH) if i in easy)
        for s in steps
        if s != spike.step - 1
    ]
    assert sample.expected == pytest.approx(statistics.median(means))


def test_a_spike_of_a_whole_batch_names_no_sample(world, capsys, monkeypatch):
    world.mean_Q[80 * BATCH : 81 * BATCH] += 1.0
    world.write()
    monkeypatch.setattr(spikes_file, "_LEAST_SHARE", 0.3)
    spike = find_spikes(world.run, 1).spikes[0]
    assert (spike.step, spike.named) == (81, [])
    trace(world, "--spikes", 1)
    assert "it is in the whole batch" in capsys.readouterr().out


def test_samples_below_their_level_do_not_lengthen_the_list(world):
    """One sample has most of the excess; the seven others of its step are below their levels."""
    own = slice(40 * BATCH, 41 * BATCH)
    world.mean_Q[own] -= 1.0
    world.mean_Q[own.start + 2] += 20.0
    world.write()
    spike = find_spikes(world.run, 1).spikes[0]
    assert spike.step == 41
    assert [each.sample for each in spike.samples] == [own.start + 2]


def test_a_loss_that_is_not_finite_stands_out_most(world):
    world.mean_Q[700] = np.nan
    world.mean_Q[300] += 50
    world.write()
    first, second = find_spikes(world.run, 2).spikes
    assert (first.step, first.named, first.deviations) == (1 + 700 // BATCH, [700], math.inf)
    assert (second.step, second.named) == (1 + 300 // BATCH, [300])


def test_a_replayed_step_says_its_checkpoint(world, capsys):
    easy = world.samples_of("easy")
    step = next(s for s in range(20, 90) if (easy // BATCH == s).sum() in (3, 4, 5))
    k = int(easy[easy // BATCH == step][1])
    world.mean_Q[k] = 5.5
    world.write_replayed(1 + k // BATCH, checkpoint=7)
    (spike,) = find_spikes(world.run, 5).spikes
    assert (spike.checkpoint, spike.samples[0].sample) == (7, k)
    trace(world, "--spikes")
    assert "under the weights of the checkpoint of step 7" in capsys.readouterr().out


def test_missing_ranks_and_steps_are_said(world, capsys):
    records_Q = world.records()
    folder = RunPaths(world.run).samples
    for first_step, last_step, ranks in ((0, 50, 1), (60, 120, 3)):
        step_Q = records_Q["step"]
        file = SamplesFile(
            folder / samples_name(0, first_step),
            replace(header(), first_step=first_step, ranks=ranks),
        )
        file.create()
        file.append(records_Q[(step_Q > first_step) & (step_Q <= last_step)])
    trace(world, "--spikes", 1)
    shown = capsys.readouterr().out
    assert "2 of 3 data-parallel ranks of the launch at step 60 have no file" in shown
    assert "10 of the steps from 1 to 120 have no records" in shown


def test_noise_alone_is_said_to_be_noise(world, capsys):
    world.mean_Q[:] = 3 + np.random.default_rng(1).normal(size=len(world.mean_Q)) / 20
    world.write()
    trace(world, "--spikes", 2)
    assert "no step stands out by 5 robust standard deviations" in capsys.readouterr().out


def test_a_spike_is_not_said_to_be_noise(world, capsys):
    world.mean_Q[700] += 50
    world.write()
    trace(world, "--spikes", 2)
    assert "no step stands out" not in capsys.readouterr().out


def test_damage_is_named_although_there_is_a_replayed_step(world, capsys):
    world.write()
    world.write_replayed(3, checkpoint=2)
    path = RunPaths(world.run).samples / samples_name(0, 0)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(SystemExit):
        trace(world, "--spikes")
    assert "is damaged" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["trace", str(tmp_path / "none"), "--spikes"])
    assert "no run in" in capsys.readouterr().err


def test_without_a_record_of_the_data_samples_are_named_all_the_same(world, capsys):
    record_path(world.run).unlink()
    world.mean_Q[300] += 50
    world.write()
    trace(world, "--spikes", 1)
    shown = capsys.readouterr().out
    assert "sample 300: " in shown
    assert "the origin of the samples is not known" in shown


def test_samples_of_another_kind_of_dataset_are_named_all_the_same(world, capsys):
    record = load_records(record_path(world.run))[0]
    replace(record, order=UntracedRecord("--sft")).save(record_path(world.run))
    world.mean_Q[300] += 50
    world.write()
    assert find_spikes(world.run, 1).spikes[0].samples[0].dataset is None
    trace(world, "--spikes", 1)
    shown = capsys.readouterr().out
    assert "sample 300: " in shown and "the origin of the samples is not known" in shown


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--spikes"], "no losses of samples"),
        (["--sample", "3", "--out", "x.json"], "--out is for what --spikes shows"),
        ([], "nothing to show"),
    ],
)
def test_bad_input_ends_with_one_line(world, capsys, flags, match):
    with pytest.raises(SystemExit) as ended:
        trace(world, *flags)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert match in error


def test_an_existing_file_is_not_replaced(world, tmp_path, capsys):
    world.write()
    out = tmp_path / "spikes.json"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        trace(world, "--spikes", "--out", out)
    assert out.read_text() == "mine"
    with pytest.raises(SystemExit):
        main(["trace", "--data-cache-path", str(tmp_path), "--spikes"])
    assert "--spikes needs losses of samples" in capsys.readouterr().err
