"""The one look of all figures: colours, titles, pictures side by side, and PNG as the format.

Matplotlib is imported only when a figure is drawn: the import takes half a second, which the drawing thread spends.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aecore.core.errors import escape_unprintable
from aecore.core.imports import fast_imports

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
"""The palette of Okabe & Ito, which can be told apart with any colour vision."""
CLASS_COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, "#B8A900", "#8C8C8C", "#6A3D9A")
"""Okabe & Ito's palette for ten classes: its yellow is darkened to be seen on white, a grey and a violet are added."""
_LONGEST_NAME = 24


def titled(width: float, height: float, title: str) -> "Figure":
    """Make an empty figure of a size in inches, with a title that states the finding."""
    with fast_imports():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", wrap=True)
    return figure


def png(figure: "Figure") -> bytes:
    """Render a figure; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def show_image(axes: "Axes", image: np.ndarray) -> None:
    """Draw one image (channels, height, width) with values in [0, 1], without axes."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    axes.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    hide_axes(axes)


def show_values(axes: "Axes", values: np.ndarray, limit: float, signed: bool = True) -> "AxesImage":
    """Draw a matrix as a heat map, from -limit (orange) to limit (purple) or, unsigned, from 0 to limit in greys."""
    return axes.imshow(
        values, aspect="auto", cmap="PuOr" if signed else "Greys", vmin=-limit if signed else 0, vmax=limit,
        interpolation="nearest",
    )  # fmt: skip


def tiled(images: np.ndarray, columns: int, gap: int = 0) -> np.ndarray:
    """Put images (count, channels, height, width) into one, in rows of `columns`, with white gaps of some pixels.

    One picture is drawn much faster than many.
    """
    count, channels, height, width = images.shape
    lines = -(-count // columns)
    sheet = np.ones((lines * columns, channels, height + gap, width + gap), images.dtype)
    sheet[:count, :, :height, :width] = images
    sheet = sheet.reshape(lines, columns, channels, height + gap, width + gap).transpose(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, lines * (height + gap), columns * (width + gap))
    return sheet[:, : lines * (height + gap) - gap, : columns * (width + gap) - gap]


def scatter(
    axes: "Axes", points: np.ndarray, labels: np.ndarray, classes: Sequence[str], size: float, fontsize: float
) -> None:
    """Draw points (rows, 2) in the colours of their classes, with each class's name at the median of its points.

    Args:
        size: area of a point, in square points.
    """
    for number, name in enumerate(map(legible, classes)):
        members, colour = points[labels == number], CLASS_COLOURS[number % len(CLASS_COLOURS)]
        if len(members):
            axes.scatter(members[:, 0], members[:, 1], s=size, color=colour, linewidths=0)
            box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "lw": 0}
            style: dict[str, Any] = {"fontsize": fontsize, "fontweight": "bold", "ha": "center", "va": "center"}
            x, y = np.median(members, 0)
            axes.text(x, y, name, color=colour, bbox=box, **style)


def legible(name: str) -> str:
    """Return a class's name, which comes from the data, as text for a figure: one short line, in which matplotlib reads
    nothing as mathematics."""
    text = escape_unprintable(name)
    return (text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…").replace("$", r"\$")


def hide_axes(axes: "Axes") -> None:
    """Remove ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def open_frame(axes: "Axes") -> None:
    """Remove the lines above and to the right of the axes."""
    axes.spines[["top", "right"]].set_visible(False)


def plane(codes: np.ndarray) -> np.ndarray:
    """Put codes (rows, units) into a plane, (rows, 2): unchanged where they have at most two units, else by t-SNE (van
    der Maaten & Hinton 2008)."""
    if codes.shape[1] <= 2:
        return np.column_stack([codes, np.zeros((len(codes), 2 - codes.shape[1]), codes.dtype)])
    with np.errstate(over="ignore", invalid="ignore"):
        spread = codes.std(0)
    if not np.isfinite(spread).all() or not spread.any():
        return np.zeros((len(codes), 2), np.float32)
    with fast_imports():
        from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(codes) - 1) / 3)
    with threadpool_limits(1, "openmp"):  # so few rows gain a fifth by a second thread, which others can use better
        return TSNE(2, perplexity=perplexity, init="pca", angle=0.8, random_state=0, max_iter=500).fit_transform(codes)
