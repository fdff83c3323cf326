"""The doctor says what the job says, in the same words: bad launches through both."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from findings import run_doctor
from jobs import Corpus, ask_launcher, job_flags
from planned_jobs import plan_of

from megatron_tokscale.core.files import sealed
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.store.lock import RunLock
from megatron_tokscale.training.history.start import read_arguments, start_of

pytestmark = pytest.mark.megatron

SPLIT = "900,100,0"
STEPS = ("--train-iters", "8", "--exit-interval", "4", "--save-interval", "4")
ON = ("--train-iters", "8", "--save-interval", "4")


@pytest.fixture(autouse=True)
def _keep_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(words) -> tuple[int, str]:
    """Start a job's only rank, forked from a process that has Megatron; its code and output."""
    answer = ask_launcher(1, ["-m", "megatron_tokscale.pretrain", *words])
    return answer["code"], answer["output"]


@pytest.fixture
def examine(capsys):
    def of(words):
        return run_doctor(capsys, "-m", "megatron_tokscale.pretrain", *words)

    return of


def documents(corpus: Corpus, split: str) -> tuple[tuple[int, int], ...]:
    parts = DataSource(corpus.data_path, split).portions("train")
    return tuple((part.sequences.start, part.sequences.stop) for part in parts)


@pytest.fixture(scope="module")
def plan(corpus: Corpus):
    return plan_of(corpus.prefixes, {0: (0.5, 0.5)}, documents=documents(corpus, SPLIT))


@pytest.fixture(scope="module")
def runs(corpus: Corpus, plan, tmp_path_factory):
    """Two runs that stopped at step 4 of 8: under the plan with a probe set, and without a plan."""
    folder = tmp_path_factory.mktemp("runs")
    plan.save(folder / "plan.json")
    probe = ("--tokscale-probe-set", str(corpus.probe_set))
    for name, flags in {
        "planned": (*probe, "--tokscale-plan", str(folder / "plan.json")),
        "plain": (*probe, "--ckpt-format", "torch_dist"),
    }.items():
        flags = job_flags(corpus, *STEPS, *flags, "--save", str(folder / name))
        code, output = run(flags)
        assert code == 0, output[-3000:]
        assert "held out: the job trains on none of the " in output
        assert "is not known" not in output
    return folder


@pytest.fixture
def launch(corpus: Corpus, plan, runs, tmp_path):
    """Flags of a job that resumes a copy of a run, and the copy."""

    def of(name, *extra):
        folder = tmp_path / "run"
        shutil.copytree(runs / name, folder)
        (folder / "tokscale/.lock").unlink(missing_ok=True)
        (folder / "cache").mkdir(exist_ok=True)
        given = plan if "--tokscale-plan" not in extra else None
        if given:
            plan.save(tmp_path / "plan.json")
            extra = ("--tokscale-plan", str(tmp_path / "plan.json"), *extra)
        run = ("--load", str(folder), "--save", str(folder))
        return [*ON, "--tokscale-probe-set", str(corpus.probe_set), *run, *extra], folder

    return of


def of_another_plan(launch, plan, path):
    replace(plan, seed=6).save(path / "other.json")
    return launch("planned", "--tokscale-plan", str(path / "other.json"))[0]


def of_a_run_without_a_plan(launch, plan, path):
    return launch("plain", "--ckpt-format", "torch_dist")[0]


def of_another_split(launch, plan, path):
    return [*launch("planned")[0], "--split", "800,200,0"]


def of_another_seed(launch, plan, path):
    return [*launch("planned")[0], "--seed", "7"]


def of_a_damaged_plan(launch, plan, path):
    words, folder = launch("planned")
    (folder / "tokscale/plan.json").write_text("{")
    return words


def of_a_damaged_data_record(launch, plan, path):
    words, folder = launch("planned")
    (folder / "tokscale/data.json").write_text('{"kind": "tokscale-data"}')
    return words


def of_a_model_of_experts(launch, plan, path):
    words, folder = launch("planned")
    known = json.loads((folder / "tokscale/run.json").read_text())
    known["model"]["num_experts"] = 8
    (folder / "tokscale/run.json").write_text(json.dumps(sealed(known)))
    return words


def of_a_place_that_is_a_file(launch, plan, path):
    (path / "file").touch()
    words = launch("plain")[0]
    words = words[: words.index("--tokscale-plan")]
    place = ("--tokscale-dir", str(path / "file/run"), "--tokscale-on-write-error", "abort")
    return [*words, *place, "--ckpt-format", "torch_dist"]


def of_a_schedule_without_its_checkpoints(launch, plan, path):
    words, folder = launch("plain")
    words = [*words[: words.index("--load")], "--tokscale-replay", str(folder)]
    return [*words, "--tokscale-probe-schedule", "list:4,5", "--ckpt-format", "torch_dist"]


def of_a_step_before_all_checkpoints(launch, plan, path):
    words, folder = launch("plain")
    words = [*words[: words.index("--load")], "--tokscale-replay", str(folder)]
    return [*words, "--tokscale-replay-step", "1", "--ckpt-format", "torch_dist"]


def of_samples_that_another_sampler_deals(launch, plan, path):
    words = launch("plain")[0]
    words = words[: words.index("--tokscale-plan")]
    return [*words, "--tokscale-sample-losses", "--dataloader-type", "cyclic"]


BAD = {
    of_another_plan: "orders them otherwise; resume with that plan, or let this one hold",
    of_a_run_without_a_plan: "no plan is known for the 32 samples that the job has consumed",
    of_another_split: "training part of left is documents 0 to 270, the job's is 0 to 240",
    of_another_seed: "are of --seed 7, --split 900,100,0, so some would come twice",
    of_a_damaged_plan: "tokscale/plan.json is not JSON",
    of_a_damaged_data_record: "tokscale/data.json has schema version None; expected a whole number",
    of_a_model_of_experts: "is of a run with num_experts 8, this job has None",
    of_a_place_that_is_a_file: "losses cannot be written to",
    of_a_schedule_without_its_checkpoints: "lists step 5; expected steps with a checkpoint",
    of_a_step_before_all_checkpoints: "no checkpoint is from before that step",
    of_samples_that_another_sampler_deals: "--dataloader-type single, not cyclic",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_the_doctor_and_the_job_refuse_alike(corpus, examine, launch, plan, tmp_path, spoil):
    words = job_flags(corpus, *spoil(launch, plan, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, found = examine(words)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert code == 2
    said, output = run(words)
    lines = [line for line in output.splitlines() if line.startswith("megatron-tokscale: ")]
    assert said == 2, output[-3000:]
    assert len(lines) == 1
    assert BAD[spoil] in lines[0]
    assert lines[0].removeprefix("megatron-tokscale: ") in found["REFUSED"]


HOLD = """
import sys
from pathlib import Path
from megatron_tokscale.store.lock import RunLock
assert RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_in_use_is_seen_and_its_lock_left_alone(corpus, examine, launch):
    words, folder = launch("planned")
    words, lock = job_flags(corpus, *words), folder / "tokscale/.lock"
    assert examine(words)[0] == 0
    assert not lock.exists()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    try:
        code, found = examine(words)
        assert code == 2
        said, output = run(words)
        assert said == 2
        (line,) = [line for line in output.splitlines() if line.startswith("megatron-tokscale: ")]
        assert "is in use by another job (host " in line and f"process {holder.pid}" in line
        assert found["REFUSED"] == [line.removeprefix("megatron-tokscale: ")]
    finally:
        holder.communicate()
    assert examine(words)[0] == 0
    own = RunLock(lock)
    assert own.acquire()
    own.release()


def test_a_job_that_takes_its_arguments_from_the_checkpoint_is_not_refused(corpus, examine, launch):
    words = job_flags(corpus, *launch("planned")[0], "--use-checkpoint-args")
    for flag in ("--seq-length", "--num-layers", "--hidden-size", "--num-attention-heads"):
        at = words.index(flag)
        del words[at : at + 2]
    code, found = examine(words)
    assert code == 0, found
    assert (
        "the arguments that --use-checkpoint-args takes from the checkpoint" in found["not checked"]
    )
    assert any("no --seq-length is given" in text for text in found["not checked"])
    code, output = run(words)
    assert code == 0, output[-3000:]
    assert "tokscale probe at step 8" in output


def test_the_arguments_of_a_checkpoint_are_read_without_torch(runs):
    """Against what Megatron has saved, in both of its formats."""
    from argparse import Namespace

    for name in ("planned", "plain"):
        saved = read_arguments(runs / name / "iter_0000004")
        assert (saved.seq_length, saved.consumed_train_samples) == (32, 32)
        flags = {"finetune": False, "load": str(runs / name), "ckpt_step": None}
        assert start_of(Namespace(**flags)) == (4, 32)
        assert start_of(Namespace(**flags | {"finetune": True})) == (0, 0)
    assert start_of(Namespace(finetune=False, load=str(runs), ckpt_step=None)) == (0, 0)
    assert start_of(Namespace(finetune=False, load=str(runs / "plain"), ckpt_step=3)) is None
    assert start_of(Namespace(finetune=False, load="msc://bucket/run", ckpt_step=None)) is None


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    import torch

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    from argparse import Namespace

    torch.save({"args": Namespace(seq_length=32, odd=Bomb())}, tmp_path / "common.pt")
    assert read_arguments(tmp_path).seq_length == 32
    assert not (tmp_path / "ran").exists()
    (tmp_path / "common.pt").write_bytes(b"PK")
    assert read_arguments(tmp_path) is None
