"""PyTorch primitives for gradient surgery."""
