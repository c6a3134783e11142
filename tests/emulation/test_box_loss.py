"""csrc/cuda/box_loss.cu equals the reference in float64, in every layout."""

import math

import pytest
import torch

from fcos_d2.ops import reference
from tests.ops.strategies import LAYOUTS

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LOSS_TYPES = ["iou", "linear_iou", "giou", "diou", "ciou"]
SHAPES = [(5, 16), (3, 7), (1, 1)]


def random_maps(shapes, images, dtype, layout="nchw"):
    """(ltrb, quality): distances that are mostly positive, as a ReLU or exp gives them."""
    lay_out = LAYOUTS[layout]
    ltrb = [lay_out((torch.rand(images, 4, h, w) * 4 - 0.1).to(dtype)) for h, w in shapes]
    quality = [lay_out((torch.randn(images, 1, h, w) * 3).to(dtype)) for h, w in shapes]
    return ltrb, quality


def random_targets(shapes, images, positive=0.4):
    """(matched, ltrb, centerness) with garbage at background points, which must not be read."""
    points = sum(h * w for h, w in shapes)
    is_positive = torch.rand(images, points) < positive
    ltrb = torch.where(is_positive[..., None], torch.rand(images, points, 4) * 4 + 0.05, math.nan)
    centerness = reference.centerness(ltrb)
    return torch.where(is_positive, 3, -1).int(), ltrb, centerness


def assert_equals_reference(ltrb, quality, targets, loss_type="giou", **options):
    ops = emulated.ops()
    quality_type = options.get("quality_type", "centerness")
    smoothing = [options.get("smoothing", 0.0)] * len(ltrb)
    options = (loss_type, quality_type, options.get("weighted", True), smoothing)
    wide = [[x.double() for x in maps] for maps in (ltrb, quality)]
    losses = ops.box_loss(ltrb, quality, *targets, *options)
    expected = reference.box_loss(*wide, *targets, *options)
    dtype = reference.accumulate_dtype(ltrb[0])
    rtol = 1e-10 if dtype == torch.float64 else 1e-6
    for loss, want in zip(losses, expected, strict=True):
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=1e-30)

    upstream = [torch.tensor(u, dtype=dtype) for u in (1.7, -0.6)]
    grads = ops.box_loss_backward(*upstream, ltrb, quality, *targets, *options)
    wanted = reference.box_loss_backward(*(u.double() for u in upstream), *wide, *targets, *options)
    eps = torch.finfo(ltrb[0].dtype).eps
    tolerance = {"rtol": max(eps, 1e-10), "atol": 4 * max(eps, 1e-6)}
    for grad, want, given_map in zip(
        grads[0] + grads[1], wanted[0] + wanted[1], [*ltrb, *quality], strict=True
    ):
        assert grad.dtype == given_map.dtype
        assert grad.stride() == torch.empty_like(given_map).stride()
        torch.testing.assert_close(grad.double(), want, **tolerance)
    return losses, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("quality_type", ["centerness", "iou"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_losses_and_options(dtype, loss_type, quality_type, weighted, smoothing):
    maps, targets = random_maps(SHAPES, 2, dtype), random_targets(SHAPES, 2)
    options = {"quality_type": quality_type, "weighted": weighted, "smoothing": smoothing}
    assert_equals_reference(*maps, targets, loss_type, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    maps = random_maps(SHAPES, 3, dtype, layout)
    assert_equals_reference(*maps, random_targets(SHAPES, 3))


def test_smoothing_of_each_level():
    shapes = [(4, 8), (2, 4)]
    maps, targets = random_maps(shapes, 2, torch.float32), random_targets(shapes, 2)
    options = ("giou", "iou", True, [1.0, 0.125])
    losses = emulated.ops().box_loss(*maps, *targets, *options)
    torch.testing.assert_close(losses, reference.box_loss(*maps, *targets, *options))


@pytest.mark.parametrize("positive", [0.0, 1.0])
@pytest.mark.parametrize("shapes", [[(20, 33)], [(0, 4), (16, 16), (2, 0), (1, 300)]])
def test_any_number_of_positives_and_points(positive, shapes):
    maps = random_maps(shapes, 2, torch.float32)
    losses, grads = assert_equals_reference(*maps, random_targets(shapes, 2, positive))
    if positive == 0:
        assert losses[0] == losses[1] == 0 and all((g == 0).all() for g in grads[0] + grads[1])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_disjoint_and_empty_predictions(loss_type):
    target = torch.tensor([[[1.0, 1.0, 1.0, 1.0]] * 4])
    pred = torch.tensor([[-3.0, 1, 4, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1e4, 1e4, 1e4, 1e4]])
    maps = [pred.t().reshape(1, 4, 2, 2).clone()], [torch.zeros(1, 1, 2, 2)]
    targets = torch.zeros(1, 4, dtype=torch.int32), target, torch.ones(1, 4)
    losses, grads = assert_equals_reference(*maps, targets, loss_type)
    assert all(x.isfinite().all() for x in (*losses, *grads[0]))


@pytest.mark.parametrize("images, shape", [(0, (2, 3)), (1, (0, 3))])
def test_empty_inputs(images, shape):
    maps, targets = random_maps([shape], images, torch.float32), random_targets([shape], images)
    options = ("giou", "centerness", True, [0.0])
    losses = emulated.ops().box_loss(*maps, *targets, *options)
    assert losses[0] == losses[1] == 0
    one = torch.ones(())
    grads = emulated.ops().box_loss_backward(one, one, *maps, *targets, *options)
    assert grads[0][0].shape == (images, 4, *shape) and grads[1][0].shape == (images, 1, *shape)


def test_order_of_blocks_and_threads_changes_no_bit():
    shapes = [(40, 48), (5, 3)]
    maps, targets = random_maps(shapes, 2, torch.bfloat16), random_targets(shapes, 2)
    options = ("ciou", "iou", True, [0.0, 1.0])
    expected = emulated.ops().box_loss(*maps, *targets, *options)
    for number in range(1, 5):
        with emulated.schedule(number):
            losses = emulated.ops().box_loss(*maps, *targets, *options)
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_bad_gradient_is_named():
    maps, targets = random_maps([(2, 2)], 1, torch.float64), random_targets([(2, 2)], 1)
    options = ("giou", "centerness", True, [0.0])
    wide, single = torch.ones((), dtype=torch.float64), torch.ones(())
    with pytest.raises(RuntimeError, match="grad_quality must be one number of the dtype of the"):
        emulated.ops().box_loss_backward(wide, single, *maps, *targets, *options)
