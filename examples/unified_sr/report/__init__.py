"""What a run says about itself: a table, plots and a report."""

from __future__ import annotations

from ._markdown import write_report
from ._table import change, comparison_table, markdown_table, result_table

__all__ = ["change", "comparison_table", "markdown_table", "result_table", "write_report"]
