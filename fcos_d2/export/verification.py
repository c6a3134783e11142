"""Loads exported files, and compares their detections with those of the original model."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling import FCOS
from ..ops import Detections
from .writers import INPUT, METADATA, OUTPUTS, require

TIE = 1e-6  # smaller differences between scores may be rounding errors of the convolutions


def load_exported(path: str | Path, format: str) -> Callable[[Tensor], Detections]:
    """Loads a file written by ``export_detector``; returns a function that runs it on images.

    ONNX and OpenVINO files run on the CPU. For torch's formats, images must be on the device of the
    exported model.
    """
    path = str(path)
    if format == "onnx":
        require(format, "onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: Detections(
            *map(torch.from_numpy, session.run(OUTPUTS, {INPUT: images.cpu().numpy()}))
        )
    if format == "openvino":
        require(format, "openvino")
        import openvino

        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: Detections(
            *(torch.from_numpy(found) for found in compiled(images.cpu().numpy()).values())
        )
    if format == "aoti":
        detect = torch._inductor.aoti_load_package(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            detect = torch.export.load(path).module()
    return lambda images: Detections(*detect(images))


def read_metadata(path: str | Path, format: str) -> dict[str, object]:
    """Reads the ``metadata`` that was passed to ``export_detector``."""
    if format == "onnx":
        require(format, "onnx")
        import onnx

        proto = onnx.load(str(path), load_external_data=False)
        return json.loads({entry.key: entry.value for entry in proto.metadata_props}[METADATA])
    if format == "openvino":
        require(format, "openvino")
        import openvino

        return json.loads(openvino.Core().read_model(path).get_rt_info(METADATA).astype(str))
    with zipfile.ZipFile(path) as archive:
        if format == "torch_export":
            name = next(n for n in archive.namelist() if n.endswith(f"/extra/{METADATA}"))
            return json.loads(archive.read(name))
        name = next(n for n in archive.namelist() if n.endswith("wrapper_metadata.json"))
        return json.loads(json.loads(archive.read(name))[METADATA])


@torch.no_grad()
def run_detector(model: FCOS, images: Tensor) -> Detections:
    """Runs ``model`` on uint8 Tensor[B, 3, H, W]; returns Detections on the CPU."""
    found = [
        output["instances"].to("cpu") for output in model([{"image": image} for image in images])
    ]
    size = model.postprocess.suppression["max_detections"]
    columns = [(one.pred_boxes.tensor, one.scores, one.pred_classes) for one in found]
    padded = (
        [F.pad(x, (0, 0) * (x.dim() - 1) + (0, size - len(x)), value=empty) for x in column]
        for column, empty in zip(zip(*columns, strict=True), (0, 0, -1), strict=True)
    )
    counts = torch.tensor([len(one) for one in found], dtype=torch.int32)
    return Detections(*map(torch.stack, padded), counts)


class Agreement(NamedTuple):
    """Differences between the detections of an exported file and those of its model.

    Attributes:
        images: number of images.
        detections: number of detections of the model.
        missed: number of these that match no detection of the file.
        extra: number of detections of the file that match none of the model.
        moved: number of matching detections with different ranks, except for ties (``TIE``).
        box_error: largest difference between coordinates of matching detections, in pixels.
        score_error: largest difference between their scores.
    """

    images: int
    detections: int
    missed: int
    extra: int
    moved: int
    box_error: float
    score_error: float

    HEADER = "images  detections  missed  extra  moved  largest difference of boxes and scores"

    def __str__(self) -> str:
        *counts, box_error, score_error = self
        columns = [f"{n:{width}}" for n, width in zip(counts, (6, 11, 7, 6, 6), strict=True)]
        return f"{' '.join(columns)}  {box_error:.1e} px  {score_error:.1e}"

    @property
    def exact(self) -> bool:
        """Whether both have the same detections in the same order."""
        return not (self.missed or self.extra or self.moved)


def compare(
    expected: Detections,
    got: Detections,
    box_tolerance: float = 0.05,
    score_tolerance: float = 1e-4,
) -> Agreement:
    """Compares the detections of a batch of images with the expected ones.

    Two detections match if they have the same class, and boxes (per coordinate, in pixels) and
    scores within the tolerances. Of several candidates, the one nearest in rank is matched.
    """
    total = Agreement(0, 0, 0, 0, 0, 0.0, 0.0)
    for image in range(len(expected.counts)):
        pair = (
            [column[image, : found.counts[image]].cpu() for column in found[:3]]
            for found in (expected, got)
        )
        total = join([total, _compare_image(*pair, box_tolerance, score_tolerance)])
    return total


def _compare_image(
    expected: Sequence[Tensor], got: Sequence[Tensor], box_tolerance: float, score_tolerance: float
) -> Agreement:
    (boxes, scores, classes), (got_boxes, got_scores, got_classes) = expected, got
    box_error = (boxes[:, None] - got_boxes).abs().amax(dim=2)
    score_error = (scores[:, None] - got_scores).abs()
    matches = (classes[:, None] == got_classes) & (box_error <= box_tolerance)
    matches &= score_error <= score_tolerance
    pairs = []
    for row in range(len(boxes)):
        candidates = matches[row].nonzero()[:, 0].tolist()
        if candidates:
            column = min(candidates, key=lambda rank: abs(rank - row))
            matches[:, column] = False
            pairs.append((row, column))
    index = tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)
    return Agreement(
        images=1,
        detections=len(boxes),
        missed=len(boxes) - len(pairs),
        extra=len(got_boxes) - len(pairs),
        moved=sum(_is_moved(scores, row, column) for row, column in pairs),
        box_error=max(box_error[index].tolist(), default=0.0),
        score_error=max(score_error[index].tolist(), default=0.0),
    )


def _is_moved(scores: Tensor, row: int, column: int) -> bool:
    return column >= len(scores) or (scores[row] - scores[column]).abs().item() > TIE


def join(parts: Sequence[Agreement]) -> Agreement:
    """Sums the counts and takes the largest errors of ``parts``."""
    *counts, box_errors, score_errors = zip(*parts, strict=True)
    return Agreement(*map(sum, counts), max(box_errors), max(score_errors))
