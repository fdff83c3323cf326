"""`plan prepare` makes the files of a plan that a job of the same flags then finds."""

import pytest
from jobs import Corpus, job_flags
from planned_jobs import dataset_of, make_scores, stratified_plan, stream_of
from recorded_job import read_samples, run_recorded

from megatron_tokscale.cli import main

STEPS = 14


@pytest.fixture
def flags(corpus: Corpus, tmp_path):
    scores = [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]
    for one in scores:
        one.save(tmp_path / f"{one.dataset.name}.tokscale.safetensors")
    stratified_plan(corpus, scores).save(tmp_path / "plan.json")
    return (
        *("--tokscale-plan", str(tmp_path / "plan.json"), "--tokscale-scores-dir", str(tmp_path)),
        *("--tokscale-dir", str(tmp_path / "run"), "--train-iters", str(STEPS)),
        *("--data-cache-path", str(tmp_path / "cache")),
    )


def written(folder):
    """The files of a folder, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.megatron
def test_a_job_finds_all_files_of_its_plan(corpus: Corpus, flags, tmp_path, capsys):
    main(["plan", "prepare", "--", *job_flags(corpus, *flags)])
    assert f"the plan's files are in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    prepared = written(tmp_path / "cache")
    run_recorded(corpus, tmp_path / "seen", 2, *flags)
    after = written(tmp_path / "cache")
    assert {name: after.get(name) for name in prepared} == prepared
    assert not [name for name in after if name.startswith("tokscale-") and name not in prepared]
    # Of Megatron's own files the job adds those of its blend, of a number of samples, alone.
    plan_files = [name for name in prepared if name.startswith("tokscale-")]
    assert len(plan_files) == 4  # two of the index, one for the strata of each dataset
    scores = [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]
    plan = stratified_plan(corpus, scores)
    stream = stream_of(dataset_of(plan, corpus.prefixes, 112, tmp_path / "offline", scores))
    assert read_samples(tmp_path / "seen") == stream


@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        ("--tokscale-plan", "--tokscale-"),
        ("--train-iters", "the number of its samples is not known"),
    ],
)
def test_a_job_without_a_plan_or_of_unknown_size_gets_a_line(
    corpus: Corpus, flags, tmp_path, capsys, dropped, words
):
    job = job_flags(corpus, *flags)
    at = job.index(dropped)
    with pytest.raises(SystemExit) as ending:
        main(["plan", "prepare", "--", *job[:at], *job[at + 2 :]])
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "cache").exists()
