"""What the ranks of a distributed run tell each other: the projected gradients of all, summed before the step."""

from gradsub.distributed._exchange import Exchange, data_parallel
from gradsub.distributed._ranks import Ranks

__all__ = ["Exchange", "Ranks", "data_parallel"]
