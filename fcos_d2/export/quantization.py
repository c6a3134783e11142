"""Writes int8 ONNX files with onnxruntime's post-training quantization."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.saving import atomic_write
from ..modeling import FCOS
from .writers import INPUT, export_detector, require

# Cheap layers that determine boxes and scores: they stay in float32.
IN_FLOAT32 = ("head.bbox_pred", "head.ctrness", "head.cls_logits")


def export_int8(model: FCOS, path: str | Path, images: Sequence[Tensor], metadata=None) -> None:
    """Writes ``model`` as an ONNX file whose convolutions compute in int8.

    Weights are quantized per channel; ``images`` calibrate the ranges of feature maps. The layers
    that predict classes, boxes and box quality stay in float32.

    Args:
        model: the detector, in any mode.
        path: output file.
        images: uint8 Tensor[C, H, W] each, as ``model`` takes them; a hundred are enough.
        metadata: as for ``export_detector``.

    Raises:
        InputError: as ``export_detector``.
    """
    require("onnx --int8", "onnx", "onnxscript", "onnxruntime")
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self):
            self._left = iter(images)

        def get_next(self) -> dict | None:
            image = next(self._left, None)
            return None if image is None else {INPUT: image[None].to(torch.uint8).cpu().numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/float32.onnx", f"{folder}/int8.onnx"
        export_detector(model, source, "onnx", metadata=metadata)
        nodes = onnx.load(source).graph.node
        quantization.quantize_static(
            source,
            target,
            Images(),
            per_channel=True,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[node.name for node in nodes if _stays(node)],
        )
        with atomic_write(path) as file:
            file.write(Path(target).read_bytes())


def _stays(node) -> bool:
    origin = " ".join(entry.value for entry in node.metadata_props)
    return any(name in origin for name in IN_FLOAT32)
