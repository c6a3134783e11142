"""Tests the dataset mapper: errors, crowd regions and crops."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2 import add_fcos_config
from fcos_d2.data import FCOSDatasetMapper
from fcos_d2.data.mapper import ObjectCrop
from fcos_d2.errors import InputError, one_line_cause

OBJECT = {"bbox": [5, 6, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3, "iscrowd": 0}
CROWD = {**OBJECT, "bbox": [30, 10, 20, 15], "category_id": 1, "iscrowd": 1}
CROWD["segmentation"] = {"counts": b"PPYo0", "size": [40, 60]}


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "scene.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def record(path, *annotations):
    image = {"file_name": str(path), "image_id": 1, "width": 60, "height": 40}
    return {**image, "annotations": list(annotations)}


def mapper(keep_crowd=True, is_train=True, augmentations=()):
    return FCOSDatasetMapper(
        is_train, augmentations=list(augmentations), image_format="BGR", keep_crowd=keep_crowd
    )


def load_in_worker(record, mapper):
    """Maps ``record`` in a worker of a DataLoader."""
    options = {"num_workers": 1, "collate_fn": lambda batch: mapper(batch[0])}
    return next(iter(torch.utils.data.DataLoader([record], **options)))


def test_mapper_equals_detectron2s_without_crowd_regions(image_file):
    data = record(image_file, OBJECT, CROWD)
    ours = mapper(keep_crowd=False)(data)
    theirs = DatasetMapper(True, augmentations=[], image_format="BGR")(data)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
    assert ours["instances"].gt_classes.tolist() == [3]


def test_crowd_regions_become_boxes_of_class_minus_one(image_file):
    data = record(image_file, CROWD, OBJECT, CROWD)
    before = deepcopy(data)
    instances = load_in_worker(data, mapper())["instances"]
    assert instances.gt_classes.tolist() == [-1, 3, -1]
    assert instances.gt_classes.dtype == torch.int64
    crowd = [30, 10, 50, 25]
    assert instances.gt_boxes.tensor.tolist() == [crowd, [5, 6, 25, 16], crowd]
    assert not instances.has("gt_masks")
    assert data == before


def test_crowd_regions_are_flipped_and_resized(image_file):
    augmentations = [T.RandomFlip(prob=1.0), T.Resize((80, 120))]
    crowd = mapper(augmentations=augmentations)(record(image_file, CROWD))["instances"]
    assert crowd.gt_boxes.tensor.tolist() == [[20, 20, 60, 50]] and crowd.image_size == (80, 120)


def test_evaluation_gets_no_ground_truth(image_file):
    mapped = mapper(is_train=False)(record(image_file, OBJECT, CROWD))
    assert "instances" not in mapped and "annotations" not in mapped


def test_crowd_regions_cannot_be_kept_with_masks():
    with pytest.raises(InputError, match="IGNORE_CROWD False or MODEL.MASK_ON False"):
        FCOSDatasetMapper(
            True, augmentations=[], image_format="BGR", keep_crowd=True, use_instance_mask=True
        )


@pytest.mark.parametrize("ignore_crowd", [True, False])
def test_ignore_crowd_key_keeps_or_drops_crowd_regions(image_file, ignore_crowd):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.MODEL.FCOS.IGNORE_CROWD = ignore_crowd
    instances = FCOSDatasetMapper(cfg, is_train=True)(record(image_file, CROWD))["instances"]
    assert len(instances) == int(ignore_crowd)
    assert FCOSDatasetMapper(cfg, False, augmentations=[]).is_train is False


@pytest.mark.parametrize(
    "read", [lambda data: mapper()(data), lambda data: load_in_worker(data, mapper())]
)
@pytest.mark.parametrize("content", [None, 1500])
def test_unreadable_image_is_reported_also_by_workers(image_file, content, read):
    data = image_file.read_bytes()
    image_file.unlink()
    if content is not None:
        image_file.write_bytes(data[:content])
    with pytest.raises(InputError) as caught:
        read(record(image_file, OBJECT))
    text = one_line_cause(caught.value)
    assert text.startswith(f"cannot read image {image_file}: ")
    assert text.endswith("replace the file or remove it from the annotations")


def test_image_whose_size_differs_from_the_annotations_is_used_if_the_boxes_fit(image_file):
    for size in ((64, 40), (40, 60)):
        mapped = mapper()({**record(image_file, OBJECT), "width": size[0], "height": size[1]})
        assert (mapped["width"], mapped["height"]) == (60, 40)
        assert mapped["instances"].gt_boxes.tensor.tolist() == [[5, 6, 25, 16]]


def test_exif_orientation_is_applied_unless_upright_is_false(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    data = record(tmp_path / "a.jpg", OBJECT)
    with pytest.raises(InputError, match="before the EXIF orientation .* set upright: false"):
        mapper()(data)
    assert mapper()({**data, "upright": False})["image"].shape == (3, 40, 60)
    assert mapper()({**data, "width": 40, "height": 60})["image"].shape == (3, 60, 40)


# ---- Crops ----


def crop_mapper(size, **options):
    crop = ObjectCrop("absolute", size)
    return FCOSDatasetMapper(True, augmentations=[crop], image_format="BGR", **options)


@pytest.fixture
def large_image(tmp_path):
    """Writes a 600 x 400 image with an 8 x 8 and a 60 x 60 object."""
    Image.new("RGB", (600, 400)).save(tmp_path / "large.png")
    boxes = ([400, 300, 408, 308], [50, 60, 110, 120])
    objects = [{"bbox": b, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1} for b in boxes]
    return {**record(tmp_path / "large.png", *objects), "width": 600, "height": 400}


def test_crops_often_contain_small_objects_at_their_original_size(large_image):
    np.random.seed(0)
    samples = [crop_mapper((96, 96), ignore_cut=True)(large_image) for _ in range(200)]
    assert {tuple(sample["image"].shape) for sample in samples} == {(3, 96, 96)}
    boxes = [sample["instances"].gt_boxes.tensor for sample in samples]
    kept = [sample["instances"].gt_classes >= 0 for sample in samples]
    small = [b[(b[:, 2] - b[:, 0] <= 8) & is_kept] for b, is_kept in zip(boxes, kept, strict=True)]
    assert sum(map(len, small)) > 60  # about 10 in random crops
    assert max((b[:, 2] - b[:, 0]).max().item() for b in small if len(b)) == 8


def test_object_that_is_mostly_cropped_is_ignored_or_dropped(large_image):
    for ignore_cut in (True, False):
        np.random.seed(0)
        for _ in range(100):
            instances = crop_mapper((96, 96), ignore_cut=ignore_cut)(large_image)["instances"]
            for box, class_ in zip(instances.gt_boxes.tensor, instances.gt_classes, strict=True):
                sides = box[2:] - box[:2]
                visible = (sides / (8 if sides.max() <= 8 else 60)).prod()
                assert (visible >= 0.4) == (class_ == 1) or sides.max() <= 8
                assert ignore_cut or class_ == 1


def test_crop_of_an_image_that_is_small_or_has_no_objects(image_file):
    assert crop_mapper((20, 30))(record(image_file))["image"].shape == (3, 20, 30)
    sample = crop_mapper((200, 300))(record(image_file, OBJECT))
    assert sample["image"].shape == (3, 40, 60) and len(sample["instances"]) == 1
    outside = {**OBJECT, "bbox": [500, 500, 5, 5]}
    assert len(crop_mapper((20, 30))(record(image_file, outside))["instances"]) == 0


def test_crop_config_crops_around_objects(large_image):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [96, 96]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (96,), 96
    np.random.seed(0)
    train, test = (FCOSDatasetMapper(cfg, is_train) for is_train in (True, False))
    assert sum(len(train(large_image)["instances"]) > 0 for _ in range(50)) > 30
    assert train.ignore_cut and test(large_image)["image"].shape[1] > 96
