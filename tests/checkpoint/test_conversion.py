"""Weights of every other FCOS under our names: each layout, its variants, and what they trap."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from fcos_d2 import InputError, add_fcos_config
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import Renaming, fit, read, unwrap, write
from fcos_d2.checkpoint.formats import LAYOUTS

from . import peer_weights
from .peer_weights import CHANNELS, LEVELS, NUM_CLASSES, small_cfg

pytest_plugins = ["tests.script"]

DCN = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
DCN += ("MODEL.RESNETS.DEFORM_MODULATED", True)
CAFFE = [102.9801, 115.9465, 122.7717]
MSRA = [103.53, 116.28, 123.675]
BGR = ("INPUT.FORMAT", "BGR", "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
RGB = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", MSRA[::-1], "MODEL.PIXEL_STD")
RGB += ([58.395, 57.12, 57.375], "MODEL.RESNETS.STRIDE_IN_1X1", False)

# Name -> (layout, its weights, options of the config that they are for, its FCOS keys).
VARIANTS = {
    "original": ("original", {}, (), {"CONVENTION": "original_imprv"}),
    "original, paper": ("original", {}, (), {"CONVENTION": "original"}),
    "original, dcn": (
        "original",
        {"deformable": True},
        DCN,
        {"CONVENTION": "original_imprv", "USE_DEFORMABLE": True},
    ),
    "adelaidet": ("adelaidet", {}, (), {}),
    "adelaidet, iou": ("adelaidet", {}, (), {"BOX_QUALITY": "iou"}),
    "adelaidet, dcn": ("adelaidet", {"deformable": True}, DCN, {"USE_DEFORMABLE": True}),
    "adelaidet, bn": ("adelaidet", {"batch_norm": True}, (), {"NORM": "BN"}),
    "adelaidet, shared": (
        "adelaidet",
        {"shared": True},
        (),
        {"NUM_SHARE_CONVS": 4, "NUM_CLS_CONVS": 0, "NUM_BOX_CONVS": 0},
    ),
    "adelaidet, rt": (
        "adelaidet",
        {"levels": 3, "shared": True, "batch_norm": True},
        (),
        {"NUM_SHARE_CONVS": 4, "NUM_CLS_CONVS": 0, "NUM_BOX_CONVS": 0, "NORM": "SyncBN"},
    ),
    "detectron2": ("detectron2", {}, (), {"CONVENTION": "detectron2"}),
    "detectron2, bn": (
        "detectron2",
        {"batch_norm": True},
        (),
        {"CONVENTION": "detectron2", "NORM": "BN"},
    ),
    "cvpods": ("cvpods", {}, (), {"LOCATION_OFFSET": 0.0, "RANK_WITH_CTR": False}),
    "torchvision": ("torchvision", {}, RGB, {"CONVENTION": "torchvision"}),
    "torchvision, 0.12": ("torchvision", {"old": True}, RGB, {"CONVENTION": "torchvision"}),
    "mmdetection": ("mmdetection", {}, (), {"CONVENTION": "mmdet_tricks"}),
    "mmdetection, base": ("mmdetection", {"bias": False}, (), {"CONVENTION": "mmdet_base"}),
    "mmdetection, 2.0": (
        "mmdetection",
        {"bias": False, "legacy": True},
        (),
        {"CONVENTION": "mmdet_base"},
    ),
    "mmdetection, dcn": (
        "mmdetection",
        {"deformable": True},
        DCN,
        {"CONVENTION": "mmdet_tricks", "USE_DEFORMABLE": True},
    ),
    "mmdetection, bn": (
        "mmdetection",
        {"batch_norm": True},
        (),
        {"CONVENTION": "mmdet_tricks", "NORM": "BN"},
    ),
}
WRAPPERS = {
    "bare": lambda state: state,
    "trainer": lambda state: {"model": state, "optimizer": {"state": {}}, "iteration": 7},
    "mmengine": lambda state: {
        "meta": {"epoch": 12},
        "state_dict": state,
        "ema_state_dict": {f"module.{key}": value + 1 for key, value in state.items()},
    },
    "distributed": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled": lambda state: {
        "state_dict": {f"_orig_mod.module.{k}": v for k, v in state.items()}
    },
    "averaged": lambda state: {
        "model": {key: value + 1 for key, value in state.items()},
        "model_ema": {
            "n_averaged": torch.tensor(3),
            **{f"module.{key}": value for key, value in state.items()},
        },
    },
}


def caffe_mean(name: str) -> list[float]:
    return CAFFE if name.startswith("original") or "bias" in VARIANTS[name][1] else MSRA


@pytest.fixture(params=VARIANTS)
def variant(request):
    """(Name of the layout, its weights, config)."""
    layout, arguments, options, fcos = VARIANTS[request.param]
    if "INPUT.FORMAT" not in options:
        options = (*options, *BGR, "MODEL.PIXEL_MEAN", caffe_mean(request.param))
    peer = getattr(peer_weights, layout)(**arguments)
    return layout, peer, small_cfg(*options, levels=arguments.get("levels", LEVELS), **fcos)


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(got[key], expected[key])]


def load(cfg, content, tmp_path):
    """The model of ``cfg`` with weights from a file that holds ``content``."""
    torch.save(content, tmp_path / "weights.pth")
    model = build_model(cfg)
    Checkpointer(model).load(str(tmp_path / "weights.pth"))
    return model


def test_every_variant_loads_completely_and_agrees_with_its_config(variant, tmp_path, caplog):
    layout, peer, cfg = variant
    caplog.set_level("INFO", logger="fcos_d2")
    state = load(cfg, {"model": peer.theirs}, tmp_path).state_dict()
    loaded = {key: value for key, value in state.items() if key in peer.ours}
    assert_same(loaded, peer.ours)
    rest = [key for key in state if key not in peer.ours]
    assert all(re.search(r"scale$|num_batches_tracked$|moving_fg$", key) for key in rest)
    assert all((state[key] == 1).all() for key in rest if key.endswith("scale"))
    (line,) = [line for line in caplog.messages if "recognised as" in line]
    assert f"recognised as {layout}, convention " in line
    assert f"{len(peer.ours)} tensors loaded; the config agrees with it" in line


def test_every_variant_survives_the_way_to_adelaidet_and_back(variant):
    layout, peer, _ = variant
    ours = read(peer.theirs).weights
    there = write(ours, "adelaidet")
    assert all(key.startswith(("backbone.", "proposal_generator.fcos_head.")) for key in there)
    back = read(there)
    assert back.layout == "adelaidet"
    assert_same(fit(back.weights, ours), ours)
    if layout == "adelaidet":
        assert_same(there, peer.theirs)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("layout", ["original", "adelaidet", "torchvision", "mmdetection"])
def test_wrappers_and_prefixes_are_taken_off(layout, wrap):
    peer = getattr(peer_weights, layout)()
    recognised = read(wrap(peer.theirs))
    assert recognised.layout == layout
    assert_same(recognised.weights, peer.ours)


def test_frozen_norms_of_the_original_have_no_epsilon_and_batch_norms_have_one():
    peer = peer_weights.original()
    frozen, trained = "backbone.body.layer1.0.bn1", "backbone.body.layer2.0.bn2"
    for name in (frozen, trained):
        peer.theirs[f"{name}.running_var"] = torch.full_like(peer.theirs[f"{name}.weight"], 0.25)
    peer.theirs[f"{trained}.num_batches_tracked"] = torch.tensor(100)
    weights = read(peer.theirs).weights
    got = weights["backbone.bottom_up.res2.0.conv1.norm.running_var"]
    assert torch.allclose(got, torch.tensor(0.24999), rtol=0, atol=1e-8)
    # Dividing by sqrt(0.24999 + 1e-5) is dividing by sqrt(0.25).
    assert torch.equal((got + 1e-5).sqrt(), torch.full_like(got, 0.5))
    kept = weights["backbone.bottom_up.res3.0.conv2.norm.running_var"]
    assert torch.equal(kept, torch.full_like(kept, 0.25))


def test_other_layouts_keep_their_variances():
    for peer in (peer_weights.adelaidet(), peer_weights.torchvision(), peer_weights.mmdetection()):
        name = "backbone.bottom_up.stem.conv1.norm.running_var"
        assert torch.equal(read(peer.theirs).weights[name], peer.ours[name])


def numbered_rows(classes: int) -> dict:
    """torchvision's weights whose class layer has row r filled with r."""
    theirs = peer_weights.torchvision(classes=classes).theirs
    rows = torch.arange(float(classes))
    layer = "head.classification_head.cls_logits"
    theirs[f"{layer}.bias"] = rows
    theirs[f"{layer}.weight"] = rows.view(-1, 1, 1, 1).expand(-1, CHANNELS, 3, 3)
    return theirs


def test_91_rows_become_80_by_category_id():
    recognised = read(numbered_rows(91))
    rows = recognised.weights["head.cls_logits.bias"].tolist()
    assert len(rows) == 80 and recognised.needs.settings["MODEL.FCOS.NUM_CLASSES"] == 80
    # person, ..., fire hydrant (11), stop sign (13), ..., backpack (27), ..., toothbrush (90)
    assert rows[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert rows[24] == 27 and rows[79] == 90
    assert not set(rows) & {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    weight = recognised.weights["head.cls_logits.weight"]
    assert weight[:, 0, 0, 0].tolist() == rows


@pytest.mark.parametrize(
    "rows, wanted, kept",
    [(91, 91, range(91)), (5, None, range(5)), (5, 4, range(1, 5)), (5, 5, range(5))],
)
def test_rows_for_no_class_go_only_where_the_model_has_none(rows, wanted, kept):
    weights = read(numbered_rows(rows), wanted).weights
    assert weights["head.cls_logits.bias"].tolist() == list(kept)


def test_centerness_is_found_under_all_its_names():
    names = {
        "original": "rpn.head.centerness",
        "adelaidet": "proposal_generator.fcos_head.ctrness",
        "detectron2": "head.ctrness",
        "torchvision": "head.regression_head.bbox_ctrness",
        "mmdetection": "bbox_head.conv_centerness",
        "cvpods": "head.centerness",
    }
    assert names.keys() == {layout.name for layout in LAYOUTS}
    for layout, name in names.items():
        theirs = getattr(peer_weights, layout)().theirs
        theirs[f"{name}.bias"] = torch.tensor([0.125])
        weights = read(theirs).weights
        assert weights["head.ctrness.bias"].tolist() == [0.125]
        assert not [key for key in weights if "centerness" in key]


def test_biases_that_mmdetection_leaves_out_are_zero():
    peer = peer_weights.mmdetection(bias=False)
    assert "bbox_head.cls_convs.0.conv.bias" not in peer.theirs
    bias = read(peer.theirs).weights["head.bbox_tower.9.bias"]
    assert torch.equal(bias, torch.zeros(CHANNELS))


def test_exponential_regression_in_pixels(tmp_path):
    """Distance exp(scale * x) pixels = exp(scale * x) / stride strides, at every point."""
    peer = peer_weights.original()
    box, scale = "rpn.head.bbox_pred", 0.5
    peer.theirs[f"{box}.weight"].zero_()
    peer.theirs[f"{box}.bias"].copy_(torch.tensor([2.0, 4.0, 6.0, 8.0]))
    for level in range(LEVELS):
        peer.theirs[f"rpn.head.scales.{level}.scale"].fill_(scale)
    model = load(small_cfg(CONVENTION="original"), peer.theirs, tmp_path)
    maps = [torch.randn(1, CHANNELS, 2, 2) for _ in range(LEVELS)]
    expected = torch.tensor([2.718281828, 7.389056099, 20.085536923, 54.598150033])
    for ltrb, stride in zip(model.head(maps).ltrb, model.head.strides, strict=True):
        pixels = ltrb[0, :, 1, 1] * stride
        assert torch.allclose(pixels, expected, rtol=1e-6)


def needs_of(theirs: dict, **rest):
    return read({"state_dict": theirs, **rest}).needs


def test_pixels_of_a_resnext_are_those_it_was_trained_with():
    """From the shape of its grouped convolutions."""
    peer = peer_weights.adelaidet()
    name = "backbone.bottom_up.res2.0.conv2.weight"
    for groups, std, in_1x1 in ((1, 1.0, True), (32, 57.375, False), (64, 1.0, False)):
        peer.theirs[name] = torch.zeros(64, 64 // groups, 3, 3)
        settings = needs_of(peer.theirs).settings
        assert settings["MODEL.PIXEL_STD"][0] == std
        assert settings["MODEL.RESNETS.STRIDE_IN_1X1"] == in_1x1
    theirs = peer_weights.mmdetection().theirs
    theirs["backbone.layer1.0.conv2.weight"] = torch.zeros(64, 1, 3, 3)
    settings = needs_of(theirs).settings
    assert settings["INPUT.FORMAT"] == "RGB" and not settings["MODEL.RESNETS.STRIDE_IN_1X1"]


MMDET_2 = """
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', style='pytorch', init_cfg=dict(type='Normal', std=0.01)),
    bbox_head=dict(type='FCOSHead', norm_on_bbox=True, centerness_on_reg=False))
"""


@pytest.mark.parametrize("key", ["cfg", "config"])
def test_config_that_mmdetection_saves_decides_what_keys_do_not_tell(key):
    theirs = peer_weights.mmdetection(bias=False).theirs
    assert needs_of(theirs).conventions == ("mmdet_base",)
    conventions, settings = needs_of(theirs, meta={key: MMDET_2})
    assert conventions == ("mmdet_tricks",)
    assert settings == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
        "MODEL.PIXEL_STD": [4.0, 5.0, 6.0],
        "MODEL.FCOS.CENTERNESS_ON_REG": False,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.NUM_CLASSES": NUM_CLASSES,
    }
    assert needs_of(theirs, meta={key: "not = ( python"}).conventions == ("mmdet_base",)


def test_differences_from_the_config_are_named_with_the_keys_to_set(tmp_path, caplog):
    peer = peer_weights.torchvision()
    load(small_cfg(NMS_TH=0.5), peer.theirs, tmp_path)
    (line,) = [line for line in caplog.messages if "recognised as torchvision" in line]
    assert "\n" not in line
    for part in (
        "set MODEL.FCOS.CONVENTION torchvision (",
        "LOCATION_OFFSET 0.0 instead of 0.5",
        "NMS_TH 0.6 instead of 0.5",
        "INPUT.FORMAT RGB instead of BGR",
        "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] instead of [103.53, 116.28, 123.675]",
        "MODEL.RESNETS.STRIDE_IN_1X1 False instead of True",
    ):
        assert part in line
    assert "NUM_CLASSES" not in line


def test_of_two_conventions_the_one_in_use_is_compared(tmp_path, caplog):
    options = (*BGR, "MODEL.PIXEL_MEAN", CAFFE)
    peer = peer_weights.original()
    load(small_cfg(*options, CONVENTION="original", NMS_TH=0.5), peer.theirs, tmp_path)
    (line,) = [line for line in caplog.messages if "recognised as original" in line]
    assert "convention original_imprv or original, " in line
    assert line.endswith("set MODEL.FCOS.CONVENTION original (NMS_TH 0.6 instead of 0.5)")


def refused(cfg, content, tmp_path) -> str:
    """The one line with which weights are refused; the model must be as it was."""
    torch.save(content, tmp_path / "weights.pth")
    model = build_model(cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        Checkpointer(model).load(str(tmp_path / "weights.pth"))
    assert_same(model.state_dict(), before)
    assert "\n" not in str(caught.value) and "weights.pth" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_whatever_is_missing_or_misshapen_is_left_for_the_model_to_refuse(layout):
    peer = getattr(peer_weights, layout)()
    fragile = [key for key in peer.theirs if "head" in key or "conv2.weight" in key]
    for key in fragile[::3]:
        others = {name: value for name, value in peer.theirs.items() if name != key}
        for theirs in (others, {**others, key: torch.zeros(3)}):
            recognised = read(theirs)
            if recognised is None:
                continue  # what tells the layouts apart
            assert len(recognised.weights) >= len(peer.ours) - 5


def test_missing_tensors_are_named_and_nothing_is_loaded(tmp_path):
    peer = peer_weights.mmdetection()
    del peer.theirs["bbox_head.conv_reg.bias"]
    message = refused(small_cfg(CONVENTION="mmdet_tricks"), peer.theirs, tmp_path)
    assert "they lack head.bbox_pred.bias; recognised as mmdetection" in message


def test_unexpected_tensors_are_named_by_their_own_names(tmp_path):
    peer = peer_weights.original()
    peer.theirs["rpn.mask_head.weight"] = torch.zeros(3)
    message = refused(small_cfg(CONVENTION="original"), peer.theirs, tmp_path)
    assert "there is no place for rpn.mask_head.weight" in message


def test_factors_that_are_not_1_need_a_model_that_has_them(tmp_path):
    peer = peer_weights.adelaidet()
    cfg = small_cfg(USE_SCALE=False)
    message = refused(cfg, peer.theirs, tmp_path)
    assert "there is no place for head.scales.0.scale" in message
    for level in range(LEVELS):
        peer.theirs[f"proposal_generator.fcos_head.scales.{level}.scale"].fill_(1.0)
    load(cfg, peer.theirs, tmp_path)


def test_other_shapes_are_named_with_what_the_weights_need(tmp_path):
    message = refused(small_cfg(NUM_CLASSES=3), peer_weights.adelaidet().theirs, tmp_path)
    assert "head.cls_logits.weight expected (3, 32, 3, 3), got (5, 32, 3, 3)" in message
    assert "MODEL.FCOS.NUM_CLASSES 5 instead of 3" in message


def test_a_backbone_alone_starts_a_training_and_is_no_detector(tmp_path):
    peer = peer_weights.adelaidet()
    backbone = {k: v for k, v in peer.theirs.items() if k.startswith("backbone.bottom_up.")}
    message = refused(small_cfg(), backbone, tmp_path)
    assert "they lack backbone.fpn_lateral3.weight" in message and "more" in message
    model = build_model(small_cfg())
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = True
    checkpointer.load(str(tmp_path / "weights.pth"))
    assert torch.equal(
        model.backbone.bottom_up.stem.conv1.weight,
        peer.ours["backbone.bottom_up.stem.conv1.weight"],
    )


def test_weights_of_something_else_hold_nothing_even_for_a_training(tmp_path):
    torch.save({"model": {"transformer.queries": torch.zeros(3)}}, tmp_path / "detr.pth")
    checkpointer = Checkpointer(build_model(small_cfg()))
    checkpointer.reset_class_layer = True
    with pytest.raises(InputError, match="detr.pth holds nothing .* but transformer.queries;"):
        checkpointer.load(str(tmp_path / "detr.pth"))


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_training_on_another_class_count_keeps_all_but_the_class_layer(layout, tmp_path, caplog):
    caplog.set_level("INFO", logger="fcos_d2")
    peer = getattr(peer_weights, layout)()
    torch.save(peer.theirs, tmp_path / "weights.pth")
    model = build_model(small_cfg(NUM_CLASSES=2))
    initial = model.head.cls_logits.weight.clone()
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = True
    checkpointer.load(str(tmp_path / "weights.pth"))
    state = model.state_dict()
    assert torch.equal(model.head.cls_logits.weight, initial)
    loaded = {key: state[key] for key in peer.ours if "cls_logits" not in key}
    assert_same(loaded, {key: peer.ours[key] for key in loaded})
    assert "has 5 classes and the model 2: head.cls_logits.* starts from" in caplog.text
    assert f"{len(loaded)} tensors loaded" in caplog.text


def with_scales(peer, *scales: float) -> dict:
    return {
        **peer.ours,
        **{f"head.scales.{i}.scale": torch.tensor([scale]) for i, scale in enumerate(scales)},
    }


@pytest.mark.parametrize("layout", ["detectron2", "torchvision"])
def test_one_factor_for_all_levels_goes_into_the_prediction(layout):
    peer = getattr(peer_weights, layout)(**({"classes": 80} if layout == "torchvision" else {}))
    written = write(with_scales(peer, *[1.5] * LEVELS), layout)
    back = read(written).weights
    expected = dict(peer.ours)
    for leaf in ("weight", "bias"):
        expected[f"head.bbox_pred.{leaf}"] = peer.ours[f"head.bbox_pred.{leaf}"] * 1.5
    assert_same(back, expected)


@pytest.mark.parametrize("layout", ["detectron2", "torchvision"])
def test_different_factors_cannot_be_written_where_there_are_none(layout):
    ours = with_scales(peer_weights.detectron2(), 1.0, 1.0, 1.25, 1.0, 1.0)
    with pytest.raises(InputError, match="head.scales are 1, 1, 1.25, 1, 1: .*written exactly"):
        write(ours, layout)


def test_80_classes_become_91_rows_of_which_11_never_win():
    peer = peer_weights.torchvision(classes=80)
    written = write(peer.ours, "torchvision")
    layer = "head.classification_head.cls_logits"
    assert written[f"{layer}.weight"].shape == (91, CHANNELS, 3, 3)
    unused = written[f"{layer}.weight"].flatten(1).abs().sum(1) == 0
    assert unused.nonzero().flatten().tolist() == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert (written[f"{layer}.bias"][unused].sigmoid() == 0).all()
    assert_same(read(written).weights, peer.ours)


def test_other_class_counts_get_a_row_for_the_background():
    written = write(peer_weights.torchvision().ours, "torchvision")
    layer = written["head.classification_head.cls_logits.weight"]
    assert len(layer) == NUM_CLASSES + 1 and not layer[0].any() and layer[1:].any()


def test_batch_norms_are_written_where_their_weights_can_be_shared():
    peer = peer_weights.detectron2(batch_norm=True)
    assert_same(write(peer.ours, "detectron2"), peer.theirs)
    with pytest.raises(InputError, match="group norms"):
        write(peer.ours, "torchvision")
    own = peer_weights.adelaidet(batch_norm=True).ours
    own |= {key: torch.ones(1) for key in own if key.endswith(".scale")}
    with pytest.raises(InputError, match="share the weight of a batch norm.*cls_tower.1"):
        write(own, "detectron2")


@pytest.mark.parametrize(
    "arguments, name",
    [({"shared": True}, "head.share_tower.0"), ({"deformable": True}, "conv2_offset")],
)
def test_what_torchvision_lacks_cannot_be_written(arguments, name):
    ours = peer_weights.adelaidet(**arguments).ours
    ours |= {key: torch.ones(1) for key in ours if key.endswith(".scale")}
    with pytest.raises(InputError, match=f"torchvision has no place for .*{name}"):
        write(ours, "torchvision")


@pytest.mark.parametrize(
    "source, target, key",
    [
        (peer_weights.torchvision(), "adelaidet", "LOCATION_OFFSET 0.5.*need 0.0"),
        (peer_weights.cvpods(), "adelaidet", "LOCATION_OFFSET 0.5.*need 0.0"),
        (peer_weights.mmdetection(bias=False), "adelaidet", "USE_RELU True.*need False"),
        (peer_weights.detectron2(), "torchvision", "LOCATION_OFFSET 0.0.*need 0.5"),
    ],
)
def test_weights_that_would_mean_other_boxes_elsewhere_are_not_written(source, target, key):
    recognised = read(source.theirs)
    with pytest.raises(InputError, match=key):
        write(recognised.weights, target, recognised.needs)


def test_weights_that_mean_the_same_elsewhere_are_written():
    for peer, target in (
        (peer_weights.original(), "adelaidet"),
        (peer_weights.mmdetection(), "adelaidet"),
        (peer_weights.detectron2(), "adelaidet"),
    ):
        recognised = read(peer.theirs)
        assert read(write(recognised.weights, target, recognised.needs)).layout == target


def test_a_layout_that_cannot_be_written_is_refused_with_those_that_can():
    with pytest.raises(InputError, match="choose adelaidet, detectron2, torchvision"):
        write(peer_weights.mmdetection().ours, "mmdetection")


def test_weights_of_this_package_are_nobody_elses():
    assert read({"model": peer_weights.adelaidet().ours, "trainer": {}, "iteration": 3}) is None


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3, "args": None}])
def test_a_checkpoint_without_tensors_is_refused(content, tmp_path):
    with pytest.raises(InputError, match="expected weights by name"):
        unwrap(content)
    assert "cannot be used: expected weights by name" in refused(small_cfg(), content, tmp_path)


def test_names_are_renamed_by_the_first_row_that_fits_in_both_directions():
    rows = (
        ("a{k}.x", "b{k+2}.y"),
        ("t.{i}.conv", "t.{3*i}"),
        ("t.{i}.gn", "t.{3*i+1}"),
        ("r.**", "**"),
    )
    there = Renaming(rows)
    back = Renaming((right, left) for left, right in rows)
    names = {
        "a1.x.weight": "b3.y.weight",
        "t.2.conv.bias": "t.6.bias",
        "t.2.gn.bias": "t.7.bias",
        "r.deep.er.weight": "deep.er.weight",
    }
    for left, right in names.items():
        assert there(left) == right and back(right) == left
    assert there("c.weight") is None and there("a1.xx.weight") is None
    assert back("b1.y.weight") == "r.b1.y.weight"  # there is no a-1
    assert back("t.5.weight") == "r.t.5.weight"  # neither conv nor gn


def dla_names() -> list[str]:
    """Some of DLA-34's in AdelaiDet, and where they are in timm's model."""
    return [
        "base_layer.0",
        "level1.1",
        "level2.project.0",
        "level3.tree1.tree2.conv2",
        "level5.root.bn",
    ]


LEAVES = ("conv", "norm")


def vovnet_names() -> dict[str, str]:
    """All modules with weights of VoVNet-39 in youngwanLEE/vovnet-detectron2: ours by theirs."""
    names = {f"stem.stem_{i}/{leaf}": f"stem_{i - 1}.{leaf}" for i in (1, 2, 3) for leaf in LEAVES}
    for stage, blocks in ((2, 1), (3, 1), (4, 2), (5, 2)):
        for block in range(1, blocks + 1):
            osa = f"OSA{stage}_{block}"
            there, here = f"stage{stage}.{osa}", f"stages_{stage - 2}.blocks.{block - 1}"
            for leaf in LEAVES:
                for i in range(5):
                    names[f"{there}.layers.{i}.{osa}_{i}/{leaf}"] = f"{here}.conv_mid.{i}.{leaf}"
                names[f"{there}.concat.{osa}_concat/{leaf}"] = f"{here}.conv_concat.{leaf}"
            names[f"{there}.ese.fc"] = f"{here}.attn.fc"
    return {theirs: ours.replace("norm", "bn") for theirs, ours in names.items()}


def mobilenet_names() -> dict[str, str]:
    """All modules with weights of MobileNetV2: ours by theirs; blocks hold 4 or 6 of them."""
    names = {"features.0.0": "conv_stem", "features.0.1": "bn1"}
    first = {0: "conv_dw", 1: "bn1", 3: "conv_pw", 4: "bn2"}
    names |= {f"features.1.conv.{i}": f"blocks.0.0.{n}" for i, n in first.items()}
    places = ["1.0", "1.1", "2.0", "2.1", "2.2", "3.0", "3.1", "3.2", "3.3"]
    places += ["4.0", "4.1", "4.2", "5.0", "5.1", "5.2", "6.0"]
    others = {0: "conv_pw", 1: "bn1", 3: "conv_dw", 4: "bn2", 6: "conv_pwl", 7: "bn3"}
    for index, place in enumerate(places, start=2):
        names |= {f"features.{index}.conv.{i}": f"blocks.{place}.{n}" for i, n in others.items()}
    return names


@pytest.mark.parametrize(
    "layout, prefix, names, model, options",
    [
        ("adelaidet", "backbone.bottom_up.", {n: n for n in dla_names()}, "dla34", {}),
        (
            "adelaidet",
            "backbone.bottom_up.",
            vovnet_names(),
            "ese_vovnet39b",
            {"ese_in_all_blocks": True},
        ),
        ("original", "backbone.body.", mobilenet_names(), "mobilenetv2_100", {}),
    ],
)
def test_backbones_that_are_timms_here_get_its_names(layout, prefix, names, model, options):
    pytest.importorskip("timm")
    from fcos_d2.modeling.timm_backbone import TimmBackbone

    peer = getattr(peer_weights, layout)()
    theirs = {key: value for key, value in peer.theirs.items() if not key.startswith(prefix)}
    values = {name: torch.randn(1) for name in names}
    theirs |= {f"{prefix}{name}.weight": value for name, value in values.items()}
    weights = read(theirs).weights
    for name, ours in names.items():
        assert weights[f"backbone.bottom_up.body.{ours}.weight"] is values[name]
    with torch.device("meta"):
        expected = {k for k in TimmBackbone(model, **options).state_dict() if k.endswith("weight")}
    got = {f"body.{ours}.weight" for ours in names.values()}
    assert got <= expected if model == "dla34" else got == expected
    if layout == "adelaidet":
        there = write(weights, "adelaidet")
        assert all(there[f"{prefix}{name}.weight"] is values[name] for name in names)


@pytest.mark.parametrize(
    "config, layout, groups",
    [
        ("original/fcos_R_50_FPN_1x", "original", 1),
        ("original/fcos_imprv_R_101_FPN_2x", "original", 1),
        ("original/fcos_X_101_32x8d_FPN_2x", "original", 32),
        ("original/fcos_imprv_X_101_64x4d_FPN_2x", "original", 64),
        ("fcos_R_50_FPN_1x_iou", "adelaidet", 1),
        ("fcos_X_101_32x8d_dcnv2_FPN_2x", "adelaidet", 32),
        ("fcos_X_101_64x4d_FPN_2x", "adelaidet", 64),
        ("rt/fcos_RT_R_50_FPN_4x_bn", "adelaidet", 1),
        ("detectron2/fcos_R_50_FPN_1x", "detectron2", 1),
        ("torchvision/fcos_R_50_FPN", "torchvision", 1),
        ("mmdetection/fcos_R_50_FPN_1x", "mmdetection", 1),
        ("mmdetection/fcos_X_101_64x4d_FPN_2x", "mmdetection", 64),
        ("mmdetection/fcos_tricks_R_50_FPN_1x", "mmdetection", 1),
    ],
)
def test_published_configs_say_what_published_weights_need(config, layout, groups):
    arguments = {"bias": "tricks" in config} if layout == "mmdetection" else {}
    theirs = getattr(peer_weights, layout)(**arguments).theirs
    conv = next(key for key in theirs if re.search(r"(res2|layer1)\.0\.conv2\.weight$", key))
    theirs[conv] = torch.zeros(64, 64 // groups, 3, 3)
    conventions, settings = read(theirs).needs
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(f"configs/{config}.yaml")
    assert cfg.MODEL.FCOS.CONVENTION in conventions
    del settings["MODEL.FCOS.NUM_CLASSES"]
    for key, value in settings.items():
        used = cfg
        for part in key.split("."):
            used = used[part]
        assert used == value, key


def test_train_net_evaluates_weights_of_others(script, fcos_cfg, tmp_path):
    fcos_cfg.merge_from_file("tiny.yaml")
    fcos_cfg.MODEL.DEVICE = "cpu"
    torch.save(write(build_model(fcos_cfg).state_dict(), "adelaidet"), tmp_path / "theirs.pth")
    result = script("--eval-only", "MODEL.WEIGHTS", "theirs.pth")
    assert result.status == 0 and "bbox" in result.results[0]
    (line,) = [line for line in result.out.splitlines() if "recognised as" in line]
    assert "theirs.pth: recognised as adelaidet, convention adelaidet, " in line


def test_key_counts_and_parameters_are_the_published_ones():
    """peers' R-50: 324 tensors and 32,244,250 parameters and constants in the authors' two."""
    assert len(peer_weights.original().theirs) == len(peer_weights.adelaidet().theirs) == 324
    assert len(peer_weights.detectron2().theirs) == 319
    assert len(peer_weights.torchvision().theirs) == 372
    assert len(peer_weights.torchvision(old=True).theirs) == 319
    assert len(peer_weights.mmdetection().theirs) == 377
    assert len(peer_weights.mmdetection(bias=False).theirs) == 369
