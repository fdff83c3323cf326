"""The documents of the repository, taken apart: headings, links, commands, blocks of code."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "patches/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
GUIDES = [name for name in DOCUMENTS if not name.startswith("benchmarks/results/")]
"""The documents that tell a user what to type; the results of benchmarks tell what was."""

_FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document}:{self.line}"


def read(name):
    return (ROOT / name).read_text()


def blocks(name, language):
    text = read(name)
    return [
        Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]


def commands(block):
    """The calls of the verbs in a block of shell, each as a list of words without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(part, comments=True)[1:]
        for line in lines
        for part in line.split("&&")
        if part.strip().startswith("megatron-tokscale ")
    ]


def links(name):
    """Targets of the links and images of a document that lie in the repository."""
    return [target for target in _LINK.findall(_prose(name)) if "://" not in target]


def headings(name):
    return [heading.strip() for heading in _HEADING.findall(_prose(name))]


def anchors(name):
    """Names of the sections as GitHub makes them of the headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(name)
    }


def _prose(name):
    return _FENCE.sub("", read(name))
