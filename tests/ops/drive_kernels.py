"""Runs every CUDA kernel under compute-sanitizer: ``python -m tests.ops.drive_kernels``.

Uses small, odd shapes and all layouts and dtypes. Does not check results; the tests do.
"""

from __future__ import annotations

import itertools

import torch

from fcos_d2 import ops
from fcos_d2.ops.fcos_loss import fcos_loss

from . import inputs

OPTIONS = dict(
    cls_weight=1.0, alpha=0.25, gamma=2.0, loss_type="giou", quality_type="centerness",
    weight_by_centerness=True, smoothing=0.0,
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def train(device: str, dtype: torch.dtype, channels_last: bool, save_gradient: bool) -> None:
    """Assigns targets and computes losses for three images, one of them empty."""
    levels = inputs.pyramid(100, 140)
    options = {"channels_last": channels_last, "device": device}
    maps = inputs.predictions(levels, 3, 13, dtype, **options)
    logits, ltrb, quality = ([x.requires_grad_() for x in level] for level in maps)
    targets = inputs.targets(levels, [40, 0, 3], 13, device, height=100, width=140)
    cls = ops.sigmoid_focal_loss(logits, targets.labels)
    box, centerness = ops.box_loss(ltrb, quality, targets)
    normalizers = [(total, 1.0) for total in targets.totals[[0, 1, 0]]]
    fused = fcos_loss(
        logits, ltrb, quality, targets, normalizers, save_gradient=save_gradient, **OPTIONS
    )
    (cls / 2 + box + centerness + sum(fused)).backward()


def infer(device: str, dtype: torch.dtype, channels_last: bool, prior: float) -> None:
    """Selects candidates (``prior`` determines how many) and runs every NMS variant."""
    levels = inputs.pyramid(100, 140)
    options = {"channels_last": channels_last, "device": device, "prior": prior}
    maps = inputs.predictions(levels, 3, 13, dtype, **options)
    sizes = torch.tensor([[100, 140]] * 3, device=device)
    found = ops.select_candidates(*maps, levels, sizes, score_threshold=0.05, topk=300)
    for method, agnostic in itertools.product(("hard", "linear", "gaussian"), (False, True)):
        ops.batched_nms_padded(*found, method=method, class_agnostic=agnostic)
    ops.batched_nms(found.boxes[0], found.scores[0], found.classes[0], 0.5)


def main(device: str = "cuda") -> None:
    """Runs all combinations of layouts and dtypes."""
    torch.manual_seed(0)
    for dtype, channels_last in itertools.product(DTYPES, (False, True)):
        for save_gradient in (False, True):
            train(device, dtype, channels_last, save_gradient)
        for prior in (-6.0, 0.0, 20.0):
            infer(device, dtype, channels_last, prior)


if __name__ == "__main__":
    assert all(kind["CUDA"] == "compiled" for kind in ops.backend().values()), ops.backend()
    main()
    torch.cuda.synchronize()
