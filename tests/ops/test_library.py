"""The contract all ops share: opcheck, fullgraph compilation, dispatch, examples that are true."""

import doctest
import importlib
import math

import pytest
import torch
from torch.library import opcheck

from fcos_d2 import ops
from fcos_d2.ops import _library

from . import inputs

LEVELS = inputs.pyramid(64, 96, 2)
OPS = torch.ops.fcos_d2


def op_arguments(name: str, requires_grad: bool = False) -> tuple:
    """Arguments of the raw op, as its wrapper passes them."""
    targets = inputs.targets(LEVELS, [3, 0], 4, height=64, width=96)
    maps = [[x.requires_grad_(requires_grad) for x in m] for m in inputs.predictions(LEVELS, 2, 4)]
    logits, ltrb, quality = maps
    shapes, pitches, sizes = [8, 12, 4, 6], [8, 8, 16, 16], torch.tensor([[64, 96]] * 2)
    box = (targets.matched, targets.ltrb, targets.centerness, "giou", "iou", True, [1.0, 0.5])
    one = torch.ones(())
    boxes, classes, offsets = inputs.ground_truth([3, 0], 4, 64, 96)
    scores = torch.rand(2, 9)
    return {
        "assign_targets": (
            boxes, classes, offsets, shapes, [8, 16], pitches, 0.5, [-1.0, 32.0, 32.0, math.inf],
            4, 1.5, True,
        ),
        "sigmoid_focal_loss": (logits, targets.labels, 0.25, 2.0),
        "sigmoid_focal_loss_backward": (one, logits, targets.labels, 0.25, 2.0),
        "box_loss": (ltrb, quality, *box),
        "box_loss_backward": (one, one, ltrb, quality, *box),
        "select_candidates": (
            logits, ltrb, quality, sizes, [8, 16], pitches, 0.5, 0.05, 10,
            False, True, "sqrt", True,
        ),
        "batched_nms": (inputs.boxes(9), scores[0], torch.arange(9) % 2, 0.5),
        "batched_nms_padded": (
            inputs.boxes(18).view(2, 9, 4), scores, torch.arange(18).view(2, 9) % 3 - 1, 0.5, 5,
            False, "hard", 0.5, 0.0,
        ),
    }[name]  # fmt: skip


ALL_OPS = list(ops.backend())


def test_every_op_is_listed_here():
    for name in ALL_OPS:
        assert op_arguments(name)


@pytest.mark.parametrize("name", ALL_OPS)
def test_opcheck(name):
    opcheck(getattr(OPS, name).default, op_arguments(name))


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "box_loss"])
def test_opcheck_with_gradients(name):
    opcheck(getattr(OPS, name).default, op_arguments(name, requires_grad=True))


def losses(logits, ltrb, quality, boxes, classes, offsets):
    targets = ops.assign_targets(boxes, classes, offsets, LEVELS, inputs.ranges(2), num_classes=4)
    box, iou = ops.box_loss(ltrb, quality, targets)
    return ops.sigmoid_focal_loss([x * 2 for x in logits], targets.labels) + box + iou


def detect(logits, ltrb, quality, sizes):
    candidates = ops.select_candidates(logits, ltrb, quality, LEVELS, sizes, topk=20)
    return ops.batched_nms_padded(*candidates, max_detections=7)


def test_losses_compile_into_one_graph_forward_and_backward():
    maps = [[x.requires_grad_() for x in m] for m in inputs.predictions(LEVELS, 2, 4)]
    packed = inputs.ground_truth([3, 1], 4, 64, 96)
    leaves = [x for m in maps for x in m]
    expected = losses(*maps, *packed)
    wanted = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(*maps, *packed)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), wanted)


def test_detection_compiles_into_one_graph():
    maps = inputs.predictions(LEVELS, 2, 4)
    sizes = torch.tensor([[64, 96]] * 2)
    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*maps, sizes), detect(*maps, sizes))


def test_detections_and_targets_take_no_part_in_gradients():
    maps = [[x.requires_grad_() for x in m] for m in inputs.predictions(LEVELS, 2, 4)]
    candidates = ops.select_candidates(*maps, LEVELS, torch.tensor([[64, 96]] * 2), topk=20)
    assert not any(x.requires_grad for x in candidates)
    scores = candidates.scores.clone().requires_grad_()
    detections = ops.batched_nms_padded(candidates.boxes, scores, candidates.classes)
    assert not any(x.requires_grad for x in detections)
    boxes, classes, offsets = inputs.ground_truth([3, 1], 4, 64, 96)
    targets = ops.assign_targets(
        boxes.requires_grad_(), classes, offsets, LEVELS, inputs.ranges(2), num_classes=4
    )
    assert not any(x.requires_grad for x in targets)


def test_autocast_takes_half_precision_as_it_is():
    maps = inputs.predictions(LEVELS, 2, 4, torch.bfloat16)
    packed = inputs.ground_truth([3, 1], 4, 64, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses(*maps, *packed).dtype == torch.float32


def test_non_contiguous_maps_give_the_same_results():
    maps = inputs.predictions(LEVELS, 2, 4)
    strided = [[torch.stack((x, x), dim=-1)[..., 0] for x in m] for m in maps]
    assert not strided[0][0].is_contiguous()
    packed = inputs.ground_truth([3, 1], 4, 64, 96)
    torch.testing.assert_close(losses(*strided, *packed), losses(*maps, *packed))
    sizes = torch.tensor([[64, 96]] * 2)
    torch.testing.assert_close(detect(*strided, sizes), detect(*maps, sizes))


def test_unloadable_library_is_an_error_with_the_command_to_rebuild(tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_compiled_libraries", lambda: [broken])
    with pytest.raises(
        ImportError, match="_C.so does not load with torch .* pip install --no-deps -e ."
    ):
        _library._load_compiled_libraries()


@pytest.mark.parametrize(
    "module",
    ["assign_targets", "sigmoid_focal_loss", "box_loss", "select_candidates", "batched_nms"],
)
def test_examples_in_docstrings_are_true(module):
    module = importlib.import_module(f"fcos_d2.ops.{module}")
    names = {**vars(ops), "torch": torch, "math": math}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0 and result.failed == 0
