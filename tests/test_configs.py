"""Tests that every config trains, detects, matches its publication, and has no unused keys."""

import inspect
import sys
from pathlib import Path

import detectron2.engine.defaults
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.solver import build_lr_scheduler
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2 import FCOS, add_fcos_config, resolve_convention
from fcos_d2.data import FCOSDatasetMapper
from fcos_d2.engine import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))
EXPERIMENTS = [path for path in YAMLS if path.name.startswith("fcos_")]
SIDE = 64

# Replacements for slow backbones: smaller models of the same kind, with the same strides.
SMALLER = {
    "ese_vovnet39b": "ese_vovnet19b_slim",
    "ese_vovnet57b": "ese_vovnet19b_slim",
    "ese_vovnet99b": "ese_vovnet19b_slim",
    "dla34": "dla46_c",
    "mobilenetv2_100": "mobilenetv2_035",
    "vovnet39a": "ese_vovnet19b_slim",
    "vovnet57a": "ese_vovnet19b_slim",
    "convnext_tiny": "test_convnext",
}
SMALLER_SWIN = ["embed_dim=24", "depths=[1,1,1,1]"]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def merged(path: Path) -> CfgNode:
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(path))
    return resolve_convention(cfg)


def experiment(name: str) -> CfgNode:
    return merged(CONFIGS / f"{name}.yaml")


def shrink(cfg: CfgNode) -> None:
    """Reduces channels and blocks in place, but no values that the configs set."""
    resnets, timm = cfg.MODEL.RESNETS, cfg.MODEL.TIMM
    if resnets.DEPTH > 34:
        resnets.DEPTH = 50
        resnets.WIDTH_PER_GROUP = max(1, resnets.WIDTH_PER_GROUP // 16)
        resnets.RES2_OUT_CHANNELS, resnets.STEM_OUT_CHANNELS = 32, 8
    timm.NAME = SMALLER.get(timm.NAME, timm.NAME)
    if timm.NAME.startswith("swin"):
        timm.OPTIONS = [*timm.OPTIONS, *SMALLER_SWIN]
    cfg.MODEL.FPN.OUT_CHANNELS = 64


class Recorder(CfgNode):
    """A config that records the full names of the keys that are read in it or its copies.

    Reads by the code that fills in conventions do not count.
    """

    def __init__(self, node: CfgNode, read: set[str], prefix: str = ""):
        super().__init__()
        self.__dict__.update(read=read, prefix=prefix)
        for key, value in node.items():
            is_node = isinstance(value, CfgNode)
            dict.__setitem__(
                self, key, Recorder(value, read, f"{prefix}{key}.") if is_node else value
            )

    def __getitem__(self, key):
        reader = sys._getframe(1)
        if reader.f_code.co_name == "__getattr__":
            reader = sys._getframe(2)
        if reader.f_code.co_name not in ("_convention", "fcos_settings"):
            self.__dict__["read"].add(f"{self.__dict__['prefix']}{key}")
        return super().__getitem__(key)

    def __deepcopy__(self, memo):
        return self


def records(folder: Path, num_classes: int) -> list[dict]:
    """Returns two images, one of which shows an object of the last class."""
    image, found = folder / "gray.png", []
    Image.fromarray(np.full((SIDE, SIDE + 30, 3), 99, np.uint8)).save(image)
    box = {"bbox": [8, 8, 40, 48], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    for index, annotations in enumerate(([{**box, "category_id": num_classes - 1}], [])):
        size = {"height": SIDE, "width": SIDE + 30}
        found.append(
            {"file_name": str(image), "image_id": index, "annotations": annotations, **size}
        )
    return found


def use(cfg: CfgNode, folder: Path) -> tuple[list[float], list]:
    """Trains for two iterations; returns their losses, and the detections in one image."""
    torch.manual_seed(0)
    data = records(folder, cfg.MODEL.FCOS.NUM_CLASSES)
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    mapper = FCOSDatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(cfg, dataset=data, mapper=mapper)
    assert loader is not None
    losses = []
    for _ in range(2):
        total = sum(model.train()([mapper(record) for record in data]).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        scheduler.step()
        losses.append(total.item())
    # Enforces detections: a detector that has seen two images may well find nothing.
    torch.nn.init.zeros_(model.head.cls_logits.bias)
    torch.nn.init.zeros_(model.head.bbox_pred.weight)
    torch.nn.init.ones_(model.head.bbox_pred.bias)
    with torch.no_grad():
        found = model.eval()([FCOSDatasetMapper(cfg, is_train=False)(data[0])])
    return losses, found[0]["instances"]


@pytest.fixture(scope="module", params=EXPERIMENTS, ids=name_of)
def outcome(request, tmp_path_factory):
    """Runs an experiment on tiny images; returns its losses, detections, config and used keys."""
    cfg, read = merged(request.param), set()
    shrink(cfg)
    use_tiny_images(cfg)
    losses, found = use(Recorder(cfg, read), tmp_path_factory.mktemp("data"))
    return losses, found, cfg, read


def use_tiny_images(cfg: CfgNode) -> None:
    cfg.MODEL.DEVICE, cfg.DATALOADER.NUM_WORKERS = "cpu", 0
    cfg.INPUT.MIN_SIZE_TRAIN = (SIDE,) * len(cfg.INPUT.MIN_SIZE_TRAIN)
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 2 * SIDE
    cfg.INPUT.MIN_SIZE_TEST = SIDE


def check_outcome(losses: list[float], found, cfg: CfgNode) -> None:
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert 0 < len(found) <= cfg.MODEL.FCOS.POST_NMS_TOPK_TEST
    assert found.pred_boxes.tensor.isfinite().all()
    assert found.pred_classes.max() < cfg.MODEL.FCOS.NUM_CLASSES


def test_experiment_trains_and_detects(outcome):
    losses, found, cfg, _ = outcome
    check_outcome(losses, found, cfg)


# Read when a training run starts, which these tests skip.
STARTUP = inspect.getsource(detectron2.engine.defaults) + inspect.getsource(
    sys.modules[Trainer.__module__]
)
BY_SETUP = {"VERSION", "SEED", "DATASETS.REGISTER", "MODEL.FCOS.CONVENTION"}


def keys_of(tree: dict, prefix: str = "") -> list[str]:
    """Returns the full names of the keys that a file sets."""
    found = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name not in BY_SETUP
        found += keys_of(value, f"{name}.") if nested else [name]
    return found


def test_every_key_of_an_experiment_is_read(outcome, request):
    path, (_, _, _, read) = request.node.callspec.params["outcome"], outcome
    keys = set()
    while path is not None:
        tree = yaml.safe_load(path.read_text())
        base = tree.pop("_BASE_", None)
        keys |= set(keys_of(tree))
        path = path.parent / base if base else None
    read = read | BY_SETUP | {key for key in keys if f".{key.rpartition('.')[2]}" in STARTUP}
    # Keys of backbones that a derived config replaces, and of clipping that it disables.
    unused = {key for key in keys - read if not key.startswith(replaced(outcome[2]))}
    assert unused == set()


def replaced(cfg: CfgNode) -> tuple[str, ...]:
    """Returns prefixes of keys that a config inherits but does not use."""
    of_backbone = "MODEL.RESNETS." if "resnet" not in cfg.MODEL.BACKBONE.NAME else "MODEL.TIMM."
    clipping = () if cfg.SOLVER.CLIP_GRADIENTS.ENABLED else ("SOLVER.CLIP_GRADIENTS.",)
    return of_backbone, *clipping


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_full_size_experiment_trains_and_detects(path, tmp_path):
    cfg = merged(path)
    use_tiny_images(cfg)
    check_outcome(*use(cfg, tmp_path), cfg)


# ---- Values ----


def test_every_file_is_an_experiment_or_a_base():
    bases = {path.parent / base for path in YAMLS if (base := base_of(path))}
    assert {path.resolve() for path in YAMLS} - {path.resolve() for path in EXPERIMENTS} <= {
        path.resolve() for path in bases
    }
    assert all(path.name.startswith(("fcos_", "Base-")) for path in YAMLS)


def base_of(path: Path) -> str | None:
    return yaml.safe_load(path.read_text()).get("_BASE_")


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_file_has_the_current_version_and_its_name_as_output_folder(path):
    cfg = merged(path)
    assert cfg.VERSION == 2
    if path in EXPERIMENTS and path.parent.name not in ("digits", "quick_schedules"):
        assert f"output/{name_of(path)}" == cfg.OUTPUT_DIR


def test_output_folders_are_unique():
    folders = [Path(merged(path).OUTPUT_DIR) for path in EXPERIMENTS]
    assert len(set(folders)) == len(folders)


def same_but(first: str, second: str, **keys) -> bool:
    """Returns whether two configs differ only in ``keys`` (MODEL__FCOS__NORM="BN") and output."""
    one, other = experiment(first), experiment(second)
    for key, value in keys.items():
        options = [key.replace("__", "."), value]
        assert one.merge_from_list(options) is None and one != other
    one.OUTPUT_DIR = other.OUTPUT_DIR
    return one == other


@pytest.mark.parametrize(
    "name", ["R_50_FPN_1x", "R_50_FPN_2x", "R_101_FPN_2x", "X_101_32x8d_dcnv2_FPN_2x"]
)
def test_iou_changes_only_the_box_quality(name):
    assert same_but(f"fcos_{name}", f"fcos_{name}_iou", MODEL__FCOS__BOX_QUALITY="iou")


def test_long_schedules_have_the_published_steps():
    base = experiment("fcos_R_50_FPN_1x")
    longer, longest = experiment("fcos_R_101_FPN_2x"), experiment("vovnet/fcos_V_57_FPN_3x")
    assert longer.MODEL.RESNETS.DEPTH == 101 and "R-101" in longer.MODEL.WEIGHTS
    assert longer.SOLVER.MAX_ITER == 2 * base.SOLVER.MAX_ITER
    assert tuple(2 * step for step in base.SOLVER.STEPS) == longer.SOLVER.STEPS
    assert longer.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert longest.SOLVER.MAX_ITER == 3 * base.SOLVER.MAX_ITER
    assert longest.SOLVER.STEPS == (210_000, 250_000)


def rates(name: str) -> dict[str, tuple[float, float]]:
    """Returns (learning rate, weight decay) of a weight, a bias and a norm."""
    cfg = experiment(name)
    shrink(cfg)
    cfg.MODEL.DEVICE = "cpu"
    with torch.device("meta"):
        model = FCOS(cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = Trainer.build_optimizer(cfg, model).param_groups
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {
        "weight": found["head.cls_tower.0.weight"],
        "bias": found["head.cls_tower.0.bias"],
        "norm": found["head.cls_tower.1.weight"],
    }


@pytest.mark.parametrize(
    "name, bias, norm",
    [
        ("fcos_R_50_FPN_1x", (0.01, 1e-4), (0.01, 0.0)),
        ("detectron2/fcos_R_50_FPN_1x", (0.01, 1e-4), (0.01, 0.0)),
        ("torchvision/fcos_R_50_FPN", (0.01, 1e-4), (0.01, 1e-4)),
        ("original/fcos_imprv_R_50_FPN_1x", (0.02, 0.0), (0.01, 1e-4)),
        ("mmdetection/fcos_tricks_R_50_FPN_1x", (0.02, 0.0), (0.01, 1e-4)),
    ],
)
def test_biases_and_norms_have_the_published_learning_rates(name, bias, norm):
    assert rates(name) == {"weight": (0.01, 1e-4), "bias": bias, "norm": norm}


def warmup(name: str) -> list[float]:
    """Returns the factors of the learning rate at iterations 0, 250, 499, 500 and 1000."""
    cfg = experiment(name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = build_lr_scheduler(cfg, optimizer)._multiplier
    return [factor(step / cfg.SOLVER.MAX_ITER) for step in (0, 250, 499, 500, 1000)]


@pytest.mark.parametrize(
    "name, factors",
    [
        ("fcos_R_50_FPN_1x", [0.001, 0.25075, 0.499501, 0.5005, 1]),
        ("torchvision/fcos_R_50_FPN", [0.001, 0.25075, 0.499501, 0.5005, 1]),
        ("original/fcos_imprv_R_50_FPN_1x", [1 / 3, 1 / 3, 1 / 3, 1, 1]),
        ("mmdetection/fcos_R_50_FPN_1x", [1 / 3, 1 / 3, 1 / 3, 1, 1]),
        ("mmdetection/fcos_tricks_R_50_FPN_1x", [1 / 3, 2 / 3, 1 - 2 / 1500, 1, 1]),
    ],
)
def test_warmup_has_the_published_factors(name, factors):
    assert warmup(name) == pytest.approx(factors, rel=1e-4)


@pytest.mark.parametrize(
    "folder, conventions, pixels",
    [
        (".", {"adelaidet"}, {("BGR", 103.53, 1.0), ("BGR", 103.53, 57.375)}),
        ("rt", {"adelaidet"}, {("BGR", 103.53, 1.0)}),
        ("vovnet", {"adelaidet"}, {("BGR", 103.53, 1.0)}),
        ("original", {"original", "original_imprv"}, {("BGR", 102.9801, 1.0)}),
        ("detectron2", {"detectron2"}, {("BGR", 103.53, 1.0)}),
        ("torchvision", {"torchvision"}, {("RGB", 123.675, 58.395)}),
        (
            "mmdetection",
            {"mmdet_base", "mmdet_tricks"},
            {("BGR", 102.9801, 1.0), ("BGR", 103.53, 1.0), ("RGB", 123.675, 58.395)},
        ),
        ("rosinality", {"rosinality"}, {("RGB", 104.0136, 73.6028)}),
    ],
)
def test_conventions_and_pixel_statistics_match_the_implementation(folder, conventions, pixels):
    cfgs = [merged(path) for path in (CONFIGS / folder).glob("fcos_*.yaml")]
    assert {cfg.MODEL.FCOS.CONVENTION for cfg in cfgs} == conventions
    models = [cfg.MODEL for cfg in cfgs]
    formats = [cfg.INPUT.FORMAT for cfg in cfgs]
    found = {(f, m.PIXEL_MEAN[0], m.PIXEL_STD[0]) for f, m in zip(formats, models, strict=True)}
    assert found == pixels


def test_real_time_models_have_three_levels_and_small_images():
    for path in (CONFIGS / "rt").glob("fcos_*.yaml"):
        cfg = merged(path)
        assert cfg.MODEL.FCOS.IN_FEATURES == ["p3", "p4", "p5"] and cfg.MODEL.FCOS.TOP_LEVELS == 0
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (512, 736)
        norms = (cfg.MODEL.RESNETS.NORM, cfg.MODEL.TIMM.NORM)
        assert "SyncBN" in norms and ("BN" if "_bn" in path.stem else "GN") == cfg.MODEL.FCOS.NORM
        shared = 4 if "shtw" in path.stem else 0
        assert shared == cfg.MODEL.FCOS.NUM_SHARE_CONVS
        assert cfg.MODEL.FCOS.NUM_CLS_CONVS == cfg.MODEL.FCOS.NUM_BOX_CONVS == 4 - shared


def test_rosinality_computes_p6_from_c5_and_centerness_from_the_class_tower():
    for path in (CONFIGS / "rosinality").glob("fcos_*.yaml"):
        cfg = merged(path)
        cfg.MODEL.DEVICE = "cpu"
        with torch.device("meta"):
            model = FCOS(cfg)
        assert model.backbone.top_block.p6.in_channels == 1024
        assert not model.head.quality_on_box_tower and not model.head.use_relu
        assert not model.head.norm_reg_targets and model.losses.assignment["center_radius"] == 1.5
