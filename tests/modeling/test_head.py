"""Tests FCOSHead: towers, scales, distances, quality, deformable convolutions, initialization."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fcos_d2.modeling import FCOSHead
from fcos_d2.modeling.head import DeformableConv, Tower

C = 32
SIZES = ((6, 8), (3, 4))


def make_head(**options) -> FCOSHead:
    """Builds a head with two levels, three classes and one convolution per tower by default."""
    settings = dict(num_classes=3, strides=(8, 16), num_cls_convs=1, num_box_convs=1, norm="none")
    return FCOSHead(in_channels=C, **(settings | options))


def features(images: int = 2, sizes=SIZES) -> list[torch.Tensor]:
    return [torch.randn(images, C, h, w) for h, w in sizes]


def modules(head: nn.Module, kind: type) -> list[str]:
    return [name for name, module in head.named_modules() if isinstance(module, kind)]


def changed(before, after) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_predictions_have_the_shapes_of_the_maps():
    logits, ltrb, quality, box_features = make_head()(features())
    assert [tuple(t.shape) for t in logits] == [(2, 3, 6, 8), (2, 3, 3, 4)]
    assert [tuple(t.shape) for t in ltrb] == [(2, 4, 6, 8), (2, 4, 3, 4)]
    assert [tuple(t.shape) for t in quality] == [(2, 1, 6, 8), (2, 1, 3, 4)]
    assert box_features == []


def test_parameters_have_adelaidets_names():
    head = make_head(num_cls_convs=2, num_share_convs=1, norm="GN", strides=(8,))
    modules = ["share_tower.0", "share_tower.1", "bbox_tower.0", "bbox_tower.1", "cls_logits"]
    modules += ["cls_tower.0", "cls_tower.1", "cls_tower.3", "cls_tower.4", "bbox_pred", "ctrness"]
    expected = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
    assert set(head.state_dict()) == expected | {"scales.0.scale"}


def test_batch_norms_are_separate_per_level():
    tower = Tower(C, 1, "BN", num_levels=2)
    norms = tower[1]
    x = torch.randn(2, C, 4, 4) + 5
    tower(x, 0).sum().backward()
    assert norms[0].running_mean.abs().max() > 0 and norms[0].weight.grad is not None
    assert norms[1].running_mean.abs().max() == 0 and norms[1].weight.grad is None
    assert norms[1].num_batches_tracked == 0
    assert tower[0].weight.grad is not None  # the convolution is shared
    before = [tower.eval()(x, level) for level in (0, 1)]
    norms[1].running_var.fill_(100)
    assert changed(before, [tower(x, level) for level in (0, 1)]) == [False, True]


@pytest.mark.parametrize(
    "norm, kind, count",
    [
        ("GN", nn.GroupNorm, 2),
        ("BN", nn.BatchNorm2d, 4),
        ("SyncBN", nn.SyncBatchNorm, 4),
        ("none", nn.modules.batchnorm._NormBase, 0),
        ("", nn.GroupNorm, 0),
    ],
)
def test_number_of_norms_per_convolution_and_level(norm, kind, count):
    head = make_head(norm=norm)
    assert len(modules(head, kind)) == count
    assert len(modules(head, nn.Conv2d)) == 2 + 3
    head.eval()(features())  # SyncBatchNorm trains only on GPUs
    assert kind is not nn.GroupNorm or not count or head.cls_tower[1].num_groups == 32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "LN"}, "MODEL.FCOS.NORM must be one of 'GN', 'BN', 'SyncBN', 'none', '', got"),
        ({"norm": "GN", "in_channels": 48}, "GN needs channels divisible by 32, got 48"),
    ],
)
def test_invalid_norm_is_rejected(options, message):
    settings = {"in_channels": C, "num_classes": 3, "strides": (8,)} | options
    with pytest.raises(ValueError, match=message):
        FCOSHead(**settings)


def test_number_of_maps_must_be_the_number_of_strides():
    with pytest.raises(ValueError, match=r"expected 2 feature maps.*got 1.*IN_FEATURES"):
        make_head()(features()[:1])


def test_towers_have_the_requested_depth():
    head = make_head(num_share_convs=2, num_cls_convs=3, num_box_convs=0)
    depths = [modules(t, nn.Conv2d) for t in (head.share_tower, head.cls_tower, head.bbox_tower)]
    assert list(map(len, depths)) == [2, 3, 0]


def test_shared_tower_feeds_classes_and_boxes_and_other_towers_only_one():
    head, maps = make_head(num_share_convs=1, norm="GN"), features()

    def affects(tower):
        before = head(maps)
        nn.init.normal_(tower[0].weight)
        after = head(maps)
        return any(changed(before.logits, after.logits)), any(changed(before.ltrb, after.ltrb))

    nn.init.constant_(head.bbox_pred.bias, 1.0)  # where relu is not flat
    assert affects(head.share_tower) == (True, True)
    assert affects(head.cls_tower) == (True, False)
    assert affects(head.bbox_tower) == (False, True)


def test_scale_of_a_level_only_scales_the_boxes_of_that_level():
    head, maps = make_head(use_relu=True), features()
    nn.init.constant_(head.bbox_pred.bias, 1.0)
    before = head(maps)
    nn.init.constant_(head.scales[1].scale, 2.0)
    after = head(maps)
    torch.testing.assert_close(after.ltrb[1], 2 * before.ltrb[1])
    assert changed(before.ltrb, after.ltrb) == [False, True]
    assert not any(changed(before.logits + before.quality, after.logits + after.quality))


def test_scale_multiplies_before_exp_and_is_optional():
    head, maps = make_head(use_relu=False), features()
    before = head(maps)
    nn.init.constant_(head.scales[0].scale, 2.0)
    torch.testing.assert_close(head(maps).ltrb[0], before.ltrb[0] ** 2)
    assert not [name for name in make_head(use_scale=False).state_dict() if "scale" in name]


@pytest.mark.parametrize("level, stride", [(0, 8), (1, 16)])
@pytest.mark.parametrize("use_relu", [True, False])
def test_regression_in_pixels_and_in_strides_yields_the_same_distances(use_relu, level, stride):
    """In pixels, outputs are ``stride`` times as large, or larger by log(stride) before exp."""
    strides, pixels = (make_head(use_relu=use_relu, norm_reg_targets=n) for n in (True, False))
    nn.init.constant_(strides.bbox_pred.bias, 0.5)
    pixels.load_state_dict(strides.state_dict())
    with torch.no_grad():
        if use_relu:
            pixels.scales[level].scale.mul_(stride)
        else:
            pixels.bbox_pred.bias.add_(math.log(stride))
    maps = features()
    expected = strides(maps).ltrb[level]
    torch.testing.assert_close(pixels(maps).ltrb[level], expected)
    assert expected.min() > 0.1


def test_distances_are_never_negative():
    for use_relu in (True, False):
        head = make_head(use_relu=use_relu)
        nn.init.constant_(head.bbox_pred.bias, -1.0)
        assert all(level.min() >= 0 for level in head(features()).ltrb)


@pytest.mark.parametrize("on_box_tower", [True, False])
def test_quality_is_predicted_from_the_configured_tower(on_box_tower):
    head = make_head(quality_on_box_tower=on_box_tower)
    sum(level.sum() for level in head(features()).quality).backward()
    assert (head.bbox_tower[0].weight.grad is not None) == on_box_tower
    assert (head.cls_tower[0].weight.grad is not None) == (not on_box_tower)


def test_box_features_are_the_output_of_the_box_tower():
    head, maps = make_head(yield_box_features=True), features()
    box_features = head(maps).box_features
    for level, feature in enumerate(maps):
        torch.testing.assert_close(box_features[level], head.bbox_tower(feature, level))


def test_deformable_convolution_is_initialized_with_zero_offsets_and_masks_of_one_half():
    layer, x = DeformableConv(C, C), torch.randn(2, C, 5, 7)
    weight, bias = layer.conv.weight, layer.conv.bias
    torch.testing.assert_close(layer(x), F.conv2d(x, weight / 2, bias, padding=1))


def test_deformable_convolution_samples_at_its_offsets():
    layer, x = DeformableConv(C, C), torch.randn(1, C, 6, 7)
    with torch.no_grad():
        layer.offset.bias[1:18:2] = 1.0  # x of every (y, x) pair: one pixel to the right
        layer.offset.bias[18:] = 100.0  # masks of 1
    expected = F.conv2d(F.pad(x, (0, 1))[..., 1:], layer.conv.weight, layer.conv.bias, padding=1)
    torch.testing.assert_close(layer(x)[..., 1:-2], expected[..., 1:-2])
    layer(x).sum().backward()
    assert layer.offset.weight.grad.abs().sum() > 0


def test_last_convolution_of_both_towers_is_deformable_with_zero_offsets():
    head = make_head(use_deformable=True, num_cls_convs=2, num_box_convs=2, num_share_convs=1)
    assert modules(head, DeformableConv) == ["cls_tower.2", "bbox_tower.2"]
    for name in modules(head, DeformableConv):
        offset = head.get_submodule(name).offset
        assert offset.weight.abs().max() == 0 and offset.bias.abs().max() == 0
    head(features())


@pytest.mark.parametrize("prior", [0.01, 0.2])
def test_initial_probability_of_every_class_is_the_prior(prior):
    head = make_head(prior_prob=prior)
    logits = head([torch.zeros(1, C, 4, 4)] * 2).logits
    torch.testing.assert_close(logits[0].sigmoid(), torch.full((1, 3, 4, 4), prior))


def test_convolutions_are_initialized_with_small_weights_and_zero_bias():
    head = make_head(num_share_convs=1, use_deformable=True)
    for name in ("share_tower.0", "cls_tower.0.conv", "bbox_tower.0.conv", "bbox_pred", "ctrness"):
        conv = head.get_submodule(name)
        assert 0.008 < conv.weight.std() < 0.012, name
        assert conv.bias.abs().max() == 0, name


@pytest.mark.parametrize("use_relu", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
def test_box_outputs_agree_in_dtype_under_autocast(use_relu, use_scale):
    head = make_head(use_relu=use_relu, use_scale=use_scale)
    with torch.autocast("cpu", torch.bfloat16):
        _, ltrb, quality, _ = head(features())
    assert {t.dtype for t in ltrb} == {t.dtype for t in quality}
