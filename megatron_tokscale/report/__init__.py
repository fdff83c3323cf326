"""Self-contained HTML pages on a run and on two. Importing this room loads no matplotlib."""

from megatron_tokscale.report.run_report import check_page, report_comparison, report_run

__all__ = ["check_page", "report_comparison", "report_run"]
