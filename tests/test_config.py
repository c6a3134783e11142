"""Tests conventions, the use of every config key, and that YAML and LazyConfig agree."""

import ast
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig

from fcos_d2 import CONVENTIONS, InputError, add_fcos_config, resolve_convention
from fcos_d2 import config as config_module
from fcos_d2.config import fcos_settings
from fcos_d2.data import FCOSDatasetMapper
from fcos_d2.engine import Trainer
from fcos_d2.modeling import FCOSLoss, FCOSProposals

from .modeling.tiny import sample, tiny_cfg, tiny_fcos, train_step

CONFIGS = Path(__file__).parents[1] / "configs"
R_50 = "fcos_R_50_FPN_1x"
ALL_LEVELS = ("p3", "p4", "p5", "p6", "p7")

# MODEL.FCOS of adet/config/defaults.py: every key and its default.
ADELAIDET = """
MODEL:
  FCOS:
    NUM_CLASSES: 80
    IN_FEATURES: ["p3", "p4", "p5", "p6", "p7"]
    FPN_STRIDES: [8, 16, 32, 64, 128]
    PRIOR_PROB: 0.01
    INFERENCE_TH_TRAIN: 0.05
    INFERENCE_TH_TEST: 0.05
    NMS_TH: 0.6
    PRE_NMS_TOPK_TRAIN: 1000
    PRE_NMS_TOPK_TEST: 1000
    POST_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TEST: 100
    TOP_LEVELS: 2
    NORM: "GN"
    USE_SCALE: True
    BOX_QUALITY: "ctrness"
    THRESH_WITH_CTR: False
    LOSS_ALPHA: 0.25
    LOSS_GAMMA: 2.0
    LOSS_NORMALIZER_CLS: "fg"
    LOSS_WEIGHT_CLS: 1.0
    SIZES_OF_INTEREST: [64, 128, 256, 512]
    USE_RELU: True
    USE_DEFORMABLE: False
    NUM_CLS_CONVS: 4
    NUM_BOX_CONVS: 4
    NUM_SHARE_CONVS: 0
    CENTER_SAMPLE: True
    POS_RADIUS: 1.5
    LOC_LOSS_TYPE: "giou"
    YIELD_PROPOSAL: False
    YIELD_BOX_FEATURES: False
"""


def default_cfg() -> CfgNode:
    cfg = get_cfg()
    add_fcos_config(cfg)
    return cfg


def merged(path: Path) -> CfgNode:
    cfg = default_cfg()
    cfg.merge_from_file(str(path))
    return resolve_convention(cfg)


def merge_text(tmp_path: Path, text: str) -> CfgNode:
    (tmp_path / "config.yaml").write_text(text)
    cfg = default_cfg()
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    return cfg


# ---- Conventions and values ----


@pytest.mark.parametrize("name", CONVENTIONS)
def test_conventions_set_the_same_keys_and_train(name):
    assert set(CONVENTIONS[name]) == set(CONVENTIONS["adelaidet"])
    model = tiny_fcos(CONVENTION=name)
    losses = train_step(model, [sample(64, 96, [[8.0, 8, 40, 48]])])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", CONVENTIONS)
def test_convention_sets_all_unset_keys(name):
    cfg = default_cfg()
    cfg.MODEL.FCOS.CONVENTION = name
    fcos = resolve_convention(cfg).MODEL.FCOS
    assert {key: fcos[key] for key in CONVENTIONS[name]} == CONVENTIONS[name]
    assert not [key for key, value in fcos.items() if value is None]


def test_docs_list_the_differences_of_conventions():
    """Rows are "| `KEY`: meaning | value of adelaidet | value: `names`; ... |"."""
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)`[^|]*\| (.+) \| (.+) \|$", page, re.MULTILINE)
    documented = {}
    for key, default, others in rows:
        values = dict.fromkeys(CONVENTIONS, ast.literal_eval(default.strip("`")))
        for value, names in re.findall(r"([^:;]+): ([^;]+)", others):
            for name in re.findall(r"`(\w+)`", names):
                values[name] = ast.literal_eval(value.strip(" `"))
        documented[key] = values
    differing = {
        key: values
        for key in CONVENTIONS["adelaidet"]
        if len(set((values := {name: c[key] for name, c in CONVENTIONS.items()}).values())) > 1
    }
    assert documented == differing


def test_explicit_value_overrides_the_convention():
    cfg = default_cfg()
    cfg.merge_from_list(["MODEL.FCOS.CONVENTION", "torchvision", "MODEL.FCOS.NMS_TH", 0.5])
    fcos = resolve_convention(cfg).MODEL.FCOS
    assert fcos.NMS_TH == 0.5 and fcos.LOCATION_PITCH == "floor"


def test_resolving_twice_has_no_effect():
    once, twice = default_cfg(), default_cfg()
    resolve_convention(once)
    assert resolve_convention(resolve_convention(twice)) == once


def test_settings_leave_a_frozen_config_unchanged():
    cfg = default_cfg()
    cfg.freeze()
    before = cfg.dump()
    assert fcos_settings(cfg).NMS_TH == 0.6
    assert cfg.dump() == before and cfg.is_frozen()


def test_dumped_config_can_be_loaded(tmp_path):
    for cfg in (default_cfg(), resolve_convention(default_cfg())):
        again = merge_text(tmp_path, cfg.dump())
        assert again.MODEL.FCOS == cfg.MODEL.FCOS and again.SOLVER == cfg.SOLVER


def test_unknown_convention_is_refused():
    cfg = default_cfg()
    cfg.MODEL.FCOS.CONVENTION = "adelaide"
    with pytest.raises(InputError, match="one of adelaidet, original, .*got 'adelaide'"):
        resolve_convention(cfg)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("CENTER_SAMPLE", "false", "CENTER_SAMPLE must be bool, got 'false'; write it like True"),
        ("USE_RELU", 1, "USE_RELU must be bool, got 1"),
        ("NMS_TH", "0.5%", "NMS_TH must be float, got '0.5%'; write it like 0.6"),
        ("NMS_TH", True, "NMS_TH must be float, got True"),
        ("SCORE_RULE", 2, "SCORE_RULE must be str, got 2"),
    ],
)
def test_wrong_type_is_refused_for_keys_that_yacs_does_not_check(key, value, message):
    cfg = default_cfg()
    cfg.merge_from_list([f"MODEL.FCOS.{key}", value])
    for use in (resolve_convention, fcos_settings):
        with pytest.raises(InputError, match=f"MODEL.FCOS.{message}"):
            use(cfg)


def test_integer_is_accepted_for_a_float():
    cfg = default_cfg()
    cfg.MODEL.FCOS.NMS_TH = 1
    assert resolve_convention(cfg).MODEL.FCOS.NMS_TH == 1


@pytest.mark.parametrize("key", ["MODEL.FCOS.NMS_THRESH", "MODEL.FOCS.NMS_TH"])
def test_unknown_key_is_an_error(key, tmp_path):
    with pytest.raises((AssertionError, KeyError), match="Non-existent"):
        default_cfg().merge_from_list([key, 0.5])
    section, _, name = key.rpartition(".")
    with pytest.raises(KeyError, match="Non-existent config key"):
        merge_text(tmp_path, f"MODEL:\n  {section[6:]}:\n    {name}: 0.5\n")


def test_adding_keys_twice_is_refused():
    with pytest.raises(InputError, match="call add_fcos_config.* once"):
        add_fcos_config(default_cfg())


def test_adelaidet_config_has_the_same_meaning(tmp_path):
    cfg = merge_text(tmp_path, ADELAIDET)
    assert fcos_settings(cfg) == fcos_settings(default_cfg())
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "FCOS", "build_tiny_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DEVICE = "cpu"
    train_step(build_model(cfg), [sample(64, 96, [[8.0, 8, 40, 48]])])


# ---- Every key is read and has an effect ----


class ReadKeys(CfgNode):
    """Records the keys that are read, except by the code that resolves the convention."""

    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == CfgNode.__getattr__.__code__.co_filename:
            frame = frame.f_back
        if frame.f_code.co_filename != config_module.__file__ or key == "CONVENTION":
            self.__dict__.setdefault("read", set()).add(key)
        return super().__getitem__(key)


def parts_of(cfg) -> dict:
    """Builds everything that reads MODEL.FCOS."""
    model = META_ARCH_REGISTRY.get("FCOS")(cfg)
    return {
        "model": model,
        "proposals": FCOSProposals(cfg, model.backbone.output_shape()),
        "mapper": FCOSDatasetMapper(cfg, is_train=True),
        "optimizer": Trainer.build_optimizer(cfg, model),
    }


def test_every_key_is_read():
    cfg = tiny_cfg(levels=ALL_LEVELS, YIELD_PROPOSAL=True)
    resolve_convention(cfg)
    cfg.MODEL.FCOS, cfg.SOLVER = ReadKeys(cfg.MODEL.FCOS), ReadKeys(cfg.SOLVER)
    parts_of(cfg)
    assert set(cfg.MODEL.FCOS) - cfg.MODEL.FCOS.__dict__["read"] == set()
    assert "OPTIMIZER" in cfg.SOLVER.__dict__["read"]


OTHER_VALUES = {
    "BOX_QUALITY": "iou", "CENTERNESS_ON_REG": False, "CENTER_SAMPLE": False,
    "CLIP_BEFORE_NMS": True, "CONVENTION": "torchvision", "CTR_WEIGHTED_LOC": False,
    "DROP_EMPTY": True, "PIXEL_EXTENT": 1,
    "FPN_STRIDES": [8, 16, 32, 64, 100], "IGNORE_CROWD": True, "INFERENCE_TH_TEST": 0.2,
    "INFERENCE_TH_TRAIN": 0.2, "IN_FEATURES": ["p3", "p4", "p5", "p6"], "IOU_SMOOTH": 0.5,
    "LOCATION_OFFSET": 0.25, "LOCATION_PITCH": "floor", "LOC_LOSS_TYPE": "diou",
    "LOSS_ALPHA": 0.5, "LOSS_GAMMA": 1.0, "LOSS_NORMALIZER_BOX": "cls",
    "LOSS_NORMALIZER_CLS": "all", "LOSS_WEIGHT_CLS": 2.0, "MOVING_FG_START": 7.0,
    "NMS_CLASS_AGNOSTIC": True, "NMS_METHOD": "linear", "NMS_SIGMA": 0.3, "NMS_TH": 0.5,
    "NORM": "BN", "NORM_REG_TARGETS": False, "NUM_BOX_CONVS": 3, "NUM_CLASSES": 7,
    "NUM_CLS_CONVS": 3, "NUM_SHARE_CONVS": 1, "POST_NMS_TOPK_TEST": 9, "POST_NMS_TOPK_TRAIN": 9,
    "POS_RADIUS": 2.0, "PRE_NMS_TOPK_TEST": 9, "PRE_NMS_TOPK_TRAIN": 9, "PRIOR_PROB": 0.1,
    "RANGE_INCLUSIVE": False, "RANK_WITH_CTR": False, "SCORE_RULE": "product",
    "SIZES_OF_INTEREST": [32, 64, 128, 256], "SYNC_NORMALIZER": False, "THRESH_WITH_CTR": True,
    "TOP_LEVELS": 1, "TOP_LEVELS_FROM": "res5", "USE_DEFORMABLE": True, "USE_RELU": False,
    "USE_SCALE": False, "YIELD_BOX_FEATURES": True, "YIELD_PROPOSAL": False,
}  # fmt: skip


def attributes(thing) -> dict:
    """Returns the attributes of builtin types."""
    types = (bool, int, float, str, tuple, list, dict, type(None))
    return {
        key: value
        for key, value in vars(thing).items()
        if not key.startswith("_") and isinstance(value, types)
    }


def describe(cfg) -> str:
    """Describes the objects that the config builds, or returns its error."""
    torch.manual_seed(0)
    try:
        parts = parts_of(cfg)
    except ValueError as error:
        return str(error)
    model, proposals = parts["model"], parts["proposals"]
    things = [model.head, model.losses, model.grid, model.postprocess, proposals.test_postprocess]
    things += [parts["mapper"], *filter(None, [proposals.train_postprocess])]
    facts = [repr(model), model.head.cls_logits.bias[0].item(), model.losses.state_dict()]
    return str([*facts, parts["optimizer"], *map(attributes, things)])


@pytest.fixture(scope="module")
def ordinary():
    cfg = tiny_cfg(levels=ALL_LEVELS, YIELD_PROPOSAL=True, LOSS_NORMALIZER_CLS="moving_fg")
    return cfg, describe(cfg)


@pytest.mark.parametrize("key", sorted(default_cfg().MODEL.FCOS))
def test_changing_a_key_changes_the_detector(key, ordinary):
    cfg = ordinary[0].clone()
    assert key in OTHER_VALUES, "a new key needs another value in this test"
    cfg.MODEL.FCOS[key] = OTHER_VALUES[key]
    assert describe(cfg) != ordinary[1]


def test_optimizer_key_selects_the_optimizer(ordinary):
    cfg = ordinary[0].clone()
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    assert describe(cfg) != ordinary[1] and "AdamW" in describe(cfg)


# ---- YAML and LazyConfig ----


@pytest.fixture(scope="module")
def yaml_cfg():
    cfg = merged(CONFIGS / f"{R_50}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module")
def lazy_cfg():
    return LazyConfig.load(str(CONFIGS / "lazy" / f"{R_50}.py"))


@pytest.fixture(scope="module")
def both_models(yaml_cfg, lazy_cfg):
    from_yaml, from_lazy = build_model(yaml_cfg), instantiate(lazy_cfg.model)
    from_lazy.load_state_dict(from_yaml.state_dict())
    return from_yaml, from_lazy


def test_model_has_the_published_number_of_parameters(both_models):
    parameters = list(both_models[0].parameters())
    assert sum(p.numel() for p in parameters) == 32_244_250
    assert sum(p.numel() for p in parameters if p.requires_grad) == 32_021_850


def test_yaml_and_lazy_build_the_same_model(both_models):
    from_yaml, from_lazy = both_models
    assert repr(from_yaml) == repr(from_lazy)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in both_models]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    trained = [[k for k, p in m.named_parameters() if p.requires_grad] for m in both_models]
    assert trained[0] == trained[1]
    for name in ("head", "losses", "postprocess", "grid"):
        assert attributes(getattr(from_yaml, name)) == attributes(getattr(from_lazy, name)), name
    assert from_yaml.head_in_features == from_lazy.head_in_features
    assert from_yaml.input_format == from_lazy.input_format
    for name in ("pixel_mean", "pixel_std"):
        assert torch.equal(getattr(from_yaml, name), getattr(from_lazy, name))


def test_yaml_and_lazy_models_return_the_same_results(both_models):
    batch = [sample(60, 90, [[8.0, 8, 40, 48]])]
    for model in both_models:
        model.train()
        torch.nn.init.constant_(model.head.cls_logits.bias, -1.0)  # so that something is found
    losses = [model(batch) for model in both_models]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    with torch.no_grad():
        found = [model.eval()(batch)[0]["instances"] for model in both_models]
    assert len(found[0]) > 0
    assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)
    assert torch.equal(found[0].scores, found[1].scores)


def test_lazy_config_has_the_parts_for_training_and_can_be_saved(lazy_cfg, tmp_path):
    assert set(lazy_cfg) == {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    LazyConfig.save(lazy_cfg, str(tmp_path / "config.yaml"))
    assert "FCOSHead" in (tmp_path / "config.yaml").read_text()


def test_lazy_model_sets_every_argument(lazy_cfg):
    for name in ("head", "losses", "postprocess", "grid"):
        node = lazy_cfg.model[name]
        target = node._target_ if callable(node._target_) else instantiate(node._target_)
        arguments = inspect.signature(inspect.unwrap(target.__init__)).parameters
        assert set(node) - {"_target_"} == set(arguments) - {"self"}, name


def test_lazy_value_is_set_once_for_all_modules(lazy_cfg):
    cfg = LazyConfig.load(str(CONFIGS / "lazy" / f"{R_50}.py"))
    cfg.model.head.num_classes = 5
    assert isinstance(cfg.model, DictConfig)
    assert instantiate(cfg.model.losses).num_classes == 5
    assert isinstance(instantiate(cfg.model.losses), FCOSLoss)


def test_yaml_and_lazy_build_the_same_optimizer(both_models, yaml_cfg, lazy_cfg):
    model = both_models[0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    lazy_cfg.optimizer.params.model = model
    from_yaml, from_lazy = Trainer.build_optimizer(yaml_cfg, model), instantiate(lazy_cfg.optimizer)

    def settings(optimizer):
        keys = ("lr", "momentum", "weight_decay", "nesterov")
        return {
            names[parameter]: [group[key] for key in keys]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert type(from_yaml) is type(from_lazy)
    assert settings(from_yaml) == settings(from_lazy)
    assert settings(from_yaml)["head.cls_tower.0.weight"] == [0.01, 0.9, 1e-4, False]
    assert settings(from_yaml)["head.cls_tower.1.weight"] == [0.01, 0.9, 0.0, False]  # GN


def test_yaml_and_lazy_build_the_same_schedule(yaml_cfg, lazy_cfg):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = build_lr_scheduler(yaml_cfg, optimizer)._multiplier
    other, last = instantiate(lazy_cfg.lr_multiplier), lazy_cfg.train.max_iter
    assert last == yaml_cfg.SOLVER.MAX_ITER
    for step in (0, 1, 500, 999, 1000, 59_999, 60_000, 79_999, 80_000, last - 1):
        assert factor(step / last) == pytest.approx(other(step / last), rel=1e-6), step
    assert factor(0) == pytest.approx(0.001)
    assert [factor(step / last) for step in (1000, 60_000, 80_000)] == pytest.approx([1, 0.1, 0.01])


def test_yaml_and_lazy_use_the_same_data_and_augmentations(yaml_cfg, lazy_cfg):
    loaders = lazy_cfg.dataloader
    assert (loaders.train.dataset.names,) == yaml_cfg.DATASETS.TRAIN
    assert (loaders.test.dataset.names,) == yaml_cfg.DATASETS.TEST
    assert loaders.train.total_batch_size == yaml_cfg.SOLVER.IMS_PER_BATCH
    assert lazy_cfg.train.init_checkpoint == yaml_cfg.MODEL.WEIGHTS
    assert lazy_cfg.train.output_dir == yaml_cfg.OUTPUT_DIR
    for is_train, loader in ((True, loaders.train), (False, loaders.test)):
        ours, theirs = instantiate(loader.mapper), FCOSDatasetMapper(yaml_cfg, is_train=is_train)
        assert type(ours) is type(theirs)
        assert attributes(ours) == attributes(theirs)
        assert [*map(effect, ours.augmentations.augs)] == [*map(effect, theirs.augmentations.augs)]


def effect(augmentation) -> tuple:
    """Returns the type of an augmentation, and its settings or, for resizing, its results."""
    settings = vars(augmentation)
    if hasattr(augmentation, "short_edge_length"):
        images = [np.empty(shape, np.uint8) for shape in ((480, 640, 3), (300, 900, 3))]
        settings = [vars(augmentation.get_transform(image)) for image in images]
    return type(augmentation), settings


def test_number_of_classes_comes_from_the_registered_dataset():
    """Builds a model from the YAML of a training run like detectron2's DefaultPredictor."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.DATASETS.TRAIN = ("voc_2007_train",)
    assert fcos_settings(cfg).NUM_CLASSES == 20 and cfg.MODEL.FCOS.NUM_CLASSES is None
    cfg.DATASETS.TRAIN = ("nowhere",)
    with pytest.raises(InputError, match="NUM_CLASSES is null, and 'nowhere' is not registered"):
        fcos_settings(cfg)
