"""Bytes that a step of data-parallel training sends: counted on two ranks, and on paper for larger models."""
