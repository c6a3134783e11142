"""Creates detectron2's evaluator for a dataset, and completes the annotations that it needs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import tempfile
from numbers import Real
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)

from ..data.catalog import coco_content, prepare
from ..errors import InputError

KEYS = {"images", "annotations", "categories"}


def evaluator_for(dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """Creates the evaluator for ``evaluator_type`` in the metadata of a dataset.

    Args:
        dataset_name: name of a registered dataset.
        output_dir: folder for the detections; None to not save them.

    Raises:
        InputError: the type is missing or is not an evaluator of boxes.
    """
    prepare(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco":
        return _coco_evaluator(dataset_name, output_dir)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    raise InputError(
        f"evaluator_type of dataset {dataset_name!r} must be coco, pascal_voc or lvis, got "
        f"{kind!r}; set MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco' where you "
        "register it"
    )


def _coco_evaluator(dataset_name: str, output_dir: str | None) -> COCOEvaluator:
    """Creates a COCOEvaluator with the repaired annotations.

    COCOEvaluator itself would read COCO files with all their defects, and cache the annotations of
    datasets registered in Python across runs, so it gets an empty file.
    """
    content = coco_content(dataset_name)
    known = MetadataCatalog.get(dataset_name)
    alias = f"{dataset_name} (evaluated)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "empty.json")
        path.write_text(json.dumps({key: [] for key in content.keys() & KEYS}))
        MetadataCatalog.get(alias).set(json_file=str(path))
        try:
            # Many builds of detectron2 lack the compiled code of the fast implementation.
            evaluator = COCOEvaluator(alias, output_dir=output_dir, use_fast_impl=False)
        finally:
            MetadataCatalog.remove(alias)
    evaluator._metadata = known
    evaluator._coco_api.dataset = _complete(content, dataset_name)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator._coco_api.createIndex()
    return evaluator


def _complete(content: dict, dataset_name: str) -> dict:
    """Completes the fields of annotations that COCOeval reads, in place.

    Ids are numbered from 1, since 0 means "no match" in COCOeval. ``iscrowd`` defaults to 0, and
    ``area`` to that of the box. Boxes without area, which no detection can match, become crowds,
    which the evaluation ignores.
    """
    num_flat = 0
    for number, annotation in enumerate(content.get("annotations", ()), 1):
        area, (_, _, width, height) = annotation.get("area"), annotation["bbox"]
        if not isinstance(area, Real) or not 0 <= area < math.inf:
            area = width * height
        is_flat = not (width and height)
        num_flat += is_flat
        iscrowd = int(is_flat or annotation.get("iscrowd") or 0)
        annotation.update(id=number, iscrowd=iscrowd, area=area)
    if num_flat:
        logging.getLogger(__name__).warning(
            f"dataset {dataset_name!r}: the evaluation ignores {num_flat} boxes without area"
        )
    return content
