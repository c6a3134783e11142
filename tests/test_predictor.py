"""Tests which weights a Predictor loads, its preprocessing, and formats of other libraries."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fcos_d2 import predictor
from fcos_d2.errors import InputError
from fcos_d2.predictor import Prediction, Predictor

from .modeling.tiny import tiny_cfg, tiny_fcos
from .tiny_training import ROOT


@pytest.fixture
def output(tmp_path):
    """Returns a function that saves weights in OUTPUT_DIR of a training run, its ``folder``."""
    data = ("DATASETS.TRAIN", (), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path))
    (tmp_path / "config.yaml").write_text(tiny_cfg(*data).dump())

    def save(name, bias, average=None):
        model = tiny_fcos()
        states = {}
        for key, value in (("model", bias), ("ema", average)):
            if value is not None:
                nn.init.constant_(model.head.cls_logits.bias, value)
                states[key] = {k: v.clone() for k, v in model.state_dict().items()}
        if average is not None:  # as torch's AveragedModel names them
            states["ema"] = {f"module.{k}": v for k, v in states["ema"].items()}
            states["ema"]["n_averaged"] = torch.tensor(3)
        torch.save(states, tmp_path / name)

    save.folder = tmp_path
    return save


def bias_of(output, *opts, weights="") -> float:
    loaded = Predictor.from_config(str(output.folder / "config.yaml"), opts, weights)
    return loaded._model.head.cls_logits.bias[0].item()


def test_ema_is_loaded_if_it_is_enabled(output):
    output("model_final.pth", 1.0, average=2.0)
    assert bias_of(output) == 1
    assert bias_of(output, "MODEL_EMA.ENABLED", True) == 2
    output("model_final.pth", 1.0)
    output("model_final_ema.pth", 3.0)  # of an earlier training run
    assert bias_of(output) == 1


def test_weights_argument_overrides_model_weights(output):
    output("model_final.pth", 1.0)
    output("other.pth", 2.0)
    output("third.pth", 3.0)
    other, third = (str(output.folder / f"{name}.pth") for name in ("other", "third"))
    assert bias_of(output, "MODEL.WEIGHTS", other) == 2
    assert bias_of(output, "MODEL.WEIGHTS", other, weights=third) == 3
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        bias_of(output, "MODEL.WEIGHTS", "nowhere.pth")


def test_missing_weights_are_refused(output):
    with pytest.raises(InputError, match="there is no model_final.pth; train first"):
        bias_of(output)


def test_detections_per_image_that_fcos_ignores_is_refused(output):
    output("model_final.pth", 1.0)
    with pytest.raises(InputError, match="set MODEL.FCOS.POST_NMS_TOPK_TEST 300 instead"):
        bias_of(output, "TEST.DETECTIONS_PER_IMAGE", 300)


def test_url_of_weights_is_not_changed(output, monkeypatch):
    loaded = []
    monkeypatch.setattr(predictor, "load_detector", lambda cfg, weights: loaded.append(weights))
    monkeypatch.setattr(predictor, "accelerated", lambda cfg, model: model)
    Predictor.from_config(str(output.folder / "config.yaml"), weights="https://host/a//w.pth")
    assert loaded == ["https://host/a//w.pth"]


class Recorder(nn.Module):
    """Records its input and raises StopIteration."""

    def forward(self, batch):
        self.input = batch[0]
        raise StopIteration


@pytest.mark.parametrize("input_format, channel", [("RGB", 0), ("BGR", 2)])
@pytest.mark.parametrize("shape, size", [((20, 40), (30, 60)), ((1, 6000), (1, 60))])
def test_input_has_the_channel_order_and_size_of_the_model(input_format, channel, shape, size):
    model, image = Recorder(), np.zeros((*shape, 3), np.uint8)
    image[..., 0] = 200  # red
    with pytest.raises(StopIteration):
        Predictor(model, (40, 60), input_format, 0.5)(image)
    assert model.input["image"].shape == (3, *size)
    assert (model.input["height"], model.input["width"]) == shape
    assert (model.input["image"][channel] == 200).all()
    assert model.input["image"].sum() == 200 * size[0] * size[1]


@pytest.fixture
def prediction():
    image, boxes = np.zeros((48, 64, 3), np.uint8), np.array([[1, 2, 11, 22]], np.float32)
    return Prediction(image, boxes, np.array([0.5]), np.array([1]), ["cat"], [17])


def test_to_supervision_converts_boxes_scores_and_names(prediction, monkeypatch):
    with pytest.raises(InputError, match="pip install supervision"):
        monkeypatch.setitem(sys.modules, "supervision", None)
        prediction.to_supervision()
    module = SimpleNamespace(Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "supervision", module)
    found = prediction.to_supervision()
    assert found.xyxy is prediction.boxes and found.confidence is prediction.scores
    assert found.class_id.tolist() == [1] and found.data["class_name"].tolist() == ["cat"]


def test_sahi_adapter_in_the_documentation_detects_slices(prediction):
    sliced = pytest.importorskip("sahi.predict").get_sliced_prediction
    text = (ROOT / "docs" / "inference.md").read_text()
    space: dict = {}
    exec(re.search(r"(?s)```python\n(from sahi.*?)\n\n\npredictor =", text)[1], space)
    model = SimpleNamespace(class_names=["dog", "cat"])
    adapter = space["FCOSForSahi"](model=model)
    adapter.model = lambda image: prediction
    none = {"overlap_height_ratio": 0, "overlap_width_ratio": 0, "perform_standard_pred": False}
    result = sliced(np.zeros((48, 128, 3), np.uint8), adapter, 48, 64, **none)
    boxes = sorted(one.bbox.to_xyxy() for one in result.object_prediction_list)
    assert boxes == [[1, 2, 11, 22], [65, 2, 75, 22]]
    assert result.object_prediction_list[0].category.name == "cat"
