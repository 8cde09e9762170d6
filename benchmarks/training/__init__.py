"""Step time and memory of whole training steps against the peers; nothing here asserts a time."""
