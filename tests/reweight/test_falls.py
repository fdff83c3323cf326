"""Documents scored by the fall of their loss, and by a tuned run, from planted losses.

Shapes: N watched tokens, K probes, Q documents.
"""

from dataclasses import replace

import numpy as np
import pytest
from gpt_datasets import gpt_config, gpt_dataset
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, markov_documents, write_documents
from runs import write_run

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.record import DataRecord, DatasetRecord, record_path
from megatron_tokscale.data.scores import DocumentScores
from megatron_tokscale.fit import fit_run
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.reweight.score_text import describe_scores
from megatron_tokscale.reweight.scoring import score_run
from megatron_tokscale.store import WatchedTokens

SPLIT, STEPS, NOISE = "900,100,0", (100, 400), 0.8


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [
        write_documents(folder / name, markov_documents(seed, 300))
        for seed, name in enumerate(("left", "right"))
    ]


@pytest.fixture(scope="module")
def data(prefixes):
    return DataSource(["0.5", prefixes[0], "0.5", prefixes[1]], SPLIT)


@pytest.fixture(scope="module")
def probe_set(data):
    return build_probe_set(
        ProbeSettings(
            data_path=data.words,
            split=SPLIT,
            seq_length=SEQ_LENGTH,
            vocab_size=VOCAB_SIZE,
            n_tokens=7000,
            part="train",
            eod=EOD,
        )
    )


def true_falls(prefixes):
    """A fall of each document that its own tokens decide: 5 nats per share of high ids."""
    falls = []
    for prefix in prefixes:
        tokens = IndexedTokens.open(prefix)
        share = [np.mean(tokens.sequence(q) > EOD / 2) for q in range(tokens.n_sequences)]
        falls.append(5 * np.array(share) - 1.5)
    return falls


def planted_losses(probe_set, falls, seed=0):
    """Losses at a quarter and at the end: their mean difference in a document is its fall."""
    random = np.random.default_rng(seed)
    late_N = random.uniform(1, 8, probe_set.n_tokens)
    fall_N = np.choose(probe_set.dataset_N, [fall[probe_set.document_N] for fall in falls])
    fall_N = fall_N + random.normal(0, NOISE, probe_set.n_tokens)
    return np.stack([late_N + fall_N, late_N], axis=1)


@pytest.fixture
def run(tmp_path, probe_set, prefixes):
    return write_run(
        tmp_path / "run", STEPS, planted_losses(probe_set, true_falls(prefixes)), probe_set
    )


def tuned_from(run, path, gains, seed=1):
    """A run of the same tokens whose losses at its one probe are lower by the documents' gains."""
    probe_set = run.probe_set
    noise_N = np.random.default_rng(seed).normal(0, NOISE, probe_set.n_tokens)
    gain_N = np.choose(probe_set.dataset_N, [gain[probe_set.document_N] for gain in gains])
    late_N = run.read_losses_at(STEPS[1])
    return write_run(path, [40], (late_N - gain_N + noise_N)[:, None], probe_set)


def loaded(summaries):
    return [DocumentScores.load(summary.path) for summary in summaries]


def test_two_checkpoints_score_documents_without_a_fit(run, data, prefixes, tmp_path):
    told = []
    summaries = score_run(run, data, out=tmp_path / "out", tell=told.append)
    assert told == []
    for scores, summary, true_Q in zip(
        loaded(summaries), summaries, true_falls(prefixes), strict=True
    ):
        assert scores.fitted is None
        assert scores.target_Q is None
        is_training = np.arange(300) < 270
        np.testing.assert_array_equal(np.isfinite(scores.fall_Q), is_training)
        is_watched = scores.watched_Q > 0
        found = scores.details.reliability["fall"]
        assert summary.watched == found.documents == is_watched.sum()
        for chosen in (is_watched, is_training & ~is_watched):
            error = np.mean((scores.fall_Q[chosen] - true_Q[chosen]) ** 2)
            assert error < 0.6 * true_Q[chosen].var()
        # True falls are a linear function of the tokens, so predictions are reliable too.
        assert 0.3 < found.predicted <= 1
        assert found.signal_variance == pytest.approx(true_Q[is_watched].var(), rel=0.5)


def test_falls_are_means_over_the_documents_tokens_drawn_together(run, data, tmp_path):
    (scores, _) = loaded(score_run(run, data, out=tmp_path / "out", predict=False))
    probe_set, loss_NK = run.probe_set, run.read_losses()
    means = {}
    for document in np.flatnonzero(scores.watched_Q):
        where = (probe_set.dataset_N == 0) & (probe_set.document_N == document)
        assert scores.watched_Q[document] == where.sum() >= 16
        means[document] = float(np.mean(loss_NK[where, 0] - loss_NK[where, 1], dtype=np.float64))
    raw = np.array(list(means.values()))
    found = scores.fall_Q[list(means)]
    assert np.corrcoef(raw, found)[0, 1] > 0.9
    assert 0 < found.std() < raw.std()
    weights = scores.watched_Q[list(means)]
    mean = scores.details.reliability["fall"].mean
    assert mean == pytest.approx(np.average(raw, weights=weights), rel=1e-6)


def test_tokens_without_a_finite_loss_are_counted_and_left_out(probe_set, prefixes, data, tmp_path):
    loss_NK = planted_losses(probe_set, true_falls(prefixes))
    loss_NK[:50, 0], loss_NK[40:60, 1] = np.nan, np.inf
    told = []
    run = write_run(tmp_path / "run", STEPS, loss_NK, probe_set)
    scored = loaded(score_run(run, data, out=tmp_path / "out", tell=told.append))
    (note,) = told
    assert note.startswith(f"60 of {probe_set.n_tokens:,} watched tokens have a loss that is not")
    assert all(np.isfinite(scores.fall_Q[:270]).all() for scores in scored)


def test_details_tell_the_cost_of_the_reference(run, data, tmp_path):
    run = replace(run, info=replace(run.info, size={"parameters": 12_345}))
    details = loaded(score_run(run, data, out=tmp_path / "out"))[0].details
    per_step = run.records[1].consumed_tokens // STEPS[1]
    assert details.fall_tokens == (STEPS[0] * per_step, STEPS[1] * per_step)
    assert details.reference_tokens == STEPS[1] * per_step
    assert details.reference_parameters == 12_345
    assert details.log_tokens_range is None


def test_a_fitted_run_has_scores_of_both_kinds(probe_set, data, tmp_path):
    steps = [0, *np.unique(np.geomspace(1, 400, 24).round().astype(int))]
    x_K = np.log(np.maximum(steps, 0.1))
    midpoint_N = np.random.default_rng(0).uniform(1, 5, probe_set.n_tokens)
    loss_NK = 1 + 3 / (1 + np.exp((x_K - midpoint_N[:, None]) / 0.3))
    run = write_run(tmp_path / "run", steps, loss_NK, probe_set)
    fit_run(run)
    for scores in loaded(score_run(run, data, out=tmp_path / "out")):
        assert scores.fitted is not None
        np.testing.assert_array_equal(np.isfinite(scores.fall_Q), np.isfinite(scores.drop_Q))
        assert set(scores.details.reliability) == {"fall"}
        assert set(scores.details.predictor.held_out) == {
            *("learning_time", "spread", "drop", "unlearned", "fall")
        }


def test_a_tuned_run_scores_documents_by_what_it_gains(run, data, prefixes, tmp_path):
    gains = [-fall for fall in true_falls(prefixes)]
    tuned = tuned_from(run, tmp_path / "tuned", gains)
    summaries = score_run(run, data, tuned=tuned, out=tmp_path / "out")
    for scores, gain_Q in zip(loaded(summaries), gains, strict=True):
        known = np.isfinite(scores.target_Q)
        assert known.sum() == 270
        assert np.corrcoef(scores.target_Q[known], gain_Q[known])[0, 1] > 0.6
        assert np.corrcoef(scores.fall_Q[known], gain_Q[known])[0, 1] < -0.6
    text = describe_scores(summaries)
    assert "target: loss of the reference less that of the tuned run" in text
    assert "fall: loss at step 100 (the probe nearest to a quarter, step 100)" in text


def test_a_target_needs_no_probe_at_a_quarter(run, data, prefixes, tmp_path):
    last = replace(run, records=run.records[1:])
    with pytest.raises(TokscaleError, match="no probe near step 100, a quarter"):
        score_run(last, data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told = []
    tuned = tuned_from(run, tmp_path / "tuned", true_falls(prefixes))
    for scores in loaded(
        score_run(last, data, tuned=tuned, out=tmp_path / "out", tell=told.append)
    ):
        assert scores.fall_Q is None
        assert scores.target_Q is not None
        assert scores.details.fall_tokens is None
    (note,) = told
    assert "no probe near step 100" in note
    assert note.endswith("the scores have no falls")


def test_a_second_seed_tells_apart_what_one_seed_alone_shows(probe_set, data, prefixes, tmp_path):
    """A document's fall differs between seeds by as much as true falls differ between documents."""
    runs, planted = [], []
    for seed in (5, 6):
        random = np.random.default_rng(seed)
        true = true_falls(prefixes)
        falls = [fall_Q + random.normal(0, fall_Q.std(), fall_Q.size) for fall_Q in true]
        planted.append(falls)
        loss_NK = planted_losses(probe_set, falls, seed)
        runs.append(write_run(tmp_path / str(seed), STEPS, loss_NK, probe_set))
    run, second = runs
    alone = loaded(score_run(run, data, out=tmp_path / "alone", predict=False))
    both = loaded(score_run(run, data, second=second, out=tmp_path / "both", predict=False))
    for one, two, first_Q, second_Q in zip(alone, both, *planted, strict=True):
        np.testing.assert_array_equal(one.watched_Q, two.watched_Q)
        of_one, of_two = (each.details.reliability["fall"] for each in (one, two))
        is_watched_Q = two.watched_Q > 0
        covariance_22 = np.cov(first_Q[is_watched_Q], second_Q[is_watched_Q])
        assert of_one.signal_variance == pytest.approx(covariance_22[0, 0], rel=0.35)
        assert of_two.signal_variance == pytest.approx(covariance_22[0, 1], rel=0.35)
        assert of_two.signal_variance < 0.75 * of_one.signal_variance
        assert of_two.watched < of_one.watched - 0.1
        assert two.details.probes == 2 * one.details.probes == 4
        assert two.details.reference_tokens == 2 * one.details.reference_tokens
        assert two.details.second_run_id == second.info.run_id


def test_a_second_seed_has_the_steps_of_the_first(run, data, tmp_path):
    with pytest.raises(TokscaleError, match="itself; expected a replay of another seed of the run"):
        score_run(run, data, second=run, out=tmp_path / "out")
    other = write_run(tmp_path / "other", (50, 200), run.read_losses(), run.probe_set)
    with pytest.raises(TokscaleError, match="falls from step 50 to 200; expected 100 to 400"):
        score_run(run, data, second=other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_reference_is_no_tuned_run(run, data, tmp_path):
    with pytest.raises(TokscaleError, match="is the reference run itself; expected a replay"):
        score_run(run, data, tuned=run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda p: {"vocab_size": p.vocab_size + 8},
            f"of a vocabulary of {VOCAB_SIZE + 8}, .* another tokenizer; expected one tokenizer",
        ),
        (
            lambda p: {"position_BS": p.position_BS + 1},
            "watches probe set .* expected one probe set for both",
        ),
    ],
)
def test_a_tuned_run_of_other_tokens_is_refused(run, data, tmp_path, change, sentence):
    probe_set = replace(run.probe_set, **change(run.probe_set))
    tuned = replace(run, tokens=WatchedTokens(probe_set))
    with pytest.raises(TokscaleError, match=sentence) as caught:
        score_run(run, data, tuned=tuned, out=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def record_training(run, prefix, cache, n_samples):
    """The record of a job that was trained on one dataset."""
    dataset = gpt_dataset(prefix, gpt_config(cache, SEQ_LENGTH), n_samples)
    row = DatasetRecord.from_gpt_dataset(dataset)
    DataRecord((row,)).save(record_path(run.path))
    return dataset


def test_a_run_that_was_trained_on_what_it_scores_is_told(run, data, prefixes, tmp_path):
    dataset = record_training(run, prefixes[0], tmp_path / "cache", 60)
    records = tuple(replace(record, consumed_samples=record.step // 8) for record in run.records)
    told = []
    score_run(replace(run, records=records), data, out=tmp_path / "out", tell=told.append)
    # The documents whose text is in the samples that Megatron returns.
    index = dataset.document_index
    drawn = set()
    for k in range(STEPS[1] // 8):
        stretch = dataset.shuffle_index[k]
        first, last = dataset.sample_index[stretch][0], dataset.sample_index[stretch + 1][0]
        drawn |= set(index[first : last + 1].tolist())
    scores = DocumentScores.load(tmp_path / "out" / "left.tokscale.safetensors")
    n_seen = len(drawn & set(np.flatnonzero(scores.watched_Q).tolist()))
    n_watched = sum(
        int((each.watched_Q > 0).sum())
        for each in map(
            DocumentScores.load,
            (tmp_path / "out" / f"{name}.tokscale.safetensors" for name in ("left", "right")),
        )
    )
    (note,) = told
    assert f"was trained on {n_seen} of the {n_watched} watched documents" in note
    assert f"--unseen-by {run.path}" in note
    assert n_seen > 10


def test_a_record_that_cannot_be_followed_is_told_and_scores_are_made(
    run, data, prefixes, tmp_path
):
    dataset = record_training(run, prefixes[0], tmp_path / "cache", 60)
    for file in (tmp_path / "cache").glob("*shuffle_index.npy"):
        file.unlink()
    del dataset
    told = []
    summaries = score_run(run, data, out=tmp_path / "out", tell=told.append)
    assert len(summaries) == 2
    (note,) = told
    assert "it is not known which documents" in note


def test_the_table_has_the_reliability_of_watched_and_predicted_scores(run, data, tmp_path):
    summaries = score_run(run, data, out=tmp_path)
    lines = describe_scores(summaries).splitlines()
    for summary in summaries:
        found = summary.reliability["fall"]
        row = next(line for line in lines if line.startswith(f"{summary.dataset} ")).split()
        assert row[1:4] == ["270", str(summary.watched), str(summary.predicted)]
        expected = (
            found.mean,
            found.signal_variance / found.mean**2,
            found.watched,
            found.predicted,
        )
        assert row[4:] == [f"{value:.3f}" for value in expected]
    assert not any("never learned" in line for line in lines)
