"""Scores of documents: from planted fits, against a loop over single tokens.

Shapes: N watched tokens, K probes.
"""

import math
from dataclasses import replace
from itertools import pairwise

import analyses
import numpy as np
import pytest
from jobs import EOD, SEQ_LENGTH, VOCAB_SIZE, markov_documents, write_documents
from recorded_progress import RecordedProgress
from runs import probe_steps, write_run
from scipy.special import expit

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.corpus.bin_idx import IndexedTokens
from megatron_tokscale.corpus.source import DataSource
from megatron_tokscale.data.scores import DocumentScores, scores_path
from megatron_tokscale.fit import FitStatus, SigmoidFits, TokenClass, fit_run
from megatron_tokscale.probe.build import ProbeSettings, build_probe_set
from megatron_tokscale.reweight import surprisal
from megatron_tokscale.reweight.score_text import describe_scores
from megatron_tokscale.reweight.scoring import score_run
from megatron_tokscale.store import WatchedTokens

SPLIT = "900,100,0"
STEPS = probe_steps(20)
MEASURED = ("learning_time", "spread", "drop", "unlearned")


def probe_set_of(data_path, split=SPLIT, **changes):
    settings = {"n_tokens": 6000, "part": "train", "eod": EOD} | changes
    return build_probe_set(
        ProbeSettings(
            data_path=data_path,
            split=split,
            seq_length=SEQ_LENGTH,
            vocab_size=VOCAB_SIZE,
            **settings,
        )
    )


def plant_fits(run, time="step", seed=0, **changes):
    """Fits of every class, some of whose midpoints or losses are not to be used."""
    random = np.random.default_rng(seed)
    n, x_K = run.n_tokens, run.x_K(time)
    finite = x_K[np.isfinite(x_K)]
    span = finite[-1] - finite[0]
    columns = {name: random.normal(size=n) for name in SigmoidFits.columns()}
    for name in ("midpoint_N", "step1_midpoint_N", "step2_midpoint_N"):
        columns[name] = finite[0] + span * random.uniform(-0.1, 1.1, n)
    columns["drop_N"] = random.uniform(0.1, 4, n)
    for name in ("step1_drop_N", "step2_drop_N"):
        columns[name] = random.uniform(-1, 4, n)
    columns["class_N"] = random.choice(list(TokenClass), n)
    columns["drop_N"] *= np.where(columns["class_N"] == TokenClass.RISING, -1, 1)
    columns["status_N"] = random.choice(list(FitStatus), n)
    columns["n_probes_N"] = len(x_K) - (random.random(n) < 0.1)
    columns["level_N"] = np.where(columns["class_N"] == TokenClass.UNFITTED, np.nan, 1.0)
    columns |= changes
    dtypes = {"class_N": np.int8, "runner_up_N": np.int8, "status_N": np.int8}
    dtypes["n_probes_N"] = np.int32
    arrays = {
        name: np.broadcast_to(array, n).astype(dtypes.get(name, np.float32))
        for name, array in columns.items()
    }
    fits = SigmoidFits(x_K, **arrays)
    analyses.plant_fits(run, fits, time)
    return fits


def plain_run(path, data_path, **changes):
    probe_set = probe_set_of(data_path, **changes)
    return write_run(path, STEPS, np.ones((probe_set.n_tokens, len(STEPS))), probe_set)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    left, right = markov_documents(0), markov_documents(1, 200)
    for q in (0, 7, 150, 299):  # two of them at the ends of the file, one held out
        left[q] = []
    return write_documents(folder / "left", left), write_documents(folder / "right", right)


@pytest.fixture
def data_path(prefixes):
    return ["0.5", prefixes[0], "0.5", prefixes[1]]


@pytest.fixture
def data(data_path):
    return DataSource(data_path, SPLIT)


@pytest.fixture
def run(tmp_path, data_path):
    run = plain_run(tmp_path / "run", data_path)
    plant_fits(run)
    return run


def loaded(summaries):
    return {summary.dataset: DocumentScores.load(summary.path) for summary in summaries}


def log_tokens_at(run, time, x):
    """Between the neighbouring probes, in proportion; by hand."""
    points = [
        (x_k, math.log(record.consumed_tokens))
        for x_k, record in zip(run.x_K(time), run.records, strict=True)
        if np.isfinite(x_k)
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise AssertionError("outside the probes")


def scores_by_hand(run, fits, time, dataset, document):
    """watched, learning time, spread, drop, unlearned of one document, token by token."""
    finite = fits.x_K[np.isfinite(fits.x_K)]
    where = (run.probe_set.dataset_N == dataset) & (run.probe_set.document_N == document)
    n_tokens = n_unlearned = 0
    events = []
    for n in np.flatnonzero(where):
        if not np.isfinite(fits.level_N[n]) or fits.n_probes_N[n] < len(fits.x_K):
            continue
        n_tokens += 1
        n_unlearned += fits.class_N[n] == TokenClass.FLAT_UNLEARNED
        candidates = []
        if fits.class_N[n] in (TokenClass.FALLING, TokenClass.GRADUAL):
            candidates.append((fits.drop_N[n], fits.midpoint_N[n]))
        elif fits.class_N[n] == TokenClass.TWO_STEP:
            steps = [
                (fits.step1_drop_N[n], fits.step1_midpoint_N[n]),
                (fits.step2_drop_N[n], fits.step2_midpoint_N[n]),
            ]
            candidates.append(max(steps, key=lambda step: step[0]))
        events += [
            (float(drop), log_tokens_at(run, time, float(x)))
            for drop, x in candidates
            if drop > 0 and finite[0] <= x <= finite[-1]
        ]
    if n_tokens == 0:
        return 0, np.nan, np.nan, np.nan, np.nan
    drop = sum(a for a, _ in events)
    if not events:
        return n_tokens, np.nan, np.nan, 0.0, n_unlearned / n_tokens
    mean = sum(a * t for a, t in events) / drop
    spread = math.sqrt(sum(a * (t - mean) ** 2 for a, t in events) / drop)
    return n_tokens, mean, spread, drop / n_tokens, n_unlearned / n_tokens


def check_by_hand(run, fits, time, scores, min_tokens):
    n_scored = 0
    for dataset, name in enumerate(run.probe_set.datasets):
        each = scores[name]
        for document in range(each.n_documents):
            expected = scores_by_hand(run, fits, time, dataset, document)
            if expected[0] < min_tokens:
                expected = 0, np.nan, np.nan, np.nan, np.nan
            n_scored += expected[0] > 0
            found = [
                each.watched_Q[document],
                *(getattr(each, f"{m}_Q")[document] for m in MEASURED),
            ]
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    return n_scored


@pytest.mark.parametrize("min_tokens", [1, 16])
def test_scores_are_those_of_a_loop_over_tokens(run, data, tmp_path, min_tokens):
    fits = SigmoidFits.load(run.paths.fits)
    summaries = score_run(run, data, out=tmp_path, predict=False, min_tokens=min_tokens)
    n_scored = check_by_hand(run, fits, "step", loaded(summaries), min_tokens)
    assert n_scored == sum(summary.watched for summary in summaries) > 100


@pytest.mark.parametrize("time", ["step", "tokens", "lr-sum"])
def test_times_are_converted_before_they_are_averaged(run, data, tmp_path, time):
    """With a growing batch and a warm-up the axes bend against each other."""
    records = tuple(
        replace(record, consumed_tokens=int(record.step**1.3 * 50), lr_sum=record.step**1.7)
        for record in run.records
    )
    run = replace(run, records=records)
    fits = plant_fits(run, time)
    scores = loaded(score_run(run, data, out=tmp_path, predict=False))
    assert check_by_hand(run, fits, time, scores, 16) > 100


def test_the_axis_of_the_fits_does_not_change_learning_times(tmp_path, data_path, data):
    probe_set = probe_set_of(data_path, n_tokens=600)
    random = np.random.default_rng(0)
    midpoint = random.uniform(3, 8, (probe_set.n_tokens, 1))
    with np.errstate(divide="ignore"):
        x_K = np.log(STEPS)
    loss_NK = 1 + 5 * expit((midpoint - x_K) / 0.3)
    loss_NK += 0.05 * random.normal(size=loss_NK.shape)
    run = write_run(tmp_path / "run", STEPS, loss_NK, probe_set)
    found = {}
    for time in ("step", "tokens", "lr-sum"):
        fit_run(run, time=time)
        out = tmp_path / time
        found[time] = loaded(score_run(run, data, out=out, predict=False))
    tokens_per_step = run.records[1].consumed_tokens
    for dataset, name in enumerate(probe_set.datasets):
        steps, tokens, lr_sum = (found[time][name] for time in found)
        for other in (tokens, lr_sum):
            np.testing.assert_allclose(other.learning_time_Q, steps.learning_time_Q, atol=1e-4)
            np.testing.assert_allclose(other.spread_Q, steps.spread_Q, atol=1e-4)
            np.testing.assert_allclose(other.drop_Q, steps.drop_Q, atol=1e-4)
        errors = [
            midpoint[(probe_set.dataset_N == dataset) & (probe_set.document_N == document)].mean()
            + math.log(tokens_per_step)
            - steps.learning_time_Q[document]
            for document in np.flatnonzero(steps.watched_Q)
        ]
        assert np.median(np.abs(errors)) < 0.02
        assert np.max(np.abs(errors)) < 0.2  # a token that is fitted with two steps, or none


@pytest.mark.parametrize("block", [2**22, 64, 1])
def test_surprisal_is_that_of_the_counts_of_the_training_part(
    run, data, tmp_path, monkeypatch, block
):
    monkeypatch.setattr(surprisal, "_BLOCK_TOKENS", block)
    scores = loaded(score_run(run, data, out=tmp_path, predict=False))
    portions = data.portions("train")
    counts, total = [1] * VOCAB_SIZE, VOCAB_SIZE
    for portion in portions:
        for q in portion.sequences:
            for token in portion.tokens.sequence(q).tolist():
                counts[token] += 1
                total += 1
    for portion in portions:
        for q in range(portion.tokens.n_sequences):
            document = portion.tokens.sequence(q).tolist()
            expected = [-math.log(counts[token] / total) for token in document]
            expected = np.mean(expected) if expected else np.nan
            found = scores[portion.tokens.name].surprisal_Q[q]
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_training_documents_are_predicted_and_no_others(run, data, tmp_path):
    alone = loaded(score_run(run, data, out=tmp_path / "a", predict=False))
    summaries = score_run(run, data, out=tmp_path / "b")
    for summary, portion in zip(summaries, data.portions("train"), strict=True):
        before, after = alone[summary.dataset], DocumentScores.load(summary.path)
        np.testing.assert_array_equal(after.watched_Q, before.watched_Q)
        watched = before.watched_Q > 0
        is_training = np.isin(np.arange(before.n_documents), portion.sequences)
        expected = is_training & (portion.tokens.lengths > 0)
        np.testing.assert_array_equal(np.isfinite(after.drop_Q), expected)
        np.testing.assert_array_equal(np.isfinite(after.unlearned_Q), expected)
        np.testing.assert_array_equal(np.isfinite(after.learning_time_Q), after.drop_Q > 0)
        for name in MEASURED:
            old, new = getattr(before, f"{name}_Q"), getattr(after, f"{name}_Q")
            np.testing.assert_array_equal(new[watched], old[watched])
            assert np.isnan(old[~watched]).all()
        assert summary.documents == len(portion.sequences)
        assert summary.watched == watched.sum()
        assert summary.predicted == (expected & ~watched).sum() > 0
        held_out = after.details.predictor.held_out
        assert held_out["drop"].r2 == summary.held_out["drop"].r2
        assert set(held_out) == {*MEASURED, "fall"}


def test_a_prediction_finds_what_the_tokens_decide(prefixes, tmp_path):
    """Learning time by the share of high ids in a document: known for those not watched."""
    data = DataSource([prefixes[0]], SPLIT)
    run = plain_run(tmp_path / "run", data.words, n_tokens=7000)
    tokens = IndexedTokens.open(prefixes[0])
    low, high = np.log(STEPS[1]), np.log(STEPS[-1])
    high_Q = np.array([(tokens.sequence(q) > EOD / 2).sum() for q in range(tokens.n_sequences)])
    share_Q = high_Q / np.maximum(tokens.lengths, 1)
    truth_Q = low + (high - low) * np.clip(2 * share_Q - 0.5, 0.05, 0.95)
    plant_fits(
        run,
        class_N=TokenClass.FALLING,
        status_N=FitStatus.CONVERGED,
        drop_N=2.0,
        level_N=1.0,
        n_probes_N=len(STEPS),
        midpoint_N=truth_Q[run.probe_set.document_N],
    )
    summary = score_run(run, data, out=tmp_path)[0]
    scores = DocumentScores.load(summary.path)
    predicted = np.flatnonzero((scores.watched_Q == 0) & np.isfinite(scores.drop_Q))
    tokens_per_step = run.records[1].consumed_tokens
    error = scores.learning_time_Q[predicted] - (truth_Q[predicted] + math.log(tokens_per_step))
    variance = truth_Q[predicted].var()
    assert summary.predicted == len(predicted) > 50
    assert summary.held_out["learning_time"].r2 > 0.5
    assert 1 - np.mean(error**2) / variance > 0.5
    np.testing.assert_allclose(scores.drop_Q[predicted], 2)
    np.testing.assert_allclose(scores.unlearned_Q[predicted], 0)


def test_the_summary_is_that_of_the_file(run, data_path, data, tmp_path):
    for summary in score_run(run, data, out=tmp_path):
        scores = DocumentScores.load(summary.path)
        tokens = IndexedTokens.open(next(p for p in data_path if p.endswith(summary.dataset)))
        scores.check(tokens)
        assert summary.fingerprint == scores.fingerprint
        scored = ~np.isnan(scores.drop_Q)
        drops = [d * n for d, n in zip(scores.drop_Q, tokens.lengths, strict=True) if d == d]
        assert summary.drop == pytest.approx(sum(drops) / tokens.lengths[scored].sum(), rel=1e-5)
        median = math.exp(np.nanmedian(scores.learning_time_Q))
        assert summary.learning_time[1] == pytest.approx(median, rel=1e-4)
        assert summary.learning_time == tuple(sorted(summary.learning_time))


def test_scores_lie_beside_the_data_and_are_replaced_only_by_force(run, tmp_path):
    prefix = write_documents(tmp_path / "left", markov_documents(0))
    run = plain_run(tmp_path / "other", [prefix])
    plant_fits(run)
    (summary,) = score_run(run, DataSource([prefix], SPLIT), predict=False)
    assert summary.path == scores_path(prefix)
    before = summary.path.read_bytes()
    with pytest.raises(TokscaleError, match="exists; choose another folder"):
        score_run(run, DataSource([prefix], SPLIT), predict=False)
    assert summary.path.read_bytes() == before
    score_run(run, DataSource([prefix], SPLIT), force=True)
    assert summary.path.read_bytes() != before
    summary.path.write_text("something else")
    with pytest.raises(TokscaleError, match="holds no scores; move it away"):
        score_run(run, DataSource([prefix], SPLIT), force=True)
    assert summary.path.read_text() == "something else"


def test_a_file_in_the_place_of_the_folder_is_refused_before_any_work(run, data, tmp_path):
    (tmp_path / "file").touch()
    progress = RecordedProgress()
    with pytest.raises(TokscaleError, match="is a file; expected a folder"):
        score_run(run, data, out=tmp_path / "file", progress=progress)
    assert progress.stages == []


def test_a_dataset_that_nobody_watched_has_surprisal_alone(run, data, prefixes, tmp_path):
    run = plain_run(tmp_path / "other", [prefixes[0]])
    plant_fits(run)
    with pytest.raises(TokscaleError, match="0 training documents of right are watched"):
        score_run(run, data, out=tmp_path)
    left, right = score_run(run, data, out=tmp_path, predict=False)
    assert left.watched > 0
    assert (right.watched, right.predicted, right.drop, right.learning_time) == (0, 0, None, None)
    scores = DocumentScores.load(right.path)
    assert np.isnan(scores.drop_Q).all()
    assert np.isfinite(scores.surprisal_Q).all()
    assert "–" in describe_scores([right])


def test_the_table_shows_counts_and_errors(run, data, tmp_path):
    summaries = score_run(run, data, out=tmp_path)
    text = describe_scores(summaries)
    for summary in summaries:
        assert str(summary.path) in text
        assert f"{summary.drop:.3f}" in text
        assert f"{summary.dataset}: learning time" in text
        assert f"{summary.held_out['drop'].rmse:.3f}" in text
    counts = next(line for line in text.splitlines() if line.startswith("left ")).split()
    assert counts[1:4] == [str(n) for n in (270, summaries[0].watched, summaries[0].predicted)]


def other_probe_set(run, **changes):
    """The run as it would be if its probe set were another one."""
    probe_set = replace(run.probe_set, **changes)
    records = tuple(replace(r, probe_fingerprint=probe_set.fingerprint) for r in run.records)
    other = replace(run, tokens=WatchedTokens(probe_set), records=records)
    plant_fits(other)
    return other


def test_held_out_documents_are_refused(data_path, data, tmp_path):
    run = plain_run(tmp_path / "run", data_path, part="valid", n_tokens=600)
    plant_fits(run)
    with pytest.raises(TokscaleError, match="watched documents of the valid part"):
        score_run(run, data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: {"labels_BS": (p.labels_BS + 1) % 250}, "the run watched .* from the tokenizer"),
        (lambda p: {"document_BS": p.document_BS + 290}, "the run watched document .* has 300"),
        (lambda p: {"position_BS": p.position_BS + 190}, "watched longer documents of left"),
        (lambda p: {"datasets": ("a", "b")}, "the run watched a, b, the data are left, right"),
        (lambda p: {"vocab_size": 250}, "token id 250, .* ends at 249"),
        (lambda p: {"origin": replace(p.origin, part="test")}, "documents of the test part"),
    ],
)
def test_a_run_on_other_data_is_refused_and_nothing_is_written(
    run, data, tmp_path, change, sentence
):
    other = other_probe_set(run, **change(run.probe_set))
    with pytest.raises(TokscaleError, match=sentence) as caught:
        score_run(other, data, out=tmp_path / "out", predict=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_same_files_in_another_order_of_documents_are_refused(tmp_path, prefixes):
    documents = markov_documents(1, 200)
    run = plain_run(tmp_path / "run", [prefixes[1]])
    plant_fits(run)
    other = write_documents(tmp_path / "right", documents[::-1])
    with pytest.raises(TokscaleError, match="that the probe set was built from"):
        score_run(run, DataSource([other], SPLIT))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_tokens": 0}, "at least 1 watched token"),
        ({"min_tokens": 10_000, "predict": False}, "no training document .* by 10000 tokens"),
        ({"min_tokens": 60}, r"a prediction for the other \d+ needs 50"),
    ],
)
def test_settings_that_leave_nothing_to_score_are_refused(run, data_path, data, settings, sentence):
    with pytest.raises(TokscaleError, match=sentence) as caught:
        score_run(run, data, **settings)
    assert "\n" not in str(caught.value)
    assert not scores_path(data_path[1]).exists()


def test_a_run_with_older_fits_or_with_a_part_of_them_is_refused(run, data, tmp_path):
    with pytest.raises(TokscaleError, match="of other probes than the run has now"):
        score_run(replace(run, records=run.records[:-1]), data, out=tmp_path)
    run.paths.fits.unlink()
    with pytest.raises(TokscaleError, match="megatron-tokscale fit"):
        score_run(run, data, out=tmp_path)


def test_a_run_that_does_not_count_its_tokens_is_refused(run, data, tmp_path):
    records = tuple(replace(record, consumed_tokens=0) for record in run.records)
    with pytest.raises(TokscaleError, match="do not hold the consumed tokens"):
        score_run(replace(run, records=records), data, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(run, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokscaleError, match=r"cannot write .*; choose a folder"):
        score_run(run, data, out=tmp_path / "file" / "out", predict=False)


def test_per_split_data_are_whole(prefixes, tmp_path):
    data_path = {"train": [prefixes[1]], "valid": [prefixes[0]]}
    run = plain_run(tmp_path / "run", data_path, split=None, n_tokens=4000)
    plant_fits(run)
    (summary,) = score_run(run, DataSource(data_path, None), out=tmp_path)
    assert summary.documents == 200 == summary.watched + summary.predicted
