"""import and export on the command line: what is said, and what an imported run can do."""

import numpy as np
import pytest
from matrices import losses, write_interchange
from runs import log_time, write_run
from scipy.special import expit

from megatron_tokscale.cli.entry import main

STEPS = np.unique(np.geomspace(1, 2000, 24).round()).astype(int)


def sigmoids(n_tokens, seed=0):
    generator = np.random.default_rng(seed)
    curve_NK = expit((generator.uniform(1, 7, (n_tokens, 1)) - log_time(STEPS)) / 0.3)
    return (0.5 + 3 * curve_NK + generator.normal(0, 0.05, curve_NK.shape)).astype(np.float32)


def fails(*words):
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2


def test_what_is_there_and_what_is_not_is_said(tmp_path, capsys):
    path = write_interchange(tmp_path / "in", difficulty=np.ones(40))
    main(["import", str(path), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    for words in (
        "40 tokens at 7 values of T (unit unknown), from 0 to 32",
        "there: samples, positions, step 0",
        "not there: text",
        "not there: documents: intervals resample samples",
        "not there: labels",
        "not there: the unit of the axis",
        "not imported: the arrays difficulty",
        f"next: megatron-tokscale fit {tmp_path / 'run'}",
    ):
        assert words in said


def test_log_probabilities_are_told_by_their_sign(tmp_path, capsys):
    advice = "below 0: if the losses are log probabilities, import their negative"
    one_NK = losses()
    one_NK[3, 4] = -1
    for name, loss_NK in (("all", -losses() - 1), ("one", one_NK), ("none", losses())):
        path = write_interchange(tmp_path / name, loss_NK)
        main(["import", str(path), "--out", str(tmp_path / f"run-{name}")])
    found = [line.strip() for line in capsys.readouterr().out.splitlines() if advice in line]
    assert found == [f"280 losses are {advice}", f"1 loss is {advice}"]  # 40 tokens, 7 columns


def test_a_matrix_along_m_says_what_it_cannot_give(tmp_path, capsys):
    path = write_interchange(tmp_path / "in", value_K=np.array([1.0, 1, 2, 4]), name="M")
    main(["import", str(path), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "a column per run, no probes along T" in said
    assert "2 columns share a value" in said
    main(["spectrum", str(tmp_path / "run"), "--threshold", "3", "--resamples", "20"])
    assert "learned: isotonic loss at most 3 nats" in capsys.readouterr().out
    fails("fit", tmp_path / "run")
    assert "expected at least 20" in capsys.readouterr().err
    fails("report", tmp_path / "run")
    assert f"run `megatron-tokscale spectrum {tmp_path / 'run'}`" in capsys.readouterr().err
    fails("laws", tmp_path / "run")
    fails("spectrum", tmp_path / "run", "--axis", "M", "--out", tmp_path / "x")
    assert "expected it alone" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_an_imported_run_goes_through_every_verb_that_needs_no_text(tmp_path, capsys):
    np.save(tmp_path / "m.npy", sigmoids(640))
    values = ",".join(map(str, STEPS))
    words = ["--axis", "T", "--unit", "tokens", "--values", values]
    run = str(tmp_path / "run")
    main(["import", str(tmp_path / "m.npy"), "--out", run, *words])
    main(["fit", run])
    assert "(time: T (in tokens))" in capsys.readouterr().out
    for verb in ("spectrum", "laws", "report"):
        main([verb, run] + ([] if verb == "report" else ["--resamples", "20"]))
        said = capsys.readouterr()
        assert said.err.count("intervals resample blocks of 10 consecutive tokens") == 1
        reason = "not determined: the tokens' labels are not known, so their frequencies are not"
        assert (reason in said.out) == (verb == "laws")
        assert ("T (in tokens)" in said.out) == (verb != "report")
        assert "axis" not in said.out.replace("--axis", "") and "documents" not in said.out
    page = (tmp_path / "run/analysis/report.html").read_text()
    assert "imported without text" in page
    assert "training loss of the step before" not in page
    assert "Model</th>" not in page and "Time spent on probes" not in page
    assert "intervals resample blocks of 10 consecutive tokens" in page
    assert "T (in tokens)" in page and "over blocks" in page and "over documents" not in page
    fails("score", run, "--data-path", "x", "--out", tmp_path / "scores")


def test_what_stands_in_for_documents_is_said_once_for_all_runs(tmp_path, capsys):
    np.save(tmp_path / "m.npy", losses())
    runs = [str(tmp_path / name) for name in "ab"]
    for run in runs:
        words = ["--axis", "T", "--values", "1,2,3,4,5,6,7", "--out", run]
        main(["import", str(tmp_path / "m.npy"), *words])
    capsys.readouterr()
    fails("laws", *runs)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "documents and samples are not known" in said[0]


def test_one_run_says_no_more_than_before(tmp_path, capsys):
    """A run of a job has documents: no warning."""
    write_run(tmp_path / "run", [0, 1, 2], np.ones((16, 3)))
    main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.npz")])
    captured = capsys.readouterr()
    assert "resample" not in captured.err
    assert "16 tokens at 3 probes" in captured.out


def test_several_files_become_a_folder_of_runs(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", losses(seed=seed))
    files = [str(tmp_path / f"{name}.npy") for name in "ab"]
    words = ["--axis", "T", "--values", "1,2,3,4,5,6,7", "--out", str(tmp_path / "out")]
    main(["import", *files, *words, "--size", "1.5e9"])
    said = capsys.readouterr().out
    assert said.count("not there: text") == 1
    assert (tmp_path / "out/a/tokscale/run.json").is_file()


def test_bad_input_gets_one_line(tmp_path, capsys):
    np.save(tmp_path / "a.npy", losses())
    (tmp_path / "a.txt").write_text("1 2")
    empty = tmp_path / "empty"
    empty.mkdir()
    for words in (
        ["nowhere.npz"],
        [tmp_path / "a.txt"],
        [empty],
        [tmp_path / "a.npy"],
        [tmp_path / "a.npy", "--axis", "T", "--values", "1"],
        [tmp_path / "a.npy", "--axis", "M", "--values", "1,2,3,4,5,6,7", "--size", "3"],
        [tmp_path / "a.npy", "--axis", "T", "--values", "1,2,3,4,5,6,x"],
    ):
        fails("import", *words, "--out", tmp_path / "run")
        said = capsys.readouterr().err
        assert said.startswith("megatron-tokscale: ") and said.count("\n") == 1
        assert not (tmp_path / "run").exists()
