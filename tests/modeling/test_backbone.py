"""build_fpn: which levels there are, what they are computed from, and what is refused."""

import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from fcos_d2.modeling import build_fpn

from .tiny import STRIDES, TinyBottomUp, tiny_cfg, tiny_fcos


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
    assert {name: spec.stride for name, spec in fpn.output_shape().items()} == {
        name: STRIDES[name] for name in names
    }
    assert {name: tuple(t.shape[1:]) for name, t in maps.items()} == {
        name: (64, 128 // STRIDES[name], -(-192 // STRIDES[name])) for name in names
    }
    if top_levels:
        assert fpn.top_block.p6.in_channels == channels


@pytest.mark.parametrize("top_levels", [1, 2])
@pytest.mark.parametrize("source, output_matters", [("p5", True), ("res5", False)])
def test_top_levels_are_computed_from_the_map_they_are_asked_from(
    top_levels, source, output_matters
):
    """P5 is C5 after an output convolution; only in the first case it lies on the way to P6."""
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
    cfg = tiny_cfg("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone")
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
def test_top_levels_that_cannot_be_are_refused(stages, fcos, message):
    with pytest.raises(ValueError, match=f"FCOS: MODEL.FCOS.*{message}"):
        make_fpn(*stages, **fcos)


@pytest.mark.parametrize("in_features", [[], ["res6"]])
def test_pyramid_needs_feature_maps_that_exist(in_features):
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
def test_head_levels_that_do_not_fit_the_backbone_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_fcos(**options)


def test_levels_that_are_computed_for_nothing_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        tiny_fcos()
        assert not caplog.messages
        tiny_fcos(TOP_LEVELS=2)
    assert "the backbone computes p6, p7" in caplog.messages[0]
