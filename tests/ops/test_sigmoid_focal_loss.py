"""sigmoid_focal_loss: hand-computed cases, torchvision, gradients, and invalid input."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from fcos_d2.ops import _losses, sigmoid_focal_loss

from . import inputs


def labels(values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int32)


def one_level(values, dtype=torch.float32) -> list[torch.Tensor]:
    """Returns the logits of one point, K = len(values)."""
    return [torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)]


def by_hand(x, positive, alpha, gamma):
    """Computes -alpha_t (1 - p_t)^gamma log p_t in Python floats, for moderate x."""
    p = 1 / (1 + math.exp(-x))
    p_t, weight = (p, alpha) if positive else (1 - p, 1 - alpha)
    return -weight * (1 - p_t) ** gamma * math.log(p_t)


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_value_is_the_formula_summed_over_classes(label, gamma):
    x = [0.3, -1.2]
    expected = sum(by_hand(v, k == label, 0.25, gamma) for k, v in enumerate(x))
    loss = sigmoid_focal_loss(one_level(x), labels([label]), 0.25, gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_gamma_zero_without_weights_is_cross_entropy():
    loss = sigmoid_focal_loss(one_level([0.0, 0.0]), labels([0]), alpha=-1, gamma=0)
    assert loss.item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("channels_last", [False, True])
def test_loss_matches_torchvision_over_all_levels(channels_last, device):
    torchvision = pytest.importorskip("torchvision")
    levels = inputs.pyramid()
    logits, _, _ = inputs.predictions(levels, 2, 7, torch.float64, channels_last=channels_last)
    logits = [x.to(device).requires_grad_() for x in logits]
    targets = inputs.targets(levels, [5, 0], 7, device)
    flat = torch.cat([x.flatten(2).transpose(1, 2) for x in logits], dim=1)
    one_hot = torch.nn.functional.one_hot(targets.labels.long(), 8)[..., :7].double()
    dense = torchvision.ops.sigmoid_focal_loss(flat, one_hot, 0.25, 2, reduction="sum")
    ours = sigmoid_focal_loss(logits, targets.labels)
    torch.testing.assert_close(ours, dense, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(dense, logits)
    for grad, want in zip(torch.autograd.grad(ours, logits), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-15)
        assert grad.stride() == want.stride() or grad.shape == want.shape


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_gradient_is_the_derivative_of_the_value(alpha, gamma):
    x = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y = torch.randint(-1, 4, (2, 8), dtype=torch.int32)
    assert gradcheck(lambda *x: sigmoid_focal_loss(x, y, alpha, gamma), x)


@pytest.mark.parametrize("logit", [17.0, 88.0, 1e4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("label, weight", [(0, 0.25), (1, 0.75)])
def test_loss_is_linear_for_confident_mistakes_and_vanishes_for_correct_logits(
    logit, gamma, label, weight
):
    wrong, right = (-logit, logit) if label == 0 else (logit, -logit)
    x = torch.full((1, 1, 1, 1), wrong, requires_grad=True)
    loss = sigmoid_focal_loss([x], labels([label]), 0.25, gamma)
    loss.backward()
    assert loss.item() == pytest.approx(weight * logit, rel=1e-3)
    assert abs(x.grad.item()) == pytest.approx(weight, rel=1e-2)
    assert 0 <= sigmoid_focal_loss(one_level([right]), labels([label]), 0.25, gamma) < 1e-4


def test_subnormal_gradient_may_be_zero():
    logits = one_level([-90.0, -95.0])[0].requires_grad_()
    loss = sigmoid_focal_loss([logits], labels([2]), alpha=-1, gamma=0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert ((grad >= 0) & (grad <= 1.001 * logits.double().sigmoid())).all()


def test_infinity_and_nan_propagate():
    assert sigmoid_focal_loss(one_level([math.inf]), labels([1])).isinf()
    assert sigmoid_focal_loss(one_level([-math.inf]), labels([1])) == 0
    assert sigmoid_focal_loss(one_level([math.nan]), labels([1])).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("save_gradient", [False, True])
def test_ignored_points_do_not_contribute_even_if_not_finite(dtype, channels_last, save_gradient):
    broken = torch.randn(1, 3, 5, 7, dtype=torch.float64).to(dtype)
    broken[:, :, 1] = torch.tensor([math.nan, math.inf, -math.inf])[:, None].to(dtype)
    y = torch.randint(0, 4, (1, 5, 7), dtype=torch.int32)
    y[:, 1] = -1
    y, whole = y.flatten(1), broken.nan_to_num(0, 0, 0)
    losses, grads = [], []
    for x in (broken, whole):
        x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        x.requires_grad_()
        losses.append(sigmoid_focal_loss([x], y, save_gradient=save_gradient))
        grads += torch.autograd.grad(losses[-1], x)
    assert losses[0] == losses[1] and losses[0] > 0
    assert torch.equal(*grads) and (grads[0][:, :, 1] == 0).all()


def test_gradient_scales_with_the_upstream_gradient_and_can_be_computed_twice():
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    y = torch.tensor([[0, 3, 1, 3]], dtype=torch.int32)
    loss = sigmoid_focal_loss([x], y)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (again,) = torch.autograd.grad(loss / 4, x)
    torch.testing.assert_close(again, once / 4)


def loss_and_gradients(logits, y, upstream=1.0, **options):
    logits = [x.detach().clone().requires_grad_() for x in logits]
    loss = sigmoid_focal_loss(logits, y, **options)
    return loss, torch.autograd.grad(loss * upstream, logits)


def pyramid_case(dtype, device, channels_last=False):
    levels = inputs.pyramid(64, 64, 2)
    logits, _, _ = inputs.predictions(levels, 2, 20, dtype, channels_last=channels_last)
    y = inputs.targets(levels, [3, 2], 20, device, height=64, width=64).labels
    return [x.to(device) for x in logits], y


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_saved_gradient_matches_the_recomputed_one(dtype, upstream, channels_last, device):
    logits, y = pyramid_case(dtype, device, channels_last)
    scale = torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    loss, grads = loss_and_gradients(logits, y, upstream, scale=scale)
    saved_loss, saved = loss_and_gradients(logits, y, upstream, scale=scale, save_gradient=True)
    torch.testing.assert_close(saved_loss, loss, rtol=1e-6, atol=0)
    for grad, want in zip(saved, grads, strict=True):
        tolerance = {"rtol": torch.finfo(dtype).eps * 4, "atol": 1e-7}
        torch.testing.assert_close(grad, want, **tolerance)
        assert grad.stride() == want.stride()


def test_scale_multiplies_loss_and_gradient(device):
    logits, y = pyramid_case(torch.float32, device)
    plain, grads = loss_and_gradients(logits, y)
    scale = torch.tensor(0.125, device=device)
    loss, scaled = loss_and_gradients(logits, y, scale=scale)
    assert loss == plain / 8
    for grad, want in zip(scaled, grads, strict=True):
        assert torch.equal(grad, want / 8)


def test_saved_gradient_is_correct_in_every_backward_pass_of_a_retained_graph(device):
    logits, y = pyramid_case(torch.float32, device)
    _, wanted = loss_and_gradients(logits, y)
    logits = [x.requires_grad_() for x in logits]
    loss = sigmoid_focal_loss(logits, y, save_gradient=True)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)  # adds to the gradient that the previous pass returned
        for level, want in zip(logits, wanted, strict=True):
            torch.testing.assert_close(level.grad, times * want, rtol=1e-6, atol=1e-9)
    logits[0].grad.zero_()
    (loss / 2).backward()
    torch.testing.assert_close(logits[0].grad, wanted[0] / 2, rtol=1e-6, atol=1e-9)


def test_gradient_is_only_saved_if_required(monkeypatch, device):
    logits, y = pyramid_case(torch.float32, device)

    def fail(*args):
        raise AssertionError("computed an unused gradient")

    monkeypatch.setattr(_losses, "_op", fail)
    sigmoid_focal_loss(logits, y, save_gradient=True)
    with torch.no_grad():
        sigmoid_focal_loss([x.requires_grad_() for x in logits], y, save_gradient=True)
    with pytest.raises(AssertionError, match="unused"):
        sigmoid_focal_loss(logits, y, save_gradient=True)


def test_torch_compile_supports_fullgraph_with_save_gradient(device):
    logits, y = pyramid_case(torch.float32, device)
    _, wanted = loss_and_gradients(logits, y)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(logits, y):
        return sigmoid_focal_loss(logits, y, save_gradient=True)

    logits = [x.requires_grad_() for x in logits]
    for grad, want in zip(torch.autograd.grad(loss(logits, y), logits), wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("save_gradient", [False, True])
def test_second_derivative_is_an_error(save_gradient):
    x = torch.randn(1, 2, 1, 1, requires_grad=True)
    loss = sigmoid_focal_loss([x], labels([0]), save_gradient=save_gradient)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grad.sum().backward()


def test_empty_inputs():
    assert sigmoid_focal_loss([torch.zeros(0, 3, 2, 2)], torch.zeros(0, 4, dtype=torch.int32)) == 0
    x = torch.zeros(1, 3, 0, 5, requires_grad=True)
    sigmoid_focal_loss([x], torch.zeros(1, 0, dtype=torch.int32)).backward()
    assert x.grad.shape == x.shape


X = torch.zeros(1, 3, 2, 2)
Y = torch.zeros(1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, Y), r"sigmoid_focal_loss: logits must be a non-empty list of Tensor\[B, K, H, W\]"),
        (([], Y), "logits must be a non-empty list"),
        (([X.int()], Y), r"logits\[l\] must be float32 or .* got int32 Tensor\[1, 3, 2, 2\]"),
        (([X, X.half()], Y), "all levels must agree in batch, channels, dtype and device"),
        (([X[0]], Y), r"logits\[l\] must be"),
        (([X], Y.long()), r"labels must be int32 Tensor\[1, 4\], got int64 .* cast with .int\(\)"),
        (([X], Y[:, :3]), r"labels must be int32 Tensor\[1, 4\], got int32 Tensor\[1, 3\]"),
        (([X], Y.to("meta")), "labels must be on cpu like logits"),
        (([X], Y, 2.0), r"alpha \(or -1 for no weights\) must be a number in \[0, 1\]"),
        (([X], Y, 0.25, -1.0), "gamma must be a number in"),
    ],
)
def test_error_names_the_invalid_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(*arguments)


@pytest.mark.parametrize("scale", [2.0, torch.ones(1), torch.ones((), dtype=torch.float64)])
def test_error_names_an_invalid_scale(scale):
    with pytest.raises(ValueError, match=r"scale must be float32 Tensor\[\]"):
        sigmoid_focal_loss([X], Y, scale=scale)
