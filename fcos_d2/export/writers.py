"""Exports detectors to files that run without fcos_d2 and detectron2."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Set
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.saving import atomic_write
from ..errors import InputError, one_line_cause
from ..modeling import FCOS
from ..ops import Detections, batched_nms_padded, reference
from .graph import DetectionGraph, nms_as_while_loop, onnx_topk

INPUT = "images"
OUTPUTS = Detections._fields
METADATA = "fcos_d2.json"  # key of the metadata in every format
ONNX_OPSET = 18
STANDARD_NAMESPACES = ("aten", "higher_order", "prim", "prims")


def export_detector(
    model: FCOS,
    path: str | Path,
    format: str,
    *,
    half: bool = False,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Exports ``model`` to a file that runs without fcos_d2 and detectron2.

    Its input is ``images``, uint8 Tensor[B, C, H, W] in the channel order of ``model``; its outputs
    are ``boxes``, ``scores``, ``classes`` and ``counts``, as in ``fcos_d2.ops.Detections``. With
    torch's formats, both sides of an image must exceed the coarsest stride, and the file runs on
    the device of ``model``.

    Args:
        model: the detector, in any mode.
        path: output file; "openvino" writes ``.xml`` and ``.bin``, torch's formats ``.pt2``.
        format: "onnx" (opset 18), "openvino", "torch_export", or "aoti" (compiled by AOTInductor).
        half: whether weights and feature maps are float16; boxes and scores remain float32.
        metadata: stored in the file as JSON; see ``read_metadata``.

    Raises:
        InputError: a package or compiler that the format needs is missing, or the format does not
            support an operator of the model.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    text = json.dumps(dict(metadata or {}), indent=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the exporters
        FORMATS[format](model, Path(path), half, text)


def _write_onnx(model: FCOS, path: Path, half: bool, metadata: str) -> None:
    require("onnx", "onnx", "onnxscript")
    import onnx

    proto = _to_onnx(model, half)
    proto.metadata_props.add(key=METADATA, value=metadata)
    with atomic_write(path) as file:
        onnx.save(proto, file)


def _write_openvino(model: FCOS, path: Path, half: bool, metadata: str) -> None:
    require("openvino", "onnx", "onnxscript", "openvino")
    import onnx
    import openvino

    if path.suffix != ".xml":
        raise InputError(f"--format openvino writes .xml and .bin; pass FILE.xml, got {path}")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(_to_onnx(model, half=False), f"{folder}/model.onnx")
        converted = openvino.convert_model(f"{folder}/model.onnx")
        converted.set_rt_info(metadata, METADATA)
        openvino.save_model(converted, f"{folder}/model.xml", compress_to_fp16=half)
        for suffix in (".bin", ".xml"):  # .xml last: once it exists, the export is complete
            with atomic_write(path.with_suffix(suffix)) as file:
                file.write(Path(f"{folder}/model{suffix}").read_bytes())


def _to_onnx(model: FCOS, half: bool):
    """Returns the ModelProto of the graph."""
    is_hard = model.postprocess.suppression["method"] == "hard"
    suppress = batched_nms_padded if is_hard else _nms_as_while_loop
    nms = torch.ops.fcos_d2.batched_nms_padded.default
    program = _capture(DetectionGraph(model, onnx_topk, suppress, half), model, "onnx", {str(nms)})
    try:
        proto = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=ONNX_OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            custom_translation_table={nms: make_onnx_nms(model.head.cls_logits.out_channels)},
        ).model_proto
    except torch.onnx.OnnxExporterError as error:
        cause = one_line_cause(error.__cause__ or error)
        raise InputError(
            f"the model cannot be exported to ONNX ({cause}); use --format torch_export"
        ) from error
    _name_axes(proto)
    return proto


def _name_axes(proto) -> None:
    """Names the dynamic dimensions, which the tracer numbers."""
    values = (*proto.graph.input, *proto.graph.output)
    dims = [d for value in values for d in value.type.tensor_type.shape.dim if d.dim_param]
    symbols = dict.fromkeys(dim.dim_param for dim in dims)
    names = dict(zip(symbols, ("batch", "height", "width"), strict=False))
    for dim in dims:
        dim.dim_param = names[dim.dim_param]
    # Shapes of intermediate values contain the tracer's symbols; runtimes infer them again.
    del proto.graph.value_info[:]


def _write_torch_export(model: FCOS, path: Path, half: bool, metadata: str) -> None:
    program = _to_program(model, half, "torch_export")
    with atomic_write(path) as file:
        torch.export.save(program, file, extra_files={METADATA: metadata})


def _write_aoti(model: FCOS, path: Path, half: bool, metadata: str) -> None:
    from torch._inductor import aoti_compile_and_package

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(f"--format aoti needs a C++ compiler, but found no {compiler}; set CXX")
    program = _to_program(model, half, "aoti")
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        package = aoti_compile_and_package(
            program,
            package_path=f"{folder}/model.pt2",
            inductor_configs={"aot_inductor.metadata": {METADATA: metadata}},
        )
        file.write(Path(package).read_bytes())


def _to_program(model: FCOS, half: bool, format: str) -> torch.export.ExportedProgram:
    graph = DetectionGraph(model, reference.top_lowest_index_first, _nms_as_while_loop, half)
    return _capture(graph, model, format)


FORMATS = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "torch_export": _write_torch_export,
    "aoti": _write_aoti,
}

# ---- capturing ----

# With the default min_score of batched_nms_padded.
_nms_as_while_loop = partial(nms_as_while_loop, min_score=0.001)


def _capture(
    graph: nn.Module, model: FCOS, format: str, translated: Set[str] = frozenset()
) -> torch.export.ExportedProgram:
    """Captures ``graph``; raises an InputError for custom operators that are not ``translated``."""
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        graph, (_example_input(model),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    custom = _custom_operators(program) - translated
    if custom:
        raise InputError(
            f"--format {format}: the model uses {', '.join(sorted(custom))}, which runtimes lack; "
            "to export, train without custom operators such as deformable convolutions"
        )
    return program


def _example_input(model: FCOS) -> Tensor:
    """Returns two images with at least two points per level, since sizes of 1 are specialized."""
    side, channels = 2 * max(model.grid.strides), len(model.pixel_mean)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, channels, side + 8, 2 * side + 24), generator=generator)
    return pixels.to(model.device, torch.uint8)


def _custom_operators(program: torch.export.ExportedProgram) -> set[str]:
    """Returns the names of operators that are not torch's own, also in loop bodies."""
    graphs = (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    calls = (node.target for graph in graphs for node in graph.graph.nodes)
    operators = (target for target in calls if isinstance(target, torch._ops.OpOverload))
    return {str(op) for op in operators if op.namespace not in STANDARD_NAMESPACES}


def require(format: str, *packages: str) -> None:
    """Checks that all ``packages`` are installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"--format {format} needs {', '.join(missing)}; pip install 'fcos-d2[export]'"
        )


# ---- non-maximum suppression in ONNX ----


def make_onnx_nms(num_classes: int) -> Callable:
    """Returns a translation of fcos_d2::batched_nms_padded, method "hard", to NonMaxSuppression.

    NonMaxSuppression treats the classes of its scores [B, K, N] separately. A box only has a score
    for its own class, so it is selected at most once.
    """
    from onnxscript import opset18 as op

    def batched_nms_padded(
        boxes, scores, classes, iou_threshold, max_detections, class_agnostic,
        method, sigma, min_score, pixel_extent=0,
    ):  # fmt: skip
        empty, limit = op.Constant(value_float=-1.0), op.Constant(value_ints=[max_detections])
        zero, none = op.Constant(value_float=0.0), op.Constant(value_int=-1)
        ids = op.Constant(value_ints=list(range(1 if class_agnostic else num_classes)))
        labels = op.Min(classes, op.Constant(value_int=0)) if class_agnostic else classes
        is_class = op.Equal(op.Unsqueeze(labels, [1]), op.Unsqueeze(ids, [0, 2]))
        rows = op.Where(is_class, op.Unsqueeze(scores, [1]), empty)
        extent = op.Constant(value_floats=[0.0, 0.0, *[float(pixel_extent)] * 2])
        selected = op.NonMaxSuppression(
            op.Add(boxes, extent) if pixel_extent else boxes,
            rows,
            limit,
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[-0.5]),
        )
        where = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # (image, box)
        nothing = op.Expand(empty, op.Shape(scores))
        kept = op.ScatterND(nothing, where, op.GatherND(scores, where))
        kept = op.Pad(kept, op.Constant(value_ints=[0, 0, 0, max_detections]), empty)
        rank, index = op.TopK(kept, limit, axis=1)
        valid = op.GreaterOrEqual(rank, zero)
        index = op.Where(valid, index, op.Constant(value_int=0))
        box = op.GatherND(boxes, op.Unsqueeze(index, [2]), batch_dims=1)
        return (
            op.Where(op.Unsqueeze(valid, [2]), box, zero),
            op.Where(valid, rank, zero),
            op.Where(valid, op.GatherElements(classes, index, axis=1), none),
            op.Cast(op.ReduceSum(op.Cast(valid, to=6), [1], keepdims=0), to=6),
        )

    return batched_nms_padded
