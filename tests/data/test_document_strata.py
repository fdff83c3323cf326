"""The documents of each stratum, against a loop over the documents."""

from dataclasses import replace

import numpy as np
import pytest
from scored import portion_of, scores_of

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import Cut, DatasetIdentity, Plan, Stage, Stratum
from megatron_tokscale.data.document_strata import documents_of_strata, held_out_documents

EDGES = (9.0, 10.0, 12.5)
PART = (5, 70)
N = 80


def lengths() -> np.ndarray:
    """Every ninth document is empty."""
    return np.where(np.arange(N) % 9 == 0, 0, 20 + np.arange(N))


def learning_times() -> np.ndarray:
    """Half of them on an edge; some documents learn nothing."""
    time_Q = np.random.default_rng(0).choice([7.0, 8.5, 9.0, 9.5, 10.0, 11.0, 12.5, 13.0], N)
    time_Q[::13] = np.nan
    return time_Q


def planted(**changes):
    return scores_of(portion_of(lengths()), learning_times(), **changes)


def plan_of(held_out: int = 0, names=("a", "b", "c", "d"), **changes) -> Plan:
    cut = Cut("s", unit="documents", edges=EDGES, held_out=held_out)
    plan = Plan(
        datasets=(DatasetIdentity("web", N, int(lengths().sum())),),
        strata=tuple(Stratum(name, 0, 0.25) for name in names),
        stages=(Stage(0, (1.0,)),),
        seq_length=64,
        seed=5,
        cuts=(cut,),
        documents=(PART,),
    )
    return replace(plan, **changes)


def trained(plan: Plan) -> list[list[int]]:
    return [found.tolist() for found in documents_of_strata(plan, 0, planted(), PART, lengths())]


def kept_out(plan: Plan) -> list[list[int]]:
    return [found.tolist() for found in held_out_documents(plan, 0, planted(), PART, lengths())]


def by_hand() -> list[list[int]]:
    found = [[], [], [], []]
    for document in range(*PART):
        if lengths()[document] == 0:
            continue
        time = learning_times()[document]
        found[0 if np.isnan(time) else sum(time >= edge for edge in EDGES)].append(document)
    return found


def test_a_stratum_holds_the_training_documents_between_its_edges():
    assert trained(plan_of()) == by_hand()
    assert kept_out(plan_of()) == [[], [], [], []]
    assert all(found for found in by_hand())


def test_documents_can_be_divided_by_the_frequency_of_their_tokens():
    cut = Cut("s", "frequency", unit="documents", edges=(5.5, 6.0, 6.5))
    surprisal = np.linspace(5, 7, N).astype(np.float32)
    expected = [[], [], [], []]
    for document in range(*PART):
        if lengths()[document]:
            expected[sum(surprisal[document] >= edge for edge in cut.edges)].append(document)
    assert trained(plan_of(cuts=(cut,))) == expected


@pytest.mark.parametrize("held_out", [1, 4, 10_000])
def test_held_out_documents_are_left_out_of_the_training_and_never_more_than_half(held_out):
    plan = plan_of(held_out)
    for whole, drawn, out in zip(by_hand(), trained(plan), kept_out(plan), strict=True):
        assert len(out) == min(held_out, len(whole) // 2)
        assert sorted(drawn + out) == whole
        assert drawn == sorted(drawn) and out == sorted(out)


def test_more_held_out_documents_contain_the_fewer():
    for fewer, more in zip(kept_out(plan_of(2)), kept_out(plan_of(4)), strict=True):
        assert {*fewer} < {*more}


def test_held_out_documents_depend_on_the_seed_and_the_name_of_the_stratum_alone():
    plan = plan_of(4)
    assert kept_out(replace(plan, stages=(Stage(0, (3.0,), (1, 2, 3, 4)),))) == kept_out(plan)
    assert all(np.not_equal(kept_out(replace(plan, seed=6)), kept_out(plan)).any(axis=1))
    renamed = kept_out(plan_of(4, ("a", "b", "other", "d")))
    assert [renamed[z] == kept_out(plan)[z] for z in range(4)] == [True, True, False, True]


def test_scores_that_lack_the_score_of_the_plan_are_refused():
    cut = Cut("s", "target", unit="documents", edges=EDGES)
    with pytest.raises(TokscaleError, match="the scores of web have no target scores; run"):
        trained(plan_of(cuts=(cut,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": (9.0, 10.0)}, "2 edges of scores for the 4 strata of web; expected 3"),
        ({"edges": (9.0, 9.0, 10.0)}, "expected finite numbers that ascend"),
        ({"edges": (9.0, 10.0, np.inf)}, "expected finite numbers that ascend"),
        ({"held_out": -1}, "holds -1 documents out of each stratum of web; expected 0 or more"),
        ({"unlearned": True}, "never-learned documents of web; expected one of samples alone"),
        ({"unit": "tokens"}, "divides web by 'tokens'; expected one of samples, documents"),
        ({"order": "name"}, "ranks web by 'name'; expected one of learning-time"),
        ({"unit": "samples"}, "has 3 edges of scores and 0 documents to hold out; expected"),
        (
            {"unit": "samples", "edges": (), "order": "fall"},
            "ranks web by 'fall'; expected one of learning-time, frequency for strata of samples",
        ),
    ],
)
def test_a_cut_whose_parts_do_not_fit_is_refused(change, message):
    (cut,) = plan_of().cuts
    with pytest.raises(TokscaleError, match=message) as caught:
        plan_of(cuts=(replace(cut, **change),))
    assert "\n" not in str(caught.value)


def test_a_plan_of_document_strata_holds_the_training_part():
    with pytest.raises(TokscaleError, match="documents of web, and its training part is not known"):
        plan_of(documents=())


def test_a_plan_of_document_strata_read_back_is_the_plan_written(tmp_path):
    plan = plan_of(3)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.fingerprint == plan.fingerprint != plan_of(4).fingerprint
