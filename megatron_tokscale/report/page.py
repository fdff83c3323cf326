"""The page: its sections in order, with no outside resources and no scripts."""

from collections.abc import Callable, Sequence
from typing import Final

from megatron_tokscale.report.first_screen import first_screen
from megatron_tokscale.report.html import TITLE, escape, whole_page
from megatron_tokscale.report.inputs import ReportInputs
from megatron_tokscale.report.sections import Section
from megatron_tokscale.report.sections.axes import axis_sections
from megatron_tokscale.report.sections.beside import beside_sections
from megatron_tokscale.report.sections.classes import classes_section
from megatron_tokscale.report.sections.examples import examples_section
from megatron_tokscale.report.sections.forecast import forecast_section
from megatron_tokscale.report.sections.forward import forward_section
from megatron_tokscale.report.sections.laws import laws_section
from megatron_tokscale.report.sections.locality import locality_section
from megatron_tokscale.report.sections.overview import loss_section, run_section
from megatron_tokscale.report.sections.plan import plan_section
from megatron_tokscale.report.sections.spectrum import spectrum_section
from megatron_tokscale.report.sections.transfer import transfer_section
from megatron_tokscale.report.verdicts import summary

SECTIONS: Final[tuple[Callable[[ReportInputs], Sequence[Section]], ...]] = (
    loss_section,
    spectrum_section,
    locality_section,
    classes_section,
    forecast_section,
    forward_section,
    transfer_section,
    axis_sections,
    laws_section,
    examples_section,
    beside_sections,
    plan_section,
    run_section,
)
"""The sections in the order of the page, below its first screen and the table of all verdicts."""


def render(inputs: ReportInputs) -> str:
    """Return the whole page as HTML."""
    title = f"{TITLE}: {inputs.run.path.name}"
    sections = with_verdicts(
        [section for make in SECTIONS for section in make(inputs)], inputs.units
    )
    entries = "".join(
        f'<li><a href="#{each.anchor}">{escape(each.entry)}</a></li>' for each in sections
    )
    return whole_page(
        title,
        first_screen(inputs),
        f'<nav aria-label="Evidence and settings"><ol>{entries}</ol></nav>',
        *(each.html for each in sections),
    )


def with_verdicts(sections: Sequence[Section], units: str) -> list[Section]:
    """Return the sections below a first one, the table of all their verdicts."""
    verdicts = [verdict for each in sections for verdict in each.verdicts]
    return [Section("verdicts", "Verdicts", "Verdicts", summary(verdicts, units)), *sections]
