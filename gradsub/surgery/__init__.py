"""Conflict surgery: how much of each task's gradient enters the common step.

Most decide it from inner products alone. Such a method takes the Gramian G_ij = <g_i, g_j> (K x K) of the already
weighted task gradients and returns K weights w; the common gradient is sum_k w_k g_k. It never sees the gradients, so
the same function serves full gradients, projected ones and sums of either over layers. `sum_weights`, `pcgrad` and
`gradvac` have the size of the sum of the gradients, `mgda`, `cagrad` and `upgrad` that of their mean: exchanging one
for the other wants another learning rate.

`FAMO`, `DWA` and `UncertaintyWeighting` decide it from the losses and from what came before; they are called with
`SurgeryInputs`, as is any `Weighting` of your own. Ones as weights are the plain sum.

Rules that the former keep: weights have the dtype and device of the Gramian and no autograd history; they do not
change when the Gramian is multiplied by a positive number; a task with a zero gradient (an absent task) gets a finite
weight and leaves the weights of the others as if it were not there; the global random state is neither read nor
advanced.
"""

from ._cagrad import cagrad
from ._dwa import DWA
from ._famo import FAMO
from ._gradvac import GradVac, gradvac
from ._inputs import LossWeighting, Surgery, SurgeryInputs, Weighting
from ._mgda import mgda
from ._pcgrad import pcgrad
from ._registry import SURGERIES, resolve_surgery
from ._sum import sum_weights
from ._uncertainty import UncertaintyWeighting
from ._upgrad import upgrad

__all__ = [
    "DWA",
    "FAMO",
    "SURGERIES",
    "GradVac",
    "LossWeighting",
    "Surgery",
    "SurgeryInputs",
    "UncertaintyWeighting",
    "Weighting",
    "cagrad",
    "gradvac",
    "mgda",
    "pcgrad",
    "resolve_surgery",
    "sum_weights",
    "upgrad",
]
