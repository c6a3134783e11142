"""Maps records to model inputs; extends detectron2's DatasetMapper.

Errors name the image that cannot be read, crowd regions can be kept as ignored ground truth, and
crops contain objects.
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
from .defects import DefectError
from .records import read_record, xyxy_boxes

IGNORED = -1  # label of ground truth that is neither object nor background
MIN_VISIBLE = 0.4  # fraction of a cropped object's area that must be visible to train on it
RANDOM_CROPS = 0.2  # fraction of crops at random positions


class ObjectCrop(T.RandomCrop):
    """Crops around objects, mostly: random crops of large images rarely contain one."""

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        """Returns a crop with the center of one of ``boxes``, xyxy [n, 4], or a random crop."""
        size = self.get_crop_size(image.shape[:2])
        centers = boxes.reshape(-1, 2, 2).mean(1)
        inside = ((centers >= 0) & (centers <= image.shape[1::-1])).all(1)
        if not inside.any() or np.random.rand() < RANDOM_CROPS:
            return super().get_transform(image)
        box = boxes[np.random.choice(np.flatnonzero(inside))]
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
        return utils.gen_crop_transform_with_instance(size, image.shape[:2], annotation)


class FCOSDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper`` with crowd regions, crops around objects, and clear errors.

    With INPUT.CROP, crops contain objects. Training uses the visible part of a cropped object; if
    it is less than 40 percent of the area, it is neither object nor background.

    Args:
        is_train, options: see ``DatasetMapper``.
        keep_crowd: keep ``iscrowd`` annotations as boxes with ``gt_classes`` = -1. detectron2 drops
            them, which makes them background.
        ignore_cut: keep objects that are mostly cropped as such boxes, instead of dropping them.

    Raises:
        InputError: ``keep_crowd`` is used with masks. Calls raise it if the image is missing,
            truncated or not an image, has more than 8 bits per channel, or does not fit its boxes,
            also in workers of a data loader.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, keep_crowd: bool = False, ignore_cut: bool = False, **options
    ):
        if keep_crowd and options.get("use_instance_mask"):
            raise InputError(
                "crowd regions have no masks to train on; set MODEL.FCOS.IGNORE_CROWD False or "
                "MODEL.MASK_ON False"
            )
        super().__init__(is_train, **options)
        self.keep_crowd, self.ignore_cut = keep_crowd, ignore_cut

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Reads the keys of ``DatasetMapper`` and MODEL.FCOS.IGNORE_CROWD."""
        options = super().from_config(cfg, is_train)
        crop = cfg.INPUT.CROP
        if crop.ENABLED and is_train:
            options["augmentations"][0] = ObjectCrop(crop.TYPE, crop.SIZE)
        # Second-stage heads do not support the class -1.
        ignore_cut = cfg.MODEL.META_ARCHITECTURE == "FCOS" and not cfg.MODEL.MASK_ON
        return {**options, "keep_crowd": cfg.MODEL.FCOS.IGNORE_CROWD, "ignore_cut": ignore_cut}

    def __call__(self, dataset_dict: dict) -> dict:
        """Reads and transforms one image and its annotations; see ``DatasetMapper``."""
        sample = deepcopy(dataset_dict)
        image = self._read(sample)
        annotations = sample.get("annotations", ()) if self.is_train else ()
        objects = [a for a in annotations if not a.get("iscrowd", 0)]
        augmented = T.AugInput(image, boxes=xyxy_boxes(objects))
        transforms = self.augmentations(augmented)
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            size = augmented.image.shape[:2]
            is_cropped = any(isinstance(t, T.CropTransform) for t in transforms.transforms)
            cut = _find_cut(objects, augmented.boxes, size) if is_cropped else set()
            sample["annotations"] = list(self._select(annotations, cut))
            self._transform_annotations(sample, transforms, size)
        return sample

    def _select(self, annotations: Iterable[dict], cut: set[int]) -> Iterator[dict]:
        """Drops cut objects, or marks them as ignored like crowd regions."""
        for annotation in annotations:
            is_cut = id(annotation) in cut
            if (is_cut and self.ignore_cut) or (self.keep_crowd and annotation.get("iscrowd", 0)):
                box = {key: annotation[key] for key in ("bbox", "bbox_mode")}
                yield {**box, "category_id": IGNORED, "iscrowd": 0}  # detectron2 drops iscrowd 1
            elif not is_cut:
                yield annotation

    def _read(self, sample: dict) -> np.ndarray:
        """Reads the image of ``sample``, and sets the sample's size."""
        file_name, annotated = sample["file_name"], (sample.get("width"), sample.get("height"))
        try:
            image, has_other_size = read_record(sample, self.image_format)
        except DefectError as error:
            raise InputError(f"image {file_name}: {error}") from error
        except InputError as error:
            raise InputError(
                f"cannot read image {file_name}: {error}; replace the file or remove it from the "
                "annotations"
            ) from error
        if has_other_size:
            text = f"image {file_name} is {sample['width']} x {sample['height']}, but annotated as "
            text += f"{annotated[0]} x {annotated[1]}: using the image's size, as its boxes fit"
            log_first_n(logging.WARNING, text, name=__name__)
        return image


def _find_cut(objects: list[dict], boxes: np.ndarray, size: tuple[int, int]) -> set[int]:
    """Returns Python's ids of the objects whose visible part is too small after augmentation."""
    height, width = size
    visible = boxes.reshape(-1, 2, 2).clip(0, (width, height))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    visible_area = np.prod(visible[:, 1] - visible[:, 0], axis=1)
    is_cut = visible_area < MIN_VISIBLE * area
    return {id(a) for a, cut in zip(objects, is_cut, strict=True) if cut}
