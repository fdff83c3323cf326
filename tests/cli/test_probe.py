"""`probe`: sets by number, by budget and of per-split data, and their cost."""

from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE
from verb_world import data_flags

from megatron_tokscale.cli import main
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
