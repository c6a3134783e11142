"""Which of detectron2's evaluators measures a data set, made to work with files as they are."""

from __future__ import annotations

import contextlib
import io
import math
from numbers import Real

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from pycocotools.coco import COCO

from ..data import prepare
from ..errors import InputError


def evaluator_for(dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator that the metadata of ``dataset_name`` asks for.

    Args:
        dataset_name: of a registered data set.
        output_dir: where detections are written to, if they are.

    Raises:
        InputError: it asks for none, or for one that does not fit boxes.
    """
    prepare(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "coco":
        # The fast implementation is compiled code that many builds of detectron2 lack.
        evaluator = COCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False)
        _complete_annotations(evaluator._coco_api)
        return evaluator
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir)
    raise InputError(
        f"data set {dataset_name!r} has evaluator_type {kind!r}, which is none of coco, pascal_voc "
        f"and lvis; set MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco' where you "
        "register it"
    )


def _complete_annotations(coco_api: COCO) -> None:
    """Gives annotations what COCOeval reads of them and a COCO file may lack.

    It takes an id of 0 for "no match" and cannot take a text, so ids count from 1. ``iscrowd`` is 0
    where there is none, ``area`` that of the box where it is missing or no number.
    """
    for number, annotation in enumerate(coco_api.dataset.get("annotations", ()), 1):
        area, (_, _, width, height) = annotation.get("area"), annotation["bbox"]
        if not isinstance(area, Real) or not 0 <= area < math.inf:
            area = width * height
        iscrowd = int(annotation.get("iscrowd") or 0)
        annotation.update(id=number, iscrowd=iscrowd, area=area)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_api.createIndex()
