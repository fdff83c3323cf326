"""A world of files in which every verb can run."""

import os
from pathlib import Path

import pytest
from damages import world_in


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    yield world_in(folder)
    os.chdir(before)
