"""A reader who follows a link of a document arrives."""

import pytest
from documents import DOCUMENTS, GUIDES, ROOT, anchors, links, read


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_and_image_of_a_document_exists(name):
    for target in links(name):
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(found.resolve().relative_to(ROOT).as_posix()), target


def test_every_document_can_be_reached_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            folder = (ROOT / name).parent
            found = [(folder / target.partition("#")[0]).resolve() for target in links(name)]
            ahead += [str(path.relative_to(ROOT)) for path in found if path.suffix == ".md"]
    assert set(GUIDES) <= reached


def test_the_readme_is_read_in_three_minutes():
    assert len(read("README.md").splitlines()) <= 150
