"""Micro-benchmarks against the peers; nothing here asserts a time."""
