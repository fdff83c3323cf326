"""The doctor lists the installed packages, and every reason for which a job would be refused."""

import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from findings import run_doctor
from jobs import SEQ_LENGTH, VOCAB_SIZE, Corpus, job_environment, job_flags
from planned_jobs import (
    document_plan,
    make_scores,
    stratified_plan,
    train_dataset,
    with_falls,
)
from runs import plain_probe_set, write_run

from megatron_tokscale.cli import entry as cli
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.document_strata import build_documents
from megatron_tokscale.doctor import installed
from megatron_tokscale.training.data import follower
from megatron_tokscale.training.data.follower import Follower
from megatron_tokscale.training.plugin import HOOKS
from megatron_tokscale.training.settings import JobPlanSettings, JobSettings


@pytest.fixture(autouse=True)
def _keep_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def examine(capsys):
    """Run the doctor; its exit code, and its findings by state."""

    def run(*words):
        return run_doctor(capsys, *words)

    return run


@pytest.fixture
def flags(corpus: Corpus, tmp_path):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path / "run"))
    return job_flags(corpus, *probe)


def test_the_doctor_lists_the_packages_and_finds_all_hooks(capsys):
    cli.main(["doctor"])
    output = capsys.readouterr().out
    version = importlib.metadata.version
    assert f"torch               {version('torch')}" in output
    assert f"megatron-core       {version('megatron-core')}, wheel in " in output
    assert "with megatron.training\n" in output
    assert f"numpy {version('numpy')}, scipy {version('scipy')}" in output
    assert output.count("\n  found ") == len(HOOKS)
    assert "MISSING" not in output
    assert "\njob\n" not in output
    assert output.endswith("nothing is wrong\n")


def test_a_good_job_passes(examine, flags, corpus, tmp_path):
    code, found = examine(*flags)
    assert code == 0
    assert "REFUSED" not in found
    assert len(found["ok"]) == 3
    assert any(f"{corpus.probe_set} fits: 7" in text for text in found["ok"])
    assert found["not checked"] == [
        "Megatron's own validation of its flags, which needs the job's processes and devices"
    ]
    assert not (tmp_path / "run").exists()


BAD = {
    "--seq-length 64": f"sequences of {SEQ_LENGTH} tokens, the job trains on --seq-length 64",
    "--vocab-size 300": f"a vocabulary of {VOCAB_SIZE}, the job has 300",
    "--cuda-graph-impl local": "does not support --cuda-graph-impl local",
    "--sft": "the probe does not support --sft",
    "--tokscale-probe-schedule log:8": "cannot read 'log:8'",
    "--tokscale-plan nowhere.json": "cannot read nowhere.json",
    "--dataloader-type cyclic": "needs --dataloader-type single, not cyclic",
    "--tokscale-probeset x": "there is no flag --tokscale-probeset",
}


def test_every_reason_against_a_bad_job_is_listed(examine, flags, tmp_path):
    code, found = examine(*flags, *shlex.split(" ".join(BAD)))
    assert code == 2
    for reason in BAD.values():
        assert sum(reason in text for text in found["REFUSED"]) == 1, reason
    sft_under_a_plan = sft_in_our_script = 1
    assert len(found["REFUSED"]) == len(BAD) + sft_under_a_plan + sft_in_our_script
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--num-layers four", "argument --num-layers: invalid int value: 'four'"),
        ("--attention-backend four", "KeyError('four')"),
        ("--tokscale-loss-dtype int8", "argument --tokscale-loss-dtype: invalid choice: 'int8'"),
    ],
)
def test_flags_that_cannot_be_read_get_one_line(examine, flags, words, reason):
    code, found = examine(*flags, *words.split())
    assert code == 2
    assert len(found["REFUSED"]) == 1
    assert reason in found["REFUSED"][0]


def test_flags_without_effect_and_without_a_place(examine, corpus):
    code, found = examine("--seq-length", "32", "--tokscale-verify-isolation")
    assert code == 2
    assert "does nothing without --tokscale-probe-set" in found["REFUSED"][0]
    code, found = examine(
        *("--seq-length", "32", "--vocab-size", "255"),
        *("--tokscale-probe-set", str(corpus.probe_set)),
    )
    assert code == 2
    assert found["REFUSED"] == ["there is no place for the losses; give --tokscale-dir or --save"]


def test_checks_that_only_the_job_can_make_are_listed(examine, flags, corpus):
    at = flags.index("--vocab-size")
    del flags[at : at + 2]
    flags.remove("--tokscale-cpu")
    code, found = examine("mine/pretrain_gpt.py", *flags, "--flag-of-mine", "3")
    assert code == 0
    unchecked = " | ".join(found["not checked"])
    assert "the tokenizer cannot be built here" in unchecked
    assert "this machine has none, and --tokscale-cpu is not given" in unchecked
    assert "--flag-of-mine: not among this Megatron's flags" in unchecked


def test_flags_of_other_scripts_are_refused_for_our_own_alone(examine, flags):
    words = ("--spec", "no_such_module", "x")
    for script in ((), ("-m", "megatron_tokscale.pretrain")):
        code, found = examine(*script, *flags, *words)
        assert code == 2
        (reason,) = found["REFUSED"]
        assert reason.startswith("megatron_tokscale.pretrain does not support --spec: ")
    for script in (
        ("pretrain_gpt.py",),
        ("-m", "megatron_tokscale.run", "pretrain_gpt.py"),
        ("-m", "mine.pretrain"),
    ):
        code, found = examine(*script, *flags, *words)
        assert code == 0
        assert any("the script: its forward step" in text for text in found["not checked"])


def test_a_directory_that_cannot_be_written_gets_a_warning(examine, flags, tmp_path):
    (tmp_path / "run/tokscale").mkdir(parents=True)
    (tmp_path / "run/tokscale/losses").touch()
    code, found = examine(*flags)
    assert code == 0
    (warning,) = found["WARNING"]
    assert warning.startswith(f"losses cannot be written to {tmp_path / 'run/tokscale'}: [Errno 17")
    assert warning.endswith("training continues WITHOUT probes")
    code, found = examine(*flags, "--tokscale-on-write-error", "abort")
    assert code == 2
    assert found["REFUSED"] == [warning.partition("; training")[0]]


def test_a_data_cache_that_cannot_be_written_is_not_checked(examine, planned, tmp_path):
    (tmp_path / "file").touch()
    code, found = examine(*planned[2], "--data-cache-path", str(tmp_path / "file/cache"))
    assert code == 0
    assert any("which cannot be written: [Errno 20]" in text for text in found["not checked"])


def test_values_that_megatron_sets_later_are_not_checked(examine, planned):
    flags = list(planned[2])
    at = flags.index("--global-batch-size")
    del flags[at : at + 2]
    at = flags.index("--seq-length")
    del flags[at : at + 2]
    code, found = examine(*flags)
    assert code == 0, found
    unchecked = " | ".join(found["not checked"])
    assert "the sequence length: no --seq-length is given, the plan's is 32" in unchecked
    assert "how often each stratum is repeated" in unchecked


def test_a_directory_of_another_run_is_refused(examine, flags, tmp_path):
    other = plain_probe_set(16)
    write_run(tmp_path / "run", [0, 1], np.ones((16, 2)), other)
    code, found = examine(*flags)
    assert code == 2
    assert len(found["REFUSED"]) == 1
    assert f"holds losses of probe set {other.fingerprint}" in found["REFUSED"][0]


@pytest.mark.parametrize(("name", "code"), [("train", 2), ("training_log", 0)])
def test_a_missing_hook_is_named(examine, flags, monkeypatch, name, code):
    from megatron.training import training

    monkeypatch.delattr(training, name)
    found_code, found = examine(*flags)
    assert found_code == code
    assert len(found["MISSING"]) == 1
    assert f"megatron.training.training.{name}: " in found["MISSING"][0]


def test_the_doctor_says_how_each_hook_is_found(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    (train,) = (line for line in lines if "training.train: " in line)
    assert train.endswith("(arguments by name)")
    found = {line[2:22].strip(): line[22:] for line in lines if line.startswith("  ")}
    assert found["timers, tokenizer"] == "made with the flags"
    assert found["counters"] == "among the arguments"
    assert found["callbacks"] == "none"


def test_a_megatron_without_its_training_part_is_explained(capsys, monkeypatch):
    """As pip installs it on a Python before 3.12."""
    find_spec = importlib.util.find_spec

    def find(name, *args):
        return None if name == "megatron.training" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    cli.main(["doctor"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "  megatron-core " in line)
    assert "without megatron.training: its wheels have that from 0.17 on" in line
    assert "pip installs 0.16.1 on Python before 3.12" in line


WITHOUT_MEGATRON = """
import sys
sys.modules["megatron"] = None
from megatron_tokscale.cli import main
main(["doctor"])
print("no job is refused")
main(["doctor", "--", "--num-layers", "2"])
"""


@pytest.mark.slow
def test_a_machine_without_megatron_is_good_for_an_analysis():
    words = [sys.executable, "-c", WITHOUT_MEGATRON]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    alone, end, with_job = result.stdout.partition("no job is refused\n")
    assert end
    assert "megatron-core       not installed: enough for an analysis" in alone
    assert result.returncode == 2
    assert "the flags, while a hook is missing" in with_job
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("folder", "says"),
    [("auth", "another project of that name"), ("optimizers", "NVIDIA's, without CUDA extensions")],
)
def test_two_projects_are_called_apex(tmp_path, monkeypatch, folder, says):
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert says in installed._apex()


def test_a_checkout_of_megatron_stands_before_the_wheel(tmp_path):
    core = tmp_path / "megatron/core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise ImportError('looked at, not imported')")
    (core / "package_info.py").write_text("__version__ = '0.99.0+abcdef0'")
    code = "from megatron_tokscale.training.versions import find_megatron; print(*find_megatron())"
    environment = job_environment() | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found.split() == ["0.99.0+abcdef0", str(core), "False"]


# A data plan


@pytest.fixture
def planned(corpus: Corpus, tmp_path):
    """Flags of a job under a plan with strata, and what lies where they say."""
    scores = [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]
    for one in scores:
        one.save(tmp_path / f"scores/{one.dataset.name}.tokscale.safetensors")
    plan = stratified_plan(corpus, scores, max_epochs=3.0)
    plan.save(tmp_path / "plan.json")
    flags = (
        "--tokscale-plan",
        str(tmp_path / "plan.json"),
        "--tokscale-dir",
        str(tmp_path / "run"),
    )
    flags = (*flags, "--tokscale-scores-dir", str(tmp_path / "scores"), "--train-iters", "14")
    return plan, scores, job_flags(corpus, *flags)


def test_a_good_plan_passes(examine, planned, tmp_path):
    code, found = examine(*planned[2])
    assert code == 0
    assert "REFUSED" not in found
    assert f"plan {tmp_path / 'plan.json'} can be followed" in found["ok"]
    assert any("112 samples repeat no stratum more often" in text for text in found["ok"])
    assert not any("datasets are those" in text for text in found["not checked"])
    assert not (tmp_path / "run").exists()


def of_other_data(plan, scores):
    return replace(plan, datasets=(replace(plan.datasets[0], n_tokens=1), plan.datasets[1])), scores


def of_other_scores(plan, scores):
    return plan, [replace(scores[0], surprisal_Q=np.ones_like(scores[0].surprisal_Q)), scores[1]]


def of_another_tokenizer(plan, scores):
    return plan, [scores[0], replace(scores[1], digest="0" * 16)]


def repeated_too_often(plan, scores):
    return replace(plan, max_epochs=1.2), scores


BAD_PLANS = {
    of_other_data: "the plan is for other data: it has left (300 sequences, 1 tokens)",
    of_other_scores: "the plan was made with scores",
    of_another_tokenizer: "made for other data or another tokenizer",
    repeated_too_often: "stratum 'left/2' of the plan would be repeated for 1.",
}


@pytest.mark.parametrize("spoil", BAD_PLANS, ids=lambda spoil: spoil.__name__)
def test_a_plan_that_does_not_fit_the_jobs_data_is_refused(examine, planned, tmp_path, spoil):
    plan, scores = spoil(*planned[:2])
    plan.save(tmp_path / "plan.json")
    for one in scores:
        one.save(tmp_path / f"scores/{one.dataset.name}.tokscale.safetensors")
    code, found = examine(*planned[2])
    assert code == 2
    (reason,) = found["REFUSED"]
    assert BAD_PLANS[spoil] in reason


def test_the_doctor_and_the_job_count_the_same_samples(planned, corpus, tmp_path):
    """The limit at which the doctor refuses is that at which the job does."""
    parts = DataSource(corpus.data_path, "900,100,0").portions("train")
    sizes = [(part.n_tokens - 1) // SEQ_LENGTH for part in parts]
    assert sizes == [len(train_dataset(prefix, tmp_path)) for prefix in corpus.prefixes]


def test_strata_of_documents_are_counted_from_their_scores(examine, planned, corpus, tmp_path):
    scores = [with_falls(one, seed) for seed, one in enumerate(planned[1])]
    for one in scores:
        one.save(tmp_path / f"scores/{one.dataset.name}.tokscale.safetensors")
    plan = document_plan(corpus, scores, max_epochs=9.0)
    plan.save(tmp_path / "plan.json")
    code, found = examine(*planned[2])
    assert code == 0
    assert any("112 samples repeat no stratum more often" in text for text in found["ok"])
    cut = replace(plan.cuts[0], edges=(-0.5, 99.0))
    replace(plan, cuts=(cut, plan.cuts[1])).save(tmp_path / "plan.json")
    code, found = examine(*planned[2])
    assert code == 2
    assert found["REFUSED"] == [
        "stratum 'left/2' of the plan has no 32 training tokens for a sample; expected enough, as "
        "it has weight; make the plan with fewer quantiles, or give the stratum weight 0"
    ]


def test_strata_in_the_cache_need_no_scores(examine, planned, corpus, tmp_path):
    """The job reads the scores only where it makes the files of the strata."""
    scores = [with_falls(one, seed) for seed, one in enumerate(planned[1])]
    scores[1].save(tmp_path / "scores/right.tokscale.safetensors")
    (tmp_path / "scores/left.tokscale.safetensors").unlink()
    plan = document_plan(corpus, scores, max_epochs=9.0)
    plan.save(tmp_path / "plan.json")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tokscale-0-documents.npy").touch()  # of another plan
    probe = ("--tokscale-probe-set", str(corpus.probe_set))
    flags = [*planned[2], "--data-cache-path", str(cache), *probe]
    code, found = examine(*flags)
    assert code == 2
    assert ["left.tokscale.safetensors is not there" in line for line in found["REFUSED"]] == [True]
    lengths = IndexedTokens.open(corpus.prefixes[0]).lengths
    build_documents(plan, 0, lambda: scores[0], plan.documents[0], lengths, cache)
    code, found = examine(*flags)
    assert code == 0
    assert f"the strata of left are in {cache} already, so the job needs no scores" in found["ok"]
    assert any("112 samples repeat no stratum" in text for text in found["ok"])
    assert any("held out: the job trains on none" in text for text in found["ok"])
    assert not any("scores" in text for text in found["not checked"])


def test_data_given_by_parts_and_a_replan_interval_are_checked(examine, planned, corpus):
    _, _, flags = planned
    left, right = corpus.prefixes
    for name, n_words in (("--split", 2), ("--data-path", 5)):
        at = flags.index(name)
        del flags[at : at + n_words]
    parts = ["--train-data-path", right, left, "--valid-data-path", left]
    replan = ["--tokscale-probe-set", str(corpus.probe_set), "--tokscale-replan-interval"]
    code, found = examine(*flags, *parts, *replan, "9")
    assert code == 0
    assert any("112 samples repeat no stratum" in text for text in found["ok"])
    code, found = examine(*flags, *parts, *replan, "4")
    assert found["REFUSED"] == [
        "--tokscale-replan-interval is 4; expected steps above 4, which a decision takes; give more"
    ]


def test_live_weights_under_a_plan_by_target_scores_are_refused(
    examine, planned, corpus, tmp_path, monkeypatch
):
    plan, _, flags = planned
    path = tmp_path / "plan.json"
    replace(plan, provenance=replace(plan.provenance, policy="target")).save(path)
    watched = ["--tokscale-probe-set", str(corpus.probe_set)]
    code, found = examine(*flags, *watched)
    assert code == 0
    code, found = examine(*flags, *watched, "--tokscale-replan-interval", "9")
    assert code == 2
    refusal = (
        f"plan {path} is of the policy target, and --tokscale-replan-interval would replace its "
        "weights by others that follow falls; expected a plan of another policy; drop the flag"
    )
    assert found["REFUSED"] == [refusal]

    def follow(steps: int | None) -> Follower:
        """The part of a job under this plan, as the job makes it at its start."""
        settings = JobPlanSettings(
            path=path, scores_dir=None, overrides=False, steps_between_decisions=steps
        )
        of_job = JobSettings(
            probe=None, plan=settings, replay=None, run_dir=tmp_path, data_cache=None
        )
        return Follower(settings, of_job, Namespace(seq_length=SEQ_LENGTH))

    monkeypatch.setattr(follower, "check_plan", lambda args: None)  # a job's flags
    with pytest.raises(TokscaleError, match=f"^{re.escape(refusal)}$"):
        follow(9)
    assert follow(None).plan.provenance.policy == "target"


def test_data_that_is_elsewhere_is_left_to_the_job(examine, planned):
    flags = planned[2]
    flags[flags.index("--data-path") + 2] = "/nowhere/left"
    code, found = examine(*flags)
    assert code == 0
    assert any(
        "whether the job's datasets are those of the plan: /nowhere/left.idx" in text
        for text in found["not checked"]
    )


def test_a_run_directory_that_cannot_be_read_is_refused(corpus, examine):
    """A folder that this user may not enter; for root, one with too long a name."""
    folder = f"/tmp/{'x' * 300}"
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", folder)
    code, found = examine("-m", "megatron_tokscale.pretrain", *job_flags(corpus, *probe))
    assert code == 2
    assert any("File name too long" in line and folder in line for line in found["REFUSED"])
