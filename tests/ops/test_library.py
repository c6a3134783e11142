"""All ops: opcheck, torch.compile, autocast, loading of the library, and doctests."""

import doctest
import functools
import importlib
import math
import re
import shutil
import subprocess
import warnings

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fcos_d2 import ops
from fcos_d2.ops import _library

from . import drive_kernels, inputs, subprocesses

LEVELS = inputs.pyramid(64, 96, 2)
ALL_OPS = list(ops.backend())


class Recorder(TorchDispatchMode):
    """Records the arguments of the last call of each op, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace.startswith("fcos_d2"):
            self.calls[function._schema.name.partition("::")[2]] = arguments
        return function(*arguments, **(keywords or {}))


def op_arguments(name: str, requires_grad: bool = False) -> tuple:
    """Returns arguments of the op in training or inference; tensors in lists are maps."""

    def copy(value):
        if isinstance(value, list):
            copies = map(copy, value)
            return [x.requires_grad_(requires_grad) if isinstance(x, Tensor) else x for x in copies]
        return value.detach().clone() if isinstance(value, Tensor) else value

    return tuple(map(copy, recorded_calls()[name]))


@functools.cache
def recorded_calls() -> dict[str, tuple]:
    with Recorder() as recorder:
        for save_gradient in (False, True):
            drive_kernels.train("cpu", torch.float32, False, save_gradient)
        drive_kernels.infer("cpu", torch.float32, False, prior=0.0)
    return recorder.calls


def test_compute_sanitizer_runs_all_ops():
    assert set(recorded_calls()) == set(ALL_OPS)


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


def test_detections_and_targets_require_no_gradients():
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


def test_autocast_accepts_half_precision():
    maps = inputs.predictions(LEVELS, 2, 4, torch.bfloat16)
    packed = inputs.ground_truth([3, 1], 4, 64, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses(*maps, *packed).dtype == torch.float32


# Tests that do not depend on the implementation.
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
def test_missing_library_warns_once_with_the_build_command(tmp_path):
    folder = subprocesses.make_package(tmp_path, None)
    done = subprocesses.run_python(folder, "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="0")
    assert done.stdout == "0.9531\n", done.stderr
    assert done.stderr.count("fcos_d2: ") == 1
    messages = re.sub(r"\s+", " ", done.stderr)
    library = tmp_path / "fcos_d2" / "_C.so"
    assert "UserWarning: fcos_d2: assign_targets runs on cpu as plain PyTorch" in messages
    assert f"because {library} is not built; build it" in messages
    assert "pip install -e . (or: python setup.py build_ext --inplace)" in messages


@ONCE
def test_missing_library_is_an_error_if_strict(tmp_path):
    folder = subprocesses.make_package(tmp_path, None)
    done = subprocesses.run_python(folder, "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="1")
    assert done.returncode == 1 and done.stdout == ""
    assert "RuntimeError: fcos_d2: assign_targets runs on cpu" in done.stderr
    assert "FCOS_D2_STRICT=1 makes this an error" in done.stderr


@ONCE
@pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled")
def test_built_library_does_not_warn(tmp_path):
    folder = subprocesses.make_package(tmp_path, subprocesses.BUILT)
    done = subprocesses.run_python(
        folder, "-W", "error::UserWarning", "-c", LOSS_OF_TWO_OPS, FCOS_D2_STRICT="1"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.9531\n", "")


def reference_warnings(monkeypatch, device_type, loaded=(), cuda="13.0") -> list[str]:
    """Returns the warnings when the reference of an op runs on ``device_type``."""
    monkeypatch.setattr(_library, "_loaded", set(loaded))
    monkeypatch.setattr(_library, "_has_warned", False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("FCOS_D2_STRICT", raising=False)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        _library._report_reference("box_loss", device_type)
    return [str(warning.message) for warning in messages]


@ONCE
def test_missing_cuda_library_warns_on_a_gpu(monkeypatch):
    (messages,) = reference_warnings(monkeypatch, "cuda", loaded=["_C"])
    assert "box_loss runs on cuda" in messages and "_C_cuda.so is not built" in messages
    assert "FCOS_D2_CUDA=1 pip install -e ." in messages


@ONCE
@pytest.mark.parametrize(
    "device_type, loaded, cuda",
    [("cpu", ["_C"], None), ("cuda", ["_C_cuda"], "13.0"), ("cuda", [], None), ("mps", [], None)],
)
def test_no_warning_if_nothing_can_be_built(monkeypatch, device_type, loaded, cuda):
    assert reference_warnings(monkeypatch, device_type, loaded, cuda) == []


def error_of_loading(monkeypatch, library) -> str:
    monkeypatch.setattr(_library, "_compiled_libraries", lambda: [library])
    with pytest.raises(ImportError) as raised:
        _library._load_compiled_libraries()
    return str(raised.value)


@ONCE
def test_error_of_an_invalid_library_contains_the_build_command(tmp_path, monkeypatch):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    error = error_of_loading(monkeypatch, broken)
    assert f"fcos_d2: the compiled library {broken} does not load with torch" in error
    assert "pip install -e . (or: python setup.py build_ext --inplace)" in error


@ONCE
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_error_of_a_library_for_another_torch_names_the_missing_symbol(tmp_path, monkeypatch):
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
def test_docstring_examples_pass(module):
    module = importlib.import_module(f"fcos_d2.ops.{module}")
    names = {**vars(ops), "torch": torch, "math": math}
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0 and result.failed == 0
