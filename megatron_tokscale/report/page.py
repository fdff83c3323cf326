"""The page: its sections in order, with no outside resources and no scripts."""

from typing import Any

from megatron_tokscale import __version__
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.compare_section import comparison
from megatron_tokscale.report.examples import examples
from megatron_tokscale.report.learning import classes, locality, spectrum
from megatron_tokscale.report.markup import escape, paragraph
from megatron_tokscale.report.overview import loss_curve, what_was_run
from megatron_tokscale.report.style import CSS
from megatron_tokscale.store import Run

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_ENTRIES = {
    "run": "What was run",
    "loss": "Loss curve",
    "spectrum": "Spectrum",
    "locality": "Locality",
    "classes": "Classes",
    "tokens": "Example tokens",
    "comparison": "Under a plan",
}


def render(
    analysis: Analysis, compare: Run | None, tokenizer: Any, n_tokens: int, seed: int
) -> str:
    """The whole page as HTML; `tokenizer` None shows ids, `compare` None has no comparison."""
    run = analysis.run
    title = f"When tokens were learned: {run.path.name}"
    sections = [
        what_was_run(analysis),
        loss_curve(analysis),
        spectrum(analysis),
        locality(analysis),
        classes(analysis),
        examples(analysis, tokenizer, n_tokens, seed),
    ]
    if compare is not None:
        sections.append(comparison(run, compare))
    shown = [anchor for anchor in _ENTRIES if anchor != "comparison" or compare is not None]
    entries = "".join(f'<li><a href="#{anchor}">{_ENTRIES[anchor]}</a></li>' for anchor in shown)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            paragraph(f"Written by megatron-tokscale {__version__}. Losses are in nats.", "soft"),
            f'<nav aria-label="Sections"><ol>{entries}</ol></nav>',
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )
