"""Compares whole detectors in inference and training: R-50-FPN with 80 classes.

The peers are Detectron2's and torchvision's FCOS, which have the same convolutions, and the
runtimes that ours exports to. Weights are random, so there are no detections to post-process, and
most of the time is spent in convolutions.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .measure import Row, compare
from .peers import needs
from .workload import CLASSES, HEIGHT, WIDTH, name_of

CONFIG = "fcos_R_50_FPN_1x"
BOXES = [[100.0, 100.0, 300.0, 260.0], [500.0, 200.0, 900.0, 700.0], [40.0, 60.0, 90.0, 130.0]]


def run(images: int, device: torch.device) -> list[Row]:
    """Returns rows for inference on one image and training on ``images``; needs Detectron2.

    On CPUs, everything is measured a second time with the memory allocator as our commands set it.
    That cannot be undone, so it comes last.
    """
    if not find_spec("detectron2"):
        return []
    rows = _inference("inference", device) + _training("training step", images, device)
    if device.type == "cpu":
        from fcos_d2.modeling.acceleration import keep_freed_memory

        keep_freed_memory()
        rows += _inference("inference, freed memory kept", device)
        rows += _training("training step, freed memory kept", images, device)
    return rows


def _inference(name: str, device: torch.device) -> list[Row]:
    from fcos_d2.modeling.acceleration import accelerate, fastest_dtype

    model, pixels = _ours(device).eval(), torch.randint(256, (3, HEIGHT, WIDTH)).byte()
    inputs, dtype = [{"image": pixels}], fastest_dtype(device)
    contenders = {"ours": _without_gradient(accelerate(copy.deepcopy(model)), inputs)}
    if dtype != torch.float32:
        fast = accelerate(copy.deepcopy(model), dtype)
        contenders[f"ours, {name_of(dtype)}"] = _without_gradient(fast, inputs)
    contenders |= _detectron2_inference(model, inputs) | _torchvision_inference(pixels, device)
    if device.type == "cpu":
        contenders |= _runtimes(model, pixels)
    workload = f"R-50-FPN, 1 image, {HEIGHT} x {WIDTH}"
    return compare(name, workload, contenders, device, None)


def _training(name: str, images: int, device: torch.device) -> list[Row]:
    from detectron2.structures import Boxes, Instances

    from fcos_d2.modeling.acceleration import fastest_dtype, use_channels_last

    truth = Instances((HEIGHT, WIDTH), gt_boxes=Boxes(torch.tensor(BOXES)))
    truth.gt_classes = torch.arange(len(BOXES))
    pixels = torch.randint(256, (3, HEIGHT, WIDTH)).byte()
    batch = [{"image": pixels, "instances": truth}] * images
    contenders = {"ours": _step(_ours(device), batch)}
    for dtype in dict.fromkeys((torch.float32, fastest_dtype(device))):
        step = _step(use_channels_last(_ours(device)), batch, dtype)
        contenders[f"ours, {name_of(dtype)}, channels_last"] = step
    contenders |= _detectron2_training(_ours(device), batch)
    contenders |= _torchvision_training(pixels, images, device)
    workload = f"R-50-FPN, {images} images, {HEIGHT} x {WIDTH}"
    return compare(name, workload, contenders, device, None)


def _ours(device: torch.device) -> nn.Module:
    from fcos_d2 import model_zoo

    return model_zoo.get(CONFIG, device=str(device))


def _without_gradient(model: nn.Module, inputs) -> Callable:
    def infer():
        with torch.no_grad():
            return model(inputs)

    return infer


def _step(model: nn.Module, inputs, dtype: torch.dtype = torch.float32) -> Callable:
    """Returns a function that runs a forward and a backward pass."""
    device = next(model.parameters()).device.type

    def step():
        model.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            losses = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        sum(losses.values()).backward()

    return step


@needs("detectron2")
def _detectron2_inference(ours: nn.Module, inputs) -> dict[str, Callable]:
    return {"detectron2": _without_gradient(_detectron2(ours).eval(), inputs)}


@needs("detectron2")
def _detectron2_training(ours: nn.Module, batch) -> dict[str, Callable]:
    from detectron2.utils.events import EventStorage

    step = _step(_detectron2(ours), batch)

    def with_storage():  # to which detectron2 writes statistics
        with EventStorage():
            step()

    return {"detectron2": with_storage}


def _detectron2(ours: nn.Module) -> nn.Module:
    """Builds detectron2's FCOS with our norms: torch rejects its group norm of one channel."""
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    from fcos_d2 import model_zoo
    from fcos_d2.modeling.backbone import build_named_backbone

    shapes = [ours.backbone.output_shape()[name] for name in ours.head_in_features]
    head = FCOSHead(
        input_shape=shapes, conv_dims=[256] * 4, num_classes=CLASSES, prior_prob=0.01, norm=""
    )
    for name in ("cls_subnet", "bbox_subnet"):
        layers = []
        for layer in getattr(head, name):
            layers += [nn.GroupNorm(32, 256), layer] if isinstance(layer, nn.ReLU) else [layer]
        setattr(head, name, nn.Sequential(*layers))
    model = FCOS(
        backbone=build_named_backbone(model_zoo.get_config(CONFIG)), head=head,
        num_classes=CLASSES, head_in_features=ours.head_in_features,
        pixel_mean=[103.5, 116.3, 123.7], pixel_std=[1.0] * 3,
    )  # fmt: skip
    return model.to(ours.device)


@needs("torchvision")
def _torchvision_inference(pixels: Tensor, device: torch.device) -> dict[str, Callable]:
    images = [pixels.to(device) / 255]
    return {"torchvision": _without_gradient(_torchvision(device).eval(), images)}


@needs("torchvision")
def _torchvision_training(pixels: Tensor, images: int, device) -> dict[str, Callable]:
    truth = {"boxes": torch.tensor(BOXES), "labels": torch.arange(len(BOXES))}
    truth = {key: value.to(device) for key, value in truth.items()}
    inputs = ([pixels.to(device) / 255] * images, [truth] * images)
    return {"torchvision": _step(_torchvision(device).train(), inputs)}


def _torchvision(device: torch.device) -> nn.Module:
    from torchvision.models.detection import fcos_resnet50_fpn

    options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
    options |= {"min_size": HEIGHT, "max_size": WIDTH}  # does not resize
    return fcos_resnet50_fpn(**options, trainable_backbone_layers=3).to(device)


def _runtimes(model: nn.Module, pixels: Tensor) -> dict[str, Callable]:
    return _onnxruntime(model, pixels) | _openvino(model, pixels)


@needs("onnxruntime")
def _onnxruntime(model: nn.Module, pixels: Tensor) -> dict[str, Callable]:
    from fcos_d2.export import export_detector, load_exported

    with tempfile.TemporaryDirectory() as folder:
        export_detector(model, path := Path(folder, "model.onnx"), "onnx")
        detect = load_exported(path, "onnx")
    return {"ONNX Runtime": lambda: detect(pixels[None])}


@needs("openvino")
def _openvino(model: nn.Module, pixels: Tensor) -> dict[str, Callable]:
    import openvino

    from fcos_d2.export import export_detector

    contenders = {}
    with tempfile.TemporaryDirectory() as folder:
        export_detector(model, path := Path(folder, "model.xml"), "openvino")
        for hint, name in (("f32", "OpenVINO"), ("bf16", "OpenVINO, bfloat16")):
            compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
            contenders[name] = lambda compiled=compiled: compiled(pixels[None].numpy())
    return contenders
