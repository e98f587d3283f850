"""Pretraining with Krause attention, at scale and on one CPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megakrause.ops.grid import Grid
    from megakrause.ops.krause import krause_attention

__all__ = ["Grid", "krause_attention"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for: processes that tokenize do without."""
    if name == "Grid":
        from megakrause.ops.grid import Grid

        return Grid
    if name == "krause_attention":
        from megakrause.ops.krause import krause_attention

        return krause_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
