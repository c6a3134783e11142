"""Plots the metrics of a training run (detectron2's metrics.json) and precision over recall."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..errors import InputError

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MAX_NAMED = 6  # classes in the legend; of more classes, the three best and the three worst
AP_COLORS = {"AP": "#0072b2", "AP50": "#56b4e9", "AP75": "#009e73"}


class Series(NamedTuple):
    """Values of a metric by ascending iteration."""

    iterations: np.ndarray  # int [n]
    values: np.ndarray  # float [n], which may be NaN or infinite


def read_metrics(path: str | os.PathLike) -> dict[str, Series]:
    """Reads the ``metrics.json`` of a Detectron2 training run: one JSON object per line.

    Ignores a last line that a crash truncated, and all but the last value of an iteration.

    Raises:
        InputError: the file cannot be read, has no metrics, or another line is invalid.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    metrics: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            iteration = int(row.pop("iteration"))
        except (AttributeError, ValueError, TypeError, KeyError) as error:
            if number == len(lines) or not line.strip():
                continue
            raise InputError(
                f"{path} line {number} is not a JSON object with an iteration; delete that line"
            ) from error
        for name, value in row.items():
            if isinstance(value, (int, float)):
                metrics.setdefault(name, {})[iteration] = float(value)
    if not metrics:
        raise InputError(f"{path} has no metrics; train for more iterations first")
    return {
        name: Series(*map(np.array, zip(*sorted(values.items()), strict=True)))
        for name, values in metrics.items()
    }


def ap_series(metrics: Mapping[str, Series]) -> dict[str, Series]:
    """Returns the available ones of box AP, AP50 and AP75 of the first evaluated dataset."""
    prefix = next((name[:-2] for name in metrics if name.endswith("bbox/AP")), None)
    if prefix is None:
        return {}
    return {name: metrics[prefix + name] for name in AP_COLORS if prefix + name in metrics}


def plot_training(metrics: Mapping[str, Series], path: str | os.PathLike) -> None:
    """Plots losses, learning rate and box AP over the iterations.

    Args:
        metrics: metrics from ``read_metrics``.
        path: figure to write, in the format of its suffix (.png, .svg, .pdf).
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 1))
    loss, rate = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    precision = figure.add_subplot(grid[:, 1])
    last = max((int(series.iterations[-1]) for series in metrics.values()), default=1)
    for axes in (loss, rate, precision):
        _set_style(axes)
        axes.set_xlim(0, max(last, 1))
    _plot_losses(loss, metrics)
    loss.tick_params(labelbottom=False)
    _plot_rate(rate, metrics)
    _plot_precision(precision, metrics)
    figure.savefig(path, dpi=150)


def plot_precision_recall(
    precision: np.ndarray, class_names: Sequence[str], path: str | os.PathLike
) -> None:
    """Plots precision over recall for each class, and the mean.

    The legend has the ``MAX_NAMED`` best and worst classes.

    Args:
        precision: [101, K] in [0, 1], at recalls 0, 0.01, ..., 1; -1 for classes without objects.
        class_names: K names.
        path: figure to write, in the format of its suffix.
    """
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    _set_style(axes)
    axes.set_title("Precision over recall, IoU 0.5", loc="left", fontsize=12, color="#222222")
    axes.set(xlim=(0, 1), ylim=(0, 1.01))
    axes.set_xlabel("recall", fontsize=9, color="#666666")
    recall = np.linspace(0, 1, len(precision))
    known = [k for k in range(len(class_names)) if precision[:, k].max(initial=-1) > -1]
    order = sorted(known, key=lambda k: precision[:, k].mean())
    named = order if len(order) <= MAX_NAMED else [*order[:3], *order[-3:]]
    for k in known:
        color = COLORS[named.index(k)] if k in named else "#cccccc"
        axes.plot(recall, precision[:, k], color=color, linewidth=1.2, alpha=0.7)
        if k in named:
            axes.plot([], [], color=color, label=f"{class_names[k]} {precision[:, k].mean():.2f}")
    if known:
        mean = precision[:, known].mean(axis=1)
        axes.plot(recall, mean, color="#222222", linewidth=2.4, label=f"mean {mean.mean():.2f}")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor="#444444")
    figure.savefig(path, dpi=150)


def _set_style(axes) -> None:
    """Removes the frame, adds a light grid and small gray ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=6)
    axes.tick_params(colors="#666666", labelsize=9, length=0)


def _plot_losses(axes, metrics: Mapping[str, Series]) -> None:
    axes.set_title("Training losses", loc="left", fontsize=12, color="#222222")
    names = sorted(name for name in metrics if name.startswith("loss"))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    top = 0.0
    for name, color in (colors | {"total_loss": "#555555"}).items():
        iterations, values = _finite(metrics, name)
        if not len(values):
            continue
        smooth = _smooth(values)
        axes.plot(iterations, values, color=color, alpha=0.25, linewidth=0.8)
        label = f"{_shorten(name)} {smooth[-1]:.2f}"
        axes.plot(iterations, smooth, color=color, linewidth=1.8, label=label)
        # Losses of the first few iterations may be much larger than all others.
        top = max(top, 1.1 * float(np.percentile(values, 97)))
    axes.set_ylim(0, top or 1)
    _legend(axes, "upper right")


def _shorten(name: str) -> str:
    return name.removeprefix("loss_").removeprefix("fcos_").removesuffix("_loss").replace("_", " ")


def _plot_rate(axes, metrics: Mapping[str, Series]) -> None:
    axes.set_title("Learning rate", loc="left", fontsize=9, color="#666666")
    axes.set_xlabel("iteration", fontsize=9, color="#666666")
    iterations, values = _finite(metrics, "lr")
    axes.plot(iterations, values, color="#888888", linewidth=1.4)
    axes.set_yticks([0, values.max()] if len(values) else [])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.set_ylim(0, None)


def _plot_precision(axes, metrics: Mapping[str, Series]) -> None:
    axes.set_title("Box AP, %", loc="left", fontsize=12, color="#222222")
    axes.set_xlabel("iteration", fontsize=9, color="#666666")
    axes.set_ylim(0, 100)
    series = ap_series(metrics)
    for name, color in AP_COLORS.items():
        iterations, values = _finite(series, name)
        if len(values):
            style = {"linewidth": 2.2 if name == "AP" else 1.4, "marker": "o", "markersize": 4}
            label = f"{name} {values[-1]:.1f}"
            axes.plot(iterations, values, color=color, label=label, **style, clip_on=False)
    if not axes.lines:
        style = {"transform": axes.transAxes, "ha": "center", "color": "#888888"}
        axes.text(0.5, 0.5, "not evaluated yet", **style)
    _legend(axes, "lower right")


def _legend(axes, location: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=location, frameon=False, fontsize=10, labelcolor="linecolor")


def _finite(metrics: Mapping[str, Series], name: str) -> Series:
    """Returns the finite values of a series, which is empty if ``metrics`` lack it."""
    iterations, values = metrics.get(name, Series(np.zeros(0, int), np.zeros(0)))
    keep = np.isfinite(values)
    return Series(iterations[keep], values[keep])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Applies a Gaussian filter with a standard deviation of 1/40 of the training run."""
    sigma = len(values) / 40
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-9)) ** 2)
    inside = slice(radius, radius + len(values))
    sums, weights = (np.convolve(x, kernel)[inside] for x in (values, np.ones(len(values))))
    return sums / weights
