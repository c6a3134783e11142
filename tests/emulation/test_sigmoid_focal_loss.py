"""csrc/cuda/sigmoid_focal_loss.cu equals the reference in float64, in every layout."""

import pytest
import torch

from fcos_d2.ops import reference
from tests.ops.strategies import LAYOUTS

from . import emulated

pytestmark = pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.0]


def random_logits(shapes, num_classes, images, dtype, spread=3.0):
    return [(torch.randn(images, num_classes, h, w) * spread - 2).to(dtype) for h, w in shapes]


def random_labels(shapes, num_classes, images):
    """Mostly background, a fifth positive, a tenth ignored."""
    points = sum(h * w for h, w in shapes)
    labels = torch.randint(0, num_classes, (images, points), dtype=torch.int32)
    kind = torch.rand(images, points)
    labels = torch.where(kind < 0.7, num_classes, labels)
    return torch.where(kind > 0.9, -1, labels).int()


def assert_equals_reference(logits, labels, alpha=0.25, gamma=2.0):
    ops = emulated.ops()
    wide = [level.double() for level in logits]
    loss = ops.sigmoid_focal_loss(logits, labels, alpha, gamma)
    expected = reference.sigmoid_focal_loss(wide, labels, alpha, gamma)
    assert loss.dtype == reference.accumulate_dtype(logits[0])
    # The emulator makes exp and 1/x as wrong as a GPU may make them, which p^2 softplus(z) triples;
    # in a sum the errors of one logit and another cancel.
    rtol = 1e-6 if sum(level.numel() for level in logits) >= 100 else 1.5e-6
    if logits[0].dtype == torch.float64:
        rtol = 1e-8  # torch's softplus(x) is x for x > 20
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-30, equal_nan=True)

    upstream = torch.tensor(-1.7, dtype=loss.dtype)
    grads = ops.sigmoid_focal_loss_backward(upstream, logits, labels, alpha, gamma)
    wanted = reference.sigmoid_focal_loss_backward(upstream.double(), wide, labels, alpha, gamma)
    for grad, want, level in zip(grads, wanted, logits, strict=True):
        assert grad.dtype == level.dtype
        assert grad.stride() == torch.empty_like(level).stride()
        assert_gradient_close(grad, want)
    assert_saved_gradient_is_right(logits, labels, alpha, gamma, loss, wanted)
    return loss, grads


def assert_saved_gradient_is_right(logits, labels, alpha, gamma, loss, wanted):
    """``wanted`` belongs to the upstream gradient -1.7."""
    ops = emulated.ops()
    scale, factor, one = (loss.new_tensor(x) for x in (3.4, -0.5, 1.0))
    value, grads = ops.sigmoid_focal_loss_with_gradient(logits, labels, scale, alpha, gamma)
    torch.testing.assert_close(value, loss, rtol=1e-6, atol=0, equal_nan=True)
    kept = [grad.clone() for grad in grads]
    others = (logits, labels, scale, alpha, gamma)
    ops.sigmoid_focal_loss_correct_gradient(grads, one, *others)
    for grad, before, want in zip(grads, kept, wanted, strict=True):
        torch.testing.assert_close(grad, before, rtol=0, atol=0, equal_nan=True)
        assert_gradient_close(grad, -2 * want)
    ops.sigmoid_focal_loss_correct_gradient(grads, factor, *others)
    for grad, want in zip(grads, wanted, strict=True):
        assert_gradient_close(grad, want)


def assert_gradient_close(grad, want):
    """Within one unit of the last place of half types, 1e-6 (absolute 1e-7) in float32."""
    tolerance = {
        torch.float64: {"rtol": 1e-8, "atol": 1e-30},
        torch.float32: {"rtol": 1e-6, "atol": 1e-7},
        torch.float16: {"rtol": torch.finfo(torch.float16).eps, "atol": 2**-24},
        torch.bfloat16: {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 2**-126},
    }[grad.dtype]
    torch.testing.assert_close(grad.double(), want, **tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_exponents_and_memory_formats(dtype, gamma, channels_last):
    # 12 x 16 and 6 x 8 points make full vectors in every dtype, 3 x 4 and 1 x 1 do not.
    shapes, classes = [(12, 16), (6, 8), (3, 4), (1, 1)], 40
    layout = LAYOUTS["channels_last" if channels_last else "nchw"]
    logits = [layout(x) for x in random_logits(shapes, classes, 2, dtype)]
    assert_equals_reference(logits, random_labels(shapes, classes, 2), gamma=gamma)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 7, 16])
def test_layouts(layout, dtype, classes):
    shapes = [(4, 8), (3, 5)]
    logits = [LAYOUTS[layout](x) for x in random_logits(shapes, classes, 3, dtype)]
    assert_equals_reference(logits, random_labels(shapes, classes, 3))


@pytest.mark.parametrize("classes", [1, 2, 15, 17, 80, 91])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (17, 1), (33, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sizes(classes, shape, channels_last):
    layout = LAYOUTS["channels_last" if channels_last else "nchw"]
    logits = [layout(x) for x in random_logits([shape], classes, 2, torch.bfloat16)]
    assert_equals_reference(logits, random_labels([shape], classes, 2))


@pytest.mark.parametrize("fill", ["background", "ignored", "positive"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_points_all_of_one_kind(fill, channels_last):
    layout = LAYOUTS["channels_last" if channels_last else "nchw"]
    logits = [layout(x) for x in random_logits([(8, 8)], 24, 2, torch.float32)]
    label = {"background": 24, "ignored": -1, "positive": 23}[fill]
    loss, grads = assert_equals_reference(logits, torch.full((2, 64), label, dtype=torch.int32))
    if fill == "ignored":
        assert loss == 0 and (grads[0] == 0).all()


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
def test_weights(alpha):
    shapes = [(4, 8), (3, 5)]
    logits = random_logits(shapes, 9, 2, torch.float32)
    assert_equals_reference(logits, random_labels(shapes, 9, 2), alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("label", [0, 1])
def test_extreme_logits(dtype, gamma, label):
    for value in [0.0, 17.0, -17.0, 88.0, -88.0, 1e4, -1e4, min(torch.finfo(dtype).max, 3e38)]:
        x = torch.full((1, 1, 1, 1), value).to(dtype)
        label_map = torch.full((1, 1), label, dtype=torch.int32)
        loss, (grad,) = assert_equals_reference([x], label_map, gamma=gamma)
        assert loss.isfinite() and grad.isfinite().all()


def test_confident_positives_do_not_drown_the_rest():
    # As negatives these logits would cost 1e4 each, and leave few bits for all the others.
    logits = random_logits([(8, 16)], 16, 1, torch.float32)
    labels = random_labels([(8, 16)], 16, 1)
    point = torch.arange(128)
    positive = (labels[0] >= 0) & (labels[0] < 16)
    flat = logits[0].view(16, 128)
    flat[labels[0, positive].long(), point[positive]] = 1e4
    flat[:, labels[0] == -1] = 1e4
    assert_equals_reference(logits, labels)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (1, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_inputs(shape):
    x = torch.zeros(shape)
    labels = torch.zeros(shape[0], shape[2] * shape[3], dtype=torch.int32)
    ops = emulated.ops()
    assert ops.sigmoid_focal_loss([x], labels, 0.25, 2.0) == 0
    (grad,) = ops.sigmoid_focal_loss_backward(torch.ones(()), [x], labels, 0.25, 2.0)
    assert grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_blocks_and_threads_changes_no_bit(dtype):
    shapes = [(40, 48), (20, 24), (5, 3)]
    logits, labels = random_logits(shapes, 33, 2, dtype), random_labels(shapes, 33, 2)
    ops = emulated.ops()

    def run():
        grads = ops.sigmoid_focal_loss_backward(torch.ones(()), logits, labels, 0.25, 2.0)
        return [ops.sigmoid_focal_loss(logits, labels, 0.25, 2.0), *grads]

    expected = run()
    for number in range(1, 5):
        with emulated.schedule(number):
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.parametrize("label", [-2, 4, 100, -(2**31)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_label_out_of_range_stops_the_kernel(label, channels_last):
    layout = LAYOUTS["channels_last" if channels_last else "nchw"]
    logits = [layout(x) for x in random_logits([(4, 4)], 3, 1, torch.float32)]
    labels = torch.full((1, 16), 3, dtype=torch.int32)
    labels[0, 11] = label
    message = r"sigmoid_focal_loss: labels must lie in \[-1, K\]"
    with pytest.raises(RuntimeError, match=message):
        emulated.ops().sigmoid_focal_loss(logits, labels, 0.25, 2.0)
    with pytest.raises(RuntimeError, match=message):
        emulated.ops().sigmoid_focal_loss_backward(torch.ones(()), logits, labels, 0.25, 2.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(2), [torch.zeros(1, 1, 1, 1)]), "grad must be one number of the dtype"),
        ((torch.ones(()).double(), [torch.zeros(1, 1, 1, 1)]), "grad must be one number"),
        ((torch.ones(()), [torch.zeros(1, 1, 1, 1)] * 9), "logits must have 1 to 8 levels, got 9"),
        ((torch.ones(()), []), "logits must have 1 to 8 levels, got 0"),
        ((torch.ones(()), [torch.zeros(1, 1, 1, 1).int()]), "expected float32, float16"),
    ],
)
def test_bad_argument_is_named(arguments, message):
    labels = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        emulated.ops().sigmoid_focal_loss_backward(*arguments, labels, 0.25, 2.0)
