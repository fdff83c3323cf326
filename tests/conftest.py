"""Fixtures for the tests of every room, and the marker of the slow ones."""

import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy is loaded, as the verbs do
from jobs import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the marker `slow` to the tests that slow.txt lists."""
    lines = Path(__file__).with_name("slow.txt").read_text().splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    for item in items:
        if any(fnmatch(item.nodeid, pattern) for pattern in patterns):
            item.add_marker("slow")
