"""Many finished runs side by side: tables with spread and significance, and a plot of quality against retention.

``_groups`` says which runs are one row, ``_tests`` compares rows over queries, ``_tables`` makes the tables,
``_render`` Markdown and LaTeX of them, ``_plot`` the picture with the labels that ``_labels`` places, ``_write`` the
files.
"""

from __future__ import annotations

from ._groups import group_runs, tasks_of
from ._labels import leader, place_labels
from ._plot import chosen_methods, draw, trade
from ._render import escape, latex_table, markdown
from ._tables import Table, tables_of
from ._tests import LANGUAGE_MODEL, against, baselines_of, holm, paired, values_of
from ._write import compare

__all__ = [
    "LANGUAGE_MODEL",
    "Table",
    "against",
    "baselines_of",
    "chosen_methods",
    "compare",
    "draw",
    "escape",
    "group_runs",
    "holm",
    "latex_table",
    "leader",
    "markdown",
    "paired",
    "place_labels",
    "tables_of",
    "tasks_of",
    "trade",
    "values_of",
]
