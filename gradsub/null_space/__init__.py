"""The directions of each layer that general-domain knowledge uses, and that no update may touch."""

from gradsub.null_space._null_space import NullSpace

__all__ = ["NullSpace"]
