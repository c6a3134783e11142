"""Tests TimmBackbone: feature maps, trainable parameters, errors, and pretrained weights."""

import logging
import sys

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from timm.layers import FrozenBatchNormAct2d
from torch import nn

from fcos_d2 import InputError
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.modeling import FCOS, TimmBackbone
from fcos_d2.modeling.timm_backbone import Blueprint
from fcos_d2.modeling.timm_weights import TimmWeights

from .tiny import sample, tiny_cfg, train_step, without_gradient

BUILDER = "build_fcos_timm_fpn_backbone"
# One model per kind of feature extractor in timm, and one that returns channels last.
MODELS = {
    "test_resnet": [],
    "test_convnext": [],
    "test_efficientnet": [],
    "dla46_c": [],
    "hrnet_w18_small": [],
    "test_mambaout": [],
    "swin_tiny_patch4_window7_224": ["strict_img_size=False", "depths=[1,1,1,1]", "embed_dim=24"],
}


def timm_cfg(name: str, *options, **fcos):
    levels = ("p3", "p4", "p5")
    options = ("MODEL.BACKBONE.NAME", BUILDER, "MODEL.TIMM.NAME", name, *options)
    return tiny_cfg("MODEL.BACKBONE.FREEZE_AT", 0, *options, levels=levels, **fcos)


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_named_by_stride_and_have_the_declared_channels(name):
    strides = {"res2": 4, "res4": 16, "res5": 32}
    body = TimmBackbone(name, list(strides), options=MODELS[name]).eval()
    maps, shapes = body(torch.rand(2, 3, 96, 160)), body.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == strides
    for key, stride in strides.items():
        assert maps[key].shape == (2, shapes[key].channels, 96 // stride, 160 // stride)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_becomes_a_fully_trainable_detector(name):
    model = FCOS(timm_cfg(name, "MODEL.TIMM.OPTIONS", MODELS[name]))
    train_step(model, [sample(64, 96, [[8.0, 8, 40, 48]]), sample(64, 64)])
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & set(without_gradient(model))
    assert any(key.startswith("backbone.bottom_up.body.") for key in trained)
    assert len(model.eval()([sample(70, 50)])) == 1


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224"])
def test_maps_match_timm_with_channels_first(name):
    body = TimmBackbone(name, ["res3", "res5"], options=MODELS[name]).eval()
    image = torch.rand(1, 3, 64, 96)
    for ours, theirs in zip(body(image).values(), body.body(image), strict=True):
        assert torch.equal(ours.movedim(1, -1) if "swin" in name else ours, theirs)


def test_stages_beyond_the_deepest_map_are_not_built():
    def count(*names):
        return sum(p.numel() for p in TimmBackbone("test_resnet", names).parameters())

    assert count("res3") < count("res3", "res4") < count("res3", "res4", "res5")
    assert count("res4") == count("res3", "res4")


# ---- trainable parameters ----


def build_frozen(freeze_at: int, name: str = "test_resnet") -> tuple[TimmBackbone, set[str]]:
    body = TimmBackbone(name, ["res3", "res4", "res5"], freeze_at=freeze_at)
    return body, {key for key, p in body.body.named_parameters() if not p.requires_grad}


def test_freeze_at_freezes_all_layers_before_that_map():
    parameters = {key for key, _ in TimmBackbone("test_resnet").body.named_parameters()}
    stages = ("conv1", "layer1", "layer2", "layer3", "layer4")
    assert build_frozen(0)[1] == build_frozen(-1)[1] == set()
    for freeze_at in (1, 2, 3, 4, 5):
        body, frozen = build_frozen(freeze_at)
        wanted = {key for key in parameters if key.startswith(stages[:freeze_at])}
        # Frozen norms keep their weights as buffers.
        norms = {key for key in wanted if key not in dict(body.body.named_parameters())}
        assert frozen == wanted - norms and norms


@pytest.mark.parametrize("name", ["test_efficientnet", "test_mambaout", "dla46_c"])
def test_training_changes_only_maps_that_are_not_frozen(name):
    body, frozen = build_frozen(3, name)
    assert frozen
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    optimizer = torch.optim.SGD([p for p in body.parameters() if p.requires_grad], lr=1.0)
    image = torch.rand(2, 3, 64, 64)
    before = {key: value.detach().clone() for key, value in body.eval()(image).items()}
    for _ in range(2):
        body.train()(image)["res5"].square().mean().backward()
        optimizer.step()
    after = body.eval()(image)
    assert torch.equal(before["res3"], after["res3"])
    assert not torch.allclose(before["res5"], after["res5"])
    assert all(norm.num_batches_tracked == 2 for norm in norms)


def test_freeze_at_a_map_that_the_model_lacks_is_rejected():
    with pytest.raises(
        InputError, match=r"FREEZE_AT must be one of \[0, 2, 3, 4, 5\] for test_conv"
    ):
        build_frozen(1, "test_convnext")


def test_frozen_norm_has_constant_statistics_and_keeps_its_activation():
    plain, frozen = (
        TimmBackbone("test_efficientnet", norm=norm).eval() for norm in ("", "FrozenBN")
    )
    frozen.load_state_dict(plain.state_dict(), strict=False)
    assert any(isinstance(module, FrozenBatchNormAct2d) for module in frozen.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert not any("bn" in name for name, _ in frozen.named_parameters())
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(plain(image), frozen.train()(image))


def test_sync_bn_replaces_norms_that_are_not_frozen():
    body = TimmBackbone("test_resnet", norm="SyncBN", freeze_at=2)
    norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert any("Frozen" in type(module).__name__ for module in body.modules())


def test_parameters_that_no_map_depends_on_are_not_trained():
    """HRNet's last stage computes each of its four outputs with separate weights."""
    body = TimmBackbone("hrnet_w18_small", ["res5"])
    image = torch.rand(1, 3, 64, 64)
    body(image)["res5"].sum().backward()
    unused = {key for key, p in body.named_parameters() if p.grad is None}
    assert unused == {key for key, p in body.named_parameters() if not p.requires_grad} != set()


def test_vovnet_builder_adds_attention_to_all_blocks():
    def attention(builder):
        with torch.device("meta"):
            cfg = timm_cfg("ese_vovnet39b", "MODEL.BACKBONE.NAME", builder)
            body = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up.body
        return [block.attn is not None for block in body.modules() if hasattr(block, "attn")]

    assert attention(BUILDER) == [True, True, False, True, False, True]
    assert attention("build_fcos_d2_vovnet_fpn_backbone") == [True] * 6


def test_options_are_passed_to_timm():
    body = TimmBackbone("test_resnet", options=["drop_path_rate=0.5", "stem_width=8"])
    assert body.body.conv1[0].out_channels == 8
    assert any(type(module).__name__ == "DropPath" for module in body.modules())


@pytest.mark.parametrize(
    "key, value",
    [("NAME", "test_efficientnet"), ("NORM", "FrozenBN"), ("OPTIONS", ["drop_path_rate=0.5"])],
)
def test_changing_a_key_changes_the_backbone(key, value):
    cfg = timm_cfg("test_resnet")
    assert key in cfg.MODEL.TIMM and len(cfg.MODEL.TIMM) == 3
    before = repr(build_backbone(cfg, ShapeSpec(channels=3)))
    cfg.MODEL.TIMM[key] = value
    assert repr(build_backbone(cfg, ShapeSpec(channels=3))) != before


# ---- errors ----


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("", {}, "timm has no model ''; timm.list_models"),
        ("resnet51", {}, "no model 'resnet51'; did you mean resnet5"),
        ("mobilenetv4", {}, "did you mean mobilenetv4_conv_"),
        ("resnet50.a9_in1k", {}, "Invalid pretrained tag"),
        ("test_vit", {}, "only has .*stride 16, .*choose a model .*such as convnext_tiny"),
        ("sequencer2d_s", {}, "stride 7, 14, but an FPN"),
        ("swinv2_cr_tiny_ns_224", {}, "arbitrary size .*OPTIONS '\\[\"strict_img_size=False\"\\]'"),
        ("test_maxvit", {}, "does not accept images of arbitrary size .*choose another model"),
        ("inception_v4", {}, r"stride 2 has size \(61, 93\) .* instead of \(64, 96\)"),
        ("test_resnet", {"out_features": ["res6"]}, r"res1, res2, .*got .*IN_FEATURES \['res6'\]"),
        ("test_resnet", {"out_features": []}, r"got MODEL.FPN.IN_FEATURES \[\]"),
        ("test_resnet", {"norm": "BN"}, "MODEL.TIMM.NORM must be one of .*got 'BN'"),
        ("test_resnet", {"freeze_at": 7}, "FREEZE_AT must be one of .*got 7"),
        ("test_resnet", {"options": ["depth=3"]}, "unexpected keyword.*correct MODEL.TIMM.OPTIONS"),
    ],
)
def test_invalid_model_or_option_is_rejected_with_advice(name, options, message):
    with pytest.raises(InputError, match=message):
        TimmBackbone(name, **options)


def test_missing_timm_is_an_error_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="not installed; install it with: pip install timm"):
        TimmBackbone("resnet18")


# ---- timm://NAME ----


@pytest.fixture
def downloads(monkeypatch, tmp_path) -> list[str]:
    """Replaces timm's downloads; returns the names of the models that were requested."""
    requested, create = [], timm.create_model

    def create_model(name, pretrained=False, **options):
        if pretrained:
            requested.append(name)
            torch.manual_seed(len(name))
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    return requested


@pytest.mark.parametrize("norm", ["", "FrozenBN"])
def test_weights_of_timm_are_downloaded_once_and_fill_the_backbone(norm, downloads):
    name = "test_resnet.r160_in1k"
    model = FCOS(
        timm_cfg("test_resnet", "MODEL.TIMM.NORM", norm, "MODEL.WEIGHTS", f"timm://{name}")
    )
    assert downloads == []
    for _ in range(2):
        checkpointer = Checkpointer(model)
        checkpointer.reset_class_layer = True  # as at the start of training
        checkpointer.load(f"timm://{name}")
    assert downloads == [name]
    torch.manual_seed(len(name))
    theirs = timm.create_model("test_resnet", features_only=True).state_dict()
    ours = model.backbone.bottom_up.body.state_dict()
    assert set(theirs) - set(ours) == {k for k in theirs if norm and "num_batches" in k}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet51", "no weights of this name; did you mean timm://resnet"),
        ("dla34.in22k", "did you mean timm://dla34.in1k\\?"),
        ("ese_vovnet99b", "did you mean timm://ese_vovnet"),
        ("", "timm.list_pretrained\\(\\) has all names"),
    ],
)
def test_unknown_weights_are_rejected(name, message, downloads):
    with pytest.raises(InputError, match=f"MODEL.WEIGHTS timm://{name}: .*{message}"):
        TimmWeights()._get_local_path(f"timm://{name}")
    assert downloads == []


def test_model_name_without_tag_selects_the_default_weights(downloads):
    TimmWeights()._get_local_path("timm://test_resnet")
    assert downloads == ["test_resnet"]


def test_failed_download_is_a_one_line_error(monkeypatch, downloads):
    def offline(self, *arguments, **options):
        raise FileNotFoundError("check your connection")

    monkeypatch.setattr(Blueprint, "create", offline)
    with pytest.raises(InputError, match="from timm://dla34.in1k: check your connection"):
        Checkpointer(nn.Linear(1, 1)).load("timm://dla34.in1k")


@pytest.mark.parametrize("fits", [True, False])
def test_mismatched_pixel_statistics_are_warned_about(fits, caplog):
    options = ["MODEL.WEIGHTS", "timm://test_resnet.r160_in1k"]
    if fits:
        options += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [127.5] * 3]
        options += ["MODEL.PIXEL_STD", [127.5] * 3]
    with caplog.at_level(logging.WARNING):
        cfg = timm_cfg("test_resnet", *options)
        mean, std = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up.pixel_statistics
    assert mean == std == [127.5] * 3
    warned = [m for m in caplog.messages if "RGB, MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in m]
    assert len(warned) == (not fits)
