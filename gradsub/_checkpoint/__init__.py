"""What a checkpoint may contain: all of it is checked and converted before anything of the optimizer changes."""

from gradsub._checkpoint._reading import StateDictReader
from gradsub._checkpoint._stateful import Stateful

__all__ = ["StateDictReader", "Stateful"]
