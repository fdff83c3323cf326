"""Output of every benchmark: machine and versions, and a markdown table."""

import os
import platform
from collections.abc import Iterable

import megatron_tokscale


def heading(**versions: str) -> str:
    """Return machine and versions in one line."""
    load = os.getloadavg()[0]
    words = [
        f"megatron-tokscale {megatron_tokscale.__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {version}" for name, version in versions.items()),
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}",
    ]
    return ", ".join(words)


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_sections(sections: Iterable[tuple[str, list[str], Iterable[list[str]]]]) -> str:
    """Print title and table of every section as its rows are there; return all as one text."""
    text = ""
    for title, columns, rows in sections:
        section = f"**{title}**\n\n{markdown(columns, list(rows))}\n\n"
        print(section, flush=True)
        text += section
    return text
