"""A tiny FCOS, built from a config like any other detector, and helpers to train it."""

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fcos_d2 import add_fcos_config
from fcos_d2.modeling import build_fpn

NUM_CLASSES = 3
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}


class TinyBottomUp(Backbone):
    """Up to four strided convolutions, with the names and strides of a ResNet's stages."""

    def __init__(self, out_features):
        super().__init__()
        self.names = [f"res{i}" for i in range(2, int(out_features[-1][-1]) + 1)]
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, 2, 1) for _ in self.names)
        self._out_features = list(out_features)
        self._out_feature_strides = {name: 4 << i for i, name in enumerate(self.names)}
        self._out_feature_channels = dict.fromkeys(self.names, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x / 64), {}
        for name, stage in zip(self.names, self.stages, strict=True):
            maps[name] = x = stage(x.relu())
        return {name: maps[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_tiny_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return build_fpn(cfg, TinyBottomUp(cfg.MODEL.RESNETS.OUT_FEATURES))


def tiny_cfg(*options, levels: tuple[str, ...] = ("p3", "p4", "p5"), **fcos) -> CfgNode:
    """Returns a config; ``options`` are key-value pairs, ``fcos`` are keys of MODEL.FCOS."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_tiny_fpn_backbone"
    stages = [f"res{level[1]}" for level in levels if level < "p6"]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = stages
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FCOS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.FCOS.NUM_CLS_CONVS = cfg.MODEL.FCOS.NUM_BOX_CONVS = 1
    cfg.MODEL.FCOS.IN_FEATURES = list(levels)
    cfg.MODEL.FCOS.FPN_STRIDES = [STRIDES[level] for level in levels]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [8 * STRIDES[level] for level in levels[:-1]]
    cfg.MODEL.FCOS.TOP_LEVELS = sum(level > "p5" for level in levels)
    for key, value in fcos.items():
        assert key in cfg.MODEL.FCOS, key
        cfg.MODEL.FCOS[key] = value
    cfg.merge_from_list(options)
    return cfg


def tiny_fcos(*options, **settings) -> nn.Module:
    """Builds the detector of ``tiny_cfg``."""
    return build_model(tiny_cfg(*options, **settings))


def sample(height: int, width: int, boxes=(), classes=None) -> dict:
    """Returns a training input: a random image and ``boxes``, a list or a Tensor[n, 4]."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.arange(len(boxes)) % NUM_CLASSES if classes is None else torch.tensor(classes)
    instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes.long())
    return {"image": torch.rand(3, height, width) * 255, "instances": instances}


def train_step(model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    """Runs a forward and a backward pass; returns the losses."""
    losses = model.train()(batch)
    sum(losses.values()).backward()
    return losses


def without_gradient(model: nn.Module) -> list[str]:
    """Returns the names of parameters without a finite gradient."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
