"""Training curves, from metrics.json to the texts in the drawing."""

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


def test_every_measurement_is_a_series_and_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
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


def test_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "lr": 1}\n[]\n{"iteration": 2, "lr": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.json line 2"):
        read_metrics(path)


@pytest.mark.parametrize("content", ["", "\n", '{"iter', '{"iteration": 3}\n'])
def test_file_without_a_measurement_is_an_error(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match="holds no measurement"):
        read_metrics(tmp_path / "metrics.json")


def test_ap_is_that_of_the_first_data_set():
    metrics = {f"{name}/bbox/{key}": name for name in "ab" for key in ("AP", "AP50", "APs")}
    assert ap_series(metrics) == {"AP": "a", "AP50": "a"} and ap_series({}) == {}


def series(*values) -> Series:
    return Series(np.arange(len(values)), np.array(values))


def drawn_texts(metrics, tmp_path) -> str:
    """An SVG, in which matplotlib notes every text that it draws as a comment."""
    plot_training(metrics, tmp_path / "curves.svg")
    return (tmp_path / "curves.svg").read_text()


def test_curves_are_named_with_their_last_values(tmp_path):
    losses = {"total_loss": series(2.0, 2.0), "loss_fcos_cls": series(0.5, 0.5)}
    averages = {"bbox/AP": series(61.24), "bbox/AP50": series(80.0), "bbox/AP75": series(70.0)}
    text = drawn_texts({**losses, **averages, "lr": series(0.01, 0.01)}, tmp_path)
    for label in ("total 2.00", "cls 0.50", "AP 61.2", "AP50 80.0", "AP75 70.0"):
        assert f"<!-- {label} -->" in text, label


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    metrics = {"total_loss": series(2.0, math.nan, 2.0, math.inf, 2.0), "lr": series(math.nan)}
    text = drawn_texts(metrics, tmp_path)
    assert "<!-- total 2.00 -->" in text and "<!-- not evaluated yet -->" in text


def texts_of_precision_recall(precision, names, path) -> list[str]:
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_precision_recall(precision, names, path)
    return path.read_text()


def test_precision_over_recall_names_classes_with_their_average_and_the_mean(tmp_path):
    precision = np.tile([1.0, 0.5, -1.0], (101, 1))
    text = texts_of_precision_recall(precision, ["sure", "half", "absent"], tmp_path / "pr.svg")
    assert "sure 1.00" in text and "half 0.50" in text and "mean 0.75" in text
    assert "absent" not in text


def test_of_many_classes_only_the_best_and_the_worst_are_named(tmp_path):
    precision = np.tile(np.linspace(0.1, 0.9, 9), (101, 1))
    names = [f"class{i}" for i in range(9)]
    text = texts_of_precision_recall(precision, names, tmp_path / "pr.svg")
    assert [name for name in names if f"{name} " in text] == [*names[:3], *names[-3:]]


def test_precision_over_recall_without_any_object_is_an_empty_picture(tmp_path):
    plot_precision_recall(np.full((101, 2), -1.0), ["a", "b"], tmp_path / "pr.png")
    assert (tmp_path / "pr.png").stat().st_size > 0
