"""Strata of documents over Megatron's own datasets, read token by token."""

import pickle
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from document_plans import (
    EDGES,
    HELD_OUT,
    LENGTHS,
    LONG,
    PARTS,
    SEQ_LENGTH,
    STAGES,
    all_scores,
    documents_in,
    follow,
    job_datasets,
    packings_of,
    plan_of,
    scores_of,
    stratum_of,
    write_data,
)
from gpt_datasets import gpt_config, gpt_dataset, read_tokens, write_unique_tokens
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from numpy.testing import assert_array_equal
from torch.utils.data import DataLoader

from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.data import (
    Cut,
    DatasetIdentity,
    Decision,
    Plan,
    Stage,
    Stratum,
    build_index,
    with_decisions,
)
from megatron_tokscale.data.dataset import PlannedDataset
from megatron_tokscale.data.document_strata import held_out_documents, packing_sizes
from megatron_tokscale.data.index import extend_index
from megatron_tokscale.training.data import follower
from megatron_tokscale.training.data.follower import Follower
from megatron_tokscale.training.data.packings import packed_documents, packed_sizes, share_masks

N = 150


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def planned(prefixes, tmp_path_factory):
    return follow(plan_of(prefixes), prefixes, tmp_path_factory.mktemp("cache"), N)


def tokens(dataset, numbers=None):
    return [read_tokens(dataset[k]) for k in (range(len(dataset)) if numbers is None else numbers)]


def trained_documents() -> list[int]:
    return [document for document in range(*PARTS["web"]) if LENGTHS["web"][document]]


def test_no_sample_mixes_documents_of_two_strata(planned):
    drawn = Counter()
    for k in range(N):
        name, documents = documents_in(planned[k])
        stratum = planned.plan.strata[planned.locate(k)[0]]
        assert stratum.name.partition("/")[0] == name
        if name == "web":
            assert {f"web/{stratum_of(document)}" for document in documents} == {stratum.name}
        drawn[name] += len(documents)
    assert drawn["web"] > 100


def test_held_out_documents_are_never_drawn_and_all_others_are(prefixes, planned):
    scores = all_scores(prefixes)[0]
    lengths = np.array(LENGTHS["web"])
    held = held_out_documents(planned.plan, 0, scores, PARTS["web"], lengths)
    assert [len(row) for row in held] == [HELD_OUT] * 3
    held = {int(document) for row in held for document in row}
    plan = replace(planned.plan, stages=(Stage(0, (1, 0, 0)),))
    long = follow(plan, prefixes, planned.strata.files[4].parent, 200)
    seen = {document for k in range(200) for document in documents_in(long[k])[1]}
    assert not seen & held
    # Megatron drops the tail of each packing, shorter than a sequence.
    missed = {*trained_documents()} - held - seen
    assert sum(LENGTHS["web"][document] for document in missed) <= 3 * SEQ_LENGTH


def test_counts_follow_the_weights_of_every_stage(planned):
    """Strata are told by the tokens, weights are normalised by hand."""
    strata = [
        stratum_of(documents[0]) if name == "web" else None
        for name, documents in (documents_in(planned[k]) for k in range(N))
    ]
    due = np.zeros(3)
    for stage, stop in zip(STAGES, [*(stage.start for stage in STAGES[1:]), N], strict=True):
        of_web = stage.weights[0] / sum(stage.weights)
        within = np.array(stage.within[:3]) / sum(stage.within[:3])
        due += (stop - stage.start) * of_web * within
        found = [strata[:stop].count(z) for z in range(3)]
        np.testing.assert_allclose(found, due, atol=1.5)


@pytest.mark.parametrize("z", range(3))
def test_in_an_epoch_of_a_stratum_every_token_of_its_documents_is_read_once(planned, z):
    size = int(planned.strata.size_Z[z])
    packing = planned.datasets[z]
    orders = []
    for epoch in range(3):
        draws = [planned.strata.locate(z, epoch * size + j) for j in range(size)]
        assert {draw[:2] for draw in draws} == {(z, epoch)}
        orders.append([number for *_, number in draws])
        inputs = [token for *_, number in draws for token in read_tokens(packing[number])[:-1]]
        assert len({*inputs}) == len(inputs) == size * SEQ_LENGTH
    n_tokens = sum(LENGTHS["web"][document] for document in packing.indices.tolist())
    assert size == (n_tokens - 1) // SEQ_LENGTH
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(size))
    assert orders[0] != orders[1] != orders[2]


def test_a_document_longer_than_the_sequence_fills_several_samples(planned):
    z = stratum_of(LONG)
    packing = planned.datasets[z]
    alone = [n for n in range(len(packing)) if documents_in(packing[n])[1] == [LONG]]
    assert len(alone) >= LENGTHS["web"][LONG] // SEQ_LENGTH - 1


def batches(dataset, size, workers, consumed, batch=4):
    """Each global batch of Megatron's samplers and loaders, from `consumed` on."""
    loaders = [
        DataLoader(
            dataset,
            batch_sampler=MegatronPretrainingSampler(len(dataset), consumed, 1, rank, size),
            num_workers=workers,
        )
        for rank in range(size)
    ]
    rows = [
        [*part["tokens"][0].tolist(), int(part["labels"][0][-1])]
        for parts in zip(*loaders, strict=True)
        for part in parts
    ]
    return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 2), (4, 0)])
def test_the_same_batches_for_any_number_of_ranks_and_workers(planned, size, workers):
    expected = tokens(planned)
    assert batches(planned, size, workers, 0) == [expected[i : i + 4] for i in range(0, N - 3, 4)]


@pytest.mark.parametrize("consumed", [1, 69, 70, 71, 110, 111, 112, 140])
def test_resumed_around_every_stage_the_stream_goes_on(prefixes, planned, consumed):
    cache = planned.strata.files[4].parent
    resumed = follow(planned.plan, prefixes, cache, N, build=False, consumed=consumed)
    found = batches(resumed, (1, 2, 4)[consumed % 3], 0, consumed)
    expected = tokens(planned)
    assert found == [expected[i : i + 4] for i in range(consumed, N - 3, 4)]


def test_the_order_depends_neither_on_the_length_of_training_nor_on_later_stages(prefixes, planned):
    cache = planned.strata.files[4].parent
    short = replace(planned.plan, stages=STAGES[:2])
    assert tokens(follow(short, prefixes, cache, 111)) == tokens(planned, range(111))


def test_the_same_samples_from_a_pickled_copy_and_from_the_second_model_chunk(prefixes, planned):
    expected = tokens(planned)
    assert tokens(pickle.loads(pickle.dumps(planned))) == expected
    cache = planned.strata.files[4].parent
    again = follow(planned.plan, prefixes, cache, N, build=True, like=planned)
    assert again.index is planned.index and again.strata is planned.strata
    assert tokens(again) == expected


def test_one_rank_builds_and_the_others_open_what_it_built(prefixes, tmp_path):
    plan = plan_of(prefixes)
    jobs = job_datasets(prefixes, tmp_path)

    class Nobody(list):
        def __getitem__(self, number):
            raise AssertionError(number)

    with pytest.raises(TokscaleError, match=r"-counts.npy is not there; is this directory shared"):
        follow(plan, prefixes, tmp_path, scores=Nobody([0]), build=False, jobs=jobs)
    built = follow(plan, prefixes, tmp_path, jobs=jobs)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    for build in (False, True):
        opened = follow(plan, prefixes, tmp_path, scores=Nobody([0]), build=build, jobs=jobs)
        assert tokens(opened) == tokens(built)
    again = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    assert again == files


@pytest.mark.parametrize("option", ["fast_cache_load", "defer_npy_index_mmap"])
def test_megatrons_ways_to_open_a_cache_give_the_same_samples(prefixes, planned, tmp_path, option):
    """The rank that builds may use neither; the others use both."""
    jobs = job_datasets(prefixes, tmp_path)
    for job in jobs:
        setattr(job.config, option, True)
    built = follow(planned.plan, prefixes, tmp_path, jobs=jobs)
    opened = follow(planned.plan, prefixes, tmp_path, jobs=jobs, build=False)
    assert tokens(opened) == tokens(built) == tokens(planned)


def equal_strata(folder):
    """Sixteen documents of one length in two strata of equal size, and no document held out."""
    prefix = write_unique_tokens(folder / "even", [10] * 16)
    scores = scores_of(prefix, [0, 1] * 8)
    cut = Cut(scores.fingerprint, "fall", unit="documents", edges=(0.5,))
    plan = Plan(
        datasets=(scores.dataset,),
        strata=(Stratum("even/low", 0, 0.5), Stratum("even/high", 0, 0.5)),
        stages=(Stage(0, (1.0,)),),
        seq_length=SEQ_LENGTH,
        seed=5,
        cuts=(cut,),
        documents=((0, 16),),
    )
    job = gpt_dataset(prefix, gpt_config(folder / "cache", SEQ_LENGTH))
    return plan, scores, job


def test_strata_of_equal_size_do_not_share_an_index(tmp_path):
    """Megatron's own key of the two is the same."""
    plan, scores, job = equal_strata(tmp_path)
    packed = packings_of(plan, {}, tmp_path / "cache", [scores], jobs=[job])
    low, high = packed
    assert low.unique_description_hash == high.unique_description_hash
    assert sorted(low.document_index.tolist()) == list(range(0, 16, 2))
    assert sorted(high.document_index.tolist()) == list(range(1, 16, 2))
    # Opened from the files, too.
    for again in packings_of(plan, {}, tmp_path / "cache", [scores], jobs=[job], build=False):
        assert {document % 2 for document in again.document_index.tolist()} in ({0}, {1})
    # The documents are the key: other edges that give the same documents find the same index.
    before = {path.parent for path in tmp_path.rglob("*document_index.npy")}
    moved = replace(plan, cuts=(replace(plan.cuts[0], edges=(0.7,)),))
    packings_of(moved, {}, tmp_path / "cache", [scores], jobs=[job])
    assert {path.parent for path in tmp_path.rglob("*document_index.npy")} == before


def test_sizes_are_known_before_megatron_builds_an_index(prefixes, planned, tmp_path):
    plan, jobs = planned.plan, job_datasets(prefixes, tmp_path)
    scores = all_scores(prefixes)
    documents = packed_documents(plan, jobs, scores.__getitem__, tmp_path, build=True)
    sizes = [len(packing) for packing in planned.datasets]
    assert packed_sizes(plan, jobs, documents) == sizes
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert packing_sizes(plan, [None] * 3, [None] * 5) == [0] * 5
    assert planned.strata.size_Z.tolist()[:4] == sizes[:4]


def test_shares_of_the_tokens_estimate_the_sizes(prefixes, planned):
    """A plan is made before any job has packed the documents."""
    tokens_Z = np.zeros(3)
    for z in range(3):
        tokens_Z[z] = sum(LENGTHS["web"][q] for q in planned.datasets[z].indices.tolist())
    shares = tokens_Z / tokens_Z.sum()
    strata = tuple(
        replace(stratum, share=float(share))
        for stratum, share in zip(planned.plan.strata[:3], shares, strict=True)
    )
    plan = replace(planned.plan, strata=(*strata, *planned.plan.strata[3:]))
    estimate = plan.sizes_Z([int(tokens_Z.sum() - 1) // SEQ_LENGTH, 1, 1])[:3]
    np.testing.assert_allclose(estimate, planned.strata.size_Z[:3], atol=1)


@pytest.mark.parametrize("edges", [(-1.0, 1.0), (1.0, 9.0)], ids=["empty first", "empty last"])
def test_an_empty_stratum_is_refused_in_one_line_if_it_has_weight(prefixes, tmp_path, edges):
    cut = replace(plan_of(prefixes).cuts[0], edges=edges)
    plan = plan_of(prefixes)
    plan = replace(plan, cuts=(cut, *plan.cuts[1:]))
    empty = 0 if edges[0] < 0 else 2
    with pytest.raises(TokscaleError) as caught:
        follow(plan, prefixes, tmp_path)
    assert str(caught.value) == (
        f"stratum 'web/{empty}' of the plan has no 8 training tokens for a sample; expected "
        "enough, as it has weight; make the plan with fewer quantiles, or give the stratum weight 0"
    )
    within = tuple(0.0 if z == empty else 1.0 for z in range(6))
    without = follow(replace(plan, stages=(Stage(0, (1, 1, 1), within),)), prefixes, tmp_path)
    assert {documents_in(without[k])[0] for k in range(N)} == {*LENGTHS}


def test_a_stratum_without_a_whole_sample_is_refused_if_it_has_weight(tmp_path):
    prefix = write_unique_tokens(tmp_path / "web", [20, 5, 20])
    scores = scores_of(prefix, [0, 1, 0])
    cut = Cut(scores.fingerprint, "fall", unit="documents", edges=(0.5,))
    plan = Plan(
        datasets=(scores.dataset,),
        strata=(Stratum("web/0", 0, 40 / 45), Stratum("web/1", 0, 5 / 45)),
        stages=(Stage(0, (1.0,), (1.0, 0.0)), Stage(20, (1.0,))),
        seq_length=SEQ_LENGTH,
        seed=5,
        cuts=(cut,),
        documents=((0, 3),),
    )
    job = gpt_dataset(prefix, gpt_config(tmp_path / "cache", SEQ_LENGTH))
    packed = packings_of(plan, {}, tmp_path / "cache", [scores], jobs=[job])
    assert [len(packing) for packing in packed] == [4, 0]
    PlannedDataset(plan, packed, build_index(plan, 20))
    with pytest.raises(TokscaleError, match="'web/1' of the plan has no 8 training tokens"):
        PlannedDataset(plan, packed, build_index(plan, 21))


def test_a_limit_on_epochs_counts_the_samples_of_the_stratum(prefixes, planned, tmp_path):
    size = int(planned.strata.size_Z[2])
    stages = (Stage(0, (1, 0, 0), (0, 0, 1, 1, 1, 1)),)
    plan = replace(planned.plan, stages=stages, max_epochs=2.0)
    follow(plan, prefixes, tmp_path, 2 * size)
    with pytest.raises(TokscaleError, match=r"'web/2' of the plan would be repeated for 2\.\d+ ep"):
        follow(plan, prefixes, tmp_path, 2 * size + 2)


def test_weights_of_strata_that_are_decided_live_change_nothing_before_their_start(
    prefixes, planned
):
    within = (0.0, 0.0, 1.0, 1.0, 0.5, 0.5)
    decision = Decision(3, 60, (1.0, 1.0, 1.0), within)
    plan = with_decisions(planned.plan, [decision])
    cache = planned.strata.files[4].parent
    live = follow(planned.plan, prefixes, cache, N, shares_index=True)
    extend_index(plan, live.index, 60)
    assert tokens(live, range(60)) == tokens(planned, range(60))
    assert tokens(live) == tokens(follow(plan, prefixes, cache, N))
    of_web = {
        planned.plan.strata[live.locate(k)[0]].name
        for k in range(61, N)
        if documents_in(live[k])[0] == "web"
    }
    assert of_web == {"web/2"}, "also in the later stages of the plan"


def test_stages_and_edges_of_the_tests_are_what_they_promise():
    assert [after.start - before.start for before, after in pairwise(STAGES)] == [70, 41]
    assert {stratum_of(document) for document in trained_documents()} == {0, 1, 2}
    assert len(EDGES) == 2


def test_a_dataset_that_the_job_no_longer_has_leaves_its_strata_out(prefixes, tmp_path):
    stages = (Stage(0, (1, 1, 1)), Stage(10, (0, 1, 1)))
    plan = replace(plan_of(prefixes), stages=stages)
    jobs = [None, *job_datasets(prefixes, tmp_path)[1:]]
    left = follow(plan, prefixes, tmp_path, 40, jobs=jobs, consumed=10)
    assert left.datasets[:3] == [None] * 3
    whole = follow(plan, prefixes, tmp_path, 40)
    assert tokens(left, range(10, 40)) == tokens(whole, range(10, 40))


def test_a_plan_takes_the_dataset_of_every_packing():
    plan = Plan((DatasetIdentity("a", 2, 99),), (Stratum("a", 0),), (Stage(0, (1,)),), 8, 1)
    with pytest.raises(TokscaleError, match="the plan is for 1 datasets, the job has 2"):
        PlannedDataset(plan, [range(3), range(3)], build_index(plan, 3))


def test_all_packings_have_one_mask_and_the_samples_of_megatron(prefixes, tmp_path):
    """Each packing beside Megatron's own, with a mask of its own; the first sample has a pad."""
    plan = plan_of(prefixes)

    def opened():
        packed = packings_of(plan, prefixes, tmp_path, create_attention_mask=True)
        for dataset in packed:
            if len(dataset) > 1:
                pad = int(dataset[0]["tokens"][3])
                dataset._pad_token_id = pad
                dataset.masks_and_position_ids_are_cached = False
        return packed

    shared, own = opened(), opened()
    share_masks(shared)
    masks = {dataset.cached_attention_mask.data_ptr() for dataset in shared}
    assert len(masks) == 1 < len(shared)
    for ours, theirs in zip(shared, own, strict=True):
        for k in reversed(range(len(ours))):  # Megatron's masks keep the pads of the first sample
            theirs.masks_and_position_ids_are_cached = False
            ours_k, theirs_k = ours[k], theirs[k]
            assert ours_k.keys() == theirs_k.keys()
            for name, value in theirs_k.items():
                assert_array_equal(ours_k[name], value)
    assert len({d.cached_attention_mask.data_ptr() for d in own}) == len(own)


def test_masks_that_depend_on_the_sample_are_not_shared(prefixes, tmp_path):
    packed = packings_of(
        plan_of(prefixes), prefixes, tmp_path, create_attention_mask=True, eod_mask_loss=True
    )
    share_masks(packed)
    assert not any(dataset.masks_and_position_ids_are_cached for dataset in packed)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_dataset_that_a_rank_trains_on_has_one_mask(prefixes, tmp_path, monkeypatch, rank):
    """Rank 0 makes the plan's files, the others map them."""
    jobs = job_datasets(prefixes, tmp_path, create_attention_mask=True)
    planned = follow(plan_of(prefixes), prefixes, tmp_path, N, jobs=jobs)
    part = Follower.__new__(Follower)
    part._is_moved = False
    monkeypatch.setattr(Follower, "_settle", lambda *_: None)
    monkeypatch.setattr(Follower, "_build" if rank == 0 else "_prepared", lambda *_, **__: planned)
    monkeypatch.setattr(follower.torch.distributed, "get_rank", lambda: rank)
    for name in ("while_others_wait", "together"):
        monkeypatch.setattr(follower, name, lambda act, *, where: act() if where else None)
    monkeypatch.setattr(follower, "from_rank_0", lambda act: act())
    built = SimpleNamespace(
        is_distributed=True, train="the job's own", n_samples=[N], with_train=lambda train: train
    )
    train = part.on_data(None, built)
    assert train is planned
    assert len({dataset.cached_attention_mask.data_ptr() for dataset in train.datasets}) == 1
