"""CONVENTION detectron2 and torchvision match the FCOS of those packages.

The tests compare points, assignment, losses and post-processing for the same head outputs. They
exclude, and count, inputs whose results are not well-defined:
- both packages rank boxes by float32 ``1e8 - area``, so areas closer than 8 square pixels tie;
- results depend on rounding if scores are nearly equal, or a score or IoU is near its threshold.
"""

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models.detection import fcos as torchvision_fcos
from torchvision.models.detection.image_list import ImageList as TorchvisionImages
from torchvision.ops import box_iou, clip_boxes_to_image

from fcos_d2.modeling import PostProcessor, Predictions, pack_ground_truth, to_instances
from fcos_d2.modeling.fcos import build_parts
from fcos_d2.ops import point_coordinates

from .tiny import STRIDES, tiny_cfg

K = 4
LEVELS = ("p3", "p4", "p5", "p6", "p7")
SHAPES = {level: ShapeSpec(channels=32, stride=STRIDES[level]) for level in LEVELS}
# Padded sizes; in all but the first, torchvision's spacing differs from the stride on some level.
SIZES = [(256, 384), (224, 352), (64, 96), (480, 672)]
COCO = (800, 1344)


class Ours:
    """Grid, losses and post-processing built from the config of a convention."""

    def __init__(self, convention: str, **fcos):
        cfg = tiny_cfg(levels=LEVELS, CONVENTION=convention, NUM_CLASSES=K, **fcos)
        parts = build_parts(cfg, SHAPES)
        self.grid, self.losses = parts["grid"], parts["losses"]
        self.postprocess = PostProcessor(cfg)

    def levels(self, scene):
        return self.grid.levels(scene.maps, scene.images.tensor)

    def assign(self, scene):
        """Returns the index of each point's box in its image, -1 for none, and the labels."""
        truth = pack_ground_truth(scene.truth)
        targets = self.losses.assign(truth, self.levels(scene))
        local = targets.matched - truth.offsets[:-1, None]
        return torch.where(targets.matched >= 0, local, -1), targets.labels

    def compute_losses(self, scene):
        truth = pack_ground_truth(scene.truth)
        return list(self.losses(scene.predictions, truth, self.levels(scene)).values())

    def detect(self, scene):
        sizes = torch.tensor(scene.images.image_sizes)
        detections = self.postprocess(scene.predictions, self.levels(scene), sizes)
        return to_instances(detections, scene.images.image_sizes)


class Detectron2:
    """detectron2.modeling.meta_arch.fcos."""

    name, clips = "detectron2", False

    def __init__(self, topk: int = 1000):
        self.model = detectron2_fcos.FCOS(
            backbone=SimpleNamespace(output_shape=lambda: SHAPES),
            head=nn.Identity(),
            head_in_features=list(LEVELS),
            num_classes=K,
            test_topk_candidates=topk,
            pixel_mean=[0.0],
            pixel_std=[1.0],
        )

    def points(self, scene):
        return torch.cat([a.get_centers() for a in self.model.anchor_generator(scene.maps)])

    def assign(self, scene):
        anchors = self.model.anchor_generator(scene.maps)
        if hasattr(self.model, "match_anchors"):
            matched = self.model.match_anchors(anchors, scene.truth)
        else:  # main branch
            matched = [self.match(anchors, truth.gt_boxes) for truth in scene.truth]
        labels, _ = self.model.label_anchors(anchors, scene.truth)
        return torch.stack(matched), torch.stack(labels)

    def match(self, anchors, boxes):
        if len(boxes) == 0:
            return torch.full((sum(map(len, anchors)),), -1)
        quality, matched = self.model._match_anchors(boxes, anchors).max(dim=0)
        return matched.masked_fill(quality < 1e-5, -1)

    def compute_losses(self, scene):
        with EventStorage():
            losses = self.model.forward_training(
                scene.images, scene.maps, scene.predictions[:3], scene.truth
            )
        return list(losses.values())

    def detect(self, scene):
        # detectron2 computes sigmoids in place.
        predictions = [[level.clone() for level in maps] for maps in scene.predictions[:3]]
        return self.model.forward_inference(scene.images, scene.maps, predictions)

    def supports_empty_images(self):
        """False for detectron2 0.6, True for its main branch."""
        try:
            self.assign(make_scene(SIZES[2], [0, 2]))
        except IndexError:
            return False
        return True


class Torchvision:
    """torchvision.models.detection.fcos."""

    name, clips = "torchvision", True

    def __init__(self, topk: int = 1000):
        self.model = torchvision_fcos.FCOS(
            SimpleNamespace(out_channels=32), num_classes=K, topk_candidates=topk
        )

    def anchors(self, scene):
        images = TorchvisionImages(scene.images.tensor, scene.images.image_sizes)
        return self.model.anchor_generator(images, scene.maps)

    def points(self, scene):
        return Boxes(self.anchors(scene)[0]).get_centers()

    def outputs(self, scene):
        names = ("cls_logits", "bbox_regression", "bbox_ctrness")
        return {
            name: [permute_to_N_HWA_K(level, level.shape[1]) for level in maps]
            for name, maps in zip(names, scene.predictions, strict=False)
        }

    def compute_losses(self, scene):
        targets = [
            {"boxes": image.gt_boxes.tensor, "labels": image.gt_classes} for image in scene.truth
        ]
        outputs = {name: torch.cat(maps, dim=1) for name, maps in self.outputs(scene).items()}
        per_level = [level[0, 0].numel() for level in scene.maps]
        losses = self.model.compute_loss(targets, outputs, self.anchors(scene), per_level)
        return list(losses.values())

    def assign(self, scene):
        """Records the assignment that compute_loss passes to its head."""
        head, seen = self.model.head, []
        head.compute_loss = lambda targets, outputs, anchors, matched: seen.extend(matched) or {}
        self.compute_losses(scene)
        del head.compute_loss
        matched = torch.stack(seen)
        pairs = zip(scene.truth, matched, strict=True)
        labels = [torch.cat((image.gt_classes, torch.tensor([K])))[m] for image, m in pairs]
        return matched, torch.stack(labels)

    def detect(self, scene):
        per_level = [level[0, 0].numel() for level in scene.maps]
        anchors = [list(image.split(per_level)) for image in self.anchors(scene)]
        sizes = scene.images.image_sizes
        found = self.model.postprocess_detections(self.outputs(scene), anchors, sizes)
        return [
            Instances(
                size, pred_boxes=Boxes(f["boxes"]), scores=f["scores"], pred_classes=f["labels"]
            )
            for size, f in zip(sizes, found, strict=True)
        ]

    def supports_empty_images(self):
        return True


PEERS = [Detectron2, Torchvision]


def make_scene(size, counts, *, integer=False, prior=-3.0):
    """Returns random predictions and ground truth for ``len(counts)`` images padded to ``size``."""
    height, width = size
    sizes = [(height - 7 * i % 32, width - 13 * i % 32) for i in range(len(counts))]
    p5 = height // 32, width // 32
    p6 = (p5[0] + 1) // 2, (p5[1] + 1) // 2
    shapes = [(4 * p5[0], 4 * p5[1]), (2 * p5[0], 2 * p5[1]), p5, p6]
    shapes.append(((p6[0] + 1) // 2, (p6[1] + 1) // 2))
    n = len(counts)
    logits = [torch.randn(n, K, h, w) * 1.5 + prior for h, w in shapes]
    ltrb = [torch.rand(n, 4, h, w) * 3 + 0.05 for h, w in shapes]
    quality = [torch.randn(n, 1, h, w) for h, w in shapes]
    return SimpleNamespace(
        images=ImageList(torch.empty(n, 3, height, width), sizes),
        maps=[torch.empty(n, 1, h, w) for h, w in shapes],
        predictions=Predictions(logits, ltrb, quality, []),
        truth=[make_truth(*s, c, integer) for s, c in zip(sizes, counts, strict=True)],
    )


def make_truth(height, width, count, integer):
    """Draws boxes from 4 pixels to the image size; every fourth is clipped at the image border."""
    boxes, ranks, drawn = torch.empty(0, 4), set(), 0
    limit = torch.tensor([width, height], dtype=torch.float32)
    while len(boxes) < count:
        drawn += 1
        extent = 4 * (limit.min() / 4) ** torch.rand(2)
        corner = torch.rand(2) * (limit - extent)
        if len(boxes) % 4 == 0:
            corner = torch.where(torch.rand(2) < 0.5, corner - extent / 2, limit - extent / 2)
        box = torch.cat((corner, corner + extent)).view(2, 2)
        box = torch.minimum(box.clamp(min=0), limit).view(1, 4)
        box = box.round() if integer else box
        area = Boxes(box).area()
        rank = (1e8 - area).item()
        if area > 0 and rank not in ranks:
            ranks.add(rank)
            boxes = torch.cat((boxes, box))
    assert drawn <= 1.5 * count + 5  # few boxes were discarded because of ties
    truth = Instances((height, width), gt_boxes=Boxes(boxes))
    truth.gt_classes = torch.randint(K, (count,))
    return truth


def remove_ambiguous_candidates(scene, peer, levels, nms_threshold=0.6, threshold=0.04) -> float:
    """Removes candidates that depend on rounding; returns the fraction of them."""
    logits, ltrb, quality, _ = scene.predictions
    strides = [STRIDES[level] for level in LEVELS]
    points = point_coordinates(levels).double().split(levels.points_per_level)
    candidates, removed = 0, 0
    for image, size in enumerate(scene.images.image_sizes):
        entries, scores, boxes = [], [], []
        for level, stride in enumerate(strides):
            product = logits[level][image].double().sigmoid()
            product = product * quality[level][image].double().sigmoid()
            passing = (product > threshold - 1e-6).nonzero()
            distances = ltrb[level][image].double().flatten(1).T * stride
            box = torch.cat((points[level] - distances[:, :2], points[level] + distances[:, 2:]), 1)
            boxes.append(box[passing[:, 1] * product.shape[2] + passing[:, 2]])
            scores.append(product[tuple(passing.T)])
            entries += [(level, *index) for index in passing.tolist()]
        scores, order = torch.cat(scores).sort(descending=True)
        boxes = torch.cat(boxes)[order]
        boxes = clip_boxes_to_image(boxes, size) if peer.clips else boxes
        classes = torch.tensor([entry[1] for entry in entries])[order]
        near = (box_iou(boxes, boxes) - nms_threshold).abs() < 1e-3
        near &= classes[:, None] == classes
        ambiguous = near.triu(1).any(dim=0)
        ambiguous |= (scores - threshold).abs() < 1e-6
        ambiguous[1:] |= scores[:-1] - scores[1:] < 2e-6 * scores[:-1]
        for index in order[ambiguous].tolist():
            level, *position = entries[index]
            logits[level][(image, *position)] = -10.0
        candidates += len(entries)
        removed += int(ambiguous.sum())
    return removed / max(candidates, 1)


@pytest.fixture(params=PEERS, ids=lambda peer: peer.name)
def peer(request):
    return request.param()


@pytest.fixture
def ours(peer):
    return Ours(peer.name)


@pytest.mark.parametrize("size", [*SIZES, COCO])
def test_points_match(peer, ours, size):
    scene = make_scene(size, [1])
    assert torch.equal(point_coordinates(ours.levels(scene)), peer.points(scene))


@pytest.mark.parametrize(
    "size, integer", [*((size, i) for size in SIZES for i in (False, True)), (COCO, True)]
)
def test_assignment_matches_exactly(peer, ours, size, integer):
    positives = 0
    many = 60 if size[0] > 100 else 12  # more boxes would tie
    for counts in [(12, 5), (1, many)]:
        scene = make_scene(size, counts, integer=integer)
        for got, expected in zip(ours.assign(scene), peer.assign(scene), strict=True):
            assert torch.equal(got.long(), expected)
        positives += int((expected < K).sum())
    assert positives > 20


def test_assignment_matches_on_level_bounds_and_box_sides(peer, ours):
    """Boxes on a 4-pixel grid have equal areas, and lie on the bounds of every comparison."""
    scene = make_scene((256, 384), [40, 40])
    for image in scene.truth:
        image.gt_boxes.tensor = (image.gt_boxes.tensor / 4).round() * 4
    matched, labels = peer.assign(scene)
    for got, expected in zip(ours.assign(scene), (matched, labels), strict=True):
        assert torch.equal(got.long(), expected)
    inclusive, _ = Ours(peer.name, RANGE_INCLUSIVE=True).assign(scene)
    assert not torch.equal(inclusive.long(), matched)


def test_areas_that_tie_in_the_other_packages_are_distinguished(peer, ours):
    """In float32, 1e8 - 104 and 1e8 - 103 are equal."""
    scene = make_scene((64, 96), [2])
    scene.truth[0].gt_boxes = Boxes(torch.tensor([[10.0, 10, 23, 18], [10.0, 10, 22.875, 18]]))
    got, expected = ours.assign(scene)[0], peer.assign(scene)[0]
    assert 0 in expected and 1 not in expected
    assert 1 in got and 0 not in got


@pytest.mark.parametrize("size", SIZES)
def test_losses_and_gradients_match(peer, ours, size):
    for counts in [(1, 5), (12, 9)]:  # two steps, for detectron2's moving average
        scene = make_scene(size, counts)
        for maps in scene.predictions:
            for level in maps:
                level.requires_grad_()
        got, expected = ours.compute_losses(scene), peer.compute_losses(scene)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        pairs = zip(gradients(scene, got), gradients(scene, expected), strict=True)
        for grad, their_grad in pairs:
            largest = their_grad.abs().max().item()
            torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-5 * largest)


def gradients(scene, losses):
    """Returns the gradients of logits, ltrb and quality, each of which affects only one loss."""
    logits, ltrb, quality, _ = scene.predictions
    grads = torch.autograd.grad(sum(losses), logits + ltrb + quality)
    flat = [grad.flatten() for grad in grads]
    return [torch.cat(flat[i : i + len(logits)]) for i in range(0, len(flat), len(logits))]


def test_moving_average_of_positives_matches_detectron2():
    peer, ours = Detectron2(), Ours("detectron2")
    for counts in [(40, 40), (1, 1), (20, 3)]:
        scene = make_scene((256, 384), counts)
        ours.compute_losses(scene)
        peer.compute_losses(scene)
        assert ours.losses.moving_fg.item() == pytest.approx(peer.model.loss_normalizer, rel=1e-6)


@pytest.mark.parametrize("counts", [(0, 7), (0, 0)])
def test_images_without_objects(peer, ours, counts):
    scene = make_scene((224, 352), counts)
    matched, labels = ours.assign(scene)
    assert (matched[0] == -1).all() and (labels[0] == K).all()
    losses = ours.compute_losses(scene)
    if not peer.supports_empty_images():
        return
    assert torch.equal(matched.long(), peer.assign(scene)[0])
    torch.testing.assert_close(losses, peer.compute_losses(scene), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "size, prior, topk",
    [(SIZES[0], -5.0, 1000), (SIZES[1], -4.0, 1000), (SIZES[2], -2.0, 1000),
     (COCO, -6.5, 1000), (SIZES[0], -5.0, 40), (SIZES[0], -12.0, 1000)],
)  # fmt: skip
def test_detections_match(peer, size, prior, topk):
    peer, ours = type(peer)(topk), Ours(peer.name, PRE_NMS_TOPK_TEST=topk)
    for _ in range(2):
        scene = make_scene(size, [1, 1], prior=prior)
        assert remove_ambiguous_candidates(scene, peer, ours.levels(scene)) < 0.05
        for got, expected in zip(ours.detect(scene), peer.detect(scene), strict=True):
            assert len(got) == len(expected)
            assert torch.equal(got.pred_classes, expected.pred_classes)
            boxes = got.pred_boxes.tensor, expected.pred_boxes.tensor
            torch.testing.assert_close(*boxes, rtol=0, atol=1e-4)
            torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-6)
            assert prior < -8 or len(got) > 20
