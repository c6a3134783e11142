"""Tests the benchmark command."""

import pytest

from fcos_d2.commands import benchmark
from tests.tiny_training import CONFIG

pytest_plugins = ["tests.script"]
HEADER = "| part | ms per batch | images per second | includes |"


@pytest.fixture
def run(tiny_shapes, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)

    def call(*words):
        words = ["--config-file", config, "--seconds", "0.01", *words, "MODEL.DEVICE", "cpu"]
        status = benchmark.main(list(map(str, words)))
        return status, capsys.readouterr()

    return call


def table(out):
    """Returns (milliseconds, images per second) by name."""
    assert HEADER in out
    rows = [line.split("|")[1:-1] for line in out.partition(HEADER)[2].splitlines()[2:]]
    return {row[0].strip(): (float(row[1]), float(row[2])) for row in rows}


def test_every_part_is_measured_on_the_data_of_the_config(run):
    status, printed = run("--batch", 2)
    assert status == 0, printed.err
    rows = table(printed.out)
    assert list(rows) == [
        "data loading", "training step", "network", "post-processing", "inference", "end to end",
    ]  # fmt: skip
    for milliseconds, speed in rows.values():
        assert milliseconds > 0 and speed == pytest.approx(2e3 / milliseconds, rel=0.1, abs=0.1)
    assert "precision   float32 (training), float32 (inference)\n" in printed.out
    assert "resolution  short side 48, at most 64 (training); 48, at most 64" in printed.out
    assert "weights     random" in printed.out and "device " in printed.out


def test_random_images_need_no_dataset(run):
    status, printed = run(
        "--batch", 1, "--size", 40, 56,
        "MODEL.INFERENCE.DTYPE", "bfloat16", "SOLVER.AMP.ENABLED", "True",
        "SOLVER.AMP.PRECISION", "bfloat16",
        "DATASETS.TRAIN", "()", "DATASETS.TEST", "()",
    )  # fmt: skip
    assert status == 0, printed.err
    assert list(table(printed.out)) == ["training step", "network", "post-processing", "inference"]
    assert (
        "40 x 56, random images" in printed.out
        and "bfloat16 autocast (training), bfloat16" in printed.out
    )


def test_negative_batch_size_is_an_error(run):
    status, printed = run("--batch", -3)
    assert status == 2 and "--batch and --size must be positive, got -3" in printed.err
    assert len(printed.err.splitlines()) == 1
