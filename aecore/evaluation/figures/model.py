"""Figures of one model, one function per figure; each returns PNG bytes and has a title that states the finding."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aecore.evaluation.figures import look
from aecore.evaluation.figures.look import BLACK, BLUE, ORANGE, RED, legible, show_image, show_values, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reconstructions(x: np.ndarray, reconstruction: np.ndarray, mse: float) -> bytes:
    """Draw rows and their reconstructions, each (rows, *shape) as the network reads them: images, or a heat map.

    Args:
        mse: the squared error per feature of all test rows, for the title.
    """
    title = f"Reconstructed with a squared error of {mse:.4f} per feature (test rows)"
    if x.ndim > 2:
        return _lines_of_images(title, 2.0, {"input": x, "output": reconstruction})
    figure = titled(7, 4.2, title)
    grid = figure.subplots(3, 1, sharex=True)
    limit = np.nanmax(np.abs(x)) or 1.0  # missing values stay white
    maps = {"input": x, "output": reconstruction, "difference": x - reconstruction}
    for axes, (name, values) in zip(grid, maps.items(), strict=True):
        shown = show_values(axes, values, limit)
        axes.set_ylabel(f"{name}\n(rows)")
        axes.set_yticks([])
    grid[-1].set_xlabel("feature")
    figure.colorbar(shown, ax=grid, label="standardised value", shrink=0.8)
    return look.png(figure)


def triptych(clean: np.ndarray, corrupted: np.ndarray, restored: np.ndarray, noise: str) -> bytes:
    """Draw the same images clean, corrupted and restored, each (count, channels, height, width)."""
    before, after = (float(np.square(images - clean).mean()) for images in (corrupted, restored))
    title = f"Restored from {noise}: squared error per feature {before:.3f} before, {after:.3f} after"
    return _lines_of_images(title, 2.7, {"clean": clean, "corrupted": corrupted, "restored": restored})


def _lines_of_images(title: str, height: float, lines: Mapping[str, np.ndarray]) -> bytes:
    """Draw a line of images (count, channels, height, width) per name."""
    figure = titled(8, height, title)
    for axes, (name, images) in zip(figure.subplots(len(lines)), lines.items(), strict=True):
        show_image(axes, _side_by_side(images))
        axes.set_ylabel(name)
    return look.png(figure)


def _side_by_side(images: np.ndarray, places: int = 0) -> np.ndarray:
    """Put images into a row with room for at least `places` images, with gaps of a tenth of their width."""
    return look.tiled(images, max(len(images), places), max(1, images.shape[-1] // 10))


def image_grid(images: np.ndarray, columns: int, title: str) -> bytes:
    """Draw images (count, channels, height, width) in rows of `columns`, without gaps."""
    sheet = look.tiled(images, columns)
    figure = titled(5.2, 5.2 * sheet.shape[1] / sheet.shape[2] + 0.5, title)
    show_image(figure.subplots(), sheet)
    return look.png(figure)


def units(layers: Sequence[np.ndarray]) -> bytes:
    """Draw what units stand for: one array (units, *shape of the data) per layer, around zero."""
    if layers[0].ndim == 2:
        figure = titled(7, 1.1 + 1.6 * len(layers), "What each unit stands for, by feature (purple up, orange down)")
        grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
        for number, (axes, images) in enumerate(zip(grid, layers, strict=True), 1):
            show_values(axes, images, np.abs(images).max() or 1.0)
            axes.set_ylabel(f"layer {number}\nunit")
        axes.set_xlabel("feature")
        return look.png(figure)
    columns = max(len(images) for images in layers)
    height, width = layers[0].shape[-2:]
    tall = 0.56 * len(layers) * height / width + 0.6
    figure = titled(0.5 * columns + 0.6, tall, "What each unit stands for (grey is zero)")
    grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for number, (axes, images) in enumerate(zip(grid, layers, strict=True), 1):
        largest = float(np.abs(images).max()) or 1.0
        # each unit has its own scale, but a dead one is grey, not a blown-up rounding error
        limits = np.maximum(np.abs(images).max((1, 2, 3), keepdims=True), 0.01 * largest)
        show_image(axes, _side_by_side(images / (2 * limits) + 0.5, columns))
        axes.set_ylabel(f"layer {number}", fontsize=8)
    return look.png(figure)


def codes_map(
    points: np.ndarray, units: int, labels: np.ndarray | None, classes: Sequence[str], split: str
) -> bytes:  # fmt: skip
    """Draw the codes of a split's rows in a plane, coloured by label.

    Args:
        points: what `look.plane` made of the codes, (rows, 2).
        units: the number of units of a code.
    """
    size = 8 if len(points) <= 2000 else 2
    how, axis = ("The code itself", "code") if units <= 2 else (f"t-SNE of {units}-dimensional codes", "t-SNE")
    figure = titled(5.2, 5.2, f"{how}, {len(points)} {split} rows" + (", by class" if labels is not None else ""))
    axes = figure.subplots()
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, linewidths=0)
    else:
        look.scatter(axes, points, labels[: len(points)], classes, size, 13)
    axes.set_xlabel(f"{axis} 1")
    axes.set_ylabel(f"{axis} 2")
    look.open_frame(axes)
    return look.png(figure)


def activations(codes: np.ndarray, most: int = 200) -> bytes:
    """Draw codes (rows, units) as a heat map, the most active units first, at most `most` of them."""
    size = np.abs(codes)
    share = float((size > 0.1 * (size.max() or 1)).mean())
    shown = codes[:, np.argsort(-size.mean(0), kind="stable")[:most]]
    # a few large activations must not leave the others white
    limit = float(np.quantile(size[size > 0], 0.95)) if size.any() else 1.0
    figure = titled(7, 3.6, f"{share:.0%} of activations exceed a tenth of the largest ({len(codes)} test rows)")
    axes = figure.subplots()
    image = show_values(axes, shown, limit)
    axes.set_xlabel("unit, the most active first")
    axes.set_ylabel("test row")
    figure.colorbar(image, ax=axes, label="activation", extend="both")
    return look.png(figure)


def loss_curves(stages: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Draw training and validation curves of each stage, from its `history` and `best_epoch`."""
    title = "Loss by epoch; the dot marks the weights kept, chosen on validation"
    figure = titled(max(7.0, 2.4 * len(stages)), 2.9, title)
    for axes, (name, stage) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items(), strict=True):
        _loss_curve(axes, name, stage["history"], stage["best_epoch"])
    figure.axes[0].set_ylabel("loss per row")
    return look.png(figure)


def _loss_curve(axes: Any, name: str, history: Sequence[Mapping[str, float]], best: int) -> None:
    epochs = np.arange(1, len(history) + 1)
    # a classifier's weights are chosen by its validation error, which then is the curve to see the dot on
    metric = "val/error" if "val/error" in history[0] else "val/loss"
    validation = [epoch[metric] for epoch in history]
    lines = axes if metric == "val/loss" else axes.twinx()
    axes.plot(epochs, [epoch["train/loss"] for epoch in history], color=ORANGE)
    lines.plot(epochs, validation, color=BLUE)
    lines.plot(best, validation[best - 1], "o", color=BLUE, clip_on=False)
    texts = (0.97, "training loss", ORANGE), (0.88, metric.replace("val/", "validation "), BLUE)
    for height, text, colour in texts:
        axes.text(0.97, height, text, transform=axes.transAxes, color=colour, fontsize=8, ha="right", va="top")
    axes.set_title(f"{name}, epoch {best} of {len(history)}", fontsize=9)
    axes.set_xlabel("epoch")
    for axis in {axes, lines}:
        axis.tick_params(labelsize=7)
        axis.spines[["top"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if lines is axes:
        axes.spines[["right"]].set_visible(False)


def confusion(table: np.ndarray, classes: Sequence[str]) -> bytes:
    """Draw the counts of (true, predicted) pairs of classes, (classes, classes)."""
    classes = [legible(name) for name in classes]
    wrong = table - np.diag(np.diag(table))
    title = f"{np.trace(table) / table.sum():.2%} of {table.sum()} test rows right"
    if wrong.sum():
        truth, guess = np.unravel_index(wrong.argmax(), wrong.shape)
        title += f"; {classes[truth]} most often taken for {classes[guess]} ({wrong.max()})"
    side = min(4.2 + 0.16 * max(len(classes) - 10, 0), 12)
    figure = titled(side + 0.6, side + 0.5, title)
    axes = figure.subplots()
    # shares of the true class on a root scale, since the errors are what there is to see
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
    return look.png(figure)


def drift(
    errors: tuple[np.ndarray, np.ndarray] | None, effects: Sequence[tuple[str, float, bool]], threshold: float,
    most: int = 12,
) -> bytes:  # fmt: skip
    """Draw how far new rows are from those that a model was trained on.

    Args:
        errors: reconstruction errors of the reference rows and of the new rows.
        effects: name, effect size and whether it is drift, for each comparison in order; the first `most` are shown.
    """
    drifted = [name for name, _, is_drift in effects if is_drift]
    title = f"Drift: {len(drifted)} of {len(effects)} comparisons" if drifted else "No drift"
    figure = titled(8, 3.4, f"{title} (effect from {threshold:g} on that is significant)")
    *left, bars = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    if errors:
        _distributions(left[0], errors)
    shown = list(effects[:most])[::-1]
    colours = [RED if is_drift else BLUE for *_, is_drift in shown]
    bars.barh(range(len(shown)), [effect for _, effect, _ in shown], color=colours)
    bars.set_yticks(range(len(shown)), [legible(name) for name, *_ in shown], fontsize=8)
    bars.axvline(threshold, color=BLACK, linewidth=0.8, linestyle=":")
    bars.set_xlim(0, 1)
    bars.set_xlabel("effect size, the largest gap of distributions")
    for axes in (*left, bars):
        look.open_frame(axes)
    return look.png(figure)


def _distributions(axes: "Axes", errors: tuple[np.ndarray, np.ndarray]) -> None:
    """Draw the distribution functions of the reference's and of the new rows' errors."""
    for values, colour, name, height in zip(errors, (BLUE, RED), ("reference", "new"), (0.05, 0.15), strict=True):
        axes.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), color=colour)
        label = f"{name}, {len(values)} rows"
        axes.text(0.97, height, label, transform=axes.transAxes, color=colour, fontsize=8, ha="right")
    if min(values.min() for values in errors) > 0:
        axes.set_xscale("log")
    axes.set_xlabel("squared reconstruction error per feature")
    axes.set_ylabel("share of rows below")
