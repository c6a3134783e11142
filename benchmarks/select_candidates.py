"""Head outputs to final detections beside detectron2's and torchvision's inference."""

from __future__ import annotations

import torch
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fcos_d2.ops import batched_nms_padded, select_candidates

from .measure import Row, compare
from .workload import (
    CLASSES,
    HEIGHT,
    LEVELS,
    STRIDES,
    WIDTH,
    detectron2_fcos,
    image_list,
    make_batch,
    size_in_bytes,
)

SHIFT = 0.08  # of the logits, so that about 16.7k (point, class) pairs of an image pass
RULE = {"score_threshold": 0.04, "threshold_with_quality": True}  # sqrt(cls * quality) > 0.2


def _torchvision_fcos() -> TorchvisionFCOS:
    backbone = torch.nn.Identity()
    backbone.out_channels = 32
    generator = AnchorGenerator(sizes=tuple((s,) for s in STRIDES), aspect_ratios=((1.0,),) * 5)
    return TorchvisionFCOS(backbone, CLASSES, anchor_generator=generator)


def run(images: int, device: torch.device) -> list[Row]:
    """A batch, and one image alone."""
    return [*_run(images, device), *_run(1, device)]


def _run(images: int, device: torch.device) -> list[Row]:
    """About 16,700 candidates per image, and every logit above the threshold."""
    rows = []
    batch = make_batch(images, 8, device)
    ltrb, quality = ([x.detach() for x in m] for m in (batch.ltrb, batch.quality))
    pixels, model = image_list(images, device), detectron2_fcos(device)
    torchvision = _torchvision_fcos()
    for workload, shift in (("16.7k candidates", SHIFT), ("all logits pass", 25.0)):
        logits = [x.detach() + shift for x in batch.logits]
        head = {
            name: torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1)
            for name, maps in (
                ("cls_logits", logits),
                ("bbox_regression", ltrb),
                ("bbox_ctrness", quality),
            )
        }
        sizes = [h * w for h, w in LEVELS.shapes]
        head = {name: list(value.split(sizes, dim=1)) for name, value in head.items()}
        anchors = model.anchor_generator(logits)
        anchors = [[a.tensor for a in anchors]] * images

        def ours(logits=logits):
            found = select_candidates(logits, ltrb, quality, LEVELS, batch.sizes, **RULE)
            return batched_nms_padded(*found)

        def detectron2(logits=logits):
            with torch.no_grad():
                # It works in place, so it is given copies.
                copies = [x.clone() for x in logits], ltrb, [x.clone() for x in quality]
                return model.forward_inference(pixels, logits, copies)

        def peer(head=head, anchors=anchors):
            with torch.no_grad():
                return torchvision.postprocess_detections(head, anchors, [(HEIGHT, WIDTH)] * images)

        contenders = {"ours": ours, "detectron2": detectron2, "torchvision": peer}
        name = f"{images} image{'s' * (images > 1)}, {workload}"
        floor = size_in_bytes([*logits, *quality])
        rows += compare("post-processing", name, contenders, device, floor)
    return rows
