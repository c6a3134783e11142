"""Training and inference do not synchronize with the device until detections become Instances.

Three checks complement each other:
- a dispatch mode notices every operator of a real step that needs a value on the host, but on the
  CPU no copies between devices;
- fake CUDA tensors, which need no GPU, have no values, so reading values and moving or mixing
  devices fails, but autograd does not run on them;
- CUDA's sync debug mode, if there is a GPU.
"""

import contextlib

import pytest
import torch
from detectron2.structures import ImageList
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fcos_d2.modeling import FCOS
from fcos_d2.ops import reference

from .tiny import sample, tiny_cfg, tiny_fcos

SIZES = [(64, 96), (60, 90)]
OPTIONS = [
    {},
    {"CONVENTION": "original", "NORM": "BN", "IGNORE_CROWD": True},
    {"CONVENTION": "detectron2", "NMS_METHOD": "gaussian", "USE_DEFORMABLE": True},
    {"CONVENTION": "torchvision", "NMS_METHOD": "linear", "LOC_LOSS_TYPE": "ciou"},
    {"CONVENTION": "mmdet_base", "BOX_QUALITY": "iou", "NMS_CLASS_AGNOSTIC": True},
]
READS_VALUES = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy",
    "argwhere", "masked_select", "unique", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave",
)  # fmt: skip


class NoHostSync(TorchDispatchMode):
    """Raises if an operator needs a value on the host; runs the reference instead of our ops.

    ``seen`` lists the replaced ops.
    """

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        assert name not in READS_VALUES, f"{func} needs a value on the host"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask needs its values on the host"
        if func.namespace == "fcos_d2":
            self.seen.append(name)
            with self:
                return getattr(reference, name)(*args, **kwargs)
        out = func(*args, **kwargs)
        if "copy" in name:
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else out
            if source.device != target.device:
                waits = source.device.type != "cpu" or not kwargs.get("non_blocking", args[2:])
                assert not waits, f"{func} from {source.device} to {target.device} waits"
        return out


def inputs(device="cpu"):
    """Returns two images and their ground truth, one without objects, one with a crowd region."""
    boxes = [[4.0, 4, 40, 40], [30.0, 2, 80, 60], [50.0, 5, 70, 20]]
    truth = [sample(*SIZES[0], boxes, [0, 2, -1]), sample(*SIZES[1])]
    truth = [item["instances"].to(device) for item in truth]
    return ImageList(torch.rand(2, 3, 64, 96, device=device) * 255, SIZES), truth


def predict(model, images):
    maps = model.backbone(images.tensor)
    maps = [maps[name] for name in model.head_in_features]
    return maps, model.head(maps)


def compute_losses(model, images, truth):
    return model.train().forward_training(images, *predict(model, images), truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_operator_of_training_and_inference_needs_a_value_on_the_host(options):
    model, (images, truth) = tiny_fcos(**options, POST_NMS_TOPK_TEST=5), inputs()
    mode = NoHostSync()
    with mode:
        losses = compute_losses(model, images, truth)
        sum(losses.values()).backward()
        model.losses.stats.values()
        with torch.no_grad():
            model.eval().detect(images, *predict(model, images))
    assert set(mode.seen) == {
        "assign_targets", "fcos_loss", "fcos_loss_gradient", "select_candidates",
        "batched_nms_padded",
    }  # fmt: skip


@pytest.mark.parametrize("use_reference", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_value_is_read_or_copied_from_the_gpu(options, use_reference):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = FCOS(tiny_cfg(**options, POST_NMS_TOPK_TEST=5))
            images, truth = inputs("cuda")
        with NoHostSync() if use_reference else contextlib.nullcontext():
            losses = compute_losses(model, images, truth)
            stats = model.losses.stats
            detections = model.eval().detect(images, *predict(model, images))
        found = [*losses.values(), *stats.values(), *detections]
        assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.parametrize("loss_type", ["iou", "linear_iou", "giou", "diou", "ciou"])
def test_gradients_of_the_reference_stay_on_the_gpu(loss_type):
    with FakeTensorMode(), torch.device("cuda"), NoHostSync():
        one, labels = torch.rand(()), torch.zeros(2, 12, dtype=torch.int32)
        logits, ltrb, quality = ([torch.rand(2, c, 3, 4)] for c in (5, 4, 1))
        grads = reference.sigmoid_focal_loss_backward(one, logits, labels, 0.25, 2.0)
        targets = labels, torch.rand(2, 12, 4), torch.rand(2, 12)
        more = reference.box_loss_backward(
            one, one, ltrb, quality, *targets, loss_type, "iou", False, [1.0]
        )
        shapes = [tuple(grad.shape) for grad in (*grads, *more[0], *more[1])]
    assert shapes == [(2, c, 3, 4) for c in (5, 4, 1)]


def test_training_step_runs_on_meta_tensors():
    """Unlike fake tensors, these support autograd."""
    with torch.device("meta"):
        model = FCOS(tiny_cfg())
        images = ImageList(torch.empty(2, 3, 64, 96), SIZES)
        truth = [sample(*SIZES[0], torch.empty(3, 4))["instances"], sample(*SIZES[1])["instances"]]
        losses = compute_losses(model, images, truth)
        sum(losses.values()).backward()
        detections = model.eval().detect(images, *predict(model, images))
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    assert detections.boxes.shape == (2, 100, 4)


@pytest.mark.cuda
def test_cuda_reports_no_synchronization():
    model, (images, truth) = tiny_fcos("MODEL.DEVICE", "cuda"), inputs("cuda")
    for mode in ("default", "error"):  # the first iteration initializes libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sum(compute_losses(model, images, truth).values()).backward()
            with torch.no_grad():
                model.eval().detect(images, *predict(model, images))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "synchronize",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: torch.where(x > 0), lambda x: x[x > 0], lambda x: x.masked_select(x > 0),
        lambda x: x.unique(), lambda x: torch.equal(x, x), lambda x: x.tolist(),
        lambda x: x.cpu(), lambda x: x.to("cpu", non_blocking=True), lambda x: range(x.sum().int()),
        lambda x: x.index_put((x > 0,), x.new_ones(())), lambda x: x.numpy(),
        lambda x: torch.ones(3).to("cuda"), lambda x: x.add(torch.ones(3)),
        lambda x: torch.empty(3).copy_(x), lambda x: x.repeat_interleave(x.int()),
    ],
)  # fmt: skip
def test_synchronization_is_detected(synchronize):
    with FakeTensorMode(), NoHostSync():
        x = torch.ones(3, device="cuda")
        with pytest.raises((AssertionError, RuntimeError, TypeError)):
            synchronize(x)
