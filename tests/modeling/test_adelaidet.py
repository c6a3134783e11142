"""Checks compatibility with AdelaiDet, which registers backbones and changes config defaults."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Simulates the relevant effects of `import adet`.
ADET = """
from detectron2.config import CfgNode
from detectron2.config.defaults import _C
from detectron2.modeling import BACKBONE_REGISTRY

_C.MODEL.FCOS = CfgNode({"NUM_CLASSES": 80})

@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape):
    raise RuntimeError("AdelaiDet's own backbone")

@BACKBONE_REGISTRY.register()
def build_fcos_vovnet_fpn_backbone(cfg, input_shape):
    raise RuntimeError("AdelaiDet's own backbone")
"""
SETUP = """
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from fcos_d2 import InputError, add_fcos_config

def config(name):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "FCOS",
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.BACKBONE.NAME",
        name, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.FCOS.NUM_CLASSES", 3,
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]])
    return cfg
"""


def run(code: str, folder: Path) -> str:
    (folder / "adet.py").write_text(ADET)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adelaidets_backbone_name_builds_ours_until_adelaidet_is_imported(tmp_path):
    code = (
        SETUP
        + """
theirs, ours = (config(f"build_fcos{who}_resnet_fpn_backbone") for who in ("", "_d2"))
build_model(theirs)
import adet
build_model(ours)
try:
    build_model(theirs)
except RuntimeError as error:
    print(error)
"""
    )
    assert run(code, tmp_path) == "AdelaiDet's own backbone\n"


@pytest.mark.parametrize("modules", ["adet, fcos_d2", "fcos_d2, adet"])
def test_add_fcos_config_after_importing_adelaidet_is_a_one_line_error(modules, tmp_path):
    code = (
        f"import {modules}\n{SETUP}"
        + """
try:
    add_fcos_config(get_cfg())
except InputError as error:
    print(error)
"""
    )
    message = run(code, tmp_path)
    assert message.count("\n") == 1 and "has not imported AdelaiDet (adet)" in message
