"""Exports int8 ONNX files by post-training quantization with ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.saving import atomic_write
from ..modeling import FCOS
from .writers import INPUT, export_detector, require

# Quantizing these layers would save little time but change boxes and scores.
NOT_QUANTIZED = ("head.bbox_pred", "head.ctrness", "head.cls_logits")


def export_int8(model: FCOS, path: str | Path, images: Sequence[Tensor], metadata=None) -> None:
    """Exports ``model`` to an ONNX file with int8 convolutions.

    Weights are quantized per channel; ``images`` calibrate the ranges of feature maps. The layers
    that predict classes, boxes and box quality remain in float32.

    Args:
        model: the detector, in any mode.
        path: output file.
        images: about a hundred uint8 Tensor[C, H, W] in the channel order of ``model``.
        metadata: see ``export_detector``.

    Raises:
        InputError: see ``export_detector``.
    """
    require("onnx --int8", "onnx", "onnxscript", "onnxruntime")
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self._images = iter(images)

        def get_next(self) -> dict | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: image[None].to(torch.uint8).cpu().numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/float32.onnx", f"{folder}/int8.onnx"
        export_detector(model, source, "onnx", metadata=metadata)
        nodes = onnx.load(source).graph.node
        quantization.quantize_static(
            source,
            target,
            Reader(),
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[node.name for node in nodes if not _is_quantized(node)],
        )
        with atomic_write(path) as file:
            file.write(Path(target).read_bytes())


def _is_quantized(node) -> bool:
    origin = " ".join(entry.value for entry in node.metadata_props)
    return not any(name in origin for name in NOT_QUANTIZED)
