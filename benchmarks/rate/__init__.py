"""How large the updates are that the subspaces make of a learning rate, and what a model learns at it."""
