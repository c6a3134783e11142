"""The whole detector as one graph for runtimes that have neither fcos_d2 nor detectron2.

From a uint8 batch to final detections: normalisation, padding, network, decoding, NMS and clipping
(1904.01355 section 3.1), for any batch and image size. The ops of ``fcos_d2.ops`` are said once
more in standard operators, which torch.export, TorchScript and ONNX all have; a graph that still
holds any other operator is refused. Everything after the head is float32, whatever the weights are.
"""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.saving import atomic_write
from ..errors import InputError, one_line_cause
from ..modeling import FCOS, Predictions
from ..ops import Candidates, Detections, batched_nms_padded

FORMATS = ("onnx", "torch_export", "torchscript")
INPUT = "images"
OUTPUTS = Detections._fields
METADATA = "fcos_d2.json"  # the name under which every format carries its metadata
ONNX_OPSET = 18
STANDARD_NAMESPACES = ("aten", "higher_order", "prim", "prims")
EMPTY = -1.0  # the score of what is no candidate, or no longer: below every probability
TIE = 1e-6  # scores that differ by less are ordered by the rounding of the convolutions
DEFAULT_MIN_SCORE = 0.001  # of fcos_d2.ops.batched_nms_padded


class DetectionGraph(nn.Module):
    """uint8 images of one size -> detections, in operators that every runtime has.

    What it returns for an image is what ``model`` returns for it: boxes are clipped to the image
    and those without area are dropped.

    Args:
        model: in any mode; it is copied and left as it is.
        top: (values Tensor[B, n], k) -> values and indices of the k largest per row, equal ones by
            ascending index.
        suppress: like ``fcos_d2.ops.batched_nms_padded``.
        half: weights and feature maps in float16.
    """

    def __init__(self, model: FCOS, top: Callable, suppress: Callable, half: bool = False):
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        self.register_buffer("mean", model.pixel_mean.float(), persistent=False)
        self.register_buffer("std", model.pixel_std.float(), persistent=False)
        self.dtype = torch.float16 if half else torch.float32
        self.backbone, self.head = (
            _with_float32_group_norms(part.to(self.dtype)) for part in (model.backbone, model.head)
        )
        self.in_features, self.grid = model.head_in_features, model.grid
        self.selection, self.suppression = (
            model.postprocess.selection,
            model.postprocess.suppression,
        )
        self.top, self.suppress = top, suppress

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Uint8 Tensor[B, 3, H, W], in the channel order of the config -> fields of Detections."""
        padded = self._preprocess(images)
        features = self.backbone(padded)
        predictions = self.head([features[name] for name in self.in_features])
        candidates = self._select(predictions, padded)
        if self.selection["clip"]:
            candidates = candidates._replace(boxes=_clip(candidates.boxes, images))
        detections = self.suppress(*candidates, **self.suppression)
        return tuple(self._finish(detections, images))  # files must not name a class of ours

    def _preprocess(self, images: Tensor) -> Tensor:
        x = (images.float() - self.mean) / self.std
        unit = max(self.backbone.size_divisibility, 1)
        bottom, right = ((n + unit - 1) // unit * unit - n for n in images.shape[-2:])
        return F.pad(x, (0, right, 0, bottom)).to(self.dtype)

    def _select(self, predictions: Predictions, padded: Tensor) -> Candidates:
        levels = zip(
            predictions.logits, predictions.ltrb, predictions.quality, self.grid.strides,
            strict=True,
        )  # fmt: skip
        parts = [
            self._select_level(_rows(logits), _rows(ltrb), _rows(quality), stride, points)
            for (logits, ltrb, quality, stride) in levels
            for points in [_points(logits, stride, self.grid, padded)]
        ]
        return Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))

    def _select_level(
        self, logits: Tensor, ltrb: Tensor, quality: Tensor, stride: int, points: Tensor
    ) -> Candidates:
        """Rows [B, HW, C] and points [HW, 2] of one level -> its ``topk`` candidates."""
        rule, num_classes = self.selection, logits.shape[2]
        probability = logits.sigmoid()
        product = probability * quality.sigmoid()
        compared = product if rule["threshold_with_quality"] else probability
        passes = (compared > rule["score_threshold"]) & product.isnan().logical_not()
        rank = product if rule["rank_with_quality"] else probability
        rank = torch.where(passes, rank, EMPTY).flatten(1)
        # A small level has fewer pairs than topk; padding keeps k, and N with it, a constant.
        rank, index = self.top(F.pad(rank, (0, rule["topk"]), value=EMPTY), rule["topk"])
        found = rank >= 0
        index = torch.where(found, index, 0)
        point = index // num_classes
        distances = ltrb.gather(1, point[..., None].expand(-1, -1, 4)) * stride
        center = points[point]
        boxes = torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)
        score = {"cls": probability, "product": product, "sqrt": product.sqrt()}[rule["score_rule"]]
        score = score.flatten(1).gather(1, index)
        return Candidates(
            torch.where(found[..., None], boxes, 0.0),
            torch.where(found, score, 0.0),
            torch.where(found, index % num_classes, -1),
        )

    def _finish(self, detections: Detections, images: Tensor) -> Detections:
        """Clips to the image and closes the gaps of boxes that then have no area."""
        boxes, scores, classes, _ = detections
        boxes = _clip(boxes, images)
        extent = boxes[..., 2:] - boxes[..., :2]
        there = (classes >= 0) & (extent[..., 0] > 0) & (extent[..., 1] > 0)
        rank, index = self.top(torch.where(there, scores, EMPTY), scores.shape[1])
        return _collect(boxes, classes, rank, index)


class Float32GroupNorm(nn.GroupNorm):
    """GroupNorm of float16 maps whose statistics are float32 in every runtime.

    The sum of squares over a group overflows float16, and runtimes differ in what they do then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, C, ...] -> same shape and dtype."""
        return super().forward(x.float()).to(x.dtype)


def _with_float32_group_norms(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if type(layer) is nn.GroupNorm:
            layer.__class__ = Float32GroupNorm
            layer.float()
    return module


def _rows(level: Tensor) -> Tensor:
    """[B, C, H, W] of any dtype -> float32 [B, HW, C]."""
    return level.float().flatten(2).transpose(1, 2)


def _points(level: Tensor, stride: int, grid, padded: Tensor) -> Tensor:
    """Float32 Tensor[HW, 2], (x, y) of each point; see ``fcos_d2.ops.make_levels``."""
    axes = []
    for dim in (-2, -1):
        size = level.shape[dim]
        pitch = padded.shape[dim] // size if grid.pitch == "floor" else stride
        axes.append(torch.arange(size, device=level.device) * pitch + grid.offset * stride)
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1).float()


def _clip(boxes: Tensor, images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), dim=-1).flatten(-2)


def _collect(boxes: Tensor, classes: Tensor, rank: Tensor, index: Tensor) -> Detections:
    """Boxes and classes at ``index`` [B, D]; slots of negative ``rank`` are empty."""
    there = rank >= 0
    index = torch.where(there, index, 0)
    kept = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Detections(
        torch.where(there[..., None], kept, 0.0),
        torch.where(there, rank, 0.0),
        torch.where(there, classes.gather(1, index), -1),
        there.sum(dim=1).to(torch.int32),
    )


# ---- the k largest ----


def _top_by_key(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk, which leaves the order of equal values open, with that order.

    Different float32 numbers differ by at least 2^-24 of their size, and in float64 there is room
    below for the position: it takes away less than 2^-25, in steps of 2^-51.
    """
    position = torch.arange(values.shape[1], dtype=torch.float64, device=values.device)
    index = (values.double() * (1 - position * 2.0**-51)).topk(k, dim=1).indices
    return values.gather(1, index), index


def _top_of_onnx(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk; it becomes ONNX's TopK, which gives equal values to the lower index."""
    return torch.topk(values, k, dim=1)


# ---- non-maximum suppression, one box of every image per step ----


def _suppress_step(
    alive: Tensor,
    boxes: Tensor,
    classes: Tensor,
    iou_threshold: float,
    class_agnostic: bool,
    method: str,
    sigma: float,
    min_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score and index [B, 1] of the best box, and the scores [B, N] that it leaves alive."""
    position = torch.arange(alive.shape[1], device=alive.device)
    best = alive.amax(dim=1, keepdim=True)
    index = torch.where(alive == best, position, alive.shape[1]).amin(dim=1, keepdim=True)
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    overlap = torch.minimum(box[..., 2:], boxes[..., 2:])
    overlap = (overlap - torch.maximum(box[..., :2], boxes[..., :2])).clamp(min=0)
    inter = overlap[..., 0] * overlap[..., 1]
    extent, own = boxes[..., 2:] - boxes[..., :2], box[..., 2:] - box[..., :2]
    union = extent[..., 0] * extent[..., 1] + own[..., 0] * own[..., 1] - inter
    rival = (alive >= 0) & (best >= 0)
    if not class_agnostic:
        rival = rival & (classes == classes.gather(1, index))
    hit = rival & (inter > iou_threshold * union)
    iou = torch.where(union > 0, inter / union, 0.0)
    if method == "hard":
        alive = torch.where(hit, -1.0, alive)
    elif method == "linear":
        alive = torch.where(hit, alive * (1 - iou), alive)
    else:
        alive = torch.where(rival, alive * torch.exp(-iou * iou / sigma), alive)
    if method != "hard":
        alive = torch.where(alive > min_score, alive, -1.0)
    return best, index, torch.where(position == index, -1.0, alive)


def _nms_as_while_loop(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, max_detections: int, **rule
) -> Detections:
    """batched_nms_padded as torch.while_loop, for torch.export and ONNX."""
    slots = torch.arange(max_detections, device=boxes.device)

    def goes_on(step, alive, ranks, indices):
        return (step < max_detections) & (alive >= 0).any()

    def keep_best(step, alive, ranks, indices):
        best, index, alive = _suppress_step(alive, boxes, classes, **_complete(rule))
        now = slots == step
        return step + 1, alive, torch.where(now, best, ranks), torch.where(now, index, indices)

    start = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        torch.where((classes >= 0) & scores.isnan().logical_not(), scores, EMPTY),
        scores.new_full((scores.shape[0], max_detections), EMPTY),
        classes.new_zeros((classes.shape[0], max_detections)),
    )
    _, _, ranks, indices = torch.while_loop(goes_on, keep_best, start)
    return _collect(boxes, classes, ranks, indices)


def _complete(rule: Mapping) -> dict:
    return {"min_score": DEFAULT_MIN_SCORE, **rule}


def _nms_loop(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool,
    method: str,
    sigma: float,
    min_score: float,
) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, D] of what batched_nms_padded keeps, for torch.jit.script."""
    alive = torch.where((classes >= 0) & scores.isnan().logical_not(), scores, -1.0)
    ranks = torch.full([scores.shape[0], max_detections], -1.0, device=scores.device)
    indices = torch.zeros(
        [scores.shape[0], max_detections], dtype=torch.int64, device=scores.device
    )
    step = 0
    while step < max_detections and bool((alive >= 0).any()):
        best, index, alive = _suppress_step(
            alive, boxes, classes, iou_threshold, class_agnostic, method, sigma, min_score
        )
        ranks[:, step : step + 1] = best
        indices[:, step : step + 1] = index
        step += 1
    return ranks, indices


def _nms_as_scripted_loop() -> Callable:
    """batched_nms_padded for TorchScript: a trace would keep the steps of the traced image."""
    loop = torch.jit.script(_nms_loop)

    def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, **rule) -> Detections:
        return _collect(boxes, classes, *loop(boxes, scores, classes, **_complete(rule)))

    return suppress


def _score_rows(op, scores, classes, num_rows: int):
    """[B, K, N]: the score of a box in the row of its class, or in the only row; else EMPTY."""
    ids = op.Constant(value_ints=list(range(num_rows)))
    own = op.Min(classes, op.Constant(value_int=0)) if num_rows == 1 else classes
    is_own = op.Equal(op.Unsqueeze(own, [1]), op.Unsqueeze(ids, [0, 2]))
    return op.Where(is_own, op.Unsqueeze(scores, [1]), op.Constant(value_float=EMPTY))


def _nms_of_onnx(num_classes: int) -> Callable:
    """Translation of fcos_d2::batched_nms_padded, method "hard", into NonMaxSuppression.

    That one suppresses within each of [B, K, N] score rows; a box has a score in the row of its
    class alone, so it comes out once at most.
    """
    from onnxscript import opset18 as op

    def batched_nms_padded(
        boxes, scores, classes, iou_threshold, max_detections, class_agnostic, *_
    ):
        empty, limit = op.Constant(value_float=EMPTY), op.Constant(value_int=max_detections)
        rows = _score_rows(op, scores, classes, 1 if class_agnostic else num_classes)
        selected = op.NonMaxSuppression(
            boxes,
            rows,
            op.Unsqueeze(limit, [0]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[EMPTY / 2]),
        )
        where = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # (image, box)
        nothing = op.Expand(empty, op.Shape(scores))
        kept = op.ScatterND(nothing, where, op.GatherND(scores, where))
        kept = op.Pad(kept, op.Constant(value_ints=[0, 0, 0, max_detections]), empty)
        rank, index = op.TopK(kept, op.Unsqueeze(limit, [0]), axis=1)
        there = op.GreaterOrEqual(rank, op.Constant(value_float=0.0))
        index = op.Where(there, index, op.Constant(value_int=0))
        zero, none = op.Constant(value_float=0.0), op.Constant(value_int=-1)
        box = op.GatherND(boxes, op.Unsqueeze(index, [2]), batch_dims=1)
        return (
            op.Where(op.Unsqueeze(there, [2]), box, zero),
            op.Where(there, rank, zero),
            op.Where(there, op.GatherElements(classes, index, axis=1), none),
            op.Cast(op.ReduceSum(op.Cast(there, to=6), [1], keepdims=0), to=6),
        )

    return batched_nms_padded


# ---- writing ----


def export_detector(
    model: FCOS,
    path: str | Path,
    format: str,
    *,
    half: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes ``model`` as a file that a runtime opens without fcos_d2 and without detectron2.

    The graph takes ``images``, uint8 Tensor[B, 3, H, W] in the channel order of ``model``, and
    returns ``boxes``, ``scores``, ``classes`` and ``counts`` as ``fcos_d2.ops.Detections``
    describes them. For torch.export each side must be longer than the coarsest stride. TorchScript
    and torch.export files run on the device of ``model``.

    Args:
        model: the detector, in any mode.
        path: of the file.
        format: "onnx" (opset 18), "torch_export" (``.pt2``) or "torchscript".
        half: weights and feature maps in float16; boxes and scores stay float32.
        metadata: stored in the file as JSON; see ``read_metadata``.

    Raises:
        InputError: a package that the format needs is missing, or the model holds an operator that
            the format has no standard one for.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx":
        _require("onnx", "onnxscript")
    write = {"onnx": _write_onnx, "torch_export": _write_torch_export}.get(
        format, _write_torchscript
    )
    text = json.dumps(dict(metadata or {}), indent=1)
    with torch.no_grad(), warnings.catch_warnings(), atomic_write(path) as file:
        warnings.simplefilter("ignore")  # about what the exporters themselves are made of
        write(model, file, half, text)


def _write_onnx(model: FCOS, file: IO[bytes], half: bool, metadata: str) -> None:
    import onnx

    hard = model.postprocess.suppression["method"] == "hard"
    suppress = batched_nms_padded if hard else _nms_as_while_loop
    program = _capture(DetectionGraph(model, _top_of_onnx, suppress, half), model)
    translated = torch.ops.fcos_d2.batched_nms_padded.default
    num_classes = model.head.cls_logits.out_channels
    _refuse(_foreign_operators(program) - {str(translated)}, "onnx")
    try:
        result = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=ONNX_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            custom_translation_table={translated: _nms_of_onnx(num_classes)},
        )
    except torch.onnx.OnnxExporterError as error:
        cause = one_line_cause(error.__cause__ or error)
        raise InputError(
            f"the model has no form in standard ONNX operators ({cause}); use --format torch_export"
        ) from error
    proto = result.model_proto
    _name_axes(proto)
    proto.metadata_props.add(key=METADATA, value=metadata)
    onnx.save(proto, file)


def _name_axes(proto) -> None:
    """Names for the dimensions that may change, instead of the tracer's numbers."""
    names = iter(("batch", "height", "width"))
    found = {}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                if dim.dim_param not in found:
                    found[dim.dim_param] = next(names)
                dim.dim_param = found[dim.dim_param]
    # What the tracer knew about the values inside is in its own names, and runtimes infer it anew.
    del proto.graph.value_info[:]


def _write_torch_export(model: FCOS, file: IO[bytes], half: bool, metadata: str) -> None:
    program = _capture(DetectionGraph(model, _top_by_key, _nms_as_while_loop, half), model)
    _refuse(_foreign_operators(program), "torch_export")
    torch.export.save(program, file, extra_files={METADATA: metadata})


def _write_torchscript(model: FCOS, file: IO[bytes], half: bool, metadata: str) -> None:
    graph = DetectionGraph(model, _top_by_key, _nms_as_scripted_loop(), half)
    traced = torch.jit.trace(graph, _example(model), check_trace=False)
    kinds = set(_kinds(traced.inlined_graph))
    _refuse(
        {kind for kind in kinds if kind.split("::")[0] not in STANDARD_NAMESPACES}, "torchscript"
    )
    torch.jit.save(traced, file, _extra_files={METADATA: metadata})


def _kinds(block) -> Iterator[str]:
    """Of all nodes of a TorchScript graph, those inside loops and branches too."""
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from _kinds(inner)


def _capture(graph: nn.Module, model: FCOS) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    return torch.export.export(
        graph, (_example(model),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )


def _example(model: FCOS) -> Tensor:
    """Two images, with two points on the coarsest level: a size of 1 would count as a constant."""
    side = 2 * max(model.grid.strides)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, side + 8, 2 * side + 24), generator=generator)
    return pixels.to(model.device, torch.uint8)


def _foreign_operators(program: torch.export.ExportedProgram) -> set[str]:
    """Operators, here or in the bodies of loops, that are none of torch's own."""
    graphs = (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    calls = (node.target for graph in graphs for node in graph.graph.nodes)
    operators = (target for target in calls if isinstance(target, torch._ops.OpOverload))
    return {str(op) for op in operators if op.namespace not in STANDARD_NAMESPACES}


def _refuse(foreign: set[str], format: str) -> None:
    if foreign:
        raise InputError(
            f"--format {format}: the model uses {', '.join(sorted(foreign))}, which no runtime has "
            "without the package that defines it; train without deformable convolutions and the "
            "like to export"
        )


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the ONNX format needs {', '.join(missing)}; pip install 'fcos-d2[export]'"
        )


# ---- reading and comparing ----


def load_exported(path: str | Path, format: str) -> Callable[[Tensor], Detections]:
    """The detector of a file that ``export_detector`` wrote, with runtimes of this process.

    ONNX runs on the CPU. The images must be where the file's graph is.
    """
    path = str(path)
    if format == "onnx":
        _require("onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: Detections(
            *map(torch.from_numpy, session.run(OUTPUTS, {INPUT: images.cpu().numpy()}))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = format == "torchscript"
        module = torch.jit.load(path) if script else torch.export.load(path).module()
    return lambda images: Detections(*module(images))


def read_metadata(path: str | Path, format: str) -> dict[str, object]:
    """The ``metadata`` that ``export_detector`` stored."""
    path = str(path)
    if format == "onnx":
        _require("onnx")
        import onnx

        proto = onnx.load(path, load_external_data=False)
        return json.loads({entry.key: entry.value for entry in proto.metadata_props}[METADATA])
    with zipfile.ZipFile(path) as archive:  # both formats of torch keep extra files like this
        name = next(name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}"))
        return json.loads(archive.read(name))


@torch.no_grad()
def run_detector(model: FCOS, images: Tensor) -> Detections:
    """What ``model`` finds in uint8 Tensor[B, 3, H, W], on the CPU, as an exported file says it."""
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
    """How well an exported detector repeats the detections of its model.

    Attributes:
        images: compared.
        detections: of the model.
        missed: detections of the model that the export lacks (within the tolerances).
        extra: detections of the export that the model lacks.
        moved: common detections at another place in the order, not counting those that trade
            places with one whose score is the same up to rounding (``TIE``).
        box_error: largest difference of a coordinate of common detections, in pixels.
        score_error: largest difference of their scores.
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
        """Whether both found the same, in the same order."""
        return not (self.missed or self.extra or self.moved)


def compare(
    expected: Detections,
    got: Detections,
    box_tolerance: float = 0.05,
    score_tolerance: float = 1e-4,
) -> Agreement:
    """Pairs the detections of two sides, image by image.

    Two detections are common if class, boxes (``box_tolerance`` in pixels per coordinate) and
    scores (``score_tolerance``) agree; the pair nearest in the order counts.
    """
    total = Agreement(0, 0, 0, 0, 0, 0.0, 0.0)
    for image in range(len(expected.counts)):
        ours, theirs = (
            [column[image, : side.counts[image]].cpu() for column in side[:3]]
            for side in (expected, got)
        )
        one = _compare_image(ours, theirs, box_tolerance, score_tolerance)
        total = join([total, one])
    return total


def _compare_image(
    expected: Sequence[Tensor], got: Sequence[Tensor], box_tolerance: float, score_tolerance: float
) -> Agreement:
    (boxes, scores, classes), (their_boxes, their_scores, their_classes) = expected, got
    box_error = (boxes[:, None] - their_boxes).abs().amax(dim=2)
    score_error = (scores[:, None] - their_scores).abs()
    same = (classes[:, None] == their_classes) & (box_error <= box_tolerance)
    same &= score_error <= score_tolerance
    pairs = []
    for row in range(len(boxes)):
        free = same[row].nonzero()[:, 0].tolist()
        if free:
            column = min(free, key=lambda position: abs(position - row))
            same[:, column] = False
            pairs.append((row, column))
    index = tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)
    return Agreement(
        images=1,
        detections=len(boxes),
        missed=len(boxes) - len(pairs),
        extra=len(their_boxes) - len(pairs),
        moved=sum(_is_moved(scores, row, column) for row, column in pairs),
        box_error=max(box_error[index].tolist(), default=0.0),
        score_error=max(score_error[index].tolist(), default=0.0),
    )


def _is_moved(scores: Tensor, row: int, column: int) -> bool:
    return column >= len(scores) or (scores[row] - scores[column]).abs().item() > TIE


def join(parts: Sequence[Agreement]) -> Agreement:
    """The agreement over all images of ``parts``."""
    *counts, box_errors, score_errors = zip(*parts, strict=True)
    return Agreement(*map(sum, counts), max(box_errors), max(score_errors))
