"""Weights of torchvision's and detectron2's FCOS yield the same detections in this package."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from torch import nn
from torchvision.models.detection import fcos_resnet50_fpn

from fcos_d2 import add_fcos_config
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import import_weights
from fcos_d2.engine import Trainer

# Most sizes need padding, for which torchvision's points of P6 and P7 are not one stride apart.
SIZES = [[(160, 221), (160, 187)], [(97, 130)], [(256, 192), (192, 320)], [(128, 128)]]


def randomize_norms(model: nn.Module) -> nn.Module:
    """Randomizes batch norms so that activations neither vanish nor explode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        norms = (nn.BatchNorm2d, FrozenBatchNorm2d, CycleBatchNormList)
        if isinstance(module, norms) and module.weight is not None:  # some lists have no weight
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def vary_predictions(logits: nn.Conv2d, box: nn.Conv2d, quality: nn.Conv2d, spread: float) -> None:
    """Initializes the last layers so that a few dozen points have detections."""
    for conv, std, bias in ((logits, spread, -6.2), (box, 0.06, 1.0), (quality, 0.06, 1.0)):
        nn.init.normal_(conv.weight, std=std)
        nn.init.constant_(conv.bias, bias)


def load_model(weights, *options) -> nn.Module:
    """Builds this package's detector with the settings that ``weights`` require, and loads them."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file("configs/fcos_R_50_FPN_1x.yaml")
    conventions, settings = import_weights(torch.load(weights)).requirements
    needed = {"MODEL.FCOS.CONVENTION": conventions[0], **settings}
    options = (*(item for pair in needed.items() for item in pair), *options)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(weights), *options])
    model = Trainer.build_model(cfg).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def detect(model: nn.Module, images: list) -> list[dict]:
    """Runs a detectron2 model; returns its detections in torchvision's format."""
    with torch.no_grad():
        outputs = model([{"image": image} for image in images])
    found = [output["instances"] for output in outputs]
    return [
        {"boxes": f.pred_boxes.tensor, "scores": f.scores, "labels": f.pred_classes} for f in found
    ]


def assert_same_detections(got: list[dict], expected: list[dict]) -> int:
    """Checks that both have the same detections; returns their number."""
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours["scores"]) == len(theirs["scores"])
        same = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1) < 0.05
        same &= (ours["scores"][:, None] - theirs["scores"]).abs() < 1e-4
        same &= ours["labels"][:, None] == theirs["labels"]
        assert same.any(dim=0).all() and same.any(dim=1).all()
    return sum(len(theirs["scores"]) for theirs in expected)


@pytest.fixture(scope="module")
def torchvision():
    """Returns fcos_resnet50_fpn with random weights that detect something."""
    torch.manual_seed(0)
    model = randomize_norms(fcos_resnet50_fpn(weights=None, weights_backbone=None))
    vary_predictions(
        model.head.classification_head.cls_logits,
        model.head.regression_head.bbox_reg,
        model.head.regression_head.bbox_ctrness,
        spread=0.03,
    )
    return model


def detect_with_torchvision(model: nn.Module, batch: list) -> list[dict]:
    """Runs the model without resizing, in which torchvision differs from detectron2."""
    model.transform.min_size = (min(min(image.shape[1:]) for image in batch),)
    model.transform.max_size = 10_000
    assert all(min(image.shape[1:]) == model.transform.min_size[0] for image in batch)
    with torch.no_grad():
        return model(batch)


def test_detections_match_torchvision_with_91_classes(torchvision, tmp_path):
    torch.save(torchvision.state_dict(), tmp_path / "torchvision.pth")
    ours = load_model(tmp_path / "torchvision.pth", "MODEL.FCOS.NUM_CLASSES", 91)
    found = 0
    for sizes in SIZES:
        batch = [torch.rand(3, *size) for size in sizes]
        expected = detect_with_torchvision(torchvision, batch)
        found += assert_same_detections(detect(ours, [255 * image for image in batch]), expected)
    assert 20 < found < 300
    # An offset of half a stride makes the comparison fail.
    ours.grid.offset = 0.5
    with pytest.raises(AssertionError):
        assert_same_detections(detect(ours, [255 * image for image in batch]), expected)


def test_detections_match_torchvision_with_80_classes(torchvision, tmp_path):
    """Trained weights never predict the 11 unused category ids, nor do these random ones."""
    weights = {key: value.clone() for key, value in torchvision.state_dict().items()}
    gaps = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    weights["head.classification_head.cls_logits.bias"][gaps] = -1e4
    torchvision.load_state_dict(weights)
    torch.save({"model": weights, "epoch": 25}, tmp_path / "torchvision.pth")
    ours = load_model(tmp_path / "torchvision.pth")
    assert ours.head.cls_logits.out_channels == 80
    ids = torch.tensor([row for row in range(91) if row not in gaps])
    batch = [torch.rand(3, 160, 221)]
    got = detect(ours, [255 * image for image in batch])
    for image in got:
        image["labels"] = ids[image["labels"]]
    assert assert_same_detections(got, detect_with_torchvision(torchvision, batch)) > 10


def group_norm(channels: int) -> nn.GroupNorm:
    """Builds a group norm; with "GN", detectron2 0.6 fails on layers of one channel."""
    return nn.GroupNorm(min(32, channels), channels)


@pytest.mark.parametrize("norm, spread", [("GN", 0.037), ("BN", 0.25)])
def test_detections_match_detectron2(norm, spread, tmp_path):
    config = model_zoo.get_config("common/models/fcos.py").model
    config.head.norm = {"GN": group_norm, "BN": "BN"}[norm]
    theirs = randomize_norms(instantiate(config))
    for p in (3, 4, 5):  # without group norms, features would be in the tens of thousands
        getattr(theirs.backbone, f"fpn_output{p}").weight.data /= 1e4
    vary_predictions(theirs.head.cls_score, theirs.head.bbox_pred, theirs.head.ctrness, spread)
    torch.save({"model": theirs.state_dict()}, tmp_path / "detectron2.pth")
    ours = load_model(tmp_path / "detectron2.pth", "MODEL.FCOS.NORM", norm)
    found = 0
    for sizes in SIZES:
        batch = [255 * torch.rand(3, *size) for size in sizes]
        found += assert_same_detections(detect(ours, batch), detect(theirs, batch))
    assert 20 < found < 600
