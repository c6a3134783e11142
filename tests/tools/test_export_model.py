"""tools/export_model.py on a tiny detector and tiny data."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fcos_d2.config_file import read_cfg
from fcos_d2.engine import Trainer
from fcos_d2.export.graph import read_metadata
from tests.tiny_training import CONFIG

pytest_plugins = ["tests.script"]
TOOL = Path(__file__).parents[2] / "tools" / "export_model.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("export_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export_model = load_tool()


@pytest.fixture(scope="module")
def trained(tiny_shapes, tmp_path_factory):
    """(config file, weights) of a detector that finds something everywhere."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = Trainer.build_model(read_cfg(str(config), ["MODEL.DEVICE", "cpu"]))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return config, folder / "model.pth"


@pytest.fixture
def run(trained, tmp_path, capsys):
    config, weights = trained

    def call(*words, weights=weights):
        words = ["--config-file", config, "--format", "torchscript", *words]
        words += ["MODEL.DEVICE", "cpu", "MODEL.FCOS.INFERENCE_TH_TEST", "0.005"]
        status = export_model.main([*map(str, words), "MODEL.WEIGHTS", str(weights)])
        return status, capsys.readouterr()

    return call


def test_file_is_written_and_verified_on_the_test_set(run, tmp_path):
    status, printed = run("--output", tmp_path / "model.ts", "--verify", 3)
    assert status == 0, printed.err
    *_, header, one, two, three, four, five, six, verdict = printed.out.splitlines()
    assert header.split()[:5] == ["size", "batch", "images", "detections", "missed"]
    rows = [line.split() for line in (one, two, three, four, five, six)]
    assert [row[:3] for row in rows] == [[s, b, "3"] for s in ("36", "48", "60") for b in "13"]
    assert all(int(row[3]) > 10 and row[4:7] == ["0", "0", "0"] for row in rows)
    assert verdict == "the same detections"
    assert read_metadata(tmp_path / "model.ts", "torchscript") == {
        "channels": "BGR", "min_size": 48, "max_size": 64, "classes": ["small", "large"],
    }  # fmt: skip


def test_difference_is_told_and_is_the_exit_status(run, tmp_path, monkeypatch):
    load = export_model.load_exported

    def load_spoiled(*arguments):
        detect = load(*arguments)
        return lambda images: (found := detect(images))._replace(boxes=found.boxes + 0.06)

    monkeypatch.setattr(export_model, "load_exported", load_spoiled)
    status, printed = run("--output", tmp_path / "model.ts", "--verify", 2)
    assert status == 1 and "not the same detections" in printed.out


def test_float16_is_verified_with_wider_tolerances(run, tmp_path):
    status, printed = run("--output", tmp_path / "half.ts", "--half", "--verify", 2)
    assert "save up to 5%" in printed.out
    assert status == 0, printed.out


@pytest.mark.parametrize(
    "weights, message",
    [("", "MODEL.WEIGHTS is empty; end the command with"), ("no.pth", "no.pth: no such file")],
)
def test_missing_weights_are_one_line(run, tmp_path, weights, message):
    status, printed = run("--output", tmp_path / "model.ts", weights=weights)
    assert status == 2 and message in printed.err
    assert len(printed.err.splitlines()) == 1 and not list(tmp_path.glob("model*"))
