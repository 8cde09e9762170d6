"""Applications built on gradsub."""
