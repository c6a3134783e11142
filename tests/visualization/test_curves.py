"""Tests reading metrics.json and plotting curves."""

import json
import math

import matplotlib
import numpy as np
import pytest

from fcos_d2.errors import InputError
from fcos_d2.visualization.curves import (
    Series,
    ap_series,
    plot_precision_recall,
    plot_training,
    read_metrics,
)


def write_metrics(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_truncated_last_line_is_ignored(tmp_path):
    rows = [
        {"iteration": 19, "total_loss": 2.0, "lr": 0.1},
        {"iteration": 29, "bbox/AP": 10.0},
        {"iteration": 29, "bbox/AP": 11.0},  # evaluated again
        {"iteration": 39, "total_loss": 1.0, "lr": 0.1, "note": "text", "bbox/AP": None},
    ]
    path = write_metrics(tmp_path / "metrics.json", rows, '{"iteration": 49, "t')
    metrics = {key: list(map(list, series)) for key, series in read_metrics(path).items()}
    assert metrics == {
        "total_loss": [[19, 39], [2, 1]], "lr": [[19, 39], [0.1, 0.1]], "bbox/AP": [[29], [11]],
    }  # fmt: skip


def test_error_for_an_invalid_line_has_its_number(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "lr": 1}\n[]\n{"iteration": 2, "lr": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.json line 2"):
        read_metrics(path)


@pytest.mark.parametrize("content", ["", "\n", '{"iter', '{"iteration": 3}\n'])
def test_file_without_metrics_is_an_error(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match="has no metrics"):
        read_metrics(tmp_path / "metrics.json")


def test_ap_of_the_first_dataset_is_returned():
    metrics = {f"{name}/bbox/{key}": name for name in "ab" for key in ("AP", "AP50", "APs")}
    assert ap_series(metrics) == {"AP": "a", "AP50": "a"} and ap_series({}) == {}


def series(*values) -> Series:
    return Series(np.arange(len(values)), np.array(values))


def svg_of(plot, *arguments, path) -> str:
    """Returns an SVG in which text is not converted to paths."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(*arguments, path)
    return path.read_text()


def test_legend_has_the_last_values(tmp_path):
    losses = {"total_loss": series(2.0, 2.0), "loss_fcos_cls": series(0.5, 0.5)}
    averages = {"bbox/AP": series(61.24), "bbox/AP50": series(80.0), "bbox/AP75": series(70.0)}
    metrics = {**losses, **averages, "lr": series(0.01, 0.01)}
    svg = svg_of(plot_training, metrics, path=tmp_path / "curves.svg")
    for label in ("total 2.00", "cls 0.50", "AP 61.2", "AP50 80.0", "AP75 70.0"):
        assert f">{label}<" in svg, label


def test_values_that_are_not_finite_are_skipped(tmp_path):
    metrics = {"total_loss": series(2.0, math.nan, 2.0, math.inf, 2.0), "lr": series(math.nan)}
    svg = svg_of(plot_training, metrics, path=tmp_path / "curves.svg")
    assert ">total 2.00<" in svg and ">not evaluated yet<" in svg


def test_legend_of_precision_recall_has_the_ap_of_each_class_and_the_mean(tmp_path):
    precision = np.tile([1.0, 0.5, -1.0], (101, 1))
    names = ["full", "half", "absent"]
    svg = svg_of(plot_precision_recall, precision, names, path=tmp_path / "pr.svg")
    assert ">full 1.00<" in svg and ">half 0.50<" in svg and ">mean 0.75<" in svg
    assert "absent" not in svg


def test_legend_of_many_classes_has_only_the_best_and_the_worst(tmp_path):
    precision = np.tile(np.linspace(0.1, 0.9, 9), (101, 1))
    names = [f"class{i}" for i in range(9)]
    svg = svg_of(plot_precision_recall, precision, names, path=tmp_path / "pr.svg")
    assert [name for name in names if f">{name} " in svg] == [*names[:3], *names[-3:]]


def test_precision_recall_without_objects_is_an_empty_plot(tmp_path):
    plot_precision_recall(np.full((101, 2), -1.0), ["a", "b"], tmp_path / "pr.png")
    assert (tmp_path / "pr.png").stat().st_size > 0
