"""Many finished runs side by side: tables with spread and significance, and a plot of quality against retention.

``_groups`` says which runs are one row, ``_tests`` compares rows over queries, ``_tables`` makes the tables,
``_render`` Markdown and LaTeX of them, ``_plot`` the picture with the labels that ``_labels`` places, ``_write`` the
files.
"""

from __future__ import annotations

from ._groups import group_runs
from ._labels import leader, place_labels
from ._plot import chosen_methods, trade
from ._write import compare

__all__ = ["chosen_methods", "compare", "group_runs", "leader", "place_labels", "trade"]
