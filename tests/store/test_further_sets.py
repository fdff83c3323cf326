"""The run directories of a job's further probe sets, in the run directory of the job."""

import shutil
from pathlib import Path

import pytest
from runs import launch
from small_probe_sets import loss_of, make_probe_set, record

from megatron_tokscale.store import Run, RunPaths, RunWriter

MODEL = {"num_layers": 2}
FIRST = launch(seq_length=5, launch_id="first")


def write(path: Path, *steps: int, start: int = 0, launches=(FIRST,)) -> None:
    """Do what a job does for one set: open the directory, write losses, close it."""
    probe_set, writer = make_probe_set(), RunWriter(path)
    writer.open(probe_set, MODEL, launches, start)
    for step in steps:
        writer.write(loss_of(step, probe_set), record(step, probe_set))
    writer.close()


@pytest.fixture
def job(tmp_path):
    """A job with two further sets, plan and record of its data, and a folder that is no run."""
    paths = RunPaths(tmp_path)
    for path in (tmp_path, paths.of_probe_set("b"), paths.of_probe_set("a.v2")):
        write(path, 0, 1, 2)
    for path in (paths.plan, paths.decisions, paths.data_record):
        path.write_text("{}")
    (tmp_path / "probe-sets/notes").mkdir()
    return tmp_path


def test_further_sets_are_listed_by_name_and_read_as_runs(job):
    found = RunPaths(job).probe_sets
    assert found == [job / "probe-sets/a.v2", job / "probe-sets/b"]
    for path in found:
        assert Run.open(path).step_K.tolist() == [0, 1, 2]
    assert RunPaths(found[0]).probe_sets == RunPaths(job / "elsewhere").probe_sets == []


def test_the_training_of_a_further_set_is_the_jobs(job, monkeypatch):
    own, further = RunPaths(job), RunPaths(job / "probe-sets/b")
    for name in ("plan", "decisions", "data_record"):
        assert getattr(further, name) == getattr(own, name)
        assert getattr(further, name).is_file()
    assert further.losses == job / "probe-sets/b/tokscale/losses"
    monkeypatch.chdir(further.root)
    assert RunPaths(Path()).plan.samefile(own.plan)
    # A copy elsewhere is a run of its own.
    shutil.copytree(further.root, job / "copy")
    assert RunPaths(job / "copy").plan == job / "copy/tokscale/plan.json"


def test_a_new_run_sets_the_further_sets_aside_with_the_old_one(job):
    run_id = Run.open(job).info.run_id
    write(job, 0, launches=(launch(seq_length=5, launch_id="second"),))
    aside = RunPaths(job).abandoned(run_id)
    assert RunPaths(job).probe_sets == []
    assert [path.name for path in RunPaths(aside).probe_sets] == ["a.v2", "b"]
    assert Run.open(aside / "probe-sets/b").step_K.tolist() == [0, 1, 2]
    assert (aside / "plan.json").is_file()


def test_a_further_set_that_starts_anew_leaves_the_jobs_files_alone(job):
    """As when the job's own directory was lost, or opened before."""
    second = launch(seq_length=5, launch_id="second")
    write(job / "probe-sets/b", 0, launches=(second,))
    assert RunPaths(job).plan.is_file()
    assert RunPaths(job).data_record.is_file()
    assert Run.open(job).step_K.tolist() == [0, 1, 2]
    assert Run.open(job / "probe-sets/b").step_K.tolist() == [0]
