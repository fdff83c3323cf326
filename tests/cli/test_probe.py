"""`probe`: sets by number, by budget and of per-split data, and their cost."""

import numpy as np
import pytest
from gpt_datasets import gpt_config, gpt_dataset
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE
from verb_world import data_flags

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data.record import DataRecord, DatasetRecord, record_path
from megatron_tokscale.probe import ProbeSet


def test_probe_build_and_show_print_the_same(corpus, tmp_path, capsys):
    out = tmp_path / "probe.safetensors"
    flags = ["--vocab-size", str(VOCAB_SIZE), "--tokens", "300", "--eod", str(EOD)]
    main(["probe", "build", *data_flags(corpus), *flags, "--out", str(out)])
    built = capsys.readouterr().out
    main(["probe", "show", str(out)])
    assert capsys.readouterr().out == built
    assert "left: " in built


def test_probe_build_takes_per_split_data(corpus, tmp_path, capsys):
    left, right = corpus.prefixes
    out = tmp_path / "probe.safetensors"
    flags = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    data = ["--train-data-path", "1", left, "1", right, "--valid-data-path", right]
    main(
        [
            *("probe", "build", *data, *flags, "--sequences", "9", "--report-duplicates"),
            *("--out", str(out)),
        ]
    )
    captured = capsys.readouterr()
    assert "from the valid part of per-split data" in captured.out
    assert "9 of 9 windows" in captured.out  # what is held out here is trained on as well
    assert "duplicate passages" in captured.err
    assert ProbeSet.load(out).datasets == ("right",)


def test_a_budget_decides_the_size_of_a_probe_set(corpus, tmp_path, capsys):
    out = tmp_path / "probe.safetensors"
    flags = ["--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD), "--out", str(out)]
    job = [
        "--global-batch-size",
        "8",
        "--train-iters",
        "1000",
        "--tokscale-probe-schedule",
        "linear:100+last",
    ]
    main(["probe", "build", *data_flags(corpus), *flags, *job, "--budget", "0.01"])
    # 11 probes of n sequences against 3 x 8000 samples: n = 240 / 11
    assert ProbeSet.load(out).n_sequences == 21
    assert "budget: 11 probes of 21 sequences, 0.963% of the training" in capsys.readouterr().out
    model = ["--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
    sizes = ["--vocab-size", str(VOCAB_SIZE), "--seq-length", str(SEQ_LENGTH)]
    main(["probe", "cost", "--probe-set", str(out), *model, *sizes, *job])
    printed = capsys.readouterr().out
    assert "probes: 11, at steps 0, 100, 200, 300, ..., 900, 1,000" in printed
    assert "0.963% of the training" in printed
    # Each of several sets fills up its own microbatches: 22 sequences for 21.
    words = ["probe", "cost", "--probe-set", str(out), str(corpus.probe_set), *model, *sizes, *job]
    main([*words, "--micro-batch-size", "2"])
    other = ProbeSet.load(corpus.probe_set)
    rows = 22 + other.n_sequences + other.n_sequences % 2
    n_tokens = ProbeSet.load(out).n_tokens + other.n_tokens
    printed = capsys.readouterr().out
    assert f"one probe: {n_tokens:,} tokens in {21 + other.n_sequences} sequences" in printed
    assert f"(run as {rows}, to fill microbatches)" in printed
    assert f"{11 * rows / 24_000:.3%} of the training" in printed


def record_of_training(run, prefix, cache, n_samples, **config):
    """Megatron's dataset of a job on one dataset, and the record that the job keeps of it."""
    dataset = gpt_dataset(prefix, gpt_config(cache, SEQ_LENGTH, **config), n_samples)
    DataRecord((DatasetRecord.from_gpt_dataset(dataset),)).save(record_path(run))
    return dataset


def documents_of(dataset, n_samples):
    """The documents whose text is in the first samples that Megatron returns."""
    index, found = dataset.document_index, set()
    for stretch in dataset.shuffle_index[:n_samples]:
        first, last = (int(dataset.sample_index[stretch + i][0]) for i in (0, 1))
        found |= set(index[first : last + 1].tolist())
    return found


def build_unseen(corpus, run, out, n_tokens=2000):
    sizes = ["--seq-length", str(SEQ_LENGTH), "--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD)]
    data = ["--data-path", corpus.prefixes[0], "--split", "1,0,0"]
    draw = ["--part", "train", "--unseen-by", str(run), "--tokens", str(n_tokens)]
    return ["probe", "build", *data, *sizes, *draw, "--out", str(out)]


def test_a_probe_set_leaves_out_what_a_training_draws_until_its_planned_end(
    corpus, tmp_path, capsys, monkeypatch
):
    from megatron_tokscale.trace import drawn

    run, out = tmp_path / "run", tmp_path / "unseen.safetensors"
    dataset = record_of_training(run, corpus.prefixes[0], tmp_path / "cache", 100)
    assert len(dataset) > 300  # the last epoch is whole, so the plan's end is not the index's end
    monkeypatch.setattr(drawn, "planned_samples", lambda *_: 100)
    main(build_unseen(corpus, run, out))
    watched = set(ProbeSet.load(out).document_N.tolist())
    read = documents_of(dataset, 100)
    assert len(watched) > 20
    assert not watched & read
    assert "of documents that run" in capsys.readouterr().out
    assert ProbeSet.load(out).origin.unseen_by == str(run)

    # As many tokens as there are in unseen documents, and no more.
    lengths = IndexedTokens.open(corpus.prefixes[0]).lengths
    unseen = np.setdiff1d(np.arange(len(lengths)), list(read))
    most = int((lengths[unseen].astype(int) - 1).sum())
    with pytest.raises(SystemExit):
        main(build_unseen(corpus, run, tmp_path / "new", most + 1))
    assert f"has {most} tokens in" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_documents_are_unseen_by_every_run_that_is_named(corpus, tmp_path, monkeypatch):
    from megatron_tokscale.trace import drawn

    runs, out, read = [tmp_path / "one", tmp_path / "two"], tmp_path / "unseen.safetensors", []
    for seed, run in enumerate(runs, 1):
        cache = tmp_path / f"cache{seed}"
        dataset = record_of_training(run, corpus.prefixes[0], cache, 100, seed=seed)
        read.append(documents_of(dataset, 50))
    assert min(len(read[0] - read[1]), len(read[1] - read[0])) > 10
    monkeypatch.setattr(drawn, "planned_samples", lambda *_: 50)
    words = build_unseen(corpus, runs[0], out, 1000)
    at = words.index(str(runs[0]))
    main([*words[: at + 1], str(runs[1]), *words[at + 1 :]])
    probe_set = ProbeSet.load(out)
    assert not set(probe_set.document_N.tolist()) & (read[0] | read[1])
    assert probe_set.origin.unseen_by == f"{runs[0]}, {runs[1]}"


def refused(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    return error


def test_a_run_that_has_drawn_every_document_leaves_none_to_watch(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    record_of_training(run, corpus.prefixes[0], tmp_path / "cache", 900)
    error = refused(build_unseen(corpus, run, tmp_path / "new"), capsys)
    assert "draws every document of left, in " in error
    assert "epochs; expected some that it does not draw" in error
    assert not (tmp_path / "new").exists()


def test_a_run_on_other_data_leaves_nothing_to_choose_from(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    record_of_training(run, corpus.prefixes[1], tmp_path / "cache", 100)
    error = refused(build_unseen(corpus, run, tmp_path / "new"), capsys)
    assert "the run was trained on" in error
    assert "expected the same; give the data of that run" in error
    assert not (tmp_path / "new").exists()
