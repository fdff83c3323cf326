"""Against the tokens that Megatron's GPTDataset returns; each of them tells where it is from."""

import math
import tracemalloc

import numpy as np
import pytest
from gpt_datasets import (
    gpt_config,
    gpt_dataset,
    pieces_of,
    read_tokens,
    sample_index,
    write_unique_tokens,
)

from megatron_tokscale.data import Cut, DatasetIdentity
from megatron_tokscale.data.samples import SampleIndex, SampleScores
from megatron_tokscale.data.scores import DocumentScores

MIXED = [3, 40, 1, 1, 2, 17, 1, 9, 30, 2, 1, 1, 1, 25, 8]
CASES = {
    "documents cut and spanned": {"lengths": MIXED},
    "documents of one and two tokens": {"lengths": [1, 2, 1, 1, 2] * 12},
    "one long document": {"lengths": [100]},
    "documents of just one sample": {"lengths": [8] * 9},
    "documents of just what a sample reads": {"lengths": [9] * 9},
    "empty documents": {"lengths": [0, 0, 5, 0, 20, 0, 1, 0, 0, 11, 0]},
    "several epochs": {"lengths": MIXED, "n_samples": 50},
    "a short last epoch, shuffled alone": {"lengths": MIXED, "n_samples": 19},
    "one document, many epochs": {"lengths": [13], "n_samples": 20},
    "some of the documents": {"lengths": MIXED, "documents": range(4, 11)},
    "no extra token": {"lengths": MIXED, "extra": False},
    "no extra token, documents of just one sample": {"lengths": [8] * 9, "extra": False},
    "no extra token, several epochs": {"lengths": [8, 3, 1, 4, 0], "n_samples": 9, "extra": False},
}
SEQ_LENGTH = 8


class Truth:
    """A GPTDataset, and of each of its samples the (document, offset) of every token it reads."""

    def __init__(self, folder, lengths, n_samples=None, documents=None, extra=True, seed=1):
        prefix = write_unique_tokens(folder / "data", lengths)
        config = gpt_config(None, SEQ_LENGTH, extra=extra, seed=seed)
        self.dataset = gpt_dataset(prefix, config, n_samples, documents)
        self.lengths, self.extra = lengths, extra
        self.index = sample_index(self.dataset)
        read = [read_tokens(self.dataset[j], extra=extra) for j in range(len(self.dataset))]
        assert len(read) >= 3
        self.pieces = [pieces_of(tokens, lengths) for tokens in read]
        document_of = np.repeat(np.arange(len(lengths)), lengths)
        self.documents = [document_of[tokens].tolist() for tokens in read]

    @property
    def labels(self):
        """The document of every token that a sample predicts: of all but its first."""
        return [documents[1:] for documents in self.documents]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def truth(request, tmp_path):
    return Truth(tmp_path, **request.param)


def merged(pieces):
    """The pieces, where a document is followed by itself from its beginning joined or not."""
    return [(piece.document, token) for piece in pieces for token in range(*piece[1:])]


def test_the_pieces_are_the_tokens_that_the_dataset_returns(truth):
    for sample, expected in enumerate(truth.pieces):
        found = truth.index.pieces(sample)
        assert merged(found) == merged(expected)
        assert all(piece.start < piece.stop for piece in found)
        n_pieces = sum(piece.start > 0 for piece in found[1:])
        assert n_pieces == 0, "only the first piece can begin inside its document"


def test_a_document_is_held_by_the_samples_that_return_a_token_of_it(truth):
    for document in range(len(truth.lengths)):
        expected = [j for j, held in enumerate(truth.documents) if document in held]
        assert truth.index.holding(document).tolist() == expected


def test_sums_run_over_the_tokens_that_a_sample_predicts(truth):
    value_Q = np.random.default_rng(0).normal(size=len(truth.lengths))
    expected = [math.fsum(value_Q[q] for q in labels) for labels in truth.labels]
    np.testing.assert_allclose(truth.index.sum_over_labels(value_Q), expected, atol=1e-12)
    ones_N = truth.index.sum_over_labels(np.ones(len(truth.lengths)))
    assert ones_N.tolist() == [SEQ_LENGTH - (not truth.extra)] * len(truth.labels)


def scores_of(lengths, seed=0, **arrays) -> DocumentScores:
    rng, n = np.random.default_rng(seed), len(lengths)
    made = {
        "learning_time": rng.uniform(10, 25, n),
        "spread": rng.uniform(0, 3, n),
        "drop": rng.uniform(0, 4, n),
        "unlearned": rng.uniform(0, 1, n),
        "surprisal": rng.uniform(3, 9, n),
    } | arrays
    return DocumentScores(
        **{f"{name}_Q": np.asarray(array, np.float32) for name, array in made.items()},
        watched_Q=np.zeros(n, np.int32),
        dataset=DatasetIdentity("data", n, sum(lengths)),
        digest="",
    )


def holes(array, *nan_at):
    array = np.array(array, dtype=np.float32)
    array[list(nan_at)] = np.nan
    return array


def scores_with_holes(lengths) -> DocumentScores:
    """As they come: no drop and no time in some documents, no score in others, nothing in empty."""
    whole, n = scores_of(lengths), len(lengths)
    empty = [q for q, length in enumerate(lengths) if not length]
    unscored, flat = [*range(1, n, 5), *empty], list(range(2, n, 5))
    drop = whole.drop_Q.copy()
    drop[flat] = 0
    return scores_of(
        lengths,
        learning_time=holes(whole.learning_time_Q, *unscored, *flat),
        spread=holes(whole.spread_Q, *unscored, *flat),
        drop=holes(drop, *unscored),
        unlearned=holes(whole.unlearned_Q, *unscored),
        surprisal=holes(whole.surprisal_Q, *empty),
    )


def mean(values):
    values = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("make", [scores_of, scores_with_holes])
def test_a_samples_scores_are_a_loop_over_the_tokens_it_predicts(truth, make):
    scores = make(truth.lengths)
    found = SampleScores.from_document_scores(scores, truth.index)
    for sample, labels in enumerate(truth.labels):
        for name in ("drop", "unlearned", "surprisal"):
            expected = mean(getattr(scores, f"{name}_Q")[q] for q in labels)
            got = getattr(found, f"{name}_N")[sample]
            np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
        learned = [q for q in labels if scores.drop_Q[q] > 0]
        weights = [float(scores.drop_Q[q]) for q in learned]
        times = [float(scores.learning_time_Q[q]) for q in learned]
        spreads = [float(scores.spread_Q[q]) for q in learned]
        if not learned:
            assert math.isnan(found.learning_time_N[sample])
            assert math.isnan(found.spread_N[sample])
            continue
        time = np.average(times, weights=weights)
        np.testing.assert_allclose(found.learning_time_N[sample], time, rtol=1e-9)
        # The law of total variance: within the documents, and between them.
        between = [(t - time) ** 2 for t in times]
        variance = np.average(np.square(spreads) + between, weights=weights)
        np.testing.assert_allclose(found.spread_N[sample], variance**0.5, atol=1e-6)


def test_a_sample_without_drop_has_no_learning_time_whatever_came_before(tmp_path):
    """No rounding of the large sums is taken for a drop."""
    lengths = [1007, 901, 30] * 3
    truth = Truth(tmp_path, lengths, n_samples=900)
    # Sums as large, against what a token has, as those of a corpus of 10^12 tokens.
    drop = np.array([1e10 / 3, 0, 0.1] * 3, dtype=np.float32)
    found = SampleScores.from_document_scores(scores_of(lengths, drop=drop), truth.index)
    has_drop = np.array([any(drop[q] > 0 for q in labels) for labels in truth.labels])
    assert 0.2 < has_drop.mean() < 0.8
    assert (np.isnan(found.learning_time_N) == ~has_drop).all()
    assert (found.drop_N[~has_drop] == 0).all()
    inside = found.learning_time_N[has_drop]
    times = scores_of(lengths).learning_time_Q[drop > 0]
    assert times.min() - 1e-5 <= inside.min() <= inside.max() <= times.max() + 1e-5


def test_there_is_no_sample_beyond_the_last(tmp_path):
    index = Truth(tmp_path, MIXED).index
    for sample in (-1, len(index), len(index) + 5):
        with pytest.raises(IndexError, match=f"sample {sample} is not .*has {len(index)}"):
            index.pieces(sample)


def test_the_pieces_of_a_sample_are_found_without_reading_the_indices(tmp_path):
    """They are mapped, and of the scale of a corpus."""
    n = 1_000_000
    bound_N12 = np.stack([np.arange(n + 1), np.zeros(n + 1, int)], axis=1)
    arrays = {"lengths": np.full(n + 1, 8), "document": np.arange(n + 1), "bound": bound_N12}
    for name, array in (arrays | {"shuffle": np.arange(n)}).items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = [
        np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        for name in ("lengths", "document", "bound", "shuffle")
    ]
    tracemalloc.start()
    assert SampleIndex(*mapped).pieces(77) == [(77, 0, 8), (78, 0, 1)]
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def ranking(order="learning-time", *, unlearned=False) -> Cut:
    return Cut("f", order, unlearned)


def sample_scores(n=40, seed=0, **arrays) -> SampleScores:
    rng = np.random.default_rng(seed)
    made = {
        "learning_time_N": rng.integers(0, 12, n).astype(float),  # with ties
        "spread_N": np.zeros(n),
        "drop_N": np.ones(n),
        "unlearned_N": rng.integers(0, 8, n) / 8,
        "surprisal_N": rng.integers(0, 12, n).astype(float),
    }
    return SampleScores(**(made | arrays))


@pytest.mark.parametrize("n_unlearned", [0, 1, 13, 40])
def test_samples_are_ranked_as_python_sorts_them(n_unlearned):
    scores = sample_scores()
    by_unlearned = sorted(range(40), key=lambda j: scores.unlearned_N[j])
    never = by_unlearned[40 - n_unlearned :]
    others = sorted({*range(40)} - {*never})
    expected = [*sorted(others, key=lambda j: scores.learning_time_N[j]), *never]
    found = scores.ranked(ranking(unlearned=True), n_unlearned)
    assert found.tolist() == expected


def test_samples_with_nothing_to_learn_come_first():
    scores = sample_scores(5, learning_time_N=np.array([np.nan, 3, 1, np.nan, 2.0]))
    assert scores.ranked(ranking(), 0).tolist() == [0, 3, 2, 4, 1]


def test_samples_without_any_score_are_not_taken_for_never_learned():
    scores = sample_scores(
        4,
        learning_time_N=np.array([1, np.nan, 2, 3]),
        unlearned_N=np.array([0.2, np.nan, 0.9, 0.1]),
    )
    assert scores.ranked(ranking(unlearned=True), 1).tolist() == [1, 0, 3, 2]
