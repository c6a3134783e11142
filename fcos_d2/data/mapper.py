"""Maps records to the model's input: detectron2's DatasetMapper with our image reader.

Unreadable images are named, crowd regions can be kept as ground truth to ignore, and crops contain
objects.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from .defects import Unusable
from .records import boxes_of, read_record

IGNORED = -1  # the label of ground truth that is neither object nor background
VISIBLE = 0.4  # share of its area that a cropped object must show to be learned
BACKGROUND = 0.2  # share of the crops at random positions


class ObjectCrop(T.RandomCrop):
    """``RandomCrop`` that mostly contains an object; random crops of aerial photos rarely do."""

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """A crop that contains the center of one of the boxes, xyxy [n, 4], or a random one."""
        size = self.get_crop_size(image.shape[:2])
        centers = boxes.reshape(-1, 2, 2).mean(1)
        inside = ((centers >= 0) & (centers <= image.shape[1::-1])).all(1)
        if not inside.any() or np.random.rand() < BACKGROUND:
            return super().get_transform(image)
        box = boxes[np.random.choice(np.flatnonzero(inside))]
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
        return utils.gen_crop_transform_with_instance(size, image.shape[:2], annotation)


class FCOSDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper`` with crowd regions, object crops and names of broken images.

    With INPUT.CROP, crops contain objects. The visible part of a cropped object is learned; if it
    is less than 40 percent, it is neither object nor background.

    Args:
        is_train, options: those of ``DatasetMapper``.
        keep_crowd: keep ``iscrowd`` annotations, which detectron2 drops (and so teaches as
            background), as boxes with ``gt_classes`` = -1. They are transformed like all others.
        ignore_cut: keep objects that are mostly cut off as such boxes instead of dropping them.

    Raises:
        InputError: ``keep_crowd`` together with masks; on a call, when the image is missing, cut
            off, no image, of more than 8 bits a channel, or of a size that its boxes do not fit.
            It stays an InputError when it comes from a loader's worker.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, keep_crowd: bool = False, ignore_cut: bool = False, **options
    ):
        if keep_crowd and options.get("use_instance_mask"):
            raise InputError(
                "crowd regions have no masks to learn; set MODEL.FCOS.IGNORE_CROWD False or "
                "MODEL.MASK_ON False"
            )
        super().__init__(is_train, **options)
        self.keep_crowd, self.ignore_cut = keep_crowd, ignore_cut

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Reads the keys that ``DatasetMapper`` reads and MODEL.FCOS.IGNORE_CROWD."""
        options = super().from_config(cfg, is_train)
        crop = cfg.INPUT.CROP
        if crop.ENABLED and is_train:
            options["augmentations"][0] = ObjectCrop(crop.TYPE, crop.SIZE)
        # Heads of a second stage would take the class -1 for one.
        ignore_cut = cfg.MODEL.META_ARCHITECTURE == "FCOS" and not cfg.MODEL.MASK_ON
        return {**options, "keep_crowd": cfg.MODEL.FCOS.IGNORE_CROWD, "ignore_cut": ignore_cut}

    def __call__(self, dataset_dict: dict) -> dict:
        """Reads and transforms one image and its annotations; see ``DatasetMapper``."""
        sample = deepcopy(dataset_dict)
        image = self._read(sample)
        annotations = sample.get("annotations", ()) if self.is_train else ()
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        augmented = T.AugInput(image, boxes=boxes_of(objects))
        transforms = self.augmentations(augmented)
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            size = augmented.image.shape[:2]
            is_cropped = any(isinstance(t, T.CropTransform) for t in transforms.transforms)
            cut = _cut_off(objects, augmented.boxes, size) if is_cropped else set()
            sample["annotations"] = list(self._kept(annotations, cut))
            self._transform_annotations(sample, transforms, size)
        return sample

    def _kept(self, annotations: Iterable[dict], cut: set[int]) -> Iterator[dict]:
        """The annotations to learn or to ignore."""
        for annotation in annotations:
            if id(annotation) in cut:
                if self.ignore_cut:
                    yield _as_ignored(annotation)
            elif self.keep_crowd and annotation.get("iscrowd", 0):
                yield _as_ignored(annotation)
            else:
                yield annotation

    def _read(self, sample: dict) -> np.ndarray:
        """Reads the image of ``sample`` and sets its true size."""
        file_name, annotated = sample["file_name"], (sample.get("width"), sample.get("height"))
        try:
            image, has_other_size = read_record(sample, self.image_format)
        except Unusable as error:
            raise InputError(f"image {file_name}: {error}") from error
        except InputError as error:
            raise InputError(
                f"cannot read image {file_name}: {error}; replace the file or remove it from the "
                "annotations"
            ) from error
        if has_other_size:
            text = f"image {file_name} is {sample['width']} x {sample['height']}, but annotated as "
            text += f"{annotated[0]} x {annotated[1]}: using the image's size, as the boxes fit"
            log_first_n(logging.WARNING, text, name=__name__)
        return image


def _cut_off(objects: list[dict], boxes: np.ndarray, size: tuple[int, int]) -> set[int]:
    """Ids (in Python) of the objects of which the augmented image shows too little."""
    height, width = size
    shown = boxes.reshape(-1, 2, 2).clip(0, (width, height))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    part = np.prod(shown[:, 1] - shown[:, 0], axis=1)
    return {id(a) for a, is_cut in zip(objects, part < VISIBLE * area, strict=True) if is_cut}


def _as_ignored(annotation: dict) -> dict:
    """An annotation as an object of class -1, which the mappers of all versions keep."""
    box_only = {key: annotation[key] for key in ("bbox", "bbox_mode")}
    return {**box_only, "category_id": IGNORED, "iscrowd": 0}
