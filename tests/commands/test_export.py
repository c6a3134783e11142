"""Tests the export command on a tiny detector and dataset."""

import pytest
import torch

from fcos_d2.commands import export
from fcos_d2.config_file import read_cfg
from fcos_d2.export import read_metadata, run_detector
from fcos_d2.inference import build_detector
from tests.tiny_training import CONFIG

pytest_plugins = ["tests.script"]


@pytest.fixture(scope="module")
def trained(tiny_shapes, tmp_path_factory):
    """Returns (config file, weights) of a detector with detections in every image."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = build_detector(read_cfg(str(config), ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return config, folder / "model.pth"


@pytest.fixture
def run(trained, tmp_path, capsys):
    config, weights = trained

    def call(*words, weights=weights):
        words = ["--config-file", config, "--format", "torch_export", *words]
        pairs = ["MODEL.DEVICE", "cpu", "MODEL.FCOS.INFERENCE_TH_TEST", "0.005"]
        status = export.main([*map(str, pairs), "MODEL.WEIGHTS", str(weights), *map(str, words)])
        return status, capsys.readouterr()

    return call


def test_exported_file_is_verified_on_the_test_set(run, tmp_path):
    status, printed = run("--output", tmp_path / "model.pt2", "--verify", "--images", 3)
    assert status == 0, printed.err
    *_, header, one, two, three, four, five, six, verdict = printed.out.splitlines()
    assert header.split()[:5] == ["scale", "batch", "images", "detections", "missed"]
    rows = [line.split() for line in (one, two, three, four, five, six)]
    assert [row[:3] for row in rows] == [[s, b, "3"] for s in ("0.75", "1.0", "1.25") for b in "13"]
    assert all(int(row[3]) > 10 and row[4:7] == ["0", "0", "0"] for row in rows)
    assert verdict == "the detections agree"
    assert read_metadata(tmp_path / "model.pt2", "torch_export") == {
        "channels": "BGR", "min_size": 48, "max_size": 64, "classes": ["small", "large"],
    }  # fmt: skip


def test_difference_is_printed_and_fails(run, tmp_path, monkeypatch):
    def write(model, path, *_, **__):
        path.touch()
        write.model = model

    def load_shifted(*_):
        return lambda images: (found := run_detector(write.model, images))._replace(
            boxes=found.boxes + 0.06
        )

    monkeypatch.setattr(export, "export_detector", write)
    monkeypatch.setattr(export, "load_exported", load_shifted)
    status, printed = run("--output", tmp_path / "model.pt2", "--verify", "--images", 2)
    assert status == 1 and "error: the detections differ" in printed.out
    status, printed = run(
        "--output", tmp_path / "model.pt2", "--verify", "MODEL.FCOS.INFERENCE_TH_TEST", "1.0"
    )
    assert status == 2 and "the model detects nothing" in printed.err


def test_float16_is_verified_with_wider_tolerances(run, tmp_path):
    status, printed = run("--output", tmp_path / "half.pt2", "--half", "--verify", "--images", 2)
    assert "the detections agree (tolerated: 5% lost)" in printed.out
    assert status == 0, printed.out


@pytest.mark.parametrize(
    "weights, message",
    [("", "MODEL.WEIGHTS is empty; append"), ("no.pth", "no.pth: no such file")],
)
def test_missing_weights_are_an_error(run, tmp_path, weights, message):
    status, printed = run("--output", tmp_path / "model.pt2", weights=weights)
    assert status == 2 and message in printed.err
    assert len(printed.err.splitlines()) == 1 and not list(tmp_path.glob("model*"))


def test_int8_export_is_verified(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "int8.onnx"
    status, printed = run("--format", "onnx", "--output", path, "--int8", "--verify")
    assert status == 0, printed.out + printed.err
    nodes = onnx.load(path).graph.node
    quantized = {value for n in nodes if n.op_type == "DequantizeLinear" for value in n.output}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    in_float32 = [node for node in convolutions if node.input[1] not in quantized]
    assert len(in_float32) == 3 * 2 < len(convolutions), "classes, boxes and quality of two levels"
    status, printed = run("--output", tmp_path / "x.pt2", "--int8")
    assert status == 2 and "--int8 needs --format onnx" in printed.err
