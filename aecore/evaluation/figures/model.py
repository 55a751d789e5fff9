"""Figures, one function each, as PNG bytes: one look for all, titles that state the finding.

Colours are Okabe & Ito's, told apart with any colour vision.
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


BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
CLASS_COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, "#B8A900", "#8C8C8C", "#6A3D9A")
"""Okabe & Ito's, its yellow darkened to be seen on white, with a grey and a violet to make ten."""
_MOST_LETTERS = 24
"""Of a class's name."""


def png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def titled(width: float, height: float, title: str) -> "Figure":
    with fast_imports():
        from matplotlib.figure import Figure  # takes half a second, which whoever draws in a thread spends there

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left", wrap=True)
    return figure


def show(axes: "Axes", image: np.ndarray, limit: float | None = None) -> None:
    """One image (channels, height, width); `limit` centres the grey scale on zero."""
    picture = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
    if limit is not None:
        picture = picture / (2 * limit) + 0.5
    axes.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _side_by_side(images: np.ndarray, places: int = 0) -> np.ndarray:
    """Images (count, channels, height, width) in a row of at least so many places, with white between them: one picture
    is drawn much quicker than many."""
    count, channels, height, width = images.shape
    gap = max(1, width // 10)
    row = np.ones((channels, height, max(count, places) * (width + gap) - gap), images.dtype)
    for n, image in enumerate(images):
        row[:, :, n * (width + gap) : n * (width + gap) + width] = image
    return row


def legible(name: str) -> str:
    """A class's name, which comes from the data, as text of a figure: one short line, no part of it mathematics."""
    text = escape_unprintable(name)
    return (text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…").replace("$", r"\$")


def bare(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def reconstructions(x: np.ndarray, reconstruction: np.ndarray, mse: float) -> bytes:
    """The same rows before and after, each (rows, *shape) as the network reads them."""
    title = f"Reconstructed with a squared error of {mse:.4f} a feature (test rows)"
    if x.ndim == 2:
        figure = titled(7, 4.2, title)
        axes = figure.subplots(3, 1, sharex=True)
        limit = np.abs(x).max() or 1.0
        for axis, values, name in zip(
            axes, (x, reconstruction, x - reconstruction), ("input", "output", "difference"), strict=True
        ):
            shown = axis.imshow(values, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set_ylabel(f"{name}\n(rows)")
            axis.set_yticks([])
        axes[-1].set_xlabel("feature")
        figure.colorbar(shown, ax=axes, label="standardised value", shrink=0.8)
        return png(figure)
    figure = titled(8, 2.0, title)
    for axes, name, images in zip(figure.subplots(2), ("input", "output"), (x, reconstruction), strict=True):
        show(axes, _side_by_side(images))
        bare(axes)
        axes.set_ylabel(name)
    return png(figure)


def loss_curves(stages: dict[str, dict[str, Any]]) -> bytes:
    """Training and validation curves of each stage, from its `history` and `best_epoch`."""
    figure = titled(
        max(7.0, 2.4 * len(stages)), 2.9, "Loss by epoch; the dot marks the weights kept, chosen on validation"
    )
    for axes, (name, stage) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        history, best = stage["history"], stage["best_epoch"]
        epochs = np.arange(1, len(history) + 1)
        # a classifier's weights are chosen by its validation error, which then is the curve to see the dot on
        val = "val/error" if "val/error" in history[0] else "val/loss"
        validation = [epoch[val] for epoch in history]
        lines = axes if val == "val/loss" else axes.twinx()
        axes.plot(epochs, [epoch["train/loss"] for epoch in history], color=ORANGE)
        lines.plot(epochs, validation, color=BLUE)
        lines.plot(best, validation[best - 1], "o", color=BLUE, clip_on=False)
        axes.text(0.97, 0.97, "training loss", transform=axes.transAxes, color=ORANGE, fontsize=8, ha="right", va="top")
        name_val = "validation loss" if val == "val/loss" else "validation error"
        axes.text(0.97, 0.88, name_val, transform=axes.transAxes, color=BLUE, fontsize=8, ha="right", va="top")
        axes.set_title(f"{name}, epoch {best} of {len(history)}", fontsize=9)
        axes.set_xlabel("epoch")
        for axis in {axes, lines}:
            axis.tick_params(labelsize=7)
            axis.spines[["top"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if lines is axes:
            axes.spines[["right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss a row")
    return png(figure)


def units(layers: Sequence[np.ndarray]) -> bytes:
    """What units stand for: one array (units, *shape of the data) a layer, drawn around zero."""
    columns = max(len(images) for images in layers)
    if layers[0].ndim == 2:
        figure = titled(7, 1.1 + 1.6 * len(layers), "What each unit stands for, by feature (purple up, orange down)")
        for number, (axes, images) in enumerate(
            zip(figure.subplots(len(layers), 1, squeeze=False)[:, 0], layers, strict=True), 1
        ):
            limit = np.abs(images).max() or 1.0
            axes.imshow(images, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_ylabel(f"layer {number}\nunit")
        axes.set_xlabel("feature")
        return png(figure)
    height, width = layers[0].shape[-2:]
    tall = 0.56 * len(layers) * height / width + 0.6
    figure = titled(0.5 * columns + 0.6, tall, "What each unit stands for (grey is zero)")
    grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for number, (axes, images) in enumerate(zip(grid, layers, strict=True), 1):
        largest = float(np.abs(images).max()) or 1.0
        # each unit on its own scale, but a dead one is grey, not a blown-up rounding error
        limits = np.maximum(np.abs(images).max((1, 2, 3), keepdims=True), 0.01 * largest)
        show(axes, _side_by_side(images / (2 * limits) + 0.5, columns))
        bare(axes)
        axes.set_ylabel(f"layer {number}", fontsize=8)
    return png(figure)


def plane(codes: np.ndarray) -> np.ndarray:
    """Codes (rows, features) in a plane, (rows, 2): as they are where they have two features, else by t-SNE (van der
    Maaten & Hinton 2008)."""
    if codes.shape[1] <= 2:
        return np.column_stack([codes, np.zeros((len(codes), 2 - codes.shape[1]), codes.dtype)])
    if not np.isfinite(codes).all() or not codes.std(0).any():
        return np.zeros((len(codes), 2), np.float32)
    with fast_imports():
        from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(codes) - 1) / 3)
    with threadpool_limits(1, "openmp"):  # so few rows gain a fifth by a second thread, which others can use better
        return TSNE(2, perplexity=perplexity, init="pca", angle=0.8, random_state=0, max_iter=500).fit_transform(codes)


def codes_map(codes: np.ndarray, labels: np.ndarray | None, classes: Sequence[str], rows: str) -> bytes:
    """Codes (rows, features) in a plane, coloured by label.

    Args:
        rows: which rows these are, for the title.
    """
    points, size = plane(codes), 8 if len(codes) <= 2000 else 2
    how, axis = ("The code itself", "code {}") if codes.shape[1] <= 2 else (
        f"t-SNE of {codes.shape[1]}-dimensional codes", "t-SNE {}"
    )  # fmt: skip
    figure = titled(5.2, 5.2, f"{how}, {len(codes)} {rows} rows" + (", by class" if labels is not None else ""))
    axes = figure.subplots()
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, linewidths=0)
    else:
        labels = labels[: len(codes)]
        for number, name in enumerate(map(legible, classes)):
            own = points[labels == number]
            if not len(own):
                continue
            colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
            axes.scatter(own[:, 0], own[:, 1], s=size, color=colour, linewidths=0)
            x, y = np.median(own, 0)
            box = {"facecolor": "white", "alpha": 0.8, "pad": 1, "lw": 0}
            axes.text(x, y, name, color=colour, fontsize=13, fontweight="bold", ha="center", va="center", bbox=box)
    axes.set_xlabel(axis.format(1))
    axes.set_ylabel(axis.format(2))
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def drift(
    errors: tuple[np.ndarray, np.ndarray] | None, effects: Sequence[tuple[str, float, bool]], threshold: float,
    most: int = 12,
) -> bytes:  # fmt: skip
    """How far new rows are from those that a model was trained on.

    Args:
        errors: of reconstruction, of the reference and of the new rows.
        effects: name, effect size and whether it is drift, of each comparison in order; the first of them are shown.
    """
    drifted = [name for name, _, is_drift in effects if is_drift]
    title = f"Drift: {len(drifted)} of {len(effects)} comparisons" if drifted else "No drift"
    figure = titled(8, 3.4, f"{title} (effect from {threshold:g} on that is significant)")
    places = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    if errors:
        for values, colour, name, height in zip(errors, (BLUE, RED), ("reference", "new"), (0.05, 0.15), strict=True):
            places[0].plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), color=colour)
            label = f"{name}, {len(values)} rows"
            places[0].text(0.97, height, label, transform=places[0].transAxes, color=colour, fontsize=8, ha="right")
        if min(values.min() for values in errors) > 0:
            places[0].set_xscale("log")
        places[0].set_xlabel("reconstruction error, squared, a feature")
        places[0].set_ylabel("share of rows below")
    shown = list(effects[:most])[::-1]
    colours = [RED if is_drift else BLUE for *_, is_drift in shown]
    places[-1].barh(range(len(shown)), [effect for _, effect, _ in shown], color=colours)
    places[-1].set_yticks(range(len(shown)), [legible(name) for name, *_ in shown], fontsize=8)
    places[-1].axvline(threshold, color=BLACK, linewidth=0.8, linestyle=":")
    places[-1].set_xlim(0, 1)
    places[-1].set_xlabel("effect size, the largest gap of distributions")
    for axes in places:
        axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def image_grid(images: np.ndarray, columns: int, title: str) -> bytes:
    """Images (count, channels, height, width) in rows of `columns`, without gaps."""
    count, channels, height, width = images.shape
    lines = -(-count // columns)
    sheet = np.zeros((channels, lines * height, columns * width), images.dtype)
    for n, image in enumerate(images):
        top, left = n // columns * height, n % columns * width
        sheet[:, top : top + height, left : left + width] = image
    figure = titled(5.2, 5.2 * lines * height / (columns * width) + 0.5, title)
    axes = figure.subplots()
    show(axes, sheet)
    bare(axes)
    return png(figure)


def triptych(clean: np.ndarray, corrupted: np.ndarray, restored: np.ndarray, noise: str) -> bytes:
    """The same images clean, corrupted and restored, each (count, channels, height, width)."""
    before, after = (float(np.square(images - clean).mean()) for images in (corrupted, restored))
    figure = titled(8, 2.7, f"Restored from {noise}: squared error a feature {before:.3f} before, {after:.3f} after")
    rows = {"clean": clean, "corrupted": corrupted, "restored": restored}
    for axes, (name, images) in zip(figure.subplots(3), rows.items(), strict=True):
        show(axes, _side_by_side(images))
        bare(axes)
        axes.set_ylabel(name)
    return png(figure)


def activations(codes: np.ndarray, most: int = 200) -> bytes:
    """Codes (rows, units) as a heat map, the most active units first, at most `most` of them."""
    size = np.abs(codes)
    share = float((size > 0.1 * (size.max() or 1)).mean())
    shown = codes[:, np.argsort(-size.mean(0), kind="stable")[:most]]
    # a few large activations must not leave the others white
    limit = float(np.quantile(size[size > 0], 0.95)) if size.any() else 1.0
    figure = titled(7, 3.6, f"{share:.0%} of activations exceed a tenth of the largest ({len(codes)} test rows)")
    axes = figure.subplots()
    image = axes.imshow(shown, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xlabel("unit, the most active first")
    axes.set_ylabel("test row")
    figure.colorbar(image, ax=axes, label="activation", extend="both")
    return png(figure)


def confusion(table: np.ndarray, classes: Sequence[str]) -> bytes:
    """Counts of (true, predicted) pairs."""
    classes = [legible(name) for name in classes]
    wrong = table - np.diag(np.diag(table))
    title = f"{np.trace(table) / table.sum():.2%} of {table.sum()} test rows right"
    if wrong.sum():
        truth, guess = np.unravel_index(wrong.argmax(), wrong.shape)
        title += f"; {classes[truth]} most often taken for {classes[guess]} ({wrong.max()})"
    side = min(4.2 + 0.16 * max(len(classes) - 10, 0), 12)
    figure = titled(side + 0.6, side + 0.5, title)
    axes = figure.subplots()
    # shares of the true class, on a root scale: the errors are what there is to see
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for row, column in np.ndindex(table.shape):
            if table[row, column]:
                colour = "white" if share[row, column] > 0.3 else "black"
                axes.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return png(figure)
