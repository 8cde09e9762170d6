"""Search and recommendation as one conditional generation task of one language model."""
