"""What every configuration of the optimizer must do, once more with the fused capture of layers of every size.

Left out: what needs the norm of a gradient that the fused capture never forms, hooks of the generic one, and what
tries both captures itself.
"""

from __future__ import annotations

import optimizer.test_gates as gates
import optimizer.test_inner_optimizers as inner_optimizers
import optimizer.test_nonfinite as nonfinite
import optimizer.test_outside as outside
import optimizer.test_protection as protection
import optimizer.test_resume as resume
import optimizer.test_schedulers as schedulers
import optimizer.test_small_transformer as small_transformer
import optimizer.test_update as update
import pytest
from optimizer import toys
from optimizer.test_capture import *  # noqa: F403

MODULES = (
    gates,
    inner_optimizers,
    nonfinite,
    outside,
    protection,
    resume,
    schedulers,
    small_transformer,
    update,
)
EXCLUDED = {
    # They compare reports, whose estimates come from what no checkpoint has.
    "test_backward_equals_task_contexts",
    "test_with_every_option",
    # They ask for no warning, and a tied weight gives one.
    "test_tied_weights_are_stepped_once_with_the_sum_of_their_gradients",
    "test_weights_tied_in_two_places_keep_what_either_protects",
    # A hook on a weight is called where autograd's gradient is captured; tests/fused/test_features.py has its own.
    "test_nothing_changes_and_the_task_is_named",
}

for module in MODULES:
    found = {name: value for name, value in vars(module).items() if name.startswith("test_") and callable(value)}
    globals().update(found)
for name in EXCLUDED:
    del globals()[name]


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "CAPTURE", "fused")
