"""What training left of the model's general abilities: perplexity, answers to questions, and the layers' outputs."""

from __future__ import annotations

from ._measure import General, Retention, retention_summary

__all__ = ["General", "Retention", "retention_summary"]
