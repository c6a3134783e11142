"""Tests FCOS end to end: inputs, outputs, and edge cases."""

import copy
import math

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch.nn.parallel import DistributedDataParallel

from fcos_d2 import CONVENTIONS
from fcos_d2.modeling import FCOS, Predictions

from .tiny import NUM_CLASSES, STRIDES, sample, tiny_cfg, tiny_fcos, train_step, without_gradient

LOSSES = {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
BOX = [8.0, 8.0, 40.0, 48.0]
PERMISSIVE = {"INFERENCE_TH_TEST": 0.0, "NMS_TH": 1.0}
NO_EMPTY_BOXES = {"USE_RELU": False}  # boxes that ReLU makes empty are dropped by detectron2


def evaluate(model, batch):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(batch)]


def test_fcos_is_registered_and_built_from_plain_arguments_or_a_config():
    assert META_ARCH_REGISTRY.get("FCOS") is FCOS
    built = FCOS(tiny_cfg())
    parts = ("backbone", "head", "losses", "postprocess", "grid", "head_in_features")
    again = FCOS(
        **{name: getattr(built, name) for name in parts},
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
        input_format="RGB",
    )
    assert repr(again) == repr(built) and again.input_format == "RGB"
    assert built.input_format == "BGR" != tiny_fcos("INPUT.FORMAT", "RGB").input_format


def test_training_returns_three_losses_and_evaluation_detections():
    model, batch = tiny_fcos(), [sample(64, 96, [BOX]), sample(60, 90, [BOX, BOX])]
    losses = train_step(model, batch)
    assert set(losses) == LOSSES
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    assert not without_gradient(model)
    detector = tiny_fcos(**PERMISSIVE, **NO_EMPTY_BOXES)
    for found, item in zip(evaluate(detector, batch), batch, strict=True):
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert found.image_size == tuple(item["image"].shape[1:])
        assert len(found) == 100
        assert found.pred_classes.min() >= 0 and found.pred_classes.max() < NUM_CLASSES


def test_detections_are_in_pixels_of_the_original_image_and_inside_it():
    model, item = tiny_fcos(**PERMISSIVE), sample(64, 96)
    torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)
    (plain,) = evaluate(model, [item])
    (scaled,) = evaluate(model, [item | {"height": 128, "width": 288}])
    assert scaled.image_size == (128, 288)
    factors = torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(scaled.pred_boxes.tensor, plain.pred_boxes.tensor * factors)
    assert plain.pred_boxes.tensor.min() == 0 and plain.pred_boxes.tensor[:, 2].max() == 96


def test_detections_do_not_depend_on_the_other_images_of_the_batch():
    model = tiny_fcos(**PERMISSIVE)
    first, second = sample(64, 96), sample(64, 96)
    (alone,), together = evaluate(model, [first]), evaluate(model, [second, first])
    torch.testing.assert_close(together[1].pred_boxes.tensor, alone.pred_boxes.tensor)
    torch.testing.assert_close(together[1].scores, alone.scores)


def test_boxes_are_clipped_to_their_own_image_not_to_the_batch():
    model = tiny_fcos(CLIP_BEFORE_NMS=True, **PERMISSIVE).eval()
    torch.nn.init.constant_(model.head.bbox_pred.bias, 4.0)
    images = model.preprocess_image([sample(40, 96), sample(64, 50)])
    maps = model.backbone(images.tensor)
    maps = [maps[name] for name in model.head_in_features]
    found = model.forward_inference(images, maps, model.head(maps))
    largest = [image.pred_boxes.tensor.amax(dim=0).tolist() for image in found]
    assert [box[2:] for box in largest] == [[96, 40], [50, 64]]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_predictions_yield_no_boxes(convention, value):
    """Follows detectron2's test_inf_nan_data, which fails if boxes are clipped to the image."""
    model = tiny_fcos(CONVENTION=convention, **PERMISSIVE).eval()
    images = ImageList(torch.full((1, 3, 512, 512), value), [(510, 510)])
    features, predictions = model.network(images.tensor)
    nonfinite = [[torch.full_like(x, value) for x in maps] for maps in predictions[:3]]
    for maps in (nonfinite, [predictions.logits, nonfinite[1], predictions.quality]):
        (found,) = model.forward_inference(images, features, Predictions(*maps, []))
        assert not found.pred_boxes.tensor.isfinite().any()


def test_image_is_normalized_by_mean_and_std():
    mean, std = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    model = tiny_fcos("MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std)
    image = torch.tensor(mean).view(3, 1, 1) + torch.tensor(std).view(3, 1, 1) * torch.ones(3, 4, 5)
    images = model.preprocess_image([{"image": image}])
    assert images.tensor.shape == (1, 3, 32, 32)
    assert images.tensor[0, :, :4, :5].unique().item() == 1
    assert images.tensor[0, :, 4:].abs().max() == 0


@pytest.mark.parametrize(
    "levels",
    [
        ("p2", "p3", "p4", "p5", "p6"),
        ("p3", "p4", "p5", "p6", "p7"),
        ("p3", "p4", "p5"),
        ("p2", "p3"),
        ("p4",),
    ],
)
def test_any_range_of_levels_trains_all_parameters_and_evaluates(levels):
    model = tiny_fcos(levels=levels, **PERMISSIVE, **NO_EMPTY_BOXES)
    losses = train_step(model, [sample(128, 128, [BOX, [2.0, 2, 126, 120]])])
    assert all(loss.isfinite() for loss in losses.values())
    assert not without_gradient(model)
    assert model.losses.strides == tuple(STRIDES[level] for level in levels)
    assert len(evaluate(model, [sample(128, 128)])[0]) == 100


def test_levels_may_have_gaps():
    cfg = tiny_cfg(levels=("p3", "p4", "p5"))
    cfg.MODEL.FCOS.IN_FEATURES, cfg.MODEL.FCOS.FPN_STRIDES = ["p3", "p5"], [8, 32]
    cfg.MODEL.FCOS.SIZES_OF_INTEREST = [100]
    model = FCOS(cfg)
    train_step(model, [sample(64, 64, [BOX])])
    assert set(model.losses.stats) >= {"fcos/positives_p3", "fcos/positives_p5"}
    assert without_gradient(model) == [
        "backbone.fpn_output4.weight", "backbone.fpn_output4.bias",
    ]  # fmt: skip


OPTIONS = [
    {},
    {"CONVENTION": "original", "NUM_SHARE_CONVS": 1},
    {"CONVENTION": "detectron2", "USE_DEFORMABLE": True},
    {"CONVENTION": "torchvision"},
    {"CONVENTION": "mmdet_tricks", "BOX_QUALITY": "iou"},
    {"CONVENTION": "mmdet_base", "NORM": "none", "NMS_METHOD": "linear"},
]
EDGE_CASES = {
    "image without objects": lambda: [sample(64, 96, [BOX]), sample(64, 96)],
    "batch without objects": lambda: [sample(64, 96), sample(32, 40)],
    "boxes between all points": lambda: [sample(64, 96, [[5.0, 5, 11, 11]])],
    "boxes of zero size": lambda: [sample(64, 96, [[20.0, 20, 20, 20], [0, 30, 50, 30], BOX])],
    "only boxes of zero size": lambda: [sample(64, 96, [[20.0, 20, 20, 20]])],
    "only crowd regions": lambda: [sample(64, 96, [BOX], [-1])],
    "box beyond the image": lambda: [sample(64, 96, [[-50.0, -50, 500, 400]])],
    "equal boxes": lambda: [sample(64, 96, [BOX, BOX], [0, 1])],
    "image smaller than a stride": lambda: [sample(5, 7, [[0.0, 0, 7, 5]])],
    "image of one pixel": lambda: [sample(1, 1, [[0.0, 0, 1, 1]])],
    "feature maps of one point": lambda: [sample(32, 32, [[0.0, 0, 32, 32]])],
    "very long image": lambda: [sample(8, 700, [[0.0, 0, 700, 8]])],
    "images of different sizes": lambda: [sample(5, 7, [[0.0, 0, 7, 5]]), sample(90, 33)],
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", EDGE_CASES.values(), ids=EDGE_CASES)
def test_edge_case_trains_all_parameters_and_evaluates(batch, options):
    batch, settings = batch(), PERMISSIVE | {"POST_NMS_TOPK_TEST": 5} | options
    model = tiny_fcos(levels=("p3", "p4", "p5", "p6", "p7"), **settings)
    losses = train_step(model, batch)
    assert all(loss.isfinite() for loss in losses.values())
    assert not without_gradient(model)
    for found in evaluate(model, batch):
        assert found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()


def test_batch_norms_train_on_levels_with_few_points():
    model = tiny_fcos(NORM="BN", levels=("p3", "p4", "p5", "p6", "p7"))
    train_step(model, [sample(32, 40, [BOX]), sample(40, 32)])
    assert not without_gradient(model)


def test_losses_fall_and_boxes_are_found_when_overfitting_one_image():
    boxes, classes = [BOX, [50.0, 10, 90, 60]], [2, 0]
    model, batch = tiny_fcos(), [sample(64, 96, boxes, classes)]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = []
    for _ in range(80):
        optimizer.zero_grad()
        history.append({k: v.item() for k, v in train_step(model, batch).items()})
        optimizer.step()
    decrease = {name: history[20][name] / loss for name, loss in history[0].items()}
    assert decrease["loss_fcos_cls"] < 0.5 and decrease["loss_fcos_loc"] < 0.8
    assert decrease["loss_fcos_ctr"] < 1
    (found,) = evaluate(model, batch)
    for label, box in zip(classes, boxes, strict=True):
        best = found[found.pred_classes == label][0]
        assert best.scores > 0.4
        assert best.pred_boxes.tensor[0].tolist() == pytest.approx(box, abs=6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_under_autocast_are_finite_and_close(options):
    model, batch = tiny_fcos(**options), [sample(64, 96, [BOX])]
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train_step(model, batch)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.01)
    assert not without_gradient(model)
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"CONVENTION": "detectron2", "NORM": "BN"}], ids=str)
def test_models_of_other_dtypes_train(dtype, options):
    model, batch = tiny_fcos(**options), [sample(64, 96, [BOX]), sample(64, 96)]
    exact = copy.deepcopy(model)(batch)
    losses = train_step(model.to(dtype), batch)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {dtype}
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_model_can_be_copied_after_a_step():
    model, batch = tiny_fcos(), [sample(64, 96, [BOX])]
    train_step(model, batch)
    torch.testing.assert_close(copy.deepcopy(model)(batch), model(batch))


@pytest.fixture
def one_process():
    """Initializes a process group with a single process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"CONVENTION": "detectron2", "NORM": "BN"}], ids=str)
def test_distributed_training_finds_no_unused_parameters(one_process, options):
    """A step fails if the previous one left a parameter without gradient, also without objects."""
    model = tiny_fcos(levels=("p3", "p4", "p5", "p6", "p7"), **options)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    for batch in ([sample(64, 96)] * 2, [sample(64, 96, [BOX])] * 2, [sample(64, 96)] * 2):
        losses = train_step(parallel, batch)
        assert math.isfinite(sum(losses.values()).item())
