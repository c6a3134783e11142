"""Compares post-processing, from head outputs to detections, with detectron2 and torchvision."""

from __future__ import annotations

import torch

from fcos_d2.ops import batched_nms_padded, select_candidates

from .measure import Row, compare, graph_of
from .peers import needs
from .workload import CLASSES, HEIGHT, LEVELS, STRIDES, WIDTH, make_batch, name_of, size_in_bytes

SHIFT = 0.08  # of the logits, so that about 16.7k (point, class) pairs per image pass
RULE = {"score_threshold": 0.04, "threshold_with_quality": True}  # sqrt(cls * quality) > 0.2


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for a batch and for a single image, in float32 and bfloat16."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += [*_run(images, device, dtype), *_run(1, device, dtype)]
    return rows


def _run(images: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Returns rows for about 16,700 candidates per image, and for all (point, class) pairs."""
    rows = []
    batch = make_batch(images, 8, device, dtype)
    ltrb, quality = ([x.detach() for x in m] for m in (batch.ltrb, batch.quality))
    for workload, shift in (("16.7k candidates", SHIFT), ("all logits pass", 25.0)):
        logits = [x.detach() + shift for x in batch.logits]

        def ours(logits=logits):
            found = select_candidates(logits, ltrb, quality, LEVELS, batch.sizes, **RULE)
            return batched_nms_padded(*found)

        maps = (logits, ltrb, quality)
        peers = {**_detectron2(*maps, device), **_torchvision(*maps, device)}
        contenders = {"ours": ours, **graph_of(ours, device), **peers}
        name = f"{images} image{'s' * (images > 1)}, {workload}, {name_of(dtype)}"
        floor = size_in_bytes([*logits, *quality])
        rows += compare("post-processing", name, contenders, device, floor)
    return rows


@needs("detectron2")
def _detectron2(logits, ltrb, quality, device):
    from .detectron2_fcos import make_images, make_model

    model, pixels = make_model(device), make_images(len(logits[0]), device)

    def inference():
        with torch.no_grad():
            # detectron2 changes its inputs.
            copies = [x.clone() for x in logits], ltrb, [x.clone() for x in quality]
            return model.forward_inference(pixels, logits, copies)

    return {"detectron2": inference}


@needs("torchvision")
def _torchvision(logits, ltrb, quality, device):
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = torch.nn.Identity()
    backbone.out_channels = 32
    generator = AnchorGenerator(sizes=tuple((s,) for s in STRIDES), aspect_ratios=((1.0,),) * 5)
    model = FCOS(backbone, CLASSES, anchor_generator=generator)
    generator.set_cell_anchors(torch.float32, device)
    images = len(logits[0])
    anchors = [generator.grid_anchors(LEVELS.shapes, [(s, s) for s in STRIDES])] * images

    def split(maps):  # into views of one tensor, as its forward pass does
        joined = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1)
        return joined.split([h * w for h, w in LEVELS.shapes], dim=1)

    maps = {"cls_logits": logits, "bbox_regression": ltrb, "bbox_ctrness": quality}
    head = {name: split(levels) for name, levels in maps.items()}

    def postprocess():
        with torch.no_grad():
            return model.postprocess_detections(head, anchors, [(HEIGHT, WIDTH)] * images)

    return {"torchvision": postprocess}
