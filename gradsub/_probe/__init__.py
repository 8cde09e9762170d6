"""What a base optimizer's step depends on, found out by running it on a small matrix rather than by its name."""

from gradsub._probe._probes import PLAIN, Probes, Traits, pattern, patterns
from gradsub._probe._twin import base_step, constant_like

__all__ = ["PLAIN", "Probes", "Traits", "base_step", "constant_like", "pattern", "patterns"]
