"""Every document that code, tests and documents cite is there, and so is the section."""

import re

import pytest
from documents import DOCUMENTS, ROOT, headings

FOLDERS = ("megatron_tokscale", "tests", "benchmarks", "tools", "examples")
SOURCES = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    + [ROOT / name for name in DOCUMENTS]
)
CITED = re.compile(
    r"(?<![\w/])((?:\w[\w-]*/)*[A-Za-z_-]+\.md)((?:,? section| +#?)? *(\d+(?:\.\d+)*))?"
)
NAMES_OF_OTHERS = {
    "note.md",  # that a test writes
    "hashlib.md",  # an attribute
    "TABLE.md",  # a placeholder in a usage line
}


def citations():
    for path in SOURCES:
        if path.name == "test_citations.py":
            continue
        text = re.sub(r"\s*\n[ #]*", " ", path.read_text())
        for match in CITED.finditer(text):
            if (
                match[1] not in NAMES_OF_OTHERS
                and "](" not in text[match.start() - 2 : match.start()]
            ):
                yield pytest.param(
                    path, match[1], match[3], id=f"{path.relative_to(ROOT)}-{match[0]}"
                )


@pytest.mark.parametrize(("path", "cited", "section"), list(citations()))
def test_a_cited_document_and_its_section_exist(path, cited, section):
    places = [
        ROOT / cited,
        path.parent / cited,
        ROOT / "docs" / cited,
        ROOT / "docs/reference" / cited,
    ]
    found = [place for place in places if place.is_file()]
    assert found, f"{path.relative_to(ROOT)} cites {cited}"
    if section:
        numbers = [
            heading.split()[0].rstrip(".")
            for heading in headings(found[0].resolve().relative_to(ROOT).as_posix())
        ]
        assert section in numbers, f"{path.relative_to(ROOT)} cites {cited} {section}"


def test_no_section_of_the_references_is_there_twice():
    numbers = [heading.split()[0] for heading in headings("docs/references.md")]
    assert len(numbers) == len(set(numbers))
