"""Step time and peak memory on a GPU, in under five minutes: models with random weights, no network."""
