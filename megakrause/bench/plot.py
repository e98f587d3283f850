"""Pictures of benchmarks."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator


def plot_lines(path: Path, title: str, lengths: list[int], times: dict[str, list[float | None]]) -> None:
    """Milliseconds against sequence length, both on a scale of powers, one line a contestant, named at its end."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, line in times.items():
        points = [(length, time) for length, time in zip(lengths, line, strict=True) if time is not None]
        if not points:
            continue
        bold = name == "krause"
        (drawn,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=3 if bold else 1.6)
        axes.annotate(
            name, points[-1], xytext=(8, 0), textcoords="offset points", va="center", color=drawn.get_color(),
            weight="bold" if bold else "normal",
        )  # fmt: skip
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("sequence length")
    axes.set_ylabel("ms")
    axes.set_title(title, loc="left", fontsize=10)
    figure.savefig(path)
