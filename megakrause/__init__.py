"""Pretraining with Krause attention, at scale and on one CPU."""

from megakrause.ops.grid import Grid
from megakrause.ops.krause import krause_attention

__all__ = ["Grid", "krause_attention"]
__version__ = "0.1.0"
