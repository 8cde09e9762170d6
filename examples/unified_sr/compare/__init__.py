"""Many finished runs side by side: tables with spread and significance, and plots of quality against retention.

``_collect`` finds runs and groups them, ``_statistics`` tests, ``_tables`` turns groups into cells, ``_render`` cells
into Markdown and LaTeX, ``_plots`` groups into pictures, ``_write`` puts all of it into a folder.
"""

from __future__ import annotations

from ._collect import Group, Run, collect, groups_of
from ._render import escape, latex_table, markdown
from ._significance import Significance, significance
from ._statistics import Paired, holm, mean_and_deviation, paired
from ._tables import Cell, Table, tables_of
from ._write import compare

__all__ = [
    "Cell",
    "Group",
    "Paired",
    "Run",
    "Significance",
    "Table",
    "collect",
    "compare",
    "escape",
    "groups_of",
    "holm",
    "latex_table",
    "markdown",
    "mean_and_deviation",
    "paired",
    "significance",
    "tables_of",
]
