"""Tests the levels of backbones, and deformable convolutions."""

import logging

import pytest
import torch
from detectron2.layers import DeformConv, ModulatedDeformConv, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from torch import nn

from fcos_d2.modeling import FCOS, build_fpn, use_torchvision_deform_conv

from .tiny import STRIDES, TinyBottomUp, sample, tiny_cfg, tiny_fcos, train_step, without_gradient


def make_fpn(*stages: str, **fcos):
    cfg = tiny_cfg(**fcos)
    cfg.MODEL.FPN.IN_FEATURES = list(stages)
    return build_fpn(cfg, TinyBottomUp(stages))


@pytest.mark.parametrize("source, channels", [("p5", 64), ("res5", 8)])
@pytest.mark.parametrize("top_levels, names", [(0, ""), (1, "p6"), (2, "p6 p7")])
def test_top_levels_halve_the_last_level(source, channels, top_levels, names):
    fpn = make_fpn("res3", "res4", "res5", TOP_LEVELS=top_levels, TOP_LEVELS_FROM=source)
    names = ["p3", "p4", "p5", *names.split()]
    maps = fpn(torch.rand(1, 3, 128, 192))
    assert list(maps) == names
    for name in names:
        stride = STRIDES[name]
        assert fpn.output_shape()[name].stride == stride
        assert maps[name].shape[1:] == (64, 128 // stride, -(-192 // stride))
    if top_levels:
        assert fpn.top_block.p6.in_channels == channels


@pytest.mark.parametrize("top_levels", [1, 2])
@pytest.mark.parametrize("source, output_matters", [("p5", True), ("res5", False)])
def test_top_levels_are_computed_from_the_requested_map(top_levels, source, output_matters):
    """P6 depends on the output convolution of P5 only if it is computed from P5, not from C5."""
    fpn = make_fpn("res4", "res5", TOP_LEVELS=top_levels, TOP_LEVELS_FROM=source)
    image = torch.rand(1, 3, 128, 128)
    before = fpn(image)
    torch.nn.init.normal_(fpn.fpn_output5.weight)
    after = fpn(image)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    top = {f"p{5 + i}" for i in range(1, top_levels + 1)}
    assert changed == ({"p5"} | top if output_matters else {"p5"})


def test_levels_can_start_at_p2_and_end_at_any_stage():
    assert list(make_fpn("res2", "res3", TOP_LEVELS=0).output_shape()) == ["p2", "p3"]
    fpn = make_fpn("res2", "res3", "res4", TOP_LEVELS=2, TOP_LEVELS_FROM="p4")
    strides = [spec.stride for spec in fpn.output_shape().values()]
    assert strides == [4, 8, 16, 32, 64]
    assert [t.shape[-1] for t in fpn(torch.rand(1, 3, 64, 64)).values()] == [16, 8, 4, 2, 1]


def test_norm_and_fusion_of_the_pyramid_follow_the_config():
    cfg = tiny_cfg("MODEL.FPN.NORM", "GN", "MODEL.FPN.FUSE_TYPE", "avg")
    fpn = build_fpn(cfg, TinyBottomUp(["res3", "res4", "res5"]))
    assert isinstance(fpn.fpn_output3.norm, torch.nn.GroupNorm)
    assert fpn._fuse_type == "avg"


def test_resnet_backbone_is_registered():
    cfg = tiny_cfg("MODEL.BACKBONE.NAME", "build_fcos_d2_resnet_fpn_backbone")
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    assert list(backbone.output_shape()) == ["p3", "p4", "p5"]
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize(
    "stages, fcos, message",
    [
        (("res5",), {"TOP_LEVELS": 3}, "TOP_LEVELS must be 0, 1 or 2, got 3"),
        (
            ("res4", "res5"),
            {"TOP_LEVELS": 1, "TOP_LEVELS_FROM": "res4"},
            "one of p5, res5, the last",
        ),
        (
            ("res3", "res4"),
            {"TOP_LEVELS": 1},
            "TOP_LEVELS_FROM must be one of p4, res4, .*got 'p5'",
        ),
    ],
)
def test_invalid_top_levels_are_rejected(stages, fcos, message):
    with pytest.raises(ValueError, match=f"FCOS: MODEL.FCOS.*{message}"):
        make_fpn(*stages, **fcos)


@pytest.mark.parametrize("in_features", [[], ["res6"]])
def test_unknown_input_features_are_rejected(in_features):
    cfg = tiny_cfg()
    cfg.MODEL.FPN.IN_FEATURES = in_features
    with pytest.raises(ValueError, match=r"FCOS: MODEL.FPN.IN_FEATURES.*\['res5'\].*OUT_FEATURES"):
        build_fpn(cfg, TinyBottomUp(["res5"]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"IN_FEATURES": ["p3", "p4", "p6"]}, r"names \['p6'\], but .*\['p3', 'p4', 'p5'\]"),
        ({"FPN_STRIDES": [8, 16, 64]}, r"FPN_STRIDES is \[8, 16, 64\].*strides \[8, 16, 32\]"),
    ],
)
def test_head_levels_that_do_not_match_the_backbone_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_fcos(**options)


def test_unused_levels_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_fcos()
        assert not caplog.messages
        tiny_fcos(TOP_LEVELS=2)
    assert "the backbone computes p6, p7" in caplog.messages[0]


# ---- detectron2's ResNets with deformable convolutions ----


def resnet_cfg(*options):
    """Returns the config of a narrow ResNet-50, deformable from res4 on, with a three-level FPN."""
    resnets = {"DEPTH": 50, "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 32, "WIDTH_PER_GROUP": 4}
    resnets |= {"DEFORM_ON_PER_STAGE": [False, False, True, True], "DEFORM_MODULATED": True}
    cfg = tiny_cfg("MODEL.BACKBONE.NAME", "build_fcos_d2_resnet_fpn_backbone", *options)
    for key, value in resnets.items():
        if f"MODEL.RESNETS.{key}" not in options:
            cfg.MODEL.RESNETS[key] = value
    return cfg


def resnet(*options) -> nn.Module:
    return build_backbone(resnet_cfg(*options), ShapeSpec(channels=3)).bottom_up


def make_block(modulated: bool, **options) -> DeformBottleneckBlock:
    """Returns a newly initialized block, whose offsets are 0 and whose masks are 1/2."""
    layer = DeformBottleneckBlock(
        16, 24, bottleneck_channels=8, norm="BN", deform_modulated=modulated, **options
    )
    return use_torchvision_deform_conv(layer).eval()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"num_groups": 2}, {"dilation": 2}])
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_block_with_zero_offsets_matches_a_plain_block(modulated, options):
    deformable = make_block(modulated, deform_num_groups=2, **options)
    plain = BottleneckBlock(16, 24, bottleneck_channels=8, norm="BN", **options).eval()
    weights = {k: v for k, v in deformable.state_dict().items() if "offset" not in k}
    if modulated:
        weights["conv2.weight"] = weights["conv2.weight"] / 2
    plain.load_state_dict(weights)
    x = torch.rand(2, 16, 12, 10)
    torch.testing.assert_close(deformable(x), plain(x))


def test_offsets_are_pairs_of_rows_and_columns_and_masks_come_last():
    deformable = make_block(modulated=True)
    x = torch.rand(1, 8, 9, 9)
    offset, mask = torch.zeros(1, 18, 9, 9), torch.ones(1, 9, 9, 9)
    offset[:, 0::2], offset[:, 1::2] = 2.0, -1.0
    shifted = torch.zeros_like(x)
    shifted[:, :, :-2, 1:] = x[:, :, 2:, :-1]
    moved, still = (deformable.conv2(a, b, mask) for a, b in ((x, offset), (shifted, 0 * offset)))
    # The border differs: its pixels were shifted out of the image.
    torch.testing.assert_close(moved[:, :, 1:6, 2:-1], still[:, :, 1:6, 2:-1])


def test_deformable_parameters_keep_detectron2s_names():
    ours = resnet()
    replaced = {
        name for name, module in ours.named_modules() if "DeformConv2d" in str(type(module))
    }
    assert replaced == {f"res{s}.{b}.conv2" for s, n in ((4, 6), (5, 3)) for b in range(n)}
    assert not any(isinstance(m, (DeformConv, ModulatedDeformConv)) for m in ours.modules())
    names = {name for name in ours.state_dict() if name.startswith("res5.0.conv2")}
    norm = {f"res5.0.conv2.norm.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    assert names - {"res5.0.conv2.norm.num_batches_tracked"} == norm | {
        "res5.0.conv2.weight", "res5.0.conv2_offset.weight", "res5.0.conv2_offset.bias",
    }  # fmt: skip


@pytest.mark.parametrize("modulated, channels", [(False, 18), (True, 27)])
@pytest.mark.parametrize("groups", [1, 2])
def test_deformable_convolutions_follow_the_config(modulated, channels, groups):
    found = resnet(
        "MODEL.RESNETS.DEFORM_MODULATED", modulated, "MODEL.RESNETS.DEFORM_NUM_GROUPS", groups,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, True],
    )  # fmt: skip
    kinds = [type(getattr(found, f"res{s}")[0]) for s in (2, 3, 4, 5)]
    assert [kind is DeformBottleneckBlock for kind in kinds] == [False, True, False, True]
    assert found.res3[0].conv2_offset.out_channels == groups * channels
    assert found(torch.rand(1, 3, 64, 64))["res5"].shape[-2:] == (2, 2)


@pytest.mark.parametrize("freeze_at", [2, 4])
def test_all_unfrozen_parameters_of_a_deformable_detector_are_trained(freeze_at):
    model = FCOS(resnet_cfg("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN"))
    train_step(model, [sample(64, 96, [[8.0, 8, 40, 48]]), sample(64, 64)])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & set(without_gradient(model))
    offsets = "backbone.bottom_up.res4.0.conv2_offset.weight"
    assert (offsets in trained) == (freeze_at < 4)


def test_deformable_convolution_computes_positions_in_full_precision_under_autocast():
    deformable = make_block(modulated=True)
    x = torch.rand(1, 16, 12, 10)
    nn.init.normal_(deformable.conv2_offset.weight, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = deformable(x)
        assert deformable.conv2(x[:, :8], x.new_zeros(1, 18, 12, 10)).dtype == torch.float32
    torch.testing.assert_close(found.float(), deformable(x), rtol=0.05, atol=0.1)
