"""Per-task gradients, caught the moment a backward pass completes them."""

from gradsub.capture._captured import Captured
from gradsub.capture._generic import GenericCapture
from gradsub.capture._losses import LossWatcher
from gradsub.capture._projected import Projected, gather

__all__ = ["Captured", "GenericCapture", "LossWatcher", "Projected", "gather"]
