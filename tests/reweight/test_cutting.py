from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from jobs import write_documents
from scipy.stats import norm
from scored import RANGE, SEQ_LENGTH, cut, portion_of, scores_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.scores import (
    DocumentScores,
    ScoreDetails,
    data_digest,
    identity_of,
    scores_path,
)
from megatron_tokscale.reweight import CutSettings, cut_dataset, cut_job, job_of, read_scores
from megatron_tokscale.reweight.cut_samples import MAX_SAMPLES, lay_out
from megatron_tokscale.reweight.cutting import MIN_SPREAD, LearningTimes

rng = np.random.default_rng(0)
TIMES = rng.normal(12, 1, 400)


def stream_of(index):
    """(document, offset) of every token of the stream."""
    return [(d, t) for d in index.document_P.tolist() for t in range(index.lengths_Q[d])]


def test_documents_are_laid_end_to_end_and_cut_as_megatron_does():
    lengths = [5, 0, 40, 1, 7, 0, 30, 64, 3]
    portion = portion_of(lengths, sequences=range(1, 9))
    index = lay_out(portion, 10, seed=3)
    stream = stream_of(index)
    assert Counter(stream) == Counter((d, t) for d in range(1, 9) for t in range(lengths[d]))
    assert len(index) == (sum(lengths[1:]) - 1) // 10
    for sample in range(len(index)):
        read = [(p.document, t) for p in index.pieces(sample) for t in range(p.start, p.stop)]
        assert read == stream[10 * sample : 10 * sample + 11]


def test_another_seed_lays_the_documents_otherwise():
    portion = portion_of([9] * 50)
    orders = {tuple(lay_out(portion, 10, seed).document_P) for seed in (1, 1, 2)}
    assert len(orders) == 2


def test_quantiles_have_equal_shares_and_follow_in_time():
    dataset = cut("web", TIMES)
    assert dataset.names == ("web/q1", "web/q2", "web/q3", "web/q4")
    assert dataset.shares == (0.25,) * 4
    assert dataset.n_samples == (400 * 300 - 1) // SEQ_LENGTH
    times = [times.time_N for times in dataset.learning_Z]
    assert all(a.max() <= b.min() for a, b in pairwise(times))
    assert sum(map(len, times)) == dataset.n_samples
    assert dataset.cut.order == "learning-time"
    assert not dataset.cut.unlearned


def test_samples_mostly_never_learned_are_a_stratum_of_their_own():
    """Documents of 640 tokens, every fifth never learned: hardly a sample spans two."""
    unlearned = np.where(np.arange(400) % 5 == 0, 0.9, 0.1)
    dataset = cut("web", TIMES, lengths=[640] * 400, unlearned=unlearned)
    assert dataset.names[-1] == "web/unlearned"
    assert dataset.shares[-1] == pytest.approx(0.2, abs=0.02)
    assert sum(dataset.shares) == pytest.approx(1)
    assert dataset.cut.unlearned
    assert dataset.bounds[-1] == pytest.approx(1)


def test_a_few_samples_never_learned_are_no_stratum():
    unlearned = np.where(np.arange(400) == 0, 0.9, 0.1)
    assert "web/unlearned" not in cut("web", TIMES, unlearned=unlearned).names


def test_a_dataset_that_is_never_learned_is_one_stratum_without_a_cut():
    dataset = cut("noise", TIMES, unlearned=0.95)
    assert (dataset.names, dataset.shares, dataset.cut) == (("noise",), (1.0,), None)


def test_where_hardly_anything_is_learned_there_are_few_quantiles():
    """119 samples are learned: two strata of 50 at least."""
    unlearned = np.where(np.arange(400) < 26, 0.1, 0.9)
    dataset = cut("noise", TIMES, unlearned=unlearned, settings=CutSettings(8))
    assert dataset.names == ("noise/q1", "noise/q2", "noise/unlearned")


@pytest.mark.parametrize(
    ("n_samples", "names"),
    [(99, ("web",)), (100, ("web/q1", "web/q2")), (399, tuple(f"web/q{q}" for q in range(1, 8)))],
)
def test_a_stratum_holds_fifty_samples_at_least(n_samples, names):
    lengths = [n_samples * SEQ_LENGTH + 1]
    assert cut("web", [12.0], lengths=lengths, settings=CutSettings(8)).names == names


def test_a_part_of_a_large_stratum_is_used():
    dataset = cut("web", TIMES, lengths=[8000] * 400, settings=CutSettings(2))
    assert [len(times.time_N) for times in dataset.learning_Z] == [MAX_SAMPLES] * 2


def test_the_learned_drop_is_the_mean_of_normal_distributions():
    time, drop = np.array([11.0, 12.0, 14.0]), np.array([1.0, 3.0, 0.5])
    spread = np.array([0.4, 1.0, 0.2])
    tokens = np.array([100.0, 300.0, 50.0])
    learned = LearningTimes(time, spread, drop, tokens).learned_by(np.array([10.0, 12.5]))
    for x, value in zip([10.0, 12.5], learned, strict=True):
        rows = zip(time, spread, drop, tokens, strict=True)
        assert value == pytest.approx(sum(n * d * norm(t, s).cdf(x) for t, s, d, n in rows) / 450)


def test_a_spread_is_at_least_what_probes_resolve_and_a_missing_drop_gives_no_nan():
    dataset = cut("web", TIMES, spread=0.0)
    assert min(times.spread_N.min() for times in dataset.learning_Z) >= MIN_SPREAD
    nothing = cut("web", np.full(400, np.nan), spread=np.nan, drop=0.0)
    assert (nothing.learned_by(np.array([20.0])) == 0).all()


def test_a_document_without_a_score_is_refused():
    drop = np.where(np.arange(400) == 7, np.nan, 1.0)
    with pytest.raises(TokscaleError, match=r"1 of 400 training documents of web .* first is 7"):
        cut("web", TIMES, drop=drop)
    portion = portion_of([300] * 400, sequences=range(8, 400))
    cut_dataset("web", portion, scores_of(portion, TIMES, drop=drop), CutSettings(), SEQ_LENGTH, 1)


def test_an_empty_document_needs_no_score():
    lengths = np.where(np.arange(400) == 7, 0, 300)
    drop = np.where(np.arange(400) == 7, np.nan, 1.0)
    dataset = cut("web", TIMES, lengths=lengths, drop=drop)
    assert np.isfinite(dataset.learned_by(np.array([12.0]))).all()


def test_scores_that_do_not_know_their_reference_are_refused():
    with pytest.raises(TokscaleError, match="scores of web have no first and last tokens"):
        _ = cut("web", TIMES, log_tokens_range=None).log_tokens_range


def test_a_dataset_shorter_than_a_sample_is_refused():
    with pytest.raises(TokscaleError, match="not enough training tokens"):
        cut("web", [12.0], lengths=[SEQ_LENGTH])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CutSettings(0), "quantiles is 0; expected 1"),
        (lambda: CutSettings(4, 0.0), "share never learned"),
        (lambda: CutSettings(4, 1.5), "share never learned"),
        (lambda: CutSettings(held_out=-1, unit="documents"), "documents held out is -1"),
        (lambda: CutSettings(held_out=5), "samples are held out; expected .* give --strata doc"),
        (lambda: CutSettings(by="fall"), "samples are ranked by fall"),
    ],
)
def test_cut_settings_out_of_range_are_refused(make, sentence):
    with pytest.raises(TokscaleError, match=sentence):
        make()


DOCUMENTS = [[1, 2, 3, 4]] * 40


@pytest.fixture
def prefix(tmp_path):
    return write_documents(tmp_path / "web", DOCUMENTS)


def save_scores(prefix, path=None, digest=None):
    tokens = IndexedTokens.open(prefix)
    rows = {f"{key}_Q": np.ones(40, np.float32) for key in ("spread", "drop", "surprisal")}
    DocumentScores(
        **rows,
        learning_time_Q=np.linspace(10, 14, 40).astype(np.float32),
        unlearned_Q=np.zeros(40, np.float32),
        watched_Q=np.zeros(40, np.int32),
        dataset=identity_of(tokens),
        digest=digest or data_digest(tokens),
        details=ScoreDetails(run_id="reference", log_tokens_range=RANGE),
    ).save(path or scores_path(prefix))


def test_strata_by_learning_times_need_them_in_the_scores():
    portion = portion_of([300] * 100)
    scores = replace(
        scores_of(portion, 12.0, run="runs/small"),
        fall_Q=np.ones(100, np.float32),
        **dict.fromkeys(("learning_time_Q", "spread_Q", "drop_Q", "unlearned_Q")),
    )
    with pytest.raises(
        TokscaleError, match="of web have no learning times; run `megatron-tokscale fit runs/small`"
    ) as caught:
        cut_dataset("web", portion, scores, CutSettings(4), SEQ_LENGTH, 1)
    assert "\n" not in str(caught.value)


def test_scores_are_read_beside_the_data_or_from_a_folder(prefix, tmp_path):
    tokens = IndexedTokens.open(prefix)
    with pytest.raises(TokscaleError, match="is not there; expected the scores of web; restore it"):
        read_scores(tokens)
    save_scores(prefix)
    beside = read_scores(tokens)
    (tmp_path / "elsewhere").mkdir()
    save_scores(prefix, tmp_path / "elsewhere" / "web.tokscale.safetensors")
    assert read_scores(tokens, tmp_path / "elsewhere").fingerprint == beside.fingerprint


def test_scores_of_another_tokenizer_or_of_other_data_are_refused(prefix, tmp_path):
    save_scores(prefix, digest="f" * 16)
    with pytest.raises(TokscaleError, match="other data or another tokenizer"):
        read_scores(IndexedTokens.open(prefix))
    (tmp_path / "other").mkdir()
    other = write_documents(tmp_path / "other" / "web", [[1, 2, 3, 4]] * 41)
    with pytest.raises(TokscaleError, match="other data or another tokenizer"):
        read_scores(IndexedTokens.open(other), tmp_path)


def test_a_job_is_cut_and_described_from_its_training_part(prefix):
    """32 of 40 documents of 4 tokens: 127 tokens to predict."""
    save_scores(prefix)
    (dataset,) = cut_job(DataSource([prefix], "80,20,0"), 2, seed=1)
    job = job_of(DataSource([prefix], "80,20,0"), train_samples=10, seq_length=2, seed=1)
    assert dataset.n_samples == job.epoch_samples[0] == 127 // 2
    assert dataset.names == ("web",)


def test_without_weights_a_dataset_weighs_as_much_as_its_training_part(prefix, tmp_path):
    (tmp_path / "more").mkdir()
    other = write_documents(tmp_path / "more" / "code", [[1, 2]] * 40)
    job = job_of(DataSource([prefix, other], "80,20,0"), train_samples=10, seq_length=2, seed=1)
    np.testing.assert_allclose(job.base_D, [2 / 3, 1 / 3])
    weighted = DataSource(["1", prefix, "4", other], "80,20,0")
    job = job_of(weighted, train_samples=10, seq_length=2, seed=1)
    np.testing.assert_allclose(job.base_D, [0.2, 0.8])


def test_per_split_data_are_the_whole_of_their_training_datasets(prefix):
    job = job_of(DataSource({"train": [prefix], "valid": [], "test": []}, None), 10, 2, 1)
    assert job.epoch_samples == [159 // 2]
