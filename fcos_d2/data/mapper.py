"""From a record to the model's input: detectron2's mapper, with the reading of images replaced.

An image that cannot be read is named, and crowd regions can be kept as ground truth to ignore.
"""

from __future__ import annotations

import logging
from copy import deepcopy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.utils.logger import log_first_n

from ..errors import InputError
from .defects import Unusable, true_size
from .images import image_sizes, read_image, why_unreadable
from .inspection import boxes_of

IGNORED = -1  # the label of ground truth that is neither object nor background


class FCOSDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper``, with crowd regions and a name for every unreadable image.

    Args:
        is_train, options: those of ``DatasetMapper``.
        keep_crowd: keep ``iscrowd`` annotations, which detectron2 drops (and so teaches as
            background), as boxes with ``gt_classes`` = -1. They are transformed like all others.

    Raises:
        InputError: ``keep_crowd`` together with masks; on a call, when the image is missing, cut
            off, no image, of more than 8 bits a channel, or of a size that its boxes do not fit.
            It stays an InputError when it comes from a loader's worker.
    """

    @configurable
    def __init__(self, is_train: bool, *, keep_crowd: bool = False, **options):
        if keep_crowd and options.get("use_instance_mask"):
            raise InputError(
                "crowd regions have no masks to learn; set MODEL.FCOS.IGNORE_CROWD False or "
                "MODEL.MASK_ON False"
            )
        super().__init__(is_train, **options)
        self.keep_crowd = keep_crowd

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        """Reads the keys that ``DatasetMapper`` reads and MODEL.FCOS.IGNORE_CROWD."""
        options = super().from_config(cfg, is_train)
        return {**options, "keep_crowd": cfg.MODEL.FCOS.IGNORE_CROWD}

    def __call__(self, dataset_dict: dict) -> dict:
        """Reads and transforms one image and its annotations; see ``DatasetMapper``."""
        sample = deepcopy(dataset_dict)
        image = self._read(sample)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        pixels = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        sample["image"] = torch.as_tensor(pixels)
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            if self.keep_crowd:
                sample["annotations"] = [_crowd_as_ignored(a) for a in sample["annotations"]]
            self._transform_annotations(sample, transforms, augmented.image.shape[:2])
        return sample

    def _read(self, sample: dict) -> np.ndarray:
        """The image of ``sample``, which gets its true size."""
        file_name, upright = sample["file_name"], sample.get("upright", True)
        try:
            image = read_image(file_name, self.image_format, upright)
        except Exception as error:  # Pillow raises whatever a broken file leads it to
            raise InputError(
                f"cannot read image {file_name}: {why_unreadable(error)}; replace the file or "
                "remove it from the annotations"
            ) from error
        height, width = image.shape[:2]
        annotated = sample.setdefault("width", width), sample.setdefault("height", height)
        if annotated != (width, height):
            corners = boxes_of(sample.get("annotations", ()))[:, 2:]
            try:
                true_size(annotated, (width, height), image_sizes(file_name)[1], corners)
            except Unusable as error:
                raise InputError(f"image {file_name}: {error}") from error
            text = "images of another size than the annotations say keep their own, as their boxes"
            text += f" fit: {file_name} is {width} x {height}, not {annotated[0]} x {annotated[1]}"
            log_first_n(logging.WARNING, text, name=__name__)
            sample["width"], sample["height"] = width, height
        return image


def _crowd_as_ignored(annotation: dict) -> dict:
    """A crowd in the guise of an object of class -1, which the mappers of all versions let pass."""
    if not annotation.get("iscrowd", 0):
        return annotation
    box_only = {key: annotation[key] for key in ("bbox", "bbox_mode")}
    return {**box_only, "category_id": IGNORED, "iscrowd": 0}
