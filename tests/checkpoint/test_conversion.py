"""Converts weights from and to every other FCOS implementation."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from fcos_d2 import InputError, add_fcos_config
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import adapt_weights, export_weights, import_weights, rename

from ..modeling.tiny import tiny_fcos
from . import peers
from .peers import LEVELS, MODELS

COCO = 80

pytest_plugins = ["tests.script"]
pytestmark = pytest.mark.filterwarnings("ignore:.*which is a no-op")  # models on the meta device

PADDLE_LEAVES = {"_mean": "running_mean", "_variance": "running_var", "scale_reg": "scale"}


def config(name: str, *options):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(f"configs/{name}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.FCOS.NUM_CLASSES", COCO, *options])
    return cfg


def meta_model(name: str, *options) -> torch.nn.Module:
    """Builds the detector of a config on the meta device."""
    cfg = config(name, *options)
    with torch.device("meta"):
        model = build_model(cfg)
    for key in ("pixel_mean", "pixel_std"):
        value = torch.tensor(cfg.MODEL[key.upper()]).view(-1, 1, 1)
        model.register_buffer(key, value, persistent=False)
    return model


def load(model, content, tmp_path, **attributes):
    torch.save(content, tmp_path / "weights.pth")
    checkpointer = Checkpointer(model)
    vars(checkpointer).update(attributes)
    checkpointer.load(str(tmp_path / "weights.pth"))
    return model


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(got[key], expected[key])]


def without_numbers(name: str) -> str:
    return re.sub(r"\d+|(?<=\d)[a-f](?=\.)", "#", name)


@pytest.mark.parametrize("model", MODELS)
def test_every_published_model_loads_completely_and_agrees_with_its_config(model, tmp_path, caplog):
    if re.search("DLA|_V_|MNV2", model):
        pytest.importorskip("timm")
    theirs, format_name = peers.random_weights(model), model.partition("_")[0]
    recognized = import_weights({"model": theirs})
    assert recognized.format == format_name
    caplog.set_level("INFO", logger="fcos_d2")
    state = load(meta_model(*MODELS[model]), theirs, tmp_path).state_dict()
    (line,) = [line for line in caplog.messages if "recognized as" in line]
    assert f"recognized as {format_name}, convention " in line
    assert f"{len(recognized.weights)} tensors loaded; the config agrees with it" in line
    # Names and shapes agree, except for counters and for level scales that some formats lack.
    extra = {key for key in state if re.search(r"num_batches_tracked$|moving_fg$", key)}
    if format_name in ("detectron2", "torchvision"):
        extra |= {key for key in state if key.endswith(".scale")}
    assert {key: value.shape for key, value in recognized.weights.items()} == {
        key: value.shape for key, value in state.items() if key not in extra
    }
    back = import_weights(export_weights(recognized.weights, "adelaidet"))
    assert back.format == "adelaidet"
    assert_same(adapt_weights(back.weights, recognized.weights), recognized.weights)


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_module_is_mapped_to_its_counterpart(model):
    theirs = peers.random_weights(model)
    weights = import_weights(theirs, num_classes=91).weights  # keeps all of torchvision's rows
    checked = set()
    for key, value in theirs.items():
        module, _, leaf = key.rpartition(".")
        if module in peers.COUNTERPARTS and leaf != "num_batches_tracked":
            ours, leaf = peers.COUNTERPARTS[module], PADDLE_LEAVES.get(leaf, leaf)
            ours = ours if f"{ours}.{leaf}" in weights else f"{ours}.1"  # of one level
            got = weights[f"{ours}.{leaf}"]
            # 1e-5 has been subtracted from the original's variances.
            torch.testing.assert_close(got.flatten(), value.flatten(), rtol=0, atol=1.1e-5)
            checked.add(without_numbers(module))
    # All modules except DLA's unused projections.
    kinds = {without_numbers(key.rpartition(".")[0]) for key in theirs}
    assert {k for k in kinds - checked if not k.startswith("backbone.bottom_up.level")} == set()
    assert len(kinds - checked) <= 1


WRAPPERS = {
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
    "paddle": lambda state: {
        **{key: value.numpy() for key, value in state.items()},
        "StructuredToParameterName@@": dict.fromkeys(state, "conv2d_0.w_0"),
    },
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_and_prefixes_are_removed(wrap):
    theirs = peers.random_weights("mmdetection_R_50_tricks")
    assert_same(import_weights(wrap(theirs)).weights, import_weights(theirs).weights)


def test_epsilon_of_frozen_norms_is_subtracted_from_variances_of_the_original():
    theirs = peers.random_weights("original_R_50")
    frozen, trained = "backbone.body.layer1.0.bn1", "backbone.body.layer2.0.bn2"
    for name in (frozen, trained):
        theirs[f"{name}.running_var"] = torch.full((3,), 0.25)
    theirs[f"{trained}.num_batches_tracked"] = torch.tensor(100)
    weights = import_weights(theirs).weights
    got = weights["backbone.bottom_up.res2.0.conv1.norm.running_var"]
    # Dividing by sqrt(0.24999 + 1e-5) is dividing by sqrt(0.25).
    assert torch.equal((got + 1e-5).sqrt(), torch.full_like(got, 0.5))
    kept = weights["backbone.bottom_up.res3.0.conv2.norm.running_var"]
    assert torch.equal(kept, torch.full_like(kept, 0.25))


def torchvision_weights(rows: torch.Tensor) -> dict:
    """Returns weights of torchvision with a class layer whose rows contain these values."""
    layer = "head.classification_head.cls_logits"
    weight = rows.view(-1, 1, 1, 1).expand(-1, 256, 3, 3)
    theirs = peers.random_weights("torchvision_R_50")
    return {**theirs, f"{layer}.bias": rows, f"{layer}.weight": weight}


@pytest.mark.parametrize(
    "rows, wanted, kept",
    [
        (91, 91, range(91)),
        (91, None, [r for r in range(91) if r not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]),
        (5, None, range(5)),
        (5, 4, range(1, 5)),
        (5, 5, range(5)),
    ],
)
def test_rows_of_torchvisions_class_layer_are_category_ids(rows, wanted, kept):
    theirs = torchvision_weights(torch.arange(float(rows)))
    _, weights, requirements = import_weights(theirs, wanted)
    assert weights["head.cls_logits.bias"].tolist() == list(kept)
    assert weights["head.cls_logits.weight"][:, 0, 0, 0].tolist() == list(kept)
    assert requirements.settings["MODEL.FCOS.NUM_CLASSES"] == len(kept)


# ---- Required settings ----


def required_settings(theirs: dict, **rest):
    return import_weights({"state_dict": theirs, **rest}).requirements


@pytest.mark.parametrize(
    "name, groups",
    [
        *(("original/fcos_X_101_32x8d_FPN_2x", 32), ("original/fcos_X_101_64x4d_FPN_2x", 64)),
        *(("fcos_X_101_32x8d_dcnv2_FPN_2x", 32), ("fcos_X_101_64x4d_FPN_2x", 64)),
        ("mmdetection/fcos_X_101_64x4d_FPN_2x", 64),
    ],
)
def test_pixel_statistics_of_a_resnext_follow_from_its_number_of_groups(name, groups):
    format_name = name.rpartition("/")[0] or "adelaidet"
    theirs = peers.random_weights(f"{format_name}_R_50{'_base' if 'mm' in format_name else ''}")
    conv = next(key for key in theirs if re.search(r"(res2|layer1)\.0\.conv2\.weight$", key))
    theirs[conv] = torch.zeros(64, 64 // groups, 3, 3)
    conventions, settings = required_settings(theirs)
    cfg = config(name)
    assert cfg.MODEL.FCOS.CONVENTION in conventions
    for key, value in settings.items():
        used = cfg
        for part in key.split("."):
            used = used[part]
        assert used == value, key


MMDET_2 = """
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', style='pytorch', init_cfg=dict(type='Normal', std=0.01)),
    bbox_head=dict(type='FCOSHead', norm_on_bbox=True, centerness_on_reg=False))
"""
MMDET_3 = (
    "model = {'data_preprocessor': {'mean': [1, 2.5, 3], 'std': [4, 5, 6], 'bgr_to_rgb': False}}"
)


def test_config_saved_by_mmdetection_determines_settings_that_weights_do_not():
    theirs = peers.random_weights("mmdetection_R_50_base")
    conventions, settings = required_settings(theirs, meta={"cfg": MMDET_2})
    assert conventions == ("mmdet_tricks",)
    assert settings == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
        "MODEL.PIXEL_STD": [4.0, 5.0, 6.0],
        "MODEL.FCOS.CENTERNESS_ON_REG": False,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.NUM_CLASSES": COCO,
    }
    conventions, settings = required_settings(theirs, meta={"config": MMDET_3})
    assert conventions == ("mmdet_base",)
    assert settings["INPUT.FORMAT"] == "BGR"
    assert settings["MODEL.PIXEL_MEAN"] == [1, 2.5, 3]
    assert required_settings(theirs, meta={"cfg": "mean = ["}) == required_settings(theirs)


def test_differences_from_the_config_are_reported_with_the_keys_to_set(tmp_path, caplog):
    model = meta_model("fcos_R_50_FPN_1x", "MODEL.FCOS.NMS_TH", 0.5)
    load(model, peers.random_weights("torchvision_R_50"), tmp_path)
    load(model, peers.random_weights("original_R_50"), tmp_path)
    first, second = [line for line in caplog.messages if "recognized as" in line]
    for part in (
        "set MODEL.FCOS.CONVENTION torchvision (",
        "LOCATION_OFFSET 0.0 instead of 0.5",
        "NMS_TH 0.6 instead of 0.5",
        "INPUT.FORMAT RGB instead of BGR",
        "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] instead of [103.53, 116.28, 123.675]",
        "MODEL.RESNETS.STRIDE_IN_1X1 False instead of True",
    ):
        assert part in first
    assert "NUM_CLASSES" not in first and "\n" not in first
    # Of two possible conventions, the report uses the one closer to the model's.
    assert "convention original_imprv or original, " in second
    assert "CONVENTION original_imprv (CLIP_BEFORE_NMS True instead of False, NMS_TH" in second


def test_vovnet_without_residuals_does_not_agree_with_rosinalitys_weights(tmp_path, caplog):
    pytest.importorskip("timm")
    model = meta_model("rosinality/fcos_V_39_FPN", "MODEL.TIMM.OPTIONS", [])
    load(model, peers.random_weights("rosinality_V_39"), tmp_path)
    assert "set MODEL.TIMM.OPTIONS ['residual=True'] instead of []" in caplog.text


# ---- Weights that do not fit ----


@pytest.fixture(scope="module")
def tiny():
    """Weights of a tiny detector with AdelaiDet's names."""
    return export_weights(tiny_fcos().state_dict(), "adelaidet")


HEAD = "proposal_generator.fcos_head."
MISMATCHES = {
    "missing": ({f"{HEAD}bbox_pred.bias": None}, {}, "they lack head.bbox_pred.bias; recognized"),
    "unexpected": ({"mask.weight": torch.zeros(3)}, {}, "they contain unexpected mask.weight"),
    "scales": (
        {f"{HEAD}scales.0.scale": torch.tensor([2.0])},
        {"USE_SCALE": False},
        "they contain unexpected head.scales.0.scale",
    ),
    "classes": ({}, {"NUM_CLASSES": 2}, r"expected \(2, 64, 3, 3\), got \(3, .*NUM_CLASSES 3 in"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatches_are_reported_and_nothing_is_loaded(case, tiny, tmp_path):
    changes, settings, message = MISMATCHES[case]
    weights = {k: v for k, v in {**tiny, **changes}.items() if v is not None}
    model = tiny_fcos(**settings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        InputError, match=f"weights.pth do not fit the model: .*{message}"
    ) as caught:
        load(model, weights, tmp_path)
    assert "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


def test_scales_of_1_are_dropped_for_a_model_without_scales(tiny, tmp_path):
    model = load(tiny_fcos(USE_SCALE=False), tiny, tmp_path)
    assert torch.equal(model.head.bbox_pred.weight, tiny[f"{HEAD}bbox_pred.weight"])


def test_backbone_weights_alone_can_initialize_training_but_not_evaluation(tiny, tmp_path):
    backbone = {k: v for k, v in tiny.items() if k.startswith("backbone.bottom_up.")}
    with pytest.raises(InputError, match="they lack backbone.fpn_lateral3.weight, .* more;"):
        load(tiny_fcos(), backbone, tmp_path)
    model = load(tiny_fcos(), backbone, tmp_path, reset_class_layer=True)
    assert torch.equal(model.backbone.bottom_up.stem.weight, tiny["backbone.bottom_up.stem.weight"])
    with pytest.raises(InputError, match="weights.pth holds nothing .* but transformer.queries;"):
        other = {"model": {"transformer.queries": torch.zeros(3)}}
        load(tiny_fcos(), other, tmp_path, reset_class_layer=True)


def test_weights_for_other_classes_initialize_all_but_the_class_layer(tiny, tmp_path, caplog):
    model = tiny_fcos(NUM_CLASSES=2)
    initial = model.head.cls_logits.weight.clone()
    load(model, tiny, tmp_path, reset_class_layer=True)
    assert torch.equal(model.head.cls_logits.weight, initial)
    assert torch.equal(model.head.ctrness.weight, tiny[f"{HEAD}ctrness.weight"])
    assert "has 3 classes and the model 2: head.cls_logits.* starts from" in caplog.text


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3, "args": None}, [1]])
def test_checkpoint_without_tensors_is_rejected(content, tmp_path):
    with pytest.raises(InputError, match="weights.pth cannot be used: expected weights by name"):
        load(tiny_fcos(), content, tmp_path)


# ---- Exporting ----


def imported(model: str, *scales: float) -> dict:
    """Imports random weights of a model, and sets its level scales."""
    given = {f"head.scales.{i}.scale": torch.tensor([value]) for i, value in enumerate(scales)}
    return import_weights(peers.random_weights(model)).weights | given


ONES = [1.0] * LEVELS


@pytest.mark.parametrize("name", ["detectron2", "torchvision"])
def test_scale_shared_by_all_levels_is_folded_into_the_box_prediction(name):
    ours = imported(f"{name}_R_50")
    scaled = ours | {f"head.scales.{i}.scale": torch.tensor([1.5]) for i in range(LEVELS)}
    back = import_weights(export_weights(scaled, name)).weights
    for leaf in ("weight", "bias"):
        ours[f"head.bbox_pred.{leaf}"] = ours[f"head.bbox_pred.{leaf}"] * 1.5
    assert_same(back, ours)
    with pytest.raises(InputError, match="head.scales are 1, 1, 1.25, 1, 1, which they cannot"):
        export_weights(imported(f"{name}_R_50", 1.0, 1.0, 1.25, 1.0, 1.0), name)


def test_classes_become_the_rows_of_torchvisions_class_layer():
    ours, layer = imported("detectron2_R_50"), "head.classification_head.cls_logits"
    written = export_weights(ours, "torchvision")
    unused = written[f"{layer}.weight"].flatten(1).abs().sum(1) == 0
    assert unused.nonzero().flatten().tolist() == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert (written[f"{layer}.bias"][unused].sigmoid() == 0).all()
    assert_same(import_weights(written).weights, ours)
    ours = import_weights(torchvision_weights(torch.ones(5))).weights
    rows = export_weights(ours, "torchvision")[f"{layer}.weight"]
    assert len(rows) == 6 and not rows[0].any() and rows[1:].any()  # the first row is background


def test_batch_norms_are_exported_only_if_levels_share_their_weights():
    theirs = peers.random_weights("detectron2_R_50_bn")
    ours = import_weights(theirs).weights
    counted = {key: value for key, value in theirs.items() if "num_batches" in key}
    assert_same(export_weights(ours, "detectron2") | counted, theirs)
    with pytest.raises(InputError, match="group norms"):
        export_weights(ours, "torchvision")
    with pytest.raises(InputError, match="share the weight of a batch norm.*_tower.1 differ"):
        export_weights(imported("adelaidet_R_50_bn", *ONES), "detectron2")


@pytest.mark.parametrize(
    "model, name",
    [("adelaidet_R_50_dcn", "conv2_offset"), ("adelaidet_V_39", "bottom_up.body.stages_0")],
)
def test_layers_that_torchvision_lacks_cannot_be_exported(model, name):
    with pytest.raises(InputError, match=f"torchvision has no place for .*{name}"):
        export_weights(imported(model, *ONES), "torchvision")


@pytest.mark.parametrize(
    "source, target, difference",
    [
        ("torchvision_R_50", "adelaidet", "LOCATION_OFFSET 0.5.*need 0.0"),
        ("cvpods_R_50", "adelaidet", "LOCATION_OFFSET 0.5.*need 0.0"),
        ("rosinality_V_39", "adelaidet", "USE_RELU True.*need False"),
        ("detectron2_R_50", "torchvision", "LOCATION_OFFSET 0.0.*need 0.5"),
        ("original_R_50", "adelaidet", ""),
        ("mmdetection_R_50_tricks", "adelaidet", ""),
        ("detectron2_R_50", "adelaidet", ""),
        ("mmdetection_R_50_tricks", "mmdetection", "choose adelaidet, detectron2, torchvision"),
    ],
)
def test_weights_are_exported_only_to_formats_that_yield_the_same_boxes(source, target, difference):
    theirs = peers.random_weights(source)
    if source == "mmdetection_R_50_tricks":
        theirs["bbox_head.cls_convs.0.conv.bias"] = torch.ones(256)
    _, weights, requirements = import_weights(theirs)
    if difference:
        with pytest.raises(InputError, match=difference):
            export_weights(weights, target, requirements)
    else:
        assert import_weights(export_weights(weights, target, requirements)).format == target


def test_weights_of_this_package_match_no_other_format():
    assert import_weights({"model": imported("adelaidet_R_50"), "iteration": 3}) is None


def test_names_are_mapped_by_their_longest_prefix():
    modules = {"a": "b", "a.x.1": "c.2"}
    names = {"a.x.1.weight": "c.2.weight", "a.x.10.bias": "b.x.10.bias", "a.bias": "b.bias"}
    assert {name: rename(name, modules) for name in names} == names
    assert rename("aa.weight", modules) is None and rename("a", modules) is None


def test_train_net_evaluates_weights_of_another_implementation(script, fcos_cfg, tmp_path):
    fcos_cfg.merge_from_file("tiny.yaml")
    fcos_cfg.MODEL.DEVICE = "cpu"
    theirs = export_weights(build_model(fcos_cfg).state_dict(), "adelaidet")
    torch.save(theirs, tmp_path / "theirs.pth")
    result = script("--eval-only", "MODEL.WEIGHTS", "theirs.pth")
    assert result.status == 0 and "bbox" in result.results[0]
    (line,) = [line for line in result.out.splitlines() if "recognized as" in line]
    assert "theirs.pth: recognized as adelaidet, convention adelaidet, " in line
