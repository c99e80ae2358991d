"""The confusion matrix as a picture."""

from collections.abc import Sequence

from torch import Tensor

from trainer.export.figures import new_figure, png_of

_MOST_NUMBERS = 30
"""With more classes than these, the squares are coloured but not numbered."""
_MOST_NAMES = 60
"""With more classes than these, only some of them are named at the edge."""
_LONGEST_NAME = 24


def confusion_png(confusion: Tensor, class_names: Sequence[str]) -> bytes:
    """A PNG of the matrix. confusion: int (classes,classes), row: label, column: prediction.

    Colour is the share of the row, so that rare classes show; the numbers are counts.
    """
    num_classes = len(class_names)
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(max(5.0, 0.55 * num_classes + 2), 20.0)
    figure = new_figure(side, side)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    every = -(-num_classes // _MOST_NAMES)
    ticks = range(0, num_classes, every)
    names = [_shortened(class_names[tick]) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90, parse_math=False)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    if num_classes <= _MOST_NUMBERS:
        for row in range(num_classes):
            for column in range(num_classes):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(int(confusion[row, column]))
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return png_of(figure)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
