"""Worlds of known quanta in which a plan's gain can be computed: the quantization model, by hand.

A document kind (a topic) holds quanta that all topics share, quanta of its dataset, and its own. The
mean loss of a quantum falls with ln(exposure) as a sigmoid. A part of the tokens of a topic is
noise that nothing learns; junk is noise alone; boilerplate holds the head of the shared quanta.

Shapes: G topics, D datasets, K quanta of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH = 0.35  # of a quantum's sigmoid in ln(exposure)
AMPLITUDE = 3.0  # nats of a quantum that is not learned
HEAD = 60  # shared quanta that boilerplate holds
N_DATASETS = 5


def zipf(count: int) -> Floats:
    """Frequencies of quanta: Zipf's law with exponent 1.4, so the loss falls as t^-0.29."""
    p = np.arange(1, count + 1) ** -1.4
    return p / p.sum()


@dataclass
class Block:
    """Quanta that some topics share: topic g holds quantum k in `holds_GK[g, k]` of its tokens."""

    holds_GK: Floats
    need_K: Floats

    def unlearned_K(self, n_G: Floats) -> Floats:
        """Share of each quantum that is still to be learned after so many tokens of each topic."""
        return 1 / (1 + (n_G @ self.holds_GK / self.need_K) ** (1 / WIDTH))

    def marginal_G(self, n_G: Floats, weight_G: Floats) -> Floats:
        """Fall of the weighted loss for one more token of each topic."""
        exposure_K = n_G @ self.holds_GK
        left_K = self.unlearned_K(n_G)
        slope_K = left_K * (1 - left_K) / WIDTH / np.maximum(exposure_K, 1e-300)
        return self.holds_GK @ ((weight_G @ self.holds_GK) * slope_K)


@dataclass
class World:
    """A pool of topics.

    Attributes:
        share_G: share of each topic among the tokens of the pool.
        dataset_G: dataset of each topic.
        blocks: their quanta, a block for each group of topics, with the topics.
    """

    share_G: Floats
    dataset_G: NDArray[np.integer]
    blocks: list[tuple[NDArray[np.integer], Block]]

    def loss_G(self, n_G: Floats) -> Floats:
        """Learnable loss of each topic, in nats per token, after `n_G` tokens of each."""
        loss_G = np.zeros(len(self.share_G))
        for topics, block in self.blocks:
            loss_G[topics] += block.holds_GK @ block.unlearned_K(n_G[topics])
        return AMPLITUDE * loss_G

    def loss(self, n_G: Floats) -> float:
        """Mean loss of the pool."""
        return float(self.share_G @ self.loss_G(n_G))

    def fall_G(self, start: float, stop: float) -> Floats:
        """Fall of each topic's loss between two numbers of tokens of the plain blend."""
        return self.loss_G(start * self.share_G) - self.loss_G(stop * self.share_G)

    def ideal_G(self, n_tokens: float) -> Floats:
        """Constant weights with the least loss after `n_tokens`, by multiplicative gradient steps."""
        best_G = weight_G = self.share_G
        for _ in range(300):
            value_G = np.zeros(len(weight_G))
            for topics, block in self.blocks:
                n_G = n_tokens * weight_G[topics]
                value_G[topics] += block.marginal_G(n_G, self.share_G[topics])
            weight_G = weight_G * np.maximum(value_G / (weight_G @ value_G), 1e-12) ** 0.3
            weight_G = weight_G / weight_G.sum()
            if self.loss(n_tokens * weight_G) < self.loss(n_tokens * best_G):
                best_G = weight_G
        return best_G

    def faster(self, drawn_G: Callable[[float], Floats], n_tokens: float) -> float:
        """Percent of the tokens that a training saves until it has the plain blend's last loss.

        Args:
            drawn_G: tokens of each topic that it has drawn after so many tokens.
            n_tokens: length of the training by the plain blend.
        """
        target = self.loss(n_tokens * self.share_G)
        low, high = 0.2 * n_tokens, 1.6 * n_tokens
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.loss(drawn_G(middle)) > target else (low, middle)
        return 100 * (1 - middle / n_tokens)


def make_world(
    seed: int,
    n_topics: int = 300,
    popularity: float = 0.5,
    mixture: float = 0.3,
    noise: float = 0.0,
    junk: float = 0.0,
    boilerplate: float = 0.0,
) -> World:
    """Draw a world.

    Args:
        seed: seed of all draws.
        n_topics: number of topics.
        popularity: standard deviation of ln(share) between topics.
        mixture: standard deviation of the logits of shared, dataset's and own quanta in a topic.
        noise: mean share of noise tokens, with a standard deviation of two thirds of it.
        junk: share of the topics that are noise alone.
        boilerplate: share of the topics that hold the head of the shared quanta.
    """
    rng = np.random.default_rng(seed)
    share_G = np.exp(popularity * rng.standard_normal(n_topics))
    share_G /= share_G.sum()
    dataset_G = np.arange(n_topics) % N_DATASETS

    # Shares of shared, dataset's and own quanta in each topic's tokens.
    part_G3 = np.exp(np.log([0.4, 0.3, 0.3]) + mixture * rng.standard_normal((n_topics, 3)))
    part_G3 /= part_G3.sum(axis=1, keepdims=True)
    noise_G = np.clip(noise + noise * 2 / 3 * rng.standard_normal(n_topics), 0, 0.95)
    order = rng.permutation(n_topics)
    n_junk, n_boilerplate = round(junk * n_topics), round(boilerplate * n_topics)
    noise_G[order[:n_junk]] = 1.0
    part_G3 *= (1 - noise_G)[:, None]
    is_head_G = np.isin(np.arange(n_topics), order[n_junk : n_junk + n_boilerplate])
    part_G3[is_head_G] = (0.98, 0.0, 0.02)

    # The blocks of quanta.
    common_K, head_K = zipf(4000), zipf(4000)
    head_K[HEAD:] = 0
    head_K /= head_K.sum()
    held_GK = np.where(is_head_G[:, None], head_K, common_K)
    groups = [(np.arange(n_topics), 0, held_GK)]
    groups += [(np.flatnonzero(dataset_G == d), 1, zipf(1500)[None]) for d in range(N_DATASETS)]
    groups += [(np.array([g]), 2, zipf(400)[None]) for g in range(n_topics)]
    blocks = [
        (
            topics,
            Block(
                part_G3[topics, part, None] * p_GK, np.exp(0.3 * rng.standard_normal(p_GK.shape[1]))
            ),
        )
        for topics, part, p_GK in groups
    ]
    return World(share_G, dataset_G, blocks)
