"""The report of a run: one HTML page, one picture, one table, all from `results.json`."""

from trace_dist.report.html import write_report
from trace_dist.report.picture import render_png
from trace_dist.report.results import load_results
from trace_dist.report.tables import summary_table

__all__ = ["load_results", "render_png", "summary_table", "write_report"]
