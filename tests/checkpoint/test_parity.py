"""Weights of torchvision's and detectron2's own FCOS give the same detections here."""

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

# Short sides differ. Most sizes need padding, where torchvision does not space the points of P6 and
# P7 by the stride.
SIZES = [[(160, 221), (160, 187)], [(97, 130)], [(256, 192), (192, 320)], [(128, 128)]]


def randomise(model: nn.Module) -> nn.Module:
    """Randomizes batch norms so that activations neither vanish nor explode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        norms = (nn.BatchNorm2d, FrozenBatchNorm2d, CycleBatchNormList)
        if isinstance(module, norms) and module.weight is not None:  # else a list has them
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def vary_predictions(logits: nn.Conv2d, box: nn.Conv2d, quality: nn.Conv2d, spread: float) -> None:
    """Makes predictions differ between points, so that a few dozen of them are detections."""
    for conv, std, bias in ((logits, spread, -6.2), (box, 0.06, 1.0), (quality, 0.06, 1.0)):
        nn.init.normal_(conv.weight, std=std)
        nn.init.constant_(conv.bias, bias)


def our_model(weights, *options) -> nn.Module:
    """Builds our detector with these MODEL.WEIGHTS and the settings that they require."""
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
    """Returns the detections of a detectron2 model in torchvision's format."""
    with torch.no_grad():
        outputs = model([{"image": image} for image in images])
    found = [output["instances"] for output in outputs]
    return [
        {"boxes": f.pred_boxes.tensor, "scores": f.scores, "labels": f.pred_classes} for f in found
    ]


def assert_same_detections(got: list[dict], expected: list[dict]) -> int:
    """Asserts that both have the same detections; returns their number."""
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours["scores"]) == len(theirs["scores"])
        same = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1) < 0.05
        same &= (ours["scores"][:, None] - theirs["scores"]).abs() < 1e-4
        same &= ours["labels"][:, None] == theirs["labels"]
        assert same.any(dim=0).all() and same.any(dim=1).all()
    return sum(len(theirs["scores"]) for theirs in expected)


@pytest.fixture(scope="module")
def torchvision():
    """torchvision's fcos_resnet50_fpn with random weights that detect something."""
    torch.manual_seed(0)
    model = randomise(fcos_resnet50_fpn(weights=None, weights_backbone=None))
    vary_predictions(
        model.head.classification_head.cls_logits,
        model.head.regression_head.bbox_reg,
        model.head.regression_head.bbox_ctrness,
        spread=0.03,
    )
    return model


def torchvision_detections(model: nn.Module, batch: list) -> list[dict]:
    """Runs the model without resizing, which differs from detectron2's and has no weights."""
    model.transform.min_size = (min(min(image.shape[1:]) for image in batch),)
    model.transform.max_size = 10_000
    assert all(min(image.shape[1:]) == model.transform.min_size[0] for image in batch)
    with torch.no_grad():
        return model(batch)


def test_torchvision_detects_the_same_with_all_its_91_classes(torchvision, tmp_path):
    torch.save(torchvision.state_dict(), tmp_path / "torchvision.pth")
    ours = our_model(tmp_path / "torchvision.pth", "MODEL.FCOS.NUM_CLASSES", 91)
    found = 0
    for sizes in SIZES:
        batch = [torch.rand(3, *size) for size in sizes]
        expected = torchvision_detections(torchvision, batch)
        found += assert_same_detections(detect(ours, [255 * image for image in batch]), expected)
    assert 20 < found < 300
    # The comparison notices the half stride by which detectron2's points are shifted.
    ours.grid.offset = 0.5
    with pytest.raises(AssertionError):
        assert_same_detections(detect(ours, [255 * image for image in batch]), expected)


def test_torchvision_detects_the_same_with_cocos_80_classes(torchvision, tmp_path):
    """Trained weights never predict the 11 unused category ids; random ones are made to."""
    weights = {key: value.clone() for key, value in torchvision.state_dict().items()}
    gaps = [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    weights["head.classification_head.cls_logits.bias"][gaps] = -1e4
    torchvision.load_state_dict(weights)
    torch.save({"model": weights, "epoch": 25}, tmp_path / "torchvision.pth")
    ours = our_model(tmp_path / "torchvision.pth")
    assert ours.head.cls_logits.out_channels == 80
    ids = torch.tensor([row for row in range(91) if row not in gaps])
    batch = [torch.rand(3, 160, 221)]
    got = detect(ours, [255 * image for image in batch])
    for image in got:
        image["labels"] = ids[image["labels"]]
    assert assert_same_detections(got, torchvision_detections(torchvision, batch)) > 10


def group_norm(channels: int) -> nn.GroupNorm:
    """Builds "GN", which detectron2 0.6 also requests for 1 channel: torch refuses 32 groups."""
    return nn.GroupNorm(min(32, channels), channels)


@pytest.mark.parametrize("norm, spread", [("GN", 0.037), ("BN", 0.25)])
def test_detectron2_detects_the_same(norm, spread, tmp_path):
    config = model_zoo.get_config("common/models/fcos.py").model
    config.head.norm = {"GN": group_norm, "BN": "BN"}[norm]
    theirs = randomise(instantiate(config))
    for p in (3, 4, 5):  # without group norms, features would be in the tens of thousands
        getattr(theirs.backbone, f"fpn_output{p}").weight.data /= 1e4
    vary_predictions(theirs.head.cls_score, theirs.head.bbox_pred, theirs.head.ctrness, spread)
    torch.save({"model": theirs.state_dict()}, tmp_path / "detectron2.pth")
    ours = our_model(tmp_path / "detectron2.pth", "MODEL.FCOS.NORM", norm)
    found = 0
    for sizes in SIZES:
        batch = [255 * torch.rand(3, *size) for size in sizes]
        found += assert_same_detections(detect(ours, batch), detect(theirs, batch))
    assert 20 < found < 600
