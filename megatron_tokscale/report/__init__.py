"""One self-contained HTML page about a run. Importing this room loads no matplotlib."""

from megatron_tokscale.report.run_report import report_run

__all__ = ["report_run"]
