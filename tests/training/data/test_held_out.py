"""A job and the doctor say whether the watched tokens are held out of the training data."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, Corpus, job_flags, run_alone, run_forked
from planned_jobs import make_scores

from megatron_tokscale.cli import main
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data import Cut, Plan, Stage, Stratum
from megatron_tokscale.doctor import doctor
from megatron_tokscale.probe import ProbeSet
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.probe.probe_set import ProbeSetOrigin
from megatron_tokscale.store import Run
from megatron_tokscale.training.data.held_out import TrainedPart, held_out


@pytest.fixture(scope="module")
def probe_set(corpus: Corpus):
    """Of the valid part under 900,100,0: documents 270 to 299 of both datasets."""
    return ProbeSet.load(corpus.probe_set)


def with_prefixes(probe_set: ProbeSet, *prefixes: str) -> ProbeSet:
    return replace(probe_set, origin=replace(probe_set.origin, prefixes=prefixes))


def trained(data_path, split) -> list[TrainedPart]:
    return [
        TrainedPart(part.tokens.prefix, part.sequences)
        for part in DataSource(data_path, split).portions("train")
    ]


def test_tokens_of_the_valid_part_are_held_out(corpus, probe_set):
    found = held_out(probe_set, trained(corpus.data_path, "900,100,0"))
    pairs = {*zip(probe_set.dataset_N.tolist(), probe_set.document_N.tolist(), strict=True)}
    assert found.state == "held out"
    assert f"none of the {len(pairs)} watched documents" in found.line


@pytest.mark.parametrize("split", ["100,0,0", "940,60,0", "1,0,0"])
def test_watched_tokens_that_are_trained_on_are_counted(corpus, probe_set, split):
    stop = {"100,0,0": 300, "940,60,0": 282, "1,0,0": 300}[split]
    found = held_out(probe_set, trained(corpus.data_path, split))
    rows = zip(probe_set.dataset_N.tolist(), probe_set.document_N.tolist(), strict=True)
    inside = [(dataset, document) for dataset, document in rows if document < stop]
    assert len(inside) > 0
    assert found.state == "trained on"
    assert found.line.startswith(f"{len(inside)} of the {probe_set.n_tokens} watched tokens (")
    assert f"({len({*inside})} of " in found.line
    assert "their losses are not of unseen text" in found.line
    assert "\n" not in found.line


def test_a_prefix_that_cannot_be_read_is_unknown_and_ends_no_job(corpus, probe_set):
    """A folder that this user may not enter; for root, one with too long a name."""
    elsewhere = [f"/{'x' * 300}/{name}" for name in probe_set.datasets]
    moved = with_prefixes(probe_set, *elsewhere)
    found = held_out(moved, trained(corpus.data_path, "100,0,0"))
    assert found.state == "unknown"
    assert found.line.startswith("whether the watched tokens are held out is not known")


def test_only_what_the_job_trains_on_counts(corpus, probe_set):
    """Per-split data, and a dataset that the job leaves out."""
    left, right = corpus.prefixes
    parts = {"train": [left], "valid": [right]}
    found = held_out(probe_set, trained(parts, None))
    assert found.state == "trained on"
    n_left = int((probe_set.dataset_N == probe_set.datasets.index("left")).sum())
    assert found.line.startswith(f"{n_left} of the ")
    assert left in found.line
    assert right not in found.line
    only_right = trained(["1", right], "900,100,0")
    assert held_out(probe_set, only_right).state == "held out"


def test_a_set_of_the_training_part_says_that_it_watches_memorisation(corpus):
    settings = ProbeSettings(
        data_path=corpus.data_path,
        split="900,100,0",
        part="train",
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        n_tokens=200,
        eod=EOD,
    )
    probe_set = build_probe_set(settings)
    found = held_out(probe_set, trained(corpus.data_path, "900,100,0"))
    assert found.state == "trained on"
    n = probe_set.n_tokens
    assert found.line.startswith(f"{n} of the {n} watched tokens")
    assert "built from a training part, and watches memorisation" in found.line


def test_single_documents_that_a_job_leaves_out_are_held_out(corpus, probe_set):
    """As those that a plan keeps out, whose numbers lie among those of the training."""
    left, right = corpus.prefixes
    kept_out = np.unique(probe_set.document_N[probe_set.dataset_N == 0])
    others = np.setdiff1d(np.arange(300, dtype=np.int32), kept_out)
    parts = [TrainedPart(left, others[::2]), TrainedPart(left, others[1::2])]
    parts.append(TrainedPart(right, np.zeros(0, np.int32)))
    assert held_out(probe_set, parts).state == "held out"
    # One of them in either part is found.
    for document in (kept_out[0], kept_out[-1]):
        found = held_out(probe_set, [*parts, TrainedPart(left, np.array([document]))])
        n = int(((probe_set.document_N == document) & (probe_set.dataset_N == 0)).sum())
        assert found.line.startswith(f"{n} of the {probe_set.n_tokens} watched tokens (1 of ")


def test_a_set_of_a_plan_that_the_job_does_not_follow_names_the_plan(corpus, probe_set):
    of_plan = replace(probe_set, origin=replace(probe_set.origin, part="train", plan="0123"))
    found = held_out(of_plan, trained(corpus.data_path, "1,0,0"))
    assert found.state == "trained on"
    assert "plan 0123 keeps them out, and the job does not follow it; give the job" in found.line


def elsewhere(corpus: Corpus, folder: Path, *, link: bool = False) -> list[str]:
    folder.mkdir()
    for prefix in corpus.prefixes:
        for suffix in (".idx", ".bin"):
            source = Path(prefix + suffix)
            target = folder / source.name
            target.symlink_to(source) if link else shutil.copy(source, target)
    return [str(folder / Path(prefix).name) for prefix in corpus.prefixes]


@pytest.mark.parametrize("link", [True, False])
def test_the_same_files_in_another_place_are_the_same(corpus, probe_set, tmp_path, link):
    data_path = elsewhere(corpus, tmp_path / "other", link=link)
    there = held_out(probe_set, trained(data_path, "1,0,0"))
    assert there.state == "trained on"
    assert there.line.startswith(f"{probe_set.n_tokens} of the ")


def test_other_data_of_the_same_name_are_other_data(corpus, probe_set, tmp_path):
    data_path = elsewhere(corpus, tmp_path / "other")
    for suffix in (".idx", ".bin"):  # swap the two
        left, right = (Path(prefix + suffix) for prefix in data_path)
        left.rename(tmp_path / "left")
        right.rename(left)
        (tmp_path / "left").rename(right)
    assert held_out(probe_set, trained(data_path, "1,0,0")).state == "held out"


def test_unknown_training_data_get_a_line(corpus, probe_set):
    parts = trained(corpus.data_path, "1,0,0")
    gone = with_prefixes(probe_set, "/nowhere/left", "/nowhere/right")
    found = held_out(gone, parts)
    assert found.state == "unknown"
    assert "is not known" in found.line
    # Whatever they are, the documents that the job trains on are not among the watched ones.
    assert held_out(gone, trained(corpus.data_path, "900,100,0")).state == "held out"
    assert held_out(probe_set, None).state == "unknown"


@pytest.mark.megatron
def test_the_job_and_the_doctor_say_the_same(corpus: Corpus, probe_set, tmp_path, capsys):
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-dir", str(tmp_path / "run"))
    words = job_flags(corpus, *probe, "--train-iters", "1", "--split", "940,60,0")
    output = run_forked(2, "-m", "megatron_tokscale.pretrain", *words)
    expected = held_out(probe_set, trained(corpus.data_path, "940,60,0"))
    assert expected.state == "trained on"
    assert [line for line in output.splitlines() if "watched tokens" in line] == [
        f"tokscale: {expected.line}"
    ]
    doctor.examine(words)
    assert f"WARNING             {expected.line}\n" in capsys.readouterr().out


def save_plan(corpus: Corpus, folder: Path, seed: int = 5) -> Plan:
    """Save a plan that keeps seven documents of four strata out, with its scores, in `folder`."""
    scores = [make_scores(prefix, number) for number, prefix in enumerate(corpus.prefixes)]
    for one in scores:
        one.save(folder / f"{one.dataset.name}.tokscale.safetensors")
    cuts = [Cut(one.fingerprint, unit="documents", edges=(10.5,), held_out=7) for one in scores]
    plan = Plan(
        datasets=tuple(one.dataset for one in scores),
        strata=tuple(Stratum(f"{name}/{z}", d, 0.5) for d, name in enumerate("lr") for z in (0, 1)),
        stages=(Stage(0, (1.0, 1.0)),),
        seq_length=SEQ_LENGTH,
        seed=seed,
        cuts=tuple(cuts),
        documents=((0, 270), (0, 270)),
    )
    plan.save(folder / "plan.json")
    return plan


def build_strata(folder: Path) -> str:
    """Build the probe set of the documents that the plan in `folder` keeps out."""
    out = str(folder / "strata.safetensors")
    files = ("--plan", str(folder / "plan.json"), "--scores-dir", str(folder))
    vocabulary = ("--vocab-size", str(VOCAB_SIZE), "--eod", str(EOD))
    main(["probe", "build", *files, *vocabulary, "--out", out])
    return out


@pytest.mark.megatron
def test_live_weights_by_the_strata_of_another_plan_are_refused(corpus, tmp_path, capsys):
    """The strata of both have the same names, and each keeps other documents out."""
    (tmp_path / "other").mkdir()
    plan = save_plan(corpus, tmp_path, seed=5)
    other = save_plan(corpus, tmp_path / "other", seed=6)
    assert plan.strata == other.strata
    words = (
        *("--tokscale-probe-set", str(corpus.probe_set), build_strata(tmp_path / "other")),
        *("--tokscale-plan", str(tmp_path / "plan.json"), "--tokscale-scores-dir", str(tmp_path)),
        *("--tokscale-replan-interval", "6", "--tokscale-dir", str(tmp_path / "run")),
        *("--train-iters", "1"),
    )
    job = run_alone(corpus, *words)
    assert job.returncode == 2
    (line,) = [text for text in job.stderr.splitlines() if text.startswith("megatron-tokscale: ")]
    assert "would weigh strata by those of another plan: " in line
    assert f"plan {other.fingerprint} keeps them out" in line
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        doctor.examine(job_flags(corpus, *words))
    reason = line.removeprefix("megatron-tokscale: ")
    assert f"REFUSED             {reason}\n" in capsys.readouterr().out


@pytest.mark.megatron
def test_a_set_of_the_documents_that_the_plan_keeps_out_is_held_out(corpus, tmp_path, capsys):
    plan, out = save_plan(corpus, tmp_path), build_strata(tmp_path)
    run_dir = ("--tokscale-dir", str(tmp_path / "run"), "--train-iters", "1")
    words = job_flags(corpus, "--tokscale-probe-set", str(corpus.probe_set), out, *run_dir)
    follows = ("--tokscale-plan", str(tmp_path / "plan.json"))
    follows += ("--tokscale-scores-dir", str(tmp_path))
    for given, state in ((follows, "held out"), ((), "trained on")):
        output = run_forked(2, "-m", "megatron_tokscale.pretrain", *words, *given)
        lines = [line for line in output.splitlines() if line.startswith("tokscale: strata: ")]
        expected = {
            "held out": "held out: the job trains on none of the 28 watched documents",
            "trained on": f"plan {plan.fingerprint} keeps them out, and the job does not follow it",
        }[state]
        assert len(lines) == 1
        assert expected in lines[0]
        doctor.examine([*words, *given])
        found = capsys.readouterr().out
        assert lines[0].removeprefix("tokscale: strata: ") in found
        assert found.count("WARNING") == (state == "trained on")
    # The losses are of the strata.
    strata = Run.open(tmp_path / "run/probe-sets/strata")
    assert strata.probe_set.datasets == tuple(stratum.name for stratum in plan.strata)


def test_documents_are_counted_by_dataset():
    """Two datasets have documents of the same number."""
    shape = (2, 4)
    probe_set = ProbeSet(
        tokens_BS=np.zeros(shape, np.int32),
        labels_BS=np.zeros(shape, np.int32),
        mask_BS=np.ones(shape, np.bool_),
        document_BS=np.full(shape, 5, np.int32),
        position_BS=np.zeros(shape, np.int32),
        dataset_BS=np.array([[0] * 4, [1] * 4], np.int16),
        datasets=("a", "b"),
        vocab_size=10,
        origin=ProbeSetOrigin(
            split=None,
            part="valid",
            per_dataset="equal",
            seed=1234,
            eod=None,
            prefixes=("x/a", "x/b"),
        ),
    )
    found = held_out(probe_set, [TrainedPart("x/a", range(6)), TrainedPart("x/b", range(6, 9))])
    assert found.line.startswith("4 of the 8 watched tokens (1 of 2 documents)")
