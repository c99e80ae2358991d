"""Training curves as a picture: a panel for each quantity."""

import math
from collections.abc import Mapping, Sequence

from trainer.export.figures import new_figure, png_of

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Label -> (epoch, value) pairs. A label ends with its quantity: "seed 1 (training loss)"."""

_MOST_LABELS = 12
_LONGEST_LABEL = 48


def curves_png(curves: Curves) -> bytes:
    """A PNG of all curves; values that aren't finite are left out. Needs at least one curve."""
    panels: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    for label, points in curves.items():
        name, _, rest = label.rpartition("(")
        quantity = rest.removesuffix(")").strip() if name else "value"
        panels.setdefault(quantity, {})[(name or label).strip()] = points
    figure = new_figure(6.5, 3.5 * len(panels))
    all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (quantity, lines) in zip(all_axes, panels.items(), strict=True):
        for name, points in lines.items():
            finite = [point for point in points if all(map(math.isfinite, point))]
            epochs, values = [x for x, _ in finite], [y for _, y in finite]
            # A label that begins with "_" is hidden by matplotlib.
            axes.plot(epochs, values, marker=".", label=" " + name[:_LONGEST_LABEL])
        axes.set_xlabel("epoch")
        axes.set_ylabel(quantity[:_LONGEST_LABEL], parse_math=False)
        axes.grid(alpha=0.3)
        if len(lines) <= _MOST_LABELS:
            for text in axes.legend(fontsize=8).get_texts():
                text.set_parse_math(False)
    return png_of(figure)
