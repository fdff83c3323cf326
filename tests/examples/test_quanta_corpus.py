"""The corpus of known quanta, the links from truth to gain, and the study's tables.

Nothing is trained here. Shapes: F facts, G kinds, Q documents, T triples, L tokens, N watched
tokens.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from quanta_corpus import learned, links, study
from quanta_corpus.corpus import NO_FACT, Mix, Truth, WatchedTruth, World, write_corpus
from quanta_corpus.tables import report
from reweighting.ledger import Ledger
from runs import write_run

from megatron_tokscale.cli.entry import make_parser
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.records import to_json
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.data import Cut, DocumentScores, Plan, Stage, Stratum
from megatron_tokscale.data.scores import data_digest, identity_of
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set

SMALL = Mix(documents=4000, topics=5, facts=12, subjects=30, relations=4, objects=20)
HERE = Path(study.__file__).parent


@pytest.fixture(scope="module")
def world():
    return World(SMALL)


@pytest.fixture(scope="module")
def documents(world):
    return world.documents(world.natural_kinds(), 2)


# The corpus


def test_the_studys_corpus_has_the_announced_sizes():
    world = World(study.Settings.load(HERE / "settings.json").corpus)
    assert (world.vocab_size, world.length, len(world.kind_F)) == (827, 64, 40 * 160 + 10)
    assert world.first_subject == 43
    assert world.share_G.sum() == pytest.approx(1)
    assert world.share_G[[world.junk, world.boilerplate]].tolist() == [0.15, 0.2]


def test_topics_and_facts_follow_their_power_laws():
    world = World(Mix())
    topics = world.share_G[:40]
    assert topics / topics[0] == pytest.approx([g**-0.7 for g in range(1, 41)])
    for topic in (0, 39):
        within = world.within_F[world.kind_F == topic]
        assert within / within[0] == pytest.approx([j**-1.3 for j in range(1, 161)])
    assert world.frequency_F.sum() == pytest.approx(0.85)  # all triples but junk's


def test_kinds_of_documents_come_as_often_as_their_shares(world, documents):
    counts = np.bincount(documents.kind_Q, minlength=world.n_kinds)
    assert scipy.stats.chisquare(counts, world.share_G * len(documents.kind_Q)).pvalue > 1e-4


def test_facts_come_as_often_as_their_frequencies(world, documents):
    fact = documents.fact_QT[documents.fact_QT != NO_FACT]
    counts = np.bincount(fact, minlength=len(world.frequency_F))
    expected = world.frequency_F / world.frequency_F.sum() * len(fact)
    # Documents are drawn first, so facts of one kind are compared with each other.
    for kind in np.unique(world.kind_F):
        own_F = world.kind_F == kind
        scale = counts[own_F].sum() / expected[own_F].sum()
        assert scipy.stats.chisquare(counts[own_F], expected[own_F] * scale).pvalue > 1e-4


def test_subject_and_relation_determine_the_object_but_in_junk(world, documents):
    triples_QT3 = documents.token_QL[:, 1:].reshape(*documents.fact_QT.shape, 3)
    known = {}
    for fact, triple in zip(documents.fact_QT.ravel(), triples_QT3.reshape(-1, 3), strict=True):
        if fact != NO_FACT:
            assert known.setdefault(int(fact), tuple(triple)) == tuple(triple)
    pairs = Counter(triple[:2] for triple in known.values())
    assert set(pairs.values()) == {1}
    junk = triples_QT3[documents.kind_Q == world.junk].reshape(-1, 3)
    counts = np.bincount(junk[:, 2] - world.first_object, minlength=SMALL.objects)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert (documents.fact_QT[documents.kind_Q == world.junk] == NO_FACT).all()


def test_every_token_lies_in_the_range_of_its_role(world, documents):
    token_QL = documents.token_QL
    assert np.array_equal(token_QL[:, 0], 1 + documents.kind_Q)
    edges = [world.first_subject, world.first_relation, world.first_object, world.vocab_size]
    for role in range(3):
        own = token_QL[:, 1 + role :: 3]
        assert edges[role] <= own.min() and own.max() < edges[role + 1]


def test_without_junk_and_boilerplate_all_documents_are_of_topics():
    world = World(replace(SMALL, junk=0.0, boilerplate=0.0))
    assert world.natural_kinds().max() < SMALL.topics
    assert world.frequency_F.sum() == pytest.approx(1)


def test_shares_that_leave_nothing_to_the_topics_are_refused():
    with pytest.raises(TokscaleError, match=r"junk is 0\.6 and boilerplate 0\.4"):
        Mix(junk=0.6, boilerplate=0.4)


def test_the_corpus_is_the_same_on_every_call(world, documents):
    again = World(SMALL).documents(World(SMALL).natural_kinds(), 2)
    for first, second in zip(documents, again, strict=True):
        assert np.array_equal(first, second)


# Files


@pytest.fixture(scope="module")
def prefix(documents, tmp_path_factory):
    pytest.importorskip("megatron.core")
    prefix = tmp_path_factory.mktemp("data") / "quanta"
    few = type(documents)(*(array[:200] for array in documents))
    assert write_corpus(few, prefix) == 200 * 64
    return prefix


def test_what_is_written_is_what_is_read(prefix, documents):
    tokens = IndexedTokens.open(str(prefix))
    assert tokens.lengths.tolist() == [64] * 200
    assert np.array_equal(tokens.stream(range(200)).reshape(200, 64), documents.token_QL[:200])
    truth = Truth.load(prefix)
    assert np.array_equal(truth.kind_Q, documents.kind_Q[:200])
    assert np.array_equal(truth.fact_QT, documents.fact_QT[:200])


@pytest.fixture
def probe_set(prefix, world):
    settings = ProbeSettings(
        data_path=[str(prefix)],
        split="50,50,0",
        seq_length=64,
        vocab_size=world.vocab_size,
        n_tokens=3000,
        eod=None,
    )
    return build_probe_set(settings)


def test_the_truth_of_a_watched_token_is_that_of_its_label(prefix, world, probe_set):
    watched = Truth.load(prefix).of(probe_set)
    assert (watched.document_N >= 100).all()
    is_object_N = probe_set.label_N >= world.first_object
    assert np.array_equal(watched.object_N, is_object_N)
    assert is_object_N.mean() == pytest.approx(1 / 3)
    known_N = watched.fact_N != NO_FACT
    _, object_F = world._facts
    labels = probe_set.label_N[known_N] - world.first_object
    assert np.array_equal(object_F[watched.fact_N[known_N]], labels)
    assert not (known_N & ~is_object_N).any()
    assert (watched.kind_N[is_object_N & ~known_N] == world.junk).all()


# Links from the truth to a gain


def test_perfect_weights_gain_the_squared_variation_of_the_falls():
    fall_Q = np.random.default_rng(0).lognormal(0, 0.5, 100_000)
    assert links.log_speedup(fall_Q, fall_Q) == pytest.approx(math.exp(0.25) - 1, rel=0.02)
    assert links.log_speedup(np.ones(100_000), fall_Q) == pytest.approx(0, abs=1e-12)
    assert study.squared_variation(fall_Q) == pytest.approx(math.exp(0.25) - 1, rel=0.02)


def test_weights_without_information_gain_nothing():
    rng = np.random.default_rng(0)
    weight_Q, fall_Q = rng.lognormal(0, 1, (2, 100_000))
    assert links.log_speedup(weight_Q, fall_Q) == pytest.approx(0, abs=0.02)


def test_strata_keep_the_variance_between_them():
    value_Q = np.array([4.0, 1.0, 3.0, 2.0])
    stratum_Q = links.quantile_strata(value_Q, 2)
    assert stratum_Q.tolist() == [1, 0, 1, 0]
    assert links.by_stratum(value_Q, stratum_Q).tolist() == [3.5, 1.5, 3.5, 1.5]


def test_true_falls_are_those_of_the_facts_and_of_the_kinds(world, documents):
    """Objects of facts fall by their frequency, junk not at all, other tokens by 0.1 nats."""
    log_p_F = np.log(world.frequency_F)
    fall_F = (log_p_F - log_p_F.min()) / 10
    object_QL = np.zeros_like(documents.token_QL, bool)
    object_QL[:, 3::3] = True
    fact_QL = np.full_like(documents.token_QL, NO_FACT)
    fact_QL[:, 3::3] = documents.fact_QT
    fall_QL = np.where(fact_QL == NO_FACT, np.where(object_QL, 0.0, 0.1), fall_F[fact_QL])
    kind_QL = np.repeat(documents.kind_Q[:, None], 64, axis=1)
    watched = WatchedTruth(
        np.repeat(np.arange(len(fact_QL)), 63),
        *(array[:, 1:].ravel() for array in (kind_QL, object_QL, fact_QL)),
    )
    truth = Truth(documents.kind_Q, documents.fact_QT)
    found = links.true_falls(world, watched, fall_QL[:, 1:].ravel(), truth)
    mean_Q = fall_QL[:, 1:].mean(axis=1)
    for kind in range(world.n_kinds):
        own_Q = documents.kind_Q == kind
        assert found.kind_G[kind] == pytest.approx(mean_Q[own_Q].mean())
    assert found.document_Q == pytest.approx(mean_Q, abs=0.02)
    assert np.corrcoef(found.document_Q, mean_Q)[0, 1] > 0.99


def test_each_link_is_one_more_than_the_link_before():
    """Two kinds of equal size, perfect scores, a plan with the floor: every link in closed form."""
    kind_Q = np.repeat([0, 1], 500)
    fall_G = np.array([0.5, 1.5])
    fall_Q = fall_G[kind_Q]
    power = fall_G**0.8 / (fall_G**0.8).mean()
    planned_G = 0.25 + 0.75 * power
    drawn = links.Drawn(np.arange(1000), kind_Q, planned_G[kind_Q])
    found = list(links.links(drawn, links.TrueFalls(fall_G, fall_Q), kind_Q, fall_Q).values())
    cv2 = 0.25
    assert found[:5] == pytest.approx([cv2] * 5)
    assert found[5] == pytest.approx((power * fall_G).mean() - 1)
    assert found[6] == pytest.approx(0.75 * found[5])
    assert found == sorted(found, reverse=True)


def test_a_plan_draws_the_documents_of_its_strata_by_its_mean_weights(prefix):
    tokens = IndexedTokens.open(str(prefix))
    scores = DocumentScores(
        surprisal_Q=np.zeros(200, np.float32),
        watched_Q=np.zeros(200, np.int32),
        dataset=identity_of(tokens),
        digest=data_digest(tokens),
        fall_Q=np.arange(200, dtype=np.float32),
    )
    plan = Plan(
        datasets=(scores.dataset,),
        strata=(Stratum("quanta/q1", 0, 0.25), Stratum("quanta/q2", 0, 0.75)),
        stages=(Stage(0, (1.0,)), Stage(10, (1.0,), (0.1, 0.9))),
        seq_length=64,
        seed=0,
        cuts=(Cut(scores.fingerprint, "fall", unit="documents", edges=(45.0,), held_out=5),),
        documents=((0, 180),),
    )
    drawn = links.Drawn.by(plan, scores, prefix, 40)
    low, high = (drawn.document_Q[drawn.stratum_Q == z] for z in (0, 1))
    assert len(low) == 45 - 5 and set(low) < set(range(45))
    assert len(high) == 135 - 5 and set(high) < set(range(45, 180))
    # 10 samples at the shares, 30 at 0.1 and 0.9.
    assert np.unique(drawn.weight_Q).tolist() == pytest.approx([0.1375 / 0.25, 0.8625 / 0.75])
    assert (drawn.weight_Q[drawn.stratum_Q == 0] < 1).all()


# Learning times beside the truth


A_STEP = 32.0 * 21  # triples of a step


def fact_tokens(world, last_step=np.inf):
    """Tokens of facts that are learned at step 60 + 20 / (exposures a step), with some scatter."""
    rng = np.random.default_rng(0)
    fact_N = rng.choice(len(world.frequency_F), 20_000, p=world.frequency_F / 0.85)
    rate_N = world.frequency_F[fact_N] * A_STEP
    step_N = (60 + 20 / rate_N) * np.exp(rng.normal(0, 0.1, len(fact_N)))
    return learned.FactTokens(fact_N, np.where(step_N > last_step, np.inf, step_N), 0 * step_N)


@pytest.fixture(scope="module")
def full_world():
    return World(Mix())


def test_the_planted_order_of_facts_is_found(full_world):
    tokens = fact_tokens(full_world)
    order = learned.learning_order(tokens, full_world)
    assert order["rho"] > 0.98 and order["rho_of_bins"] > 0.999
    shuffled = replace(tokens, step_N=np.random.default_rng(1).permutation(tokens.step_N))
    assert abs(learned.learning_order(shuffled, full_world)["rho"]) < 0.1


def test_facts_that_are_not_learned_come_last(full_world):
    tokens = fact_tokens(full_world, last_step=600)
    assert 0.05 < tokens.censored_N.mean() < 0.5
    assert learned.learning_order(tokens, full_world)["rho"] > 0.9


def test_a_known_token_without_a_learning_time_moves_no_median(full_world):
    tokens = fact_tokens(full_world)
    some_N = np.random.default_rng(1).random(len(tokens.step_N)) < 0.2
    fewer = replace(tokens, step_N=np.where(some_N, np.nan, tokens.step_N))
    found = learned.learning_order(fewer, full_world)
    assert found["without_event"] == some_N.sum()
    assert found["rho_of_bins"] > 0.999
    rows = learned.by_exposures(fewer, full_world, A_STEP)
    assert sum(row["tokens"] for row in rows) == len(tokens.fact_N)
    assert not any(math.isnan(row["step"]) for row in rows)


def test_onset_and_exposures_of_known_frequencies_are_found(full_world):
    tokens = fact_tokens(full_world, last_step=600)
    law = learned.known_onset(tokens, full_world, A_STEP, 600.0)
    assert law["onset"] == pytest.approx(60, rel=0.1)
    assert law["exposures"] == pytest.approx(20, rel=0.15)
    assert law["b"].endswith(": holds")


def test_rows_by_exposures_count_every_token_once(full_world):
    tokens = fact_tokens(full_world, last_step=600)
    rows = learned.by_exposures(tokens, full_world, A_STEP)
    assert sum(row["tokens"] for row in rows) == len(tokens.fact_N)
    assert [row["at_least"] for row in rows] == [3.0, 1.0, 0.3, 0.1, 0.05, 0.02, 0.0]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    rate_N = full_world.frequency_F[tokens.fact_N] * A_STEP
    assert rows[0]["tokens"] == (rate_N >= 3).sum()
    assert rows[0]["censored"] == 0 and rows[-1]["censored"] == 1


# The study


@pytest.fixture
def settings():
    return study.Settings.load(HERE / "settings.json")


@pytest.fixture
def quanta(settings, tmp_path):
    return study.QuantaStudy.open(tmp_path / "run", settings, tmp_path / "ledger.jsonl")


def test_the_committed_settings_are_those_of_the_study(settings):
    size = settings.training
    assert size.arms == ("uniform", "ideal", "fall", "fall-live", "frontier", "permuted")
    assert size.seeds == (0, 1, 2, 3, 4, 5)
    assert (size.steps, size.last_step) == (600, 750)
    assert (size.steps // 4) % size.save_every == 0  # a checkpoint at each end of a fall
    assert size.steps % size.save_every == 0


def test_the_clean_study_differs_in_the_mix_the_arms_and_the_seeds_alone(settings):
    clean = study.Settings.load(HERE / "clean.json")
    assert (clean.corpus.junk, clean.corpus.boilerplate) == (0, 0)
    assert (clean.training.arms, clean.training.seeds) == (("uniform", "fall"), (0, 1, 2))
    corpus = replace(settings.corpus, junk=0.0, boilerplate=0.0)
    training = replace(settings.training, arms=("uniform", "fall"), seeds=(0, 1, 2))
    assert clean == replace(settings, corpus=corpus, training=training)


def test_a_folder_holds_one_study(quanta, settings, tmp_path):
    other = replace(settings, watched_of_kind=1)
    with pytest.raises(TokscaleError, match="other settings"):
        study.QuantaStudy.open(quanta.folder, other, tmp_path / "other.jsonl")


def test_a_vocabulary_of_another_corpus_is_refused(settings, tmp_path):
    other = replace(settings, corpus=replace(settings.corpus, topics=39))
    with pytest.raises(TokscaleError, match="vocab_size and seq_length are"):
        study.QuantaStudy.open(tmp_path / "run", other, tmp_path / "ledger.jsonl")


def test_every_phase_has_its_place_and_every_step_one_name(quanta):
    phases = quanta.phases()
    assert tuple(phases) == study.PHASES
    jobs = [step.name for step in phases["jobs"]]
    assert len(set(jobs)) == len(jobs) == 36


def test_every_verb_of_the_study_is_parsed(quanta, monkeypatch):
    commands = []
    module = __import__("reweighting.chain").chain
    monkeypatch.setattr(module, "run_logged", lambda words, log: commands.append(words))
    phases = quanta.phases()
    for name in ("valid", "unseen", "fit", "watch", "plans", "strata", "spectra"):
        for step in phases[name]:
            step.do()
    verbs = [words[3:] for words in commands if words[2] == "megatron_tokscale.cli"]
    assert len(verbs) == 4 + 36 + 6 + 2
    for words in verbs:
        make_parser().parse_args(words)


def test_the_ideal_plan_has_scores_of_its_own(quanta):
    assert quanta.scores_of("ideal") != quanta.scores_of("fall") == quanta.scores


def test_a_result_has_the_curves_of_all_tokens_and_of_objects(
    settings, prefix, world, probe_set, tmp_path
):
    """Losses of 1 + 20 t^-0.3, of objects twice as high, of junk three nats higher."""
    step_K = np.arange(0, 751, 15)
    truth = Truth.load(prefix).of(probe_set)
    curve_K = 1 + 20 * np.maximum(step_K, 1) ** -0.3
    loss_NK = np.where(truth.object_N, 2.0, 1.0)[:, None] * curve_K
    loss_NK += 3.0 * (truth.kind_N == world.junk)[:, None]
    write_run(tmp_path / "uniform-0", step_K, loss_NK, probe_set)
    small = replace(settings, corpus=SMALL)
    ledger = Ledger(tmp_path / "ledger.jsonl", {})
    chain = study.QuantaStudy(tmp_path, small.training, ledger, small)
    (tmp_path / "data").symlink_to(prefix.parent)
    result = chain.result_of(tmp_path / "uniform-0")
    assert np.array_equal(result["step"], step_K)
    assert result["loss"] == pytest.approx(loss_NK.mean(axis=0), rel=1e-5)
    assert result["object"] == pytest.approx(loss_NK[truth.object_N].mean(axis=0), rel=1e-5)
    at_T = 1 + 20 * 600**-0.3
    of_junk = np.average([1.0, 2.0], weights=[2, 1]) * at_T + 3
    assert result["groups"]["junk"] == pytest.approx(of_junk, rel=1e-3)
    assert result["groups"]["boilerplate"] == pytest.approx(of_junk - 3, rel=1e-3)


# Tables


def planted(settings, tmp_path):
    """A ledger of the whole study: losses 1 + 20 (f t)^-0.3 with a factor f for every arm."""
    ledger = Ledger(tmp_path / "ledger.jsonl", to_json(settings))
    step_K = np.arange(0, 751, 15)
    for seed in settings.training.seeds:
        rng = np.random.default_rng(seed)
        noise_K = rng.normal(0, 0.002, len(step_K))
        for arm, factor in {"uniform": 1.0, "ideal": 1.25, "fall": 1.15, "permuted": 0.9}.items():
            loss_K = 1 + 20 * (np.maximum(step_K, 1) * factor) ** -0.3 + noise_K
            result = {"step": step_K, "loss": loss_K, "object": loss_K / 2}
            ledger.add(f"{arm}/{seed}", result | {"groups": {"junk": 5.5, "rare topics": 2.0}})
    return ledger


def row_of(text, name):
    return next(line.split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_tables_of_figures_end_with_what_is_measured(settings, tmp_path):
    ledger = planted(settings, tmp_path)
    one = {"watched": 0.9, "predicted": None}
    gains = {"uniform": 0.0, "fall": 0.2}
    ledger.add(
        "reference",
        {
            "rank_correlation": {"documents": 0.95, "kinds": 0.97},
            "reliability": one,
            "cv2": {"scores": 0.5},
            "links": {"each document by its own true fall": 0.5, "to the power 0.8": 0.4},
            "expected": gains,
            "at_most": {"uniform": None, "fall": 22.1},
        },
    )
    text = report(settings.training, World(settings.corpus), ledger)
    faster = row_of(text, "each document by its own true fall")[2].rstrip(" |")
    assert float(faster) == pytest.approx(100 * (1 - math.exp(-0.5)), abs=0.05)
    measured = row_of(text, "saturation and upkeep: measured [95%]")[2].rstrip(" |")
    assert f"| fall | 22.1 | 18.1 | {measured} |" in text
    assert "| reliability of a predicted score | - |" in text


def test_tables_need_no_result_at_all(settings, tmp_path):
    text = report(settings.training, World(settings.corpus), Ledger(tmp_path / "l.jsonl", {}))
    assert "Not finished: uniform seed 0" in text and "X% faster" not in text


def test_until_none_writes_the_tables_of_a_ledger_and_trains_nothing(settings, tmp_path, capsys):
    ledger = planted(settings, tmp_path)
    words = ["--folder", tmp_path / "run", "--ledger", ledger.path, "--until", "none"]
    study.main([str(word) for word in [*words, "--out", tmp_path / "tables.txt"]])
    assert (tmp_path / "tables.txt").read_text() in capsys.readouterr().out
    assert "Against `permuted`" in (tmp_path / "tables.txt").read_text()
