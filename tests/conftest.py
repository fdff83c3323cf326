"""Fixtures for the tests of every room."""

import os

import pytest

# Both before the libraries are loaded: the verbs set the first and the CPU runtime the second.
# Without the second, Megatron's import takes three seconds more in every process.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
from jobs import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))
