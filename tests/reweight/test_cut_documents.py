"""Strata of documents, against brute force over the documents."""

import numpy as np
import pytest
from scored import RANGE, SEQ_LENGTH, cut_documents, portion_of, scores_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Plan, Stage, Stratum
from megatron_tokscale.data.document_strata import documents_of_strata, held_out_documents
from megatron_tokscale.data.scores import identity_of
from megatron_tokscale.reweight import CutSettings, cut_dataset
from megatron_tokscale.reweight.cut_documents import quantile_edges
from megatron_tokscale.reweight.cutting import check_scored

rng = np.random.default_rng(0)
LENGTHS = rng.integers(20, 900, 2000)
FALLS = rng.normal(0.4, 0.3, 2000).astype(np.float32)


def members(edges, score):
    """Documents of each stratum, one document at a time."""
    strata = [[] for _ in range(len(edges) + 1)]
    for document, value in enumerate(score):
        strata[sum(value >= edge for edge in edges)].append(document)
    return strata


def test_strata_are_quantiles_by_tokens_of_the_score():
    dataset = cut_documents("web", LENGTHS, fall=FALLS)
    assert dataset.names == tuple(f"web/q{q}" for q in range(1, 17))
    assert (dataset.cut.unit, dataset.cut.order, dataset.cut.held_out) == ("documents", "fall", 0)
    strata = members(dataset.cut.edges, FALLS)
    for share, documents in zip(dataset.shares, strata, strict=True):
        assert share == pytest.approx(LENGTHS[documents].sum() / LENGTHS.sum())
    # No document is larger than 900 tokens, so a quantile is missed by at most that.
    assert np.abs(np.array(dataset.shares) - 1 / 16).max() < 2 * 900 / LENGTHS.sum()
    assert dataset.documents == tuple(map(len, strata))


def test_a_stratum_has_the_mean_of_its_tokens():
    targets = rng.normal(0, 1, 2000).astype(np.float32)
    dataset = cut_documents("web", LENGTHS, fall=FALLS, target=targets)
    for z, documents in enumerate(members(dataset.cut.edges, FALLS)):
        tokens = LENGTHS[documents].sum()
        fall = sum(float(FALLS[q]) * int(LENGTHS[q]) for q in documents) / tokens
        target = sum(float(targets[q]) * int(LENGTHS[q]) for q in documents) / tokens
        assert dataset.fall_Z[z] == pytest.approx(fall, rel=1e-6)
        assert dataset.target_Z[z] == pytest.approx(target, rel=1e-6, abs=1e-9)
        assert dataset.samples[z] == (tokens - 1) // SEQ_LENGTH


def test_documents_of_one_score_stay_together_and_strata_may_be_missing():
    """Four in ten documents are one licence header: they are one stratum, not six."""
    falls = np.where(np.arange(2000) % 10 < 4, np.float32(0.01), FALLS)
    dataset = cut_documents("web", LENGTHS, fall=falls)
    assert 8 < len(dataset.names) < 16
    header = [z for z, own in enumerate(members(dataset.cut.edges, falls)) if 0 in own]
    assert dataset.shares[header[0]] > 0.39
    assert list(dataset.cut.edges) == sorted(set(dataset.cut.edges))


def test_where_all_documents_have_one_score_there_is_one_stratum_with_a_cut():
    dataset = cut_documents("web", LENGTHS, fall=0.3, held_out=5)
    assert (dataset.names, dataset.shares, dataset.cut.edges) == (("web/q1",), (1.0,), ())
    assert dataset.held_out == (5,)


@pytest.mark.parametrize("seed", range(20))
def test_edges_hold_their_promises_for_any_scores(seed):
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 200))
    score = np.round(draw.normal(0, 1, n), int(draw.integers(0, 3)))
    length = draw.integers(1, 500, n)
    least, quantiles = int(draw.integers(1, 2000)), int(draw.integers(1, 20))
    edges = quantile_edges(score, length, quantiles, least)
    assert len(edges) < quantiles
    sizes = [length[own].sum() for own in members(edges, score)]
    assert len(edges) == 0 or min(sizes) >= least
    assert set(edges) <= set(score.tolist())


def test_a_stratum_holds_fifty_samples_at_least():
    """800 samples of a document each: 51 documents are needed for 50 samples and a last label."""
    dataset = cut_documents("web", np.full(800, SEQ_LENGTH), fall=FALLS[:800])
    assert len(dataset.names) == 800 // 51
    assert min(dataset.samples) >= 50


def test_documents_held_out_are_in_no_share_and_are_those_of_the_plan():
    portion = portion_of(LENGTHS)
    scores = scores_of(portion, fall=FALLS)
    settings = CutSettings(unit="documents", by="fall", held_out=30)
    dataset = cut_dataset("web", portion, scores, settings, SEQ_LENGTH, 7)
    plan = Plan(
        (identity_of(portion.tokens),),
        tuple(
            Stratum(name, 0, share)
            for name, share in zip(dataset.names, dataset.shares, strict=True)
        ),
        (Stage(0, (1.0,)),),
        *(SEQ_LENGTH, 7, (dataset.cut,)),
        documents=((0, 2000),),
    )
    arguments = plan, 0, scores, (0, 2000), LENGTHS
    trained, held_out = documents_of_strata(*arguments), held_out_documents(*arguments)
    assert dataset.held_out == (30,) * 16 == tuple(map(len, held_out))
    total = sum(LENGTHS[own].sum() for own in trained)
    for z, own in enumerate(trained):
        assert dataset.shares[z] == pytest.approx(LENGTHS[own].sum() / total)
        assert dataset.samples[z] == (LENGTHS[own].sum() - 1) // SEQ_LENGTH


def test_documents_that_are_not_fitted_have_no_learning_times():
    with pytest.raises(TokscaleError, match=r"scores of web have no learning times; expected some"):
        cut_documents("web", LENGTHS, fall=FALLS).learned_by(np.array([12.0]))


def test_the_learned_drop_is_weighted_by_tokens():
    time = rng.normal(12, 1, 2000)
    dataset = cut_documents("web", LENGTHS, time=time, fall=FALLS, drop=2.0, spread=1e-3)
    learned = dataset.learned_by(np.array([RANGE[0], 12.0, RANGE[1]]))
    for z, own in enumerate(members(dataset.cut.edges, FALLS)):
        before = LENGTHS[own][time[own] < 11.5].sum()
        until = LENGTHS[own][time[own] < 12.5].sum()
        assert 2 * before / LENGTHS[own].sum() < learned[1, z] < 2 * until / LENGTHS[own].sum()
    np.testing.assert_allclose(learned[2], 2, rtol=1e-3)


def test_a_training_document_without_a_fall_is_refused():
    falls = np.where(np.arange(2000) == 7, np.nan, FALLS)
    with pytest.raises(TokscaleError, match=r"1 of 2000 training documents of web .* first is 7"):
        cut_documents("web", LENGTHS, fall=falls)
    empty = np.where(np.arange(2000) == 7, 0, LENGTHS)
    cut_documents("web", empty, fall=falls)


def test_scores_without_the_score_of_the_cut_are_refused():
    with pytest.raises(TokscaleError, match="the scores of web have no target scores"):
        cut_documents("web", LENGTHS, by="target", fall=FALLS)


def test_a_dataset_or_stratum_shorter_than_a_sample_is_refused():
    with pytest.raises(TokscaleError, match="not enough training tokens"):
        cut_documents("web", [SEQ_LENGTH], fall=0.5)
    with pytest.raises(TokscaleError, match="has 60 tokens without the documents held out"):
        cut_documents("web", [30, 30, 30], fall=0.5, held_out=2)


def test_scores_of_another_split_are_refused_by_its_documents():
    """Of the documents 0 to 1800, where the job trains on all 2000."""
    portion = portion_of(LENGTHS)
    falls = np.where(np.arange(2000) < 1800, FALLS, np.nan)
    scores = scores_of(portion, fall=falls, train_documents=(0, 1800))
    with pytest.raises(TokscaleError, match=r"documents 0 to 1800, the data have 0 to 2000; .*spl"):
        check_scored(portion, scores, "fall")
    within = portion_of(LENGTHS, sequences=range(1800))
    check_scored(within, scores, "fall")
