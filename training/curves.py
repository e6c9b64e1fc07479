"""The curves of a run: loss and Dice of each epoch."""

import math
from collections.abc import Sequence
from pathlib import Path

from ct import files


def draw_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Draws training and validation values per epoch into a PNG file.

    Args:
        history: Rows of history.csv; values that are absent or NaN are left out.
        path: The PNG; it appears completely or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "dice"), strict=True):
        for column, label in ((name, "training"), (f"val_{name}", "validation")):
            points = [
                (row["epoch"], row[column])
                for row in history
                if not math.isnan(row.get(column, math.nan))
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("Dice" if name == "dice" else "loss")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with files.write_atomically(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
