"""From a dataset dict to the model's input: detectron2's mapper, with two things it lacks.

Images that cannot be read are named, and crowd regions can be kept as ground truth to ignore.
"""

from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils

from ..errors import InputError
from .images import check_depth, read_image, why_unreadable

IGNORED = -1  # the label of ground truth that is neither object nor background


class FCOSDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper``, with crowd regions and a name for every unreadable image.

    Args:
        is_train, options: those of ``DatasetMapper``.
        keep_crowd: keep ``iscrowd`` annotations, which detectron2 drops (and so teaches as
            background), as boxes with ``gt_classes`` = -1. They are transformed like all others.

    Raises:
        InputError: ``keep_crowd`` together with masks; on a call, when the image is missing, cut
            off, no image, of more than 8 bits a channel, or not of the size that the data set
            says. It stays an InputError when it comes from a loader's worker.
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
        if self.keep_crowd and self.is_train and "annotations" in dataset_dict:
            annotations = [_crowd_as_ignored(a) for a in dataset_dict["annotations"]]
            dataset_dict = {**dataset_dict, "annotations": annotations}
        try:
            check_depth(dataset_dict["file_name"])
            return super().__call__(dataset_dict)
        except Exception as error:
            problem = self._problem_with_image(dataset_dict, error)
            if problem is None:
                raise
            raise InputError(problem) from error

    def _problem_with_image(self, dataset_dict: dict, error: Exception) -> str | None:
        """Reads the image once more, alone: a failure of anything else is not blamed on it."""
        if isinstance(error, utils.SizeMismatchError):
            return " ".join(str(error).split())
        file_name = dataset_dict["file_name"]
        try:
            read_image(file_name, self.image_format)
        except Exception as cause:
            return (
                f"cannot read image {file_name}: {why_unreadable(cause)}; "
                "replace the file or remove it from the annotations"
            )
        return None


def _crowd_as_ignored(annotation: dict) -> dict:
    """A crowd in the guise of an object of class -1, which the mappers of all versions let pass."""
    if not annotation.get("iscrowd", 0):
        return annotation
    box_only = {key: annotation[key] for key in ("bbox", "bbox_mode")}
    return {**box_only, "category_id": IGNORED, "iscrowd": 0}
