"""A receiver of progress that keeps what it was told."""

from collections.abc import Callable

from megatron_tokscale.core.progress import Meter


class RecordedProgress:
    """Progress as it was reported.

    Attributes:
        stages: the stages without a count, in order.
        units: the unit of each meter, by the meter's name.
        reports: the (done, total) that each meter was told, in order, by the meter's name.
    """

    def __init__(self, react: Callable[[int, int], object] = lambda done, total: None):
        """Call `react(done, total)` after each report to a meter."""
        self.stages: list[str] = []
        self.units: dict[str, str] = {}
        self.reports: dict[str, list[tuple[int, int]]] = {}
        self._react = react

    def stage(self, what: str) -> None:
        """Keep the name of a stage."""
        self.stages.append(what)

    def meter(self, what: str, total: int, unit: str) -> Meter:
        """Return a meter that keeps its reports."""
        self.units[what], self.reports[what] = unit, []

        def report(done: int, note: str = "") -> None:
            self.reports[what].append((done, total))
            self._react(done, total)

        return report
