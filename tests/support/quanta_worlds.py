"""Worlds of known quanta in which a plan's gain can be computed: the quantization model, by hand.

A topic holds quanta that all topics share, quanta of its dataset, and quanta of its own. The mean
loss of a quantum falls with ln(exposure) as a sigmoid. A part of a topic's tokens is noise that
nothing learns; junk is noise alone; boilerplate holds the head of the shared quanta.

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
    """Quanta of some topics: topic g holds quantum k in `holds_GK[g, k]` of its tokens.

    Attributes:
        topics: the topics.
        holds_GK: share of each quantum in each topic's tokens.
        need: exposure at which half of a quantum is learned, per quantum (K), or, where each topic
            has quanta of its own, per topic and quantum (GK).
    """

    topics: NDArray[np.integer]
    holds_GK: Floats
    need: Floats

    @property
    def is_own(self) -> bool:
        """Mask of the topics that have quanta of their own, which no other topic teaches."""
        return self.need.ndim == 2

    def exposure(self, n_G: Floats) -> Floats:
        """Exposure of the quanta after so many tokens of each topic of the world."""
        n_g = n_G[self.topics]
        return n_g[:, None] * self.holds_GK if self.is_own else n_g @ self.holds_GK

    def unlearned(self, n_G: Floats) -> Floats:
        """Share of each quantum that is still to be learned."""
        return 1 / (1 + (self.exposure(n_G) / self.need) ** (1 / WIDTH))

    def loss_G(self, n_G: Floats) -> Floats:
        """Loss of the block's topics by its quanta, in units of the amplitude."""
        left = self.unlearned(n_G)
        return (self.holds_GK * left).sum(axis=1) if self.is_own else self.holds_GK @ left

    def marginal_G(self, n_G: Floats, share_G: Floats) -> Floats:
        """Fall of the pool's loss for one more token of each of the block's topics."""
        left, share_g = self.unlearned(n_G), share_G[self.topics]
        slope = left * (1 - left) / WIDTH / np.maximum(self.exposure(n_G), 1e-300)
        if self.is_own:
            return share_g * (self.holds_GK**2 * slope).sum(axis=1)
        return self.holds_GK @ ((share_g @ self.holds_GK) * slope)


@dataclass
class World:
    """A pool of topics.

    Attributes:
        share_G: share of each topic among the tokens of the pool.
        dataset_G: dataset of each topic.
        blocks: their quanta.
    """

    share_G: Floats
    dataset_G: NDArray[np.integer]
    blocks: list[Block]

    def loss_G(self, n_G: Floats) -> Floats:
        """Learnable loss of each topic, in nats per token, after `n_G` tokens of each."""
        loss_G = np.zeros(len(self.share_G))
        for block in self.blocks:
            loss_G[block.topics] += block.loss_G(n_G)
        return AMPLITUDE * loss_G

    def loss(self, n_G: Floats) -> float:
        """Mean loss of the pool."""
        return float(self.share_G @ self.loss_G(n_G))

    def fall_G(self, start: float, stop: float) -> Floats:
        """Fall of each topic's loss between two numbers of tokens of the plain blend."""
        return self.loss_G(start * self.share_G) - self.loss_G(stop * self.share_G)

    def ideal_G(self, n_tokens: float) -> Floats:
        """Constant weights with the least loss after `n_tokens`, by multiplicative steps."""
        best_G = weight_G = self.share_G
        for _ in range(100):
            value_G = np.zeros(len(weight_G))
            for block in self.blocks:
                value_G[block.topics] += block.marginal_G(n_tokens * weight_G, self.share_G)
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

    def needs(*shape: int) -> Floats:
        return np.exp(0.3 * rng.standard_normal(shape))

    every = np.arange(n_topics)
    blocks = [Block(every, part_G3[:, 0, None] * held_GK, needs(4000))]
    for dataset in range(N_DATASETS):
        topics = np.flatnonzero(dataset_G == dataset)
        blocks.append(Block(topics, part_G3[topics, 1, None] * zipf(1500), needs(1500)))
    blocks.append(Block(every, part_G3[:, 2, None] * zipf(400), needs(n_topics, 400)))
    return World(share_G, dataset_G, blocks)
