"""Tests FCOSProposals alone and in detectron2's two-stage detectors."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage

from .tiny import NUM_CLASSES, sample, tiny_cfg, train_step, without_gradient

BOXES = [[8.0, 8, 40, 40], [30.0, 20, 90, 60]]
PERMISSIVE = {"INFERENCE_TH_TRAIN": 0.0, "INFERENCE_TH_TEST": 0.0, "NMS_TH": 1.0}


def two_stage(architecture: str, **fcos):
    cfg = tiny_cfg(**fcos)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOSProposals"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 16
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    return build_model(cfg)


def propose(model, batch):
    """Runs the proposal generator on images of 64 x 96 pixels."""
    images = ImageList(torch.stack([item["image"] for item in batch]), [(64, 96)] * len(batch))
    truth = [item["instances"] for item in batch]
    return model.proposal_generator(images, model.backbone(images.tensor), truth)


@pytest.fixture
def batch():
    return [sample(64, 96, BOXES), sample(64, 96)]


def test_training_returns_losses_and_with_yield_proposal_also_proposals(batch):
    losses = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    proposals, found = propose(two_stage("ProposalNetwork"), batch)
    assert proposals == [] and set(found) == losses
    model = two_stage("ProposalNetwork", YIELD_PROPOSAL=True, **PERMISSIVE)
    proposals, found = propose(model, batch)
    assert len(proposals) == 2 and set(found) == losses
    assert not proposals[0].proposal_boxes.tensor.requires_grad


def test_roi_heads_without_training_proposals_are_rejected():
    with pytest.raises(ValueError, match="YIELD_PROPOSAL True"):
        two_stage("GeneralizedRCNN")


def test_number_of_proposals_differs_between_training_and_evaluation(batch):
    limits = {"POST_NMS_TOPK_TRAIN": 7, "POST_NMS_TOPK_TEST": 5}
    model = two_stage("ProposalNetwork", YIELD_PROPOSAL=True, **limits, **PERMISSIVE)
    assert [len(image) for image in propose(model, batch)[0]] == [7, 7]
    proposals, losses = propose(model.eval(), batch)
    assert [len(image) for image in proposals] == [5, 5] and losses == {}


def test_proposals_are_clipped_to_the_image_and_have_the_logits_of_scores(batch):
    model = two_stage("ProposalNetwork", POST_NMS_TOPK_TEST=500, **PERMISSIVE).eval()
    head = model.proposal_generator.head
    torch.nn.init.constant_(head.bbox_pred.bias, 3.0)
    torch.nn.init.zeros_(head.cls_logits.weight)
    torch.nn.init.zeros_(head.ctrness.weight)
    for image in propose(model, batch)[0]:
        boxes, logits = image.proposal_boxes.tensor, image.objectness_logits
        assert boxes.min() == 0 and boxes[:, 2].max() == 96 and boxes[:, 3].max() == 64
        assert not boxes.requires_grad and not logits.requires_grad
        assert logits.sigmoid().tolist() == pytest.approx([(0.01 * 0.5) ** 0.5] * len(image), 1e-5)


def test_two_stage_detector_trains_on_fcos_proposals_and_evaluates(batch):
    model = two_stage("GeneralizedRCNN", YIELD_PROPOSAL=True, **PERMISSIVE)
    with EventStorage():  # detectron2's ROI heads write to it
        losses = train_step(model, batch)
    assert {"loss_fcos_cls", "loss_cls", "loss_box_reg"} <= set(losses)
    assert not without_gradient(model)
    with torch.no_grad():
        (first, _) = model.eval()(batch)
    assert first["instances"].pred_boxes.tensor.isfinite().all()
