"""A corpus of known quanta: documents of facts, each of which is learned at its own time.

A document is a header and 21 triples (subject, relation, object): 64 tokens, one sample. A fact is
a (subject, relation) and its object. Subject and relation determine the object, so the loss of an
object token falls when the model knows the fact: a fact is a quantum, and its frequency is known.

- Topics: documents of topic g = 1, 2, ... are as frequent as g^-0.7. A topic has 160 facts of its
  own; the j-th is as frequent as j^-1.3.
- Boilerplate: documents of ten facts that are equally frequent, and soon known.
- Junk: random triples, which nobody can learn: the loss of their objects stays at ln 256.

Token ids: 0 is an end-of-document token that no document has; then the headers of the topics, of
junk and of boilerplate; then subjects, relations and objects.

Shapes: F facts, G kinds of documents (the topics, junk, boilerplate), Q documents, T triples of a
document, L tokens of a document, N watched tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from megatron_tokscale.core.arrays import Floats, Integers, Mask
from megatron_tokscale.core.errors import TokscaleError
from megatron_tokscale.core.files import whole_or_absent
from megatron_tokscale.demo.corpus import write_ids
from megatron_tokscale.probe import ProbeSet

NO_FACT: Final = -1
"""Stands for the fact of a junk triple, or of a token that is not an object."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Settings of the corpus. The defaults are our choice, for a model of 0.2M parameters.

    Attributes:
        documents: number of documents.
        junk: share of the documents that are junk.
        boilerplate: share of the documents that are boilerplate.
        topics: number of topics.
        facts: facts of a topic.
        boilerplate_facts: facts of boilerplate.
        triples: triples of a document.
        subjects: subject tokens.
        relations: relation tokens.
        objects: object tokens.
        topic_exponent: exponent of the frequencies of the topics.
        fact_exponent: exponent of the frequencies of the facts of a topic.
        seed: seed of the facts and of the documents.
    """

    documents: int = 80_000
    junk: float = 0.15
    boilerplate: float = 0.2
    topics: int = 40
    facts: int = 160
    boilerplate_facts: int = 10
    triples: int = 21
    subjects: int = 512
    relations: int = 16
    objects: int = 256
    topic_exponent: float = 0.7
    fact_exponent: float = 1.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not (min(self.junk, self.boilerplate) >= 0 and self.junk + self.boilerplate < 1):
            raise TokscaleError(
                f"junk is {self.junk} and boilerplate {self.boilerplate} of the documents; "
                "expected shares of at least 0 that leave some to the topics; give others"
            )


class Documents(NamedTuple):
    """Documents, and the truth about them.

    Attributes:
        kind_Q: the kind of each document.
        fact_QT: the fact of each triple; NO_FACT in junk.
        token_QL: the tokens.
    """

    kind_Q: Integers
    fact_QT: Integers
    token_QL: Integers


@dataclass(frozen=True)
class World:
    """All facts, their frequencies, and the documents that tell them."""

    mix: Mix

    # Kinds of documents

    @property
    def n_kinds(self) -> int:
        """Number of kinds of documents G."""
        return self.mix.topics + 2

    @property
    def junk(self) -> int:
        """The kind of the junk documents."""
        return self.mix.topics

    @property
    def boilerplate(self) -> int:
        """The kind of the boilerplate documents."""
        return self.mix.topics + 1

    @cached_property
    def share_G(self) -> Floats:
        """Share of each kind of the documents."""
        mix = self.mix
        of_topics = 1 - mix.junk - mix.boilerplate
        topics = _power_law(mix.topics, mix.topic_exponent)
        return np.concatenate([of_topics * topics, [mix.junk, mix.boilerplate]])

    @property
    def groups(self) -> list[str]:
        """Name of the group of each kind: topics by how frequent they are, junk, boilerplate."""
        tenth = max(self.mix.topics // 10, 1)
        names = ["frequent topics"] * tenth + ["middling topics"] * (3 * tenth)
        rare = ["rare topics"] * (self.mix.topics - len(names))
        return [*names, *rare, "junk", "boilerplate"]

    # Facts

    @cached_property
    def _facts(self) -> tuple[Integers, Integers]:
        """Number of the (subject, relation) of each fact, and its object."""
        mix = self.mix
        rng = np.random.default_rng([mix.seed, 0])
        n_facts = mix.topics * mix.facts + mix.boilerplate_facts
        pair_F = rng.permutation(mix.subjects * mix.relations)[:n_facts]
        return pair_F, rng.integers(0, mix.objects, n_facts)

    @cached_property
    def kind_F(self) -> Integers:
        """The kind of the documents that tell each fact."""
        mix = self.mix
        topics = np.repeat(np.arange(mix.topics), mix.facts)
        return np.concatenate([topics, np.full(mix.boilerplate_facts, self.boilerplate)])

    @cached_property
    def within_F(self) -> Floats:
        """Frequency of each fact among the triples of the documents of its kind."""
        mix = self.mix
        topic = _power_law(mix.facts, mix.fact_exponent)
        boilerplate = np.full(mix.boilerplate_facts, 1 / mix.boilerplate_facts)
        return np.concatenate([np.tile(topic, mix.topics), boilerplate])

    @cached_property
    def frequency_F(self) -> Floats:
        """Frequency p of each fact among all triples of the corpus."""
        return self.share_G[self.kind_F] * self.within_F

    # Tokens

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.first_object + self.mix.objects

    @property
    def first_subject(self) -> int:
        """The smallest id of a subject."""
        return 1 + self.n_kinds

    @property
    def first_relation(self) -> int:
        """The smallest id of a relation."""
        return self.first_subject + self.mix.subjects

    @property
    def first_object(self) -> int:
        """The smallest id of an object."""
        return self.first_relation + self.mix.relations

    @property
    def length(self) -> int:
        """Tokens of a document L."""
        return 1 + 3 * self.mix.triples

    def natural_kinds(self) -> Integers:
        """Draw the kinds of the corpus's documents by their shares."""
        rng = np.random.default_rng([self.mix.seed, 1])
        return rng.choice(self.n_kinds, self.mix.documents, p=self.share_G)

    def documents(self, kind_Q: Integers, seed: int) -> Documents:
        """Draw documents of given kinds."""
        rng = np.random.default_rng([self.mix.seed, seed])
        mix, shape = self.mix, (len(kind_Q), self.mix.triples)
        fact_QT = np.full(shape, NO_FACT)
        for kind in np.unique(kind_Q[kind_Q != self.junk]):
            own_F = np.flatnonzero(self.kind_F == kind)
            told_Q = kind_Q == kind
            size = (int(told_Q.sum()), mix.triples)
            fact_QT[told_Q] = rng.choice(own_F, size, p=self.within_F[own_F])
        pair_F, object_F = self._facts
        random_pair_QT = rng.integers(0, mix.subjects * mix.relations, shape)
        random_object_QT = rng.integers(0, mix.objects, shape)
        pair_QT = np.where(fact_QT == NO_FACT, random_pair_QT, pair_F[fact_QT])
        object_QT = np.where(fact_QT == NO_FACT, random_object_QT, object_F[fact_QT])
        subject_QT, relation_QT = np.divmod(pair_QT, mix.relations)
        triples = [
            self.first_subject + subject_QT,
            self.first_relation + relation_QT,
            self.first_object + object_QT,
        ]
        token_QL = np.stack(triples, axis=2).reshape(len(kind_Q), -1)
        return Documents(kind_Q, fact_QT, np.column_stack([1 + kind_Q, token_QL]))


def _power_law(n: int, exponent: float) -> Floats:
    """Return the frequencies j^-exponent of j = 1 to n, which sum to one."""
    frequency = np.arange(1, n + 1) ** -float(exponent)
    return frequency / frequency.sum()


@dataclass(frozen=True, eq=False)
class Truth:
    """Kind and facts of every document of a dataset.

    Attributes:
        kind_Q: the kind of each document.
        fact_QT: the fact of each triple; NO_FACT in junk.
    """

    kind_Q: Integers
    fact_QT: Integers

    @classmethod
    def load(cls, prefix: Path) -> "Truth":
        """Read the truth about the dataset PREFIX.bin/.idx."""
        with np.load(_truth_path(prefix)) as file:
            return cls(file["kind_Q"].astype(np.int64), file["fact_QT"].astype(np.int64))

    def of(self, probe_set: ProbeSet) -> "WatchedTruth":
        """Return the truth about the watched tokens of a probe set of this dataset."""
        document_N, position_N = probe_set.document_N.astype(np.int64), probe_set.position_N
        object_N = (position_N > 0) & (position_N % 3 == 0)
        triple_N = np.maximum(position_N // 3 - 1, 0)
        fact_N = np.where(object_N, self.fact_QT[document_N, triple_N], NO_FACT)
        return WatchedTruth(document_N, self.kind_Q[document_N], object_N, fact_N)


class WatchedTruth(NamedTuple):
    """The truth about watched tokens.

    Attributes:
        document_N: the document of each token.
        kind_N: the kind of its document.
        object_N: whether the token is an object.
        fact_N: the fact of an object; NO_FACT in junk, and for other tokens.
    """

    document_N: Integers
    kind_N: Integers
    object_N: Mask
    fact_N: Integers


def write_corpus(documents: Documents, prefix: Path) -> int:
    """Write documents into PREFIX.bin/.idx, and the truth about them beside it.

    Returns:
        The number of tokens.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(_truth_path(prefix)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            kind_Q=documents.kind_Q.astype(np.int16),
            fact_QT=documents.fact_QT.astype(np.int16),
        )
    return write_ids(_rows(documents.token_QL), prefix)


def _rows(token_QL: Integers) -> Iterator[list[int]]:
    yield from token_QL.tolist()


def _truth_path(prefix: Path) -> Path:
    return prefix.with_suffix(".truth.npz")
