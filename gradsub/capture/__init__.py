"""Per-task gradients, caught the moment a backward pass completes them."""

from gradsub.capture._captured import Captured
from gradsub.capture._clip import clip_captured, scale_captured
from gradsub.capture._fused import FusedCapture, Part, can_fuse
from gradsub.capture._generic import MIXED, GenericCapture
from gradsub.capture._losses import LossWatcher
from gradsub.capture._projected import Projected, mix, project_block
from gradsub.capture._rows import MixedRows
from gradsub.capture._scaled import ScaleWitness, loss_scale

__all__ = [
    "MIXED",
    "Captured",
    "FusedCapture",
    "GenericCapture",
    "LossWatcher",
    "MixedRows",
    "Part",
    "Projected",
    "ScaleWitness",
    "can_fuse",
    "clip_captured",
    "loss_scale",
    "mix",
    "project_block",
    "scale_captured",
]
