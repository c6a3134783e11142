"""Exported files of every format return the detections of the original model."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from fcos_d2 import CONVENTIONS, InputError
from fcos_d2.data.digits import scenes
from fcos_d2.export import (
    Agreement,
    compare,
    export_detector,
    join,
    load_exported,
    read_metadata,
    run_detector,
    writers,
)
from fcos_d2.export.graph import DetectionGraph, Float32GroupNorm, nms_as_while_loop, onnx_topk
from fcos_d2.ops import Detections, batched_nms_padded, reference
from tests.modeling.tiny import tiny_cfg, tiny_fcos

ROOT = Path(__file__).parents[2]
METADATA = {"channels": "RGB", "min_size": 96, "max_size": 160, "classes": ["a", "b", "c"]}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2", "aoti": ".pt2"}
no_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO")
EXPORTS = ["onnx", "torch_export", pytest.param("openvino", marks=no_openvino)]
EXPORTS += [pytest.param("aoti", marks=pytest.mark.slow)]  # it compiles C++


@pytest.fixture(scope="module")
def model():
    """Returns a detector with GN whose random weights detect something everywhere."""
    torch.manual_seed(0)
    return tiny_fcos(INFERENCE_TH_TEST=0.005).eval()


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request, model, tmp_path_factory):
    """Returns the format and the path of an exported file."""
    path = tmp_path_factory.mktemp(request.param) / f"model{SUFFIXES[request.param]}"
    export_detector(model, path, request.param, metadata=METADATA)
    return request.param, path


@pytest.fixture(scope="module")
def runner(exported):
    """Returns a function that runs the exported file."""
    return load_exported(exported[1], exported[0])


@pytest.fixture(scope="module")
def digits():
    """Returns four images, uint8 Tensor[4, 3, 160, 160]."""
    rng, writing = np.random.default_rng(0), scenes.load_handwriting("val", 0)
    images = np.stack([scenes.compose_scene(writing, rng).image for _ in range(4)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def make_graph(model, half=False):
    """Returns the graph as an eager module."""
    return DetectionGraph(model, reference.top_lowest_index_first, batched_nms_padded, half)


def make_candidates(num_images=2, count=40):
    """Returns overlapping candidates with ties, padding, a NaN score and an empty box."""
    corner = torch.rand(num_images, count, 2) * 40
    boxes = torch.cat((corner, corner + 5 + torch.rand(num_images, count, 2) * 30), dim=2)
    boxes[:, 3, 2:] = boxes[:, 3, :2]
    scores = (torch.rand(num_images, count) * 20).round() / 20
    scores[:, 5] = float("nan")
    return boxes, scores, torch.randint(-1, 3, (num_images, count))


def assert_same(got, expected):
    for ours, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(torch.as_tensor(theirs), ours)


# ---- detections of exported files ----


@pytest.mark.parametrize("size", [(160, 160), (97, 130), (64, 159)], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_file_has_the_detections_of_the_model_in_order(runner, model, digits, batch, size):
    images = digits[:batch, :, : size[0], : size[1]].contiguous()
    result = compare(run_detector(model, images), runner(images))
    assert result.exact, result
    assert result.images == batch and result.detections > 10 * batch


def test_outputs_are_padded_to_fixed_shapes(runner, digits):
    boxes, scores, classes, counts = runner(digits[:2, :, :40, :48].contiguous())
    assert (boxes.shape, scores.shape, classes.shape) == ((2, 100, 4), (2, 100), (2, 100))
    assert [x.dtype for x in (boxes, scores, classes, counts)] == [
        torch.float32, torch.float32, torch.int64, torch.int32,
    ]  # fmt: skip
    unused = torch.arange(100) >= counts[:, None]
    assert counts.min() > 0 and counts.max() < 100
    assert (classes[unused] == -1).all()
    assert (scores[unused] == 0).all() and (boxes[unused] == 0).all()
    assert boxes[..., 0::2].max() <= 48 and boxes[..., 1::2].max() <= 40 and boxes.min() >= 0


def test_metadata_is_stored_in_the_file(exported):
    assert read_metadata(exported[1], exported[0]) == METADATA


RUN_ALONE = """
import runpy, sys
class BlockedImports:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fcos_d2", "detectron2", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, BlockedImports())
tool, file, path = sys.argv[1:]
sys.argv = [tool, file, path, "--score", "0.08"]
runpy.run_path(tool, run_name="__main__")
"""


def test_run_exported_tool_needs_neither_fcos_d2_nor_detectron2(exported, model, digits, tmp_path):
    path = tmp_path / "digits.png"
    Image.fromarray(digits[0].permute(1, 2, 0).numpy()[:, :120]).save(path)
    tool = ROOT / "tools" / "run_exported.py"
    command = [sys.executable, "-W", "ignore", "-c", RUN_ALONE, tool, exported[1], path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    small = Image.open(path).resize((96, 128), Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    expected = run_detector(model, image[None])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == (expected.scores >= 0.08).sum() > 0
    assert lines[0]["class"] == METADATA["classes"][expected.classes[0, 0]]
    np.testing.assert_allclose(lines[0]["box"], expected.boxes[0, 0] * 120 / 96, atol=0.01)


# ---- graph ----


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_graph_matches_the_model_under_every_convention(convention, digits):
    model = tiny_fcos(CONVENTION=convention, INFERENCE_TH_TEST=0.002, NUM_CLASSES=3).eval()
    images = digits[:2, :, :100, :140].contiguous()
    result = compare(run_detector(model, images), Detections(*make_graph(model)(images)))
    assert result.exact and result.detections > 20, result


def test_images_without_detections_have_counts_of_zero():
    model = tiny_fcos(INFERENCE_TH_TEST=1.0).eval()
    found = Detections(*make_graph(model)(torch.zeros(2, 3, 64, 64).byte()))
    assert found.counts.tolist() == [0, 0] and (found.classes == -1).all()


def test_float16_graph_approximates_the_model_and_leaves_it_unchanged(model, digits):
    model.train()
    half = make_graph(model, half=True)
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert not any(isinstance(layer, Float32GroupNorm) for layer in model.modules())
    model.eval()
    got = Detections(*half(digits))
    result = compare(run_detector(model, digits), got, box_tolerance=0.5, score_tolerance=0.005)
    assert max(result.missed, result.extra) <= 0.05 * result.detections, result
    assert got.boxes.dtype == got.scores.dtype == torch.float32
    tower = half.model.head.cls_tower
    assert (tower[0].weight.dtype, tower[1].weight.dtype) == (torch.float16, torch.float32)


def test_group_norm_of_float16_inputs_does_not_overflow():
    norm = nn.GroupNorm(2, 4)
    x = torch.randn(1, 4, 64, 64) * 2000
    expected = norm(x)
    norm.__class__ = Float32GroupNorm
    got = norm(x.half())
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, atol=0.01, rtol=0.01)


# ---- operators and errors ----


def test_frozen_norms_are_folded_into_weights():
    backbone = ("MODEL.BACKBONE.NAME", "build_fcos_d2_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH")
    model = build_model(tiny_cfg(*backbone, 50))
    graph = DetectionGraph(model, onnx_topk, batched_nms_padded)
    count = sum(isinstance(layer, FrozenBatchNorm2d) for layer in model.modules())
    assert count == 53 and not any(isinstance(x, FrozenBatchNorm2d) for x in graph.modules())


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_onnx_file_has_only_standard_operators_and_named_axes(exported):
    proto = onnx.load(exported[1])
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert sum(node.op_type == "NonMaxSuppression" for node in proto.graph.node) == 1
    session = onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(uint8)")
    assert images.shape == ["batch", 3, "height", "width"]
    assert {out.name: out.shape for out in session.get_outputs()} == {
        "boxes": ["batch", 100, 4],
        "scores": ["batch", 100],
        "classes": ["batch", 100],
        "counts": ["batch"],
    }


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_custom_operator_is_rejected(format, tmp_path):
    model = tiny_fcos(USE_DEFORMABLE=True)
    with pytest.raises(InputError, match="torchvision.*deform_conv2d.*deformable"):
        export_detector(model, tmp_path / "model", format)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_and_missing_package_or_compiler_are_reported(model, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="onnx, openvino, torch_export, aoti, got 'caffe2'"):
        export_detector(model, tmp_path / "x", "caffe2")
    monkeypatch.setattr(writers, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"onnx needs onnx, onnxscript; pip install 'fcos-d2\[export\]'"
    ):
        export_detector(model, tmp_path / "x", "onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="aoti needs a C.*no-such-compiler; set CXX"):
        export_detector(model, tmp_path / "x", "aoti")


# ---- non-maximum suppression ----


class Suppression(nn.Module):
    def __init__(self, suppress, **rule):
        super().__init__()
        self.suppress, self.rule = suppress, rule

    def forward(self, boxes, scores, classes):
        return tuple(self.suppress(boxes, scores, classes, **self.rule))


def capture(module, candidates):
    dynamic = {0: torch.export.Dim.DYNAMIC}
    return torch.export.export(module, candidates, dynamic_shapes=(dynamic,) * 3)


def open_onnx(program, path, **options):
    """Exports a captured suppression to ONNX; returns a function that runs it."""
    result = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    onnx.save(result.model_proto, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *columns: session.run(
        None, {name: x.numpy() for name, x in zip(names, columns, strict=True)}
    )


def test_while_loop_matches_batched_nms_also_as_onnx(tmp_path):
    rule = {"iou_threshold": 0.4, "max_detections": 15, "class_agnostic": False}
    rule |= {"method": "gaussian", "sigma": 0.5, "min_score": 0.001}
    program = capture(Suppression(nms_as_while_loop, **rule), make_candidates())
    run = open_onnx(program, tmp_path / "loop.onnx")
    for num_images in (2, 3):
        candidates = make_candidates(num_images)
        expected = batched_nms_padded(*candidates, **rule)
        assert_same(program.module()(*candidates), expected)
        assert_same(run(*candidates), expected)


@pytest.mark.parametrize("agnostic", [False, True])
def test_non_max_suppression_of_onnx_matches_batched_nms(agnostic, tmp_path):
    """Also with fewer boxes than ``max_detections``."""
    rule = {"iou_threshold": 0.4, "max_detections": 50, "class_agnostic": agnostic}
    program = capture(Suppression(batched_nms_padded, **rule), make_candidates())
    table = {torch.ops.fcos_d2.batched_nms_padded.default: writers.make_onnx_nms(3)}
    options = {"opset_version": 18, "custom_translation_table": table}
    run = open_onnx(program, tmp_path / "nms.onnx", **options)
    for num_images in (2, 3):
        candidates = make_candidates(num_images)
        assert_same(run(*candidates), batched_nms_padded(*candidates, **rule))


@pytest.mark.parametrize("top", [reference.top_lowest_index_first, onnx_topk])
def test_top_pads_a_short_row_with_valid_indices(top):
    values = torch.tensor([[0.5, 0.25, -1.0, 0.75]])
    found, index = top(values, 4)
    assert found.tolist() == [[0.75, 0.5, 0.25, -1.0]] and index[0, :3].tolist() == [3, 0, 1]
    assert 0 <= index[0, 3] < 4


# ---- comparison ----


def detections(*rows):
    boxes = torch.tensor([[row[:4] for row in rows]], dtype=torch.float32)
    scores, classes = (torch.tensor([[row[i] for row in rows]]) for i in (4, 5))
    return Detections(boxes, scores, classes, torch.tensor([len(rows)]))


A, B, C = (0, 0, 9, 9, 0.9, 1), (4, 4, 9, 9, 0.8, 1), (2, 2, 7, 7, 0.8, 0)


@pytest.mark.parametrize(
    "got, missed, extra, moved",
    [
        ((A, B, C), 0, 0, 0),
        ((A, C, B), 0, 0, 0),  # rounding may swap equal scores
        ((B, A, C), 0, 0, 2),
        ((A, B), 1, 0, 0),
        ((A, B, C, C), 0, 1, 0),
        ((A, B, (2, 2, 7, 7, 0.8, 1)), 1, 1, 0),
        (((0, 0, 9, 9.04, 0.90005, 1), B, C), 0, 0, 0),
        (((0, 0, 9, 9.06, 0.9, 1), B, C), 1, 1, 0),
        (((0, 0, 9, 9, 0.9002, 1), B, C), 1, 1, 0),
    ],
)
def test_comparison_counts_differences(got, missed, extra, moved):
    result = compare(detections(A, B, C), detections(*got))
    assert (result.missed, result.extra, result.moved) == (missed, extra, moved)
    assert result.exact == (not missed and not extra and not moved)


def test_comparison_reports_the_largest_differences():
    result = compare(
        detections(A, B), detections((0, 0, 9, 9.04, 0.9, 1), (4, 4, 9, 9, 0.80005, 1))
    )
    assert result.box_error == pytest.approx(0.04, abs=1e-5)
    assert result.score_error == pytest.approx(5e-5, abs=1e-6)
    assert join([result, Agreement(1, 3, 1, 0, 0, 0.5, 0.0)])[:3] == (2, 5, 1)
