"""Which of detectron2's evaluators measures a dataset, made to work with files as they are."""

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
    """The evaluator that the metadata of ``dataset_name`` asks for.

    Args:
        dataset_name: of a registered dataset.
        output_dir: where detections are written to, if they are.

    Raises:
        InputError: it asks for none, or for one that does not fit boxes.
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
        f"dataset {dataset_name!r} has evaluator_type {kind!r}, which is none of coco, pascal_voc "
        f"and lvis; set MetadataCatalog.get({dataset_name!r}).evaluator_type = 'coco' where you "
        "register it"
    )


def _coco_evaluator(dataset_name: str, output_dir: str | None) -> COCOEvaluator:
    """COCOEvaluator with the reviewed annotations instead of the file.

    COCOEvaluator caches annotations of datasets registered in Python across runs, and reads COCO
    files with all their defects. So it is created with an empty file and gets the annotations here.
    """
    content = coco_content(dataset_name)
    known = MetadataCatalog.get(dataset_name)
    alias = f"{dataset_name} as it is evaluated"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "empty.json")
        path.write_text(json.dumps({key: [] for key in content.keys() & KEYS}))
        MetadataCatalog.get(alias).set(json_file=str(path))
        try:
            # The fast implementation is compiled code that many builds of detectron2 lack.
            evaluator = COCOEvaluator(alias, output_dir=output_dir, use_fast_impl=False)
        finally:
            MetadataCatalog.remove(alias)
    evaluator._metadata = known
    evaluator._coco_api.dataset = _complete(content, dataset_name)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator._coco_api.createIndex()
    return evaluator


def _complete(content: dict, dataset_name: str) -> dict:
    """Gives annotations what COCOeval reads of them and a COCO file may lack.

    It takes an id of 0 for "no match" and cannot take a text, so ids count from 1. ``iscrowd`` is 0
    where there is none, ``area`` that of the box where it is missing or no number. A box without
    area, which nothing can match, becomes a crowd, which is left out of account.
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
            f"dataset {dataset_name!r}: {num_flat} boxes without area are left out of the "
            "evaluation"
        )
    return content
