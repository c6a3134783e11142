"""The contract all ops share: opcheck, fullgraph compilation, dispatch, examples that are true."""

import doctest
import importlib
import math
import re
import shutil
import subprocess
import warnings

import pytest
import torch
from torch.library import opcheck

from fcos_d2 import ops
from fcos_d2.ops import _library

from . import inputs, isolated

LEVELS = inputs.pyramid(64, 96, 2)


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
        "sigmoid_focal_loss_with_gradient": (logits, targets.labels, one, 0.25, 2.0),
        "sigmoid_focal_loss_correct_gradient": (
            [torch.zeros_like(x) for x in logits], one / 2, logits, targets.labels, one, 0.25, 2.0,
        ),
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
def test_opcheck(name, overloads):
    opcheck(overloads[name], op_arguments(name))


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "box_loss"])
def test_opcheck_with_gradients(name, overloads):
    opcheck(overloads[name], op_arguments(name, requires_grad=True))


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


# These start processes of their own, or look at no op.
ONCE = pytest.mark.parametrize("implementation", ["reference"], indirect=True)
LOSS_OF_TWO_OPS = """
import torch
from fcos_d2 import ops
levels = ops.make_levels([(2, 2)], [8])
for _ in range(2):
    targets = ops.assign_targets(
        torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([1]), torch.tensor([0, 1]), levels,
        [(-1, 64)], num_classes=2,
    )
    loss = ops.sigmoid_focal_loss([torch.zeros(1, 2, 2, 2)], targets.labels)
print(f"{loss.item():.4f}")
"""


@ONCE
def test_nothing_built_is_one_warning_that_says_how_to_build(tmp_path):
    folder = isolated.make_package(tmp_path, None)
    done = isolated.run(folder, "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="0")
    assert done.stdout == "0.9531\n", done.stderr
    assert done.stderr.count("fcos_d2: ") == 1
    said = re.sub(r"\s+", " ", done.stderr)
    library = tmp_path / "fcos_d2" / "_C.so"
    assert "UserWarning: fcos_d2: assign_targets runs on cpu as plain PyTorch" in said
    assert f"because {library} is not built; build it" in said
    assert "pip install -e . (or: python setup.py build_ext --inplace)" in said


@ONCE
def test_strict_turns_the_warning_into_an_error(tmp_path):
    folder = isolated.make_package(tmp_path, None)
    done = isolated.run(folder, "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="1")
    assert done.returncode == 1 and done.stdout == ""
    assert "RuntimeError: fcos_d2: assign_targets runs on cpu" in done.stderr
    assert "FCOS_D2_STRICT=1 makes this an error" in done.stderr


@ONCE
@pytest.mark.skipif(not isolated.BUILT.exists(), reason="nothing is compiled")
def test_nothing_is_said_where_everything_is_in_order(tmp_path):
    folder = isolated.make_package(tmp_path, isolated.BUILT)
    done = isolated.run(
        folder, "-W", "error::UserWarning", "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="1"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.9531\n", "")


def announce(monkeypatch, device_type, loaded=(), cuda="13.0") -> list[str]:
    """What is said where an op of the reference runs on ``device_type``."""
    monkeypatch.setattr(_library, "_loaded", set(loaded))
    monkeypatch.setattr(_library, "_has_warned", False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("FCOS_D2_STRICT", raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _library._announce_reference("box_loss", device_type)
    return [str(warning.message) for warning in said]


@ONCE
def test_library_without_cuda_says_so_on_a_gpu(monkeypatch):
    (said,) = announce(monkeypatch, "cuda", loaded=["_C"])
    assert "box_loss runs on cuda" in said and "_C_cuda.so is not built" in said
    assert "FCOS_D2_CUDA=1 pip install -e ." in said


@ONCE
@pytest.mark.parametrize(
    "device_type, loaded, cuda",
    [("cpu", ["_C"], None), ("cuda", ["_C_cuda"], "13.0"), ("cuda", [], None), ("mps", [], None)],
)
def test_silence_where_there_is_nothing_to_build(monkeypatch, device_type, loaded, cuda):
    assert announce(monkeypatch, device_type, loaded, cuda) == []


def error_of_loading(monkeypatch, library) -> str:
    monkeypatch.setattr(_library, "_compiled_libraries", lambda: [library])
    with pytest.raises(ImportError) as raised:
        _library._load_compiled_libraries()
    return str(raised.value)


@ONCE
def test_file_that_is_no_library_is_an_error_with_the_command_to_rebuild(tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    error = error_of_loading(monkeypatch, broken)
    assert f"fcos_d2: the compiled library {broken} does not load with torch" in error
    assert "pip install -e . (or: python setup.py build_ext --inplace)" in error


@ONCE
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_library_built_for_another_torch_is_an_error_that_names_the_cause(tmp_path, monkeypatch):
    source, library = tmp_path / "other.cpp", tmp_path / "_C.so"
    source.write_text(
        'extern "C" int aoti_torch_of_the_future(); int x = aoti_torch_of_the_future();'
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    error = error_of_loading(monkeypatch, library)
    assert f"{library} does not load with torch {torch.__version__}" in error
    assert "undefined symbol: aoti_torch_of_the_future; rebuild it" in error


@pytest.mark.parametrize(
    "module",
    ["assign_targets", "sigmoid_focal_loss", "box_loss", "select_candidates", "batched_nms"],
)
def test_examples_in_docstrings_are_true(module):
    module = importlib.import_module(f"fcos_d2.ops.{module}")
    names = {**vars(ops), "torch": torch, "math": math}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0 and result.failed == 0
