"""The policy `fall` in worlds of known quanta, where the best weights of all can be computed."""

import numpy as np
import pytest
from quanta_worlds import N_DATASETS, make_world
from scored import cut_documents, job_over

from megatron_tokscale.reweight import ByFall, gain_of, make_plan

N_TOKENS = 60_000.0  # of the world's clock: length of the training
POOL = 5_000_000  # tokens of the documents
DIRTY = {
    "junk": {"junk": 0.1},
    "boilerplate": {"boilerplate": 0.15},
    "all": {"junk": 0.1, "boilerplate": 0.15, "noise": 0.2, "popularity": 1.0, "mixture": 0.5},
}


def cut_world(world):
    """The topics of each dataset as documents with their true falls, cut into strata."""
    fall_G = world.fall_G(N_TOKENS / 4, N_TOKENS)
    datasets, topics = [], [np.flatnonzero(world.dataset_G == d) for d in range(N_DATASETS)]
    for d, own in enumerate(topics):
        lengths = np.maximum(np.rint(world.share_G[own] * POOL), 1).astype(int)
        datasets.append(cut_documents(f"d{d}", lengths, fall=fall_G[own]))
    return datasets, topics


def percent_faster(world, datasets, topics, **options):
    """Tokens that a training under the plan saves, and the plan."""
    weights = [world.share_G[own].sum() for own in topics]
    job = job_over(datasets, weights, 30_000, 1, documents=[(0, own.size) for own in topics])
    plan = make_plan(job, ByFall(datasets), **options)
    fall_G = world.fall_G(N_TOKENS / 4, N_TOKENS).astype(np.float32)
    stratum_G = np.zeros(len(fall_G), int)
    for d, own in enumerate(topics):
        edges = datasets[d].cut.edges
        stratum_G[own] = plan.strata_of(d).start + np.searchsorted(edges, fall_G[own], "right")
    part_G = world.share_G / np.bincount(stratum_G, world.share_G)[stratum_G]

    def drawn_G(n_tokens):
        """Topics are drawn from a stratum by their tokens; after the training as at its end."""
        samples = n_tokens / N_TOKENS * job.train_samples
        return n_tokens / samples * plan.target_Z(samples)[stratum_G] * part_G

    return world.faster(drawn_G, N_TOKENS), plan


@pytest.mark.parametrize("name", DIRTY)
def test_in_dirty_worlds_the_policy_reaches_most_of_the_ideal_gain(name):
    world = make_world(2, n_topics=300, **DIRTY[name])
    ideal_G = world.ideal_G(N_TOKENS)
    ideal = world.faster(lambda n_tokens: n_tokens * ideal_G, N_TOKENS)
    datasets, topics = cut_world(world)
    found, plan = percent_faster(world, datasets, topics)
    assert ideal > 8
    assert 0.6 * ideal < found < ideal
    permuted, _ = percent_faster(world, datasets, topics, permute=True)
    assert permuted < 0.1 * ideal
    # What the plan says that it can gain is a bound, and no more than twice what there is.
    at_most = 100 * gain_of(plan, datasets).at_most
    assert found < at_most < 2 * ideal


def test_in_a_clean_world_there_is_little_to_gain():
    world = make_world(2, n_topics=300, popularity=0.2, mixture=0.1)
    found, plan = percent_faster(world, *cut_world(world))
    assert -0.5 < found < 1.5
    assert gain_of(plan, cut_world(world)[0]).at_most < 0.02
