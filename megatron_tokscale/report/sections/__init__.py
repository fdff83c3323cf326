"""The sections of the page, one module each: its text, its tables, its figures and its verdicts.

To add a section:

1. Write `sections/NAME.py` with one public function, `NAME_section(inputs: ReportInputs) ->
   list[Section]`. It returns an empty list where the run has nothing to show.
2. Files are read in `ReportInputs.read` alone, which checks that they belong to the run.
3. Text and tables are made with `report/html.py`, figures with `draw` of `report/charts.py`. A
   number goes through `number` or `estimate`, a text that comes from outside through `escape`.
4. A claim that the data could have refuted gets a `VerdictRow`.
5. Name the function in `SECTIONS` of `report/page.py`: their order is that of the page.
6. Test in `tests/report` that the numbers of the page are those of the analysis, and that hostile
   names stay text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tokscale.report.html import section
from megatron_tokscale.report.verdicts import VerdictRow


@dataclass(frozen=True)
class Section:
    """One section of the page, with the verdicts that it explains.

    Attributes:
        anchor: id of its heading, unique in the page.
        entry: its name in the navigation, as plain text.
        title: its heading, as plain text.
        parts: paragraphs, tables and figures, as HTML.
        verdicts: its rows in the table at the head of the page.
    """

    anchor: str
    entry: str
    title: str
    parts: Sequence[str]
    verdicts: Sequence[VerdictRow] = ()

    @property
    def html(self) -> str:
        """The section as HTML."""
        return section(self.anchor, self.title, *self.parts)
