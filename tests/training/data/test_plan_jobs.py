"""Real jobs under a plan train on the samples that the plan says, in its order."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import Corpus, job_flags, markov_documents, write_documents
from megatrons import OLD, python_path
from planned_jobs import (
    BATCH,
    dataset_of,
    make_scores,
    plan_of,
    stratified_plan,
    stream_of,
    tokens_of,
    train_dataset,
)
from recorded_job import read_samples, run_recorded, start

from megatron_tokscale.cli import main
from megatron_tokscale.data import Cut, Plan, Stage, Stratum, followed_plan
from megatron_tokscale.data.take_over import take_over

pytestmark = pytest.mark.megatron

STEPS = ("--train-iters", "14", "--save-interval", "4", "--ckpt-format", "torch_dist")
WORKERS = ("--num-workers", "2")


@pytest.fixture(scope="module")
def scores(corpus: Corpus):
    return [make_scores(prefix, seed) for seed, prefix in enumerate(corpus.prefixes)]


@pytest.fixture(scope="module")
def scores_dir(corpus: Corpus, scores, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    for one in scores:
        one.save(folder / f"{one.dataset.name}.tokscale.safetensors")
    return folder


@pytest.fixture(scope="module")
def plan(corpus: Corpus, scores):
    return stratified_plan(corpus, scores)


@pytest.fixture
def planned(plan, scores_dir, tmp_path):
    """Flags of a job under the plan with strata."""
    plan.save(tmp_path / "plan.json")
    return (
        "--tokscale-plan",
        str(tmp_path / "plan.json"),
        "--tokscale-scores-dir",
        str(scores_dir),
    )


@pytest.fixture(scope="module")
def stream(corpus: Corpus, plan, scores, tmp_path_factory):
    """The first 112 samples of the plan, without a job."""
    cache = tmp_path_factory.mktemp("offline")
    dataset = dataset_of(plan, corpus.prefixes, 112, cache, scores)
    epochs = [dataset.locate(k)[1] for k in range(112)]
    assert max(epochs) == 1
    return stream_of(dataset)


def test_killed_and_resumed_on_more_ranks_with_workers(corpus, planned, stream, tmp_path):
    flags = (*STEPS, *planned, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    run_recorded(corpus, tmp_path / "killed", 1, *flags, stop=11)
    killed = read_samples(tmp_path / "killed")
    assert killed == {k: stream[k] for k in range(80)}
    run_recorded(corpus, tmp_path / "resumed", 2, *flags, *WORKERS)
    assert read_samples(tmp_path / "resumed") == {k: stream[k] for k in range(64, 112)}


LAYOUTS = {
    "TP2 x PP2": (4, "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    "PP2 with VPP": (
        *(2, "--pipeline-model-parallel-size", "2"),
        *("--num-layers-per-virtual-pipeline-stage", "1"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_samples_in_any_layout(corpus, planned, stream, tmp_path, layout):
    n_processes, *flags = LAYOUTS[layout]
    run = ("--tokscale-dir", str(tmp_path / "run"), "--train-iters", "14")
    run_recorded(corpus, tmp_path / "seen", n_processes, *flags, *planned, *run)
    assert read_samples(tmp_path / "seen") == stream


def test_a_run_that_leaves_its_plan_gets_a_line(corpus, planned, tmp_path, capsys):
    run = ("--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "2")
    run = (*run, "--train-iters", "4")
    probe = ("--tokscale-probe-set", str(corpus.probe_set), "--tokscale-probe-schedule", "list:0")
    output = run_recorded(corpus, tmp_path / "a", 1, *run, *planned, *probe, "--exit-interval", "2")
    assert "draws as Megatron does" not in output
    output = run_recorded(corpus, tmp_path / "b", 1, *run, *probe)
    assert "this job has no --tokscale-plan, so from sample 16 on it draws as Mega" in output
    main(["plan", "show", str(tmp_path / "run")])
    assert "from sample 16 on the run has not followed it" in capsys.readouterr().out


@pytest.mark.parametrize("version", OLD)
def test_a_plan_and_new_weights_in_older_megatrons(corpus, planned, scores, tmp_path, version):
    flags = (*planned, "--tokscale-dir", str(tmp_path / "run"), "--train-iters", "14")
    flags = (
        *flags,
        "--tokscale-replan-interval",
        "8",
        "--tokscale-probe-set",
        str(corpus.probe_set),
    )
    path = python_path(version)
    output = run_recorded(corpus, tmp_path / "seen", 1, *flags, python_path=path)
    assert "tokscale: from sample 104 on the datasets weigh" in output
    plan = followed_plan(tmp_path / "run")
    assert [decision.step for decision in plan.decisions] == [8]
    dataset = dataset_of(plan, corpus.prefixes, 112, tmp_path / "offline", scores)
    assert read_samples(tmp_path / "seen") == stream_of(dataset)


# A plan of the user's own weights


def test_the_users_own_weights_give_megatrons_counts_and_leave_validation_and_test(
    corpus, tmp_path
):
    flags = ("--train-iters", "10", "--split", "900,60,40", "--eval-interval", "4")
    flags = (*flags, "--eval-iters", "2", "--data-cache-path", str(tmp_path / "cache"))
    blend = {"data": ["--data-path", "0.7", corpus.prefixes[0], "0.3", corpus.prefixes[1]]}
    run_recorded(corpus, tmp_path / "plain", 1, *flags, **blend)
    plan_of(corpus.prefixes, {0: (0.7, 0.3)}).save(tmp_path / "plan.json")
    plan = ("--tokscale-plan", str(tmp_path / "plan.json"), "--tokscale-dir", str(tmp_path / "run"))
    run_recorded(corpus, tmp_path / "planned", 1, *flags, *plan, **blend)

    for kind in ("eval", "train"):
        assert len(read_samples(tmp_path / "planned", kind)) >= 4 * BATCH
    assert read_samples(tmp_path / "planned", "eval") == read_samples(tmp_path / "plain", "eval")
    plain, planned = read_samples(tmp_path / "plain"), read_samples(tmp_path / "planned")
    assert plain != planned
    of_left = set(stream_of(train_dataset(corpus.prefixes[0], tmp_path / "cache")).values())
    drawn = [[samples[k] in of_left for k in range(80)] for samples in (plain, planned)]
    assert drawn[0] == drawn[1]
    assert 0 < sum(drawn[0]) < 80


# Another plan on the way


def test_an_accepted_plan_continues_where_the_first_one_stopped(
    corpus, plan, scores, scores_dir, tmp_path
):
    """First other weights, then a dataset in the place of another."""
    extra = write_documents(tmp_path / "extra", markov_documents(7))
    second = replace(plan, seed=99, stages=(Stage(0, (1, 4)),))
    third = Plan(
        datasets=(plan.datasets[1], plan_of((extra,), {0: (1,)}).datasets[0]),
        strata=(
            *(replace(plan.strata[z], dataset=0) for z in plan.strata_of(1)),
            Stratum("extra", 1),
        ),
        stages=(Stage(0, (1, 1)), Stage(70, (1, 3), (1, 0, 0, 1))),
        seq_length=plan.seq_length,
        seed=99,
        cuts=(plan.cuts[1], None),
    )
    flags = (
        "--tokscale-scores-dir",
        str(scores_dir),
        "--save-interval",
        "4",
        "--exit-interval",
        "4",
    )
    flags = (*flags, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    flags = (*flags, "--train-iters", "14", "--tokscale-plan", str(tmp_path / "plan.json"))
    plan.save(tmp_path / "plan.json")
    run_recorded(corpus, tmp_path / "first", 1, *flags)

    second.save(tmp_path / "plan.json")
    before = (tmp_path / "run/tokscale/plan.json").read_bytes()
    refused = start(1, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags))
    assert refused.code == 2
    (line,) = refused.refusals
    assert "has consumed 32 samples under plan" in line and "--tokscale-override-plan" in line
    assert (tmp_path / "run/tokscale/plan.json").read_bytes() == before

    plan.save(tmp_path / "plan.json")
    reseeded = start(
        1, "-m", "megatron_tokscale.pretrain", *job_flags(corpus, *flags, "--seed", "5")
    )
    assert reseeded.code == 2
    (line,) = reseeded.refusals
    assert "consumed are of --seed 1234, --split 900,100,0, this job's are of --seed 5" in line
    second.save(tmp_path / "plan.json")

    output = run_recorded(corpus, tmp_path / "second", 1, *flags, "--tokscale-override-plan")
    assert f"tokscale: plan {second.fingerprint} holds from here on" in output
    third.save(tmp_path / "plan.json")
    blend = ["--data-path", "0.5", extra, "0.5", corpus.prefixes[1]]
    flags = (*flags, "--tokscale-override-plan")
    run_recorded(corpus, tmp_path / "third", 1, *flags, data=blend)
    run_recorded(corpus, tmp_path / "fourth", 2, *flags, *WORKERS, data=blend)

    seen = {}
    for name, first, stop in (("first", 0, 32), ("second", 32, 64), ("third", 64, 96)):
        samples = read_samples(tmp_path / name)
        assert list(samples) == list(range(first, stop))
        seen |= samples
    seen |= read_samples(tmp_path / "fourth")
    whole = take_over(take_over(plan, second, 32), third, 64)
    prefixes = (*corpus.prefixes, extra)
    dataset = dataset_of(whole, prefixes, 112, tmp_path / "cache", [*scores, None])
    assert seen == stream_of(dataset)

    # Without any of the plan's own bookkeeping: each sample of a stratum as often as the others.
    drawn = Counter(seen.values())
    for z in range(whole.n_strata):
        part = dataset.datasets[whole.strata[z].dataset]
        counts = [drawn[tokens_of(part, int(n))] for n in dataset.strata.numbers(z)]
        assert max(counts) - min(counts) <= 1
    assert Counter(drawn.values())[1] > 60


# Megatron's other ways to name and to open data


BY_SAMPLES = (
    *("--train-samples", "96", "--lr-decay-samples", "96", "--lr-warmup-samples", "8"),
    *("--rampup-batch-size", "4", "4", "24"),
)
IN_STEPS = ("--lr-decay-iters", "--lr-warmup-iters")


def test_parts_of_their_own_opened_from_a_cache_while_the_batch_grows(corpus, scores, tmp_path):
    """The caches are those of a job without a plan, which has no index of one epoch."""
    left, right = corpus.prefixes
    parts = ["--train-data-path", "0.6", left, "0.4", right, "--valid-data-path", left]
    flags = (*BY_SAMPLES, "--data-cache-path", str(tmp_path / "cache"))
    options = {"without": ("--split", *IN_STEPS), "data": parts}
    run_recorded(corpus, tmp_path / "plain", 1, *flags, **options)
    counts = dict.fromkeys(corpus.prefixes, (300, 301))
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    fast = ("--dataloader-fast-cache-load", "--dataloader-defer-npy-index-mmap")
    fast = (*fast, "--per-dataset-sequences-path", str(tmp_path / "counts.json"))
    for one in scores:
        one.save(tmp_path / f"{one.dataset.name}.tokscale.safetensors")
    plan = stratified_plan(corpus, scores)
    plan.save(tmp_path / "plan.json")
    planned = (
        "--tokscale-plan",
        str(tmp_path / "plan.json"),
        "--tokscale-scores-dir",
        str(tmp_path),
    )
    planned = (*planned, "--tokscale-dir", str(tmp_path / "run"))
    run_recorded(corpus, tmp_path / "fast", 2, *flags, *fast, *planned, *WORKERS, **options)

    dataset = dataset_of(plan, corpus.prefixes, 96, tmp_path / "offline", scores, split=None)
    seen = read_samples(tmp_path / "fast")
    assert len(seen) == len(read_samples(tmp_path / "plain")) >= 88
    assert seen == stream_of(dataset, 0, len(seen))


def test_phases_go_on_in_the_plan(corpus, tmp_path):
    """On a blend without weights, whose datasets Megatron would go through once."""
    plan = plan_of(corpus.prefixes, {0: (3, 1), 50: (1, 3)})
    plan.save(tmp_path / "plan.json")
    flags = ("--tokscale-plan", str(tmp_path / "plan.json"), "--phase-transition-iterations", "5")
    flags = (*flags, *BY_SAMPLES[:6], "--ckpt-format", "torch_dist", "--save-interval", "100")
    flags = (*flags, "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"))
    options = {"without": IN_STEPS, "data": ["--data-path", *corpus.prefixes]}
    for number, size in enumerate((1, 2)):
        run_recorded(corpus, tmp_path / f"phase{number}", size, *flags, **options)
    stream = stream_of(dataset_of(plan, corpus.prefixes, 96, tmp_path / "offline"))
    assert read_samples(tmp_path / "phase0") == {k: stream[k] for k in range(40)}
    assert read_samples(tmp_path / "phase1") == {k: stream[k] for k in range(40, 96)}


# What users look at


def test_shares_and_epochs_are_logged_of_a_single_dataset_with_scores_beside_it(
    corpus, scores, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prefix = tmp_path / "left"
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}").symlink_to(f"{corpus.prefixes[0]}{suffix}")
    scores[0].save(Path(f"{prefix}.tokscale.safetensors"))
    plan = plan_of(
        (str(prefix),),
        {0: (1,)},
        strata=(Stratum("early", 0, 0.5), Stratum("late", 0, 0.49), Stratum("tiny", 0, 0.01)),
        stages=(Stage(0, (1,), (0.6, 0.2, 0.2)), Stage(20, (1,), (0.2, 0.2, 0.6))),
        cuts=(Cut(scores[0].fingerprint, order="frequency"),),
    )
    plan.save(tmp_path / "plan.json")
    flags = ("--tokscale-plan", str(tmp_path / "plan.json"), "--tokscale-dir", str(tmp_path))
    flags = (*flags, "--tensorboard-dir", str(tmp_path / "board"), "--train-iters", "6")
    flags = (*flags, "--log-interval", "3", "--tensor-model-parallel-size", "2")
    data = ["--data-path", str(prefix)]
    output = run_recorded(corpus, tmp_path / "seen", 2, *flags, data=data)

    dataset = dataset_of(plan, (str(prefix),), 48, tmp_path / "offline", scores)
    seen = read_samples(tmp_path / "seen")
    assert seen == stream_of(dataset)
    events = EventAccumulator(str(tmp_path / "board")).Reload()

    def logged(name):
        return {event.step: event.value for event in events.Scalars(f"tokscale/{name}")}

    target = {
        "early": (20 * 0.6 + 4 * 0.2, 20 * 0.6 + 28 * 0.2),
        "late": (24 * 0.2, 48 * 0.2),
        "tiny": (20 * 0.2 + 4 * 0.6, 20 * 0.2 + 28 * 0.6),
        "left": (24, 48),
    }
    own = {
        stratum.name: {tokens_of(dataset.datasets[0], int(n)) for n in dataset.strata.numbers(z)}
        for z, stratum in enumerate(plan.strata)
    }
    own["left"] = set().union(*own.values())
    for name, members in own.items():
        for step, due in zip((3, 6), target[name], strict=True):
            n_samples = step * BATCH
            drawn = sum(seen[k] in members for k in range(n_samples))
            assert logged(f"plan share {name}")[step] == pytest.approx(due / n_samples)
            assert logged(f"drawn share {name}")[step] == pytest.approx(drawn / n_samples)
            assert logged(f"epochs {name}")[step] == pytest.approx(drawn / len(members))
    assert list(logged("epochs tiny vs samples")) == [24, 48]
    assert logged("epochs tiny")[6] > 2
    assert "tokscale plan at step 6 | samples off the plan by dataset: 0.00 at most" in output
