"""A grid of runs from one file: data sets x methods x seeds, each method with a learning rate chosen beforehand.

``_config`` reads the file, ``_jobs`` lists the runs in order, ``_select`` chooses a rate from the trials on the
validation split, ``_process`` carries out one run in a process of its own, ``_runner`` all of them. ``_bundle`` packs
what a grid needs on another machine.
"""

from __future__ import annotations

from ._bundle import BUNDLE, joining, write_bundle
from ._config import read_grid
from ._runner import GRACE, run_grid
from ._select import Trial, choose

__all__ = ["BUNDLE", "GRACE", "Trial", "choose", "joining", "read_grid", "run_grid", "write_bundle"]
