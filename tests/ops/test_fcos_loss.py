"""fcos_loss: losses, gradients and normalizers, compared with the ops that it fuses."""

import pytest
import torch

from fcos_d2.ops import box_loss, sigmoid_focal_loss
from fcos_d2.ops.fcos_loss import fcos_loss

from . import inputs

LEVELS, CLASSES = inputs.pyramid(64, 96, 3), 5
RULE = dict(loss_type="giou", quality_type="centerness", weight_by_centerness=True, smoothing=1.0)
WEIGHT, FLOOR = 0.7, 1e-6


def batch(dtype=torch.float32, box_dtype=None, channels_last=False):
    """Returns (logits, ltrb, quality), targets and normalizers."""
    options = {"channels_last": channels_last}
    logits, _, _ = inputs.predictions(LEVELS, 2, CLASSES, dtype, **options)
    _, ltrb, quality = inputs.predictions(LEVELS, 2, CLASSES, box_dtype or dtype, **options)
    targets = inputs.targets(LEVELS, [4, 1], CLASSES, height=64, width=96)
    positives, centerness = targets.totals.unbind()
    normalizers = [(positives, 1.0), (centerness, FLOOR), (positives, 1.0)]
    maps = [[x.requires_grad_() for x in level] for level in (logits, ltrb, quality)]
    return maps, targets, normalizers


def fused(maps, targets, normalizers, save_gradient=True, gamma=2.0):
    options = dict(cls_weight=WEIGHT, alpha=0.25, gamma=gamma, save_gradient=save_gradient)
    return fcos_loss(*maps, targets, normalizers, **options, **RULE)


def separate(maps, targets, normalizers, gamma=2.0):
    cls = sigmoid_focal_loss(maps[0], targets.labels, 0.25, gamma)
    box, quality = box_loss(*maps[1:], targets, **RULE)
    (positives, _), (centerness, _), _ = normalizers
    return WEIGHT * cls / positives, box / centerness, quality / positives


def gradients(losses, maps, upstream=(1.0, 1.0, 1.0), **options):
    total = sum(u * loss for u, loss in zip(upstream, losses, strict=True))
    return torch.autograd.grad(total, [x for level in maps for x in level], **options)


@pytest.mark.parametrize("save_gradient", [False, True])
@pytest.mark.parametrize("upstream", [(1.0, 1.0, 1.0), (1.0, 0.5, 1.0), (3.0, 0.0, 2.0)])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16), (torch.float64, torch.float64),
        (torch.float32, torch.float64),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True])
def test_losses_and_gradients_match_the_separate_ops(
    dtypes, channels_last, upstream, save_gradient
):
    maps, *rest = batch(*dtypes, channels_last)
    losses, expected = fused(maps, *rest, save_gradient), separate(maps, *rest)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    grads = gradients(losses, maps, upstream)
    for grad, want in zip(grads, gradients(expected, maps, upstream), strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, want, rtol=max(4 * eps, 4e-6), atol=1e-7)
        assert grad.stride() == want.stride()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5])
def test_gamma_is_used(gamma):
    maps, *rest = batch()
    found, expected = fused(maps, *rest, gamma=gamma), separate(maps, *rest, gamma=gamma)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_normalizer_is_clamped_to_its_lower_bound():
    maps, targets, _ = batch()
    small = [(torch.tensor(value), 4.0) for value in (0.0, -1.0, 3.0)]
    equal = [(torch.tensor(4.0), 0.0)] * 3
    found, expected = fused(maps, targets, small), fused(maps, targets, equal)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nan_normalizer_propagates():
    maps, targets, _ = batch()
    losses = fused(maps, targets, [(torch.tensor(float("nan")), 1.0)] * 3)
    assert all(loss.isnan() for loss in losses)


def test_saved_gradient_is_correct_in_every_backward_pass_of_a_retained_graph():
    maps, *rest = batch()
    losses, wanted = fused(maps, *rest), gradients(separate(maps, *rest), maps)
    leaves = [x for level in maps for x in level]
    for times in (1, 2):
        # Accumulates in place into the gradient that the previous pass returned.
        sum(losses).backward(retain_graph=True)
        for leaf, want in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(leaf.grad, times * want, rtol=1e-5, atol=1e-7)


def test_single_loss_can_be_differentiated():
    maps, *rest = batch()
    _, box, _ = fused(maps, *rest)
    grads = gradients((0.0, box, 0.0), maps)
    assert all((grad == 0).all() for grad in (*grads[:3], *grads[6:]))
    assert any((grad != 0).any() for grad in grads[3:6])


def test_second_derivative_is_an_error():
    maps, *rest = batch()
    grad = gradients(fused(maps, *rest), maps, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grad.sum().backward()


def test_torch_compile_supports_fullgraph():
    maps, *rest = batch()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")(maps, *rest)
    torch.testing.assert_close(compiled, separate(maps, *rest), rtol=1e-5, atol=0)


def test_empty_batch_has_no_loss():
    levels = inputs.pyramid(64, 64, 1)
    maps = [[x.requires_grad_() for x in level] for level in inputs.predictions(levels, 0, CLASSES)]
    targets = inputs.targets(levels, [], CLASSES)
    losses = fused(maps, targets, [(targets.totals[0], 1.0)] * 3)
    assert [loss.item() for loss in losses] == [0, 0, 0]
    assert [grad.shape[0] for grad in gradients(losses, maps)] == [0, 0, 0]
