"""What a run says about itself: a table, plots and a report."""

from __future__ import annotations

from ._markdown import write_report
from ._plots import COLOURS, draw_plots, finish
from ._table import markdown_table, result_table

__all__ = ["COLOURS", "draw_plots", "finish", "markdown_table", "result_table", "write_report"]
