"""The page: its sections in order, with no outside resources and no scripts.

A section is a file with a function Analysis -> HTML, empty if there is nothing to show, and maybe
one that gives its verdicts.
"""

from collections.abc import Sequence
from typing import Any

from megatron_tokscale import __version__
from megatron_tokscale.report.analysis import Analysis
from megatron_tokscale.report.markup import escape, paragraph
from megatron_tokscale.report.sections.axes import axis_sections, axis_verdicts
from megatron_tokscale.report.sections.beside.section import comparison
from megatron_tokscale.report.sections.classes import classes
from megatron_tokscale.report.sections.examples import examples
from megatron_tokscale.report.sections.forward import forward
from megatron_tokscale.report.sections.laws import laws, laws_verdicts
from megatron_tokscale.report.sections.locality import locality, locality_verdict
from megatron_tokscale.report.sections.overview import loss_curve, what_was_run
from megatron_tokscale.report.sections.plan.drawn_plan import read_plan
from megatron_tokscale.report.sections.plan.section import data_plan
from megatron_tokscale.report.sections.spectrum import spectrum
from megatron_tokscale.report.sections.transfer import transfer, transfer_verdicts
from megatron_tokscale.report.style import CSS
from megatron_tokscale.report.verdicts import summary
from megatron_tokscale.store import Run

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(analysis: Analysis, beside: Run | None, tokenizer: Any, n_tokens: int, seed: int) -> str:
    """The whole page as HTML; `tokenizer` None shows ids, `beside` None has no comparison."""
    title = f"When tokens were learned: {analysis.run.path.name}"
    planned = read_plan(beside) if beside else None  # a damaged file is told before the work
    verdicts = [
        locality_verdict(analysis),
        *transfer_verdicts(analysis),
        *axis_verdicts(analysis),
        *laws_verdicts(analysis),
    ]
    sections = [
        ("verdicts", "Verdicts", summary(verdicts)),
        ("run", "What was run", what_was_run(analysis)),
        ("plan", "Data plan", data_plan(analysis.plan)),
        ("loss", "Loss curve", loss_curve(analysis)),
        ("spectrum", "Spectrum", spectrum(analysis)),
        ("locality", "Locality", locality(analysis)),
        ("classes", "Classes", classes(analysis)),
        ("forward", "Forward in time", forward(analysis)),
        ("transfer", "Transfer", transfer(analysis)),
        *axis_sections(analysis),
        ("laws", "Laws", laws(analysis)),
        ("tokens", "Example tokens", examples(analysis, tokenizer, n_tokens, seed)),
    ]
    if beside:
        of_run = f"Data plan of {beside.path.name}"
        sections += [
            ("comparison", "Under a plan", comparison(analysis.run, beside)),
            ("compared-plan", "Its data plan", data_plan(planned, "compared-plan", of_run)),
        ]
    return _page(title, [each for each in sections if each[-1]])


def _page(title: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Sections as (anchor, entry in the navigation, HTML)."""
    entries = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, _ in sections)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
            f"<h1>{escape(title)}</h1>",
            paragraph(f"Written by megatron-tokscale {__version__}. Losses are in nats.", "soft"),
            f'<nav aria-label="Sections"><ol>{entries}</ol></nav>',
            *(html for _, _, html in sections),
            "</main>\n</body>\n</html>\n",
        ]
    )
