"""Per-task gradients, caught the moment a backward pass completes them."""

from gradsub.capture._captured import MIXED, Captured
from gradsub.capture._clip import clip_captured, scale_captured, scale_norms
from gradsub.capture._clipping import ClippingWatcher
from gradsub.capture._forward import can_fuse
from gradsub.capture._fused import FusedCapture, Part
from gradsub.capture._generic import GenericCapture
from gradsub.capture._held import Held
from gradsub.capture._losses import LossWatcher, watch_through
from gradsub.capture._projected import Gathered, Projected, gather_block, gather_stacks, mix, project_block
from gradsub.capture._rows import MixedRows
from gradsub.capture._scaled import Unscaling, leaves, scaler_reading, scaler_stepping

__all__ = [
    "MIXED",
    "Captured",
    "ClippingWatcher",
    "FusedCapture",
    "Gathered",
    "GenericCapture",
    "Held",
    "LossWatcher",
    "MixedRows",
    "Part",
    "Projected",
    "Unscaling",
    "can_fuse",
    "clip_captured",
    "gather_block",
    "gather_stacks",
    "leaves",
    "mix",
    "project_block",
    "scale_captured",
    "scale_norms",
    "scaler_reading",
    "scaler_stepping",
    "watch_through",
]
