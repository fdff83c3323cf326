"""The glossary gives each word one meaning, and names what is in the code."""

import re

from documents import ROOT, read

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in read("docs/glossary.md").splitlines()
    if line.startswith("| ") and not line.startswith("| word ")
]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "megatron_tokscale").rglob("*.py"))


def test_no_word_has_two_meanings():
    words = [word.strip() for row in ROWS for word in row[0].split(",")]
    assert len(words) > 60
    assert len(words) == len(set(words))


def test_every_name_of_the_code_exists():
    names = [name for row in ROWS for name in re.findall(r"`([A-Za-z]\w+)`", row[2])]
    assert len(names) > 20
    for name in names:
        assert re.search(rf"\b{name}\b", SOURCE), name
