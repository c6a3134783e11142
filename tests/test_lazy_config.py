"""Tests commands with LazyConfig files."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from fcos_d2 import InputError
from fcos_d2.commands import analyze, predict
from fcos_d2.config_file import read_cfg
from fcos_d2.inference import build_detector, load_detector

from .tiny_training import ROOT

LAZY = str(ROOT / "configs/lazy/fcos_R_50_FPN_1x.py")


def test_lazy_and_yaml_configs_of_a_model_have_the_same_values():
    lazy = read_cfg(LAZY, ["train.device=cpu", "MODEL.INFERENCE.DTYPE", "bfloat16"])
    yaml = read_cfg(str(ROOT / "configs/fcos_R_50_FPN_1x.yaml"))
    assert lazy.INPUT == yaml.INPUT and lazy.DATASETS == yaml.DATASETS
    assert (lazy.MODEL.WEIGHTS, lazy.OUTPUT_DIR) == (yaml.MODEL.WEIGHTS, yaml.OUTPUT_DIR)
    assert lazy.MODEL.META_ARCHITECTURE == "FCOS" and lazy.MODEL.FCOS.NUM_CLASSES == 80
    assert lazy.MODEL.DEVICE == "cpu" and lazy.MODEL.INFERENCE.DTYPE == "bfloat16"


def test_overrides_change_the_model():
    cfg = read_cfg(LAZY, ["train.device=cpu", "model.head.num_classes=7"])
    assert build_detector(cfg).head.cls_logits.out_channels == 7 == cfg.MODEL.FCOS.NUM_CLASSES


def test_predict_and_analyze_accept_a_lazy_config(tmp_path, capsys):
    model = instantiate(LazyConfig.load(LAZY).model)
    torch.nn.init.zeros_(model.head.cls_logits.bias)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    words = [str(tmp_path / "photo.png"), "--json", str(tmp_path / "found.json")]
    words += ["--config-file", LAZY, "--weights", str(tmp_path / "model.pth"), "--score", "0.1"]
    small = ["train.device=cpu", "INPUT.MIN_SIZE_TEST", "64"]
    assert predict.main([*words, "--opts", *small]) == 0
    (entry,) = json.loads((tmp_path / "found.json").read_text())
    assert len(entry["objects"]) > 5
    assert analyze.main(["--config-file", LAZY, "--size", "64", "96"]) == 0
    assert "32,244,250" in capsys.readouterr().out


@pytest.mark.parametrize(
    "opts, message",
    [
        (["train.init_checkpoint=no.pth"], "no.pth"),
        (["MODEL.WEIGHT", "x"], "unknown config key"),
        (["train.a[0].b=1"], "train.a"),
    ],
)
def test_invalid_overrides_are_refused(opts, message):
    with pytest.raises(InputError, match=message):
        load_detector(read_cfg(LAZY, ["train.device=cpu", *opts]))
