"""Registers, loads and checks datasets.

COCO files and the entries of DATASETS.REGISTER are reviewed and converted to records here. Other
registered datasets are loaded by their own functions.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from torch.utils.data import ConcatDataset

from ..errors import InputError, format_value, one_line_cause, suggest
from .custom import check_entry, clear_cache, read_sources, review_entry
from .defects import describe_repairs
from .digits.files import SPLITS, annotation_file, default_root, ensure_digits, image_folder
from .digits.scenes import CLASSES
from .formats.builder import Source
from .formats.files import read_json
from .formats.json_files import detect_format
from .image_files import NO_FILE, locate_images, suggest_folder
from .records import coco_records, explain_missing_objects, is_flat, review_records, set_classes
from .review import Review

CHECK = "fcos-d2 check --config-file FILE"
logger = logging.getLogger(__name__)


# ---- Registration ----


def register_digits(root: str | os.PathLike | None = None) -> None:
    """Registers ``digits_train`` and ``digits_val``, or changes their folder; writes no files.

    Args:
        root: the parent folder of ``digits``. Default: $DETECTRON2_DATASETS or ./datasets.
    """
    root = default_root() if root is None else os.fspath(root)
    for split in SPLITS:
        _register(
            f"digits_{split}",
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
            json_file=str(annotation_file(root, split)),
            image_root=str(image_folder(root, split)),
            digits_root=str(root),
        )


def register_datasets(entries: Mapping[str, Mapping]) -> None:
    """Registers the entries of DATASETS.REGISTER in detectron2's catalogs; opens no files.

    Args:
        entries: dataset name -> entry; docs/custom_data.md lists the keys. Paths are relative to
            the working directory; ``~`` and environment variables are expanded.

    Raises:
        InputError: an entry is incomplete, or a name is taken or is not a safe file name.
    """
    for name, entry in entries.items():
        check_entry(name, entry)
        if name in DatasetCatalog and not MetadataCatalog.get(name).get("entry"):
            raise InputError(
                f"DATASETS.REGISTER.{name}: a dataset with this name already exists; choose "
                "another name"
            )
        clear_cache(name)
        _register(name, entry=dict(entry))


def _register(name: str, **metadata) -> None:
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(load_coco, name))
    MetadataCatalog.get(name).set(evaluator_type="coco", **metadata)


def is_coco(name: str) -> bool:
    """Returns whether a dataset was registered here or with ``register_coco_instances``."""
    function = DatasetCatalog[name]
    ours = isinstance(function, partial) and function.func is load_coco
    return ours or getattr(function, "__module__", "") == "detectron2.data.datasets.coco"


def prepare(name: str) -> None:
    """Checks that the annotation file of a dataset exists; generates the built-in datasets.

    Raises:
        InputError: the dataset is unknown, or its annotation file is missing.
    """
    if name not in DatasetCatalog:
        similar = suggest(name, DatasetCatalog.list(), "")
        raise InputError(
            f"unknown dataset {name!r}; {similar and similar + ' Otherwise '}define it in the "
            f"config: DATASETS: {{REGISTER: {{{name}: "
            "{json: annotations.json, images: image_folder}}}"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("digits_root"):
        ensure_digits(metadata.digits_root)
    json_file = metadata.get("json_file")
    if json_file and "://" not in json_file and not PathManager.exists(json_file):
        advice = _path_advice(name)
        raise InputError(f"dataset {name!r}: annotation file {json_file} does not exist; {advice}")


def _path_advice(name: str) -> str:
    if MetadataCatalog.get(name).get("entry"):
        return f"correct the paths in DATASETS.REGISTER.{name}"
    root = os.getenv("DETECTRON2_DATASETS") or "not set, which means ./datasets"
    return (
        "check the path it was registered with, or set DETECTRON2_DATASETS to the folder that "
        f"contains all datasets (currently {root})"
    )


def _format_names(names: Sequence[str]) -> str:
    return f"dataset{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


# ---- COCO files, and formats that are converted to COCO ----


def sources_of(name: str) -> list[Source]:
    """Reads the annotation files of a dataset that passes ``is_coco``, without reviewing them.

    Raises:
        InputError: a file is missing or cannot be read.
    """
    prepare(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("entry"):
        try:
            return read_sources(name, metadata.entry)
        except InputError as error:
            raise InputError(f"dataset {name!r}: {error}") from error
    content = read_json(metadata.json_file)
    if not isinstance(content, dict):
        found = detect_format(content)
        raise InputError(f"{metadata.json_file} must be a COCO file, but is {found}")
    return [Source(metadata.json_file, metadata.get("image_root", ""), content)]


def review_dataset(name: str, masks: bool = False) -> tuple[list[Source], Review]:
    """Reviews the annotations of a dataset that passes ``is_coco``.

    Raises:
        InputError: a file contains no annotations.
    """
    sources = sources_of(name)
    return sources, review_entry(sources, MetadataCatalog.get(name).get("entry", {}), masks)


def coco_content(name: str, masks: bool = False) -> dict:
    """Returns the repaired annotations of a dataset as the content of a COCO file.

    Raises:
        InputError: annotations have defects that cannot be repaired, or images are missing.
    """
    is_own = is_coco(name)
    if not is_own and not MetadataCatalog.get(name).get("json_file"):
        return _convert_to_coco(name)
    sources, review = review_dataset(name, masks)
    file, count = sources[0].file, len(review.problems)
    if review.problems:
        more = f" ({count} problems; {CHECK} lists them)" if count > 1 else ""
        raise InputError(f"{file}: {review.problems[0].text}{more}")
    if review.missing and is_own:
        raise InputError(f"dataset {name!r}: {missing_images(name, sources, review)}")
    if review.repaired:
        text = f"{file}: repaired {', '.join(describe_repairs(review.repaired))}"
        text += "; fcos-d2 check --clean writes a repaired file"
        log_first_n(logging.WARNING, text, name=__name__, key="message")
    if is_own:
        set_classes(name, review.content["categories"])
    return review.content


def _convert_to_coco(name: str) -> dict:
    try:
        return convert_to_coco_dict(name)
    except (AttributeError, KeyError) as error:
        raise InputError(
            f"dataset {name!r} has no {error.args[0]!r}; evaluation needs thing_classes in the "
            "metadata, and file_name, width and height in every record"
        ) from error


def missing_images(name: str, sources: Sequence[Source], review: Review) -> str:
    """Describes missing images: an example, their number, and a folder that has the example."""
    (path, reason), total = next(iter(review.missing.items())), len(review.content["images"])
    text = f"image {format_value(path)}: {reason} (missing: {len(review.missing)} of {total})"
    if len(review.missing) == total and reason == NO_FILE:
        folders = [os.path.dirname(source.file) or "." for source in sources]
        found = suggest_folder(sources[0].image_root, path, folders)
        if found is not None:
            return f"{text}; {format_value(os.path.basename(path))} is in {format_value(found)}"
    return f"{text}; {_path_advice(name)}"


def load_coco(name: str, masks: bool = False) -> list[dict]:
    """Loads the records of a dataset that passes ``is_coco``.

    Raises:
        InputError: see ``coco_content``.
    """
    content = coco_content(name, masks)
    return coco_records(content, MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id, masks)


# ---- Loading ----


def load_dataset(
    names: str | Sequence[str], filter_empty: bool = True, masks: bool = False
) -> Sequence[dict]:
    """Loads and checks the records of one or more datasets, in detectron2's standard format.

    Args:
        names: registered datasets with the same classes.
        filter_empty: drop images that have no annotations or only crowd regions.
        masks: keep ``segmentation``, which takes up most of COCO's memory. Objects without a
            polygon of at least three points are then dropped.

    Returns:
        One dict per image. If any of them has ``annotations``, all do; the list is empty for images
        without objects. Unambiguous defects are repaired and logged.

    Raises:
        InputError: a name is unknown; an annotation file is missing, invalid or of an unknown
            format; a defect cannot be repaired; images are missing; or no image has objects. Boxes
            with zero area only cause a warning.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("no dataset is specified; set DATASETS.TRAIN or DATASETS.TEST")
    datasets = [_load_one(name, masks) for name in names]
    if not all(isinstance(dataset, list) for dataset in datasets):  # torch datasets are not checked
        return ConcatDataset(datasets) if len(datasets) > 1 else datasets[0]
    records = list(chain.from_iterable(datasets))
    if not records:
        raise InputError(f"{_format_names(names)}: there are no images")
    if any("annotations" in record for record in records):
        records = [r if "annotations" in r else {**r, "annotations": []} for r in records]
        _check_classes(records, names)
        if filter_empty:
            kept = filter_images_with_only_crowd_annotations(records)
            if not kept:
                check_objects(records, names)
            return kept
    return records


def _load_one(name: str, masks: bool) -> Sequence[dict]:
    prepare(name)
    try:
        if is_coco(name):
            return load_coco(name, masks)
        records = DatasetCatalog.get(name)
    except OSError as error:
        cause = one_line_cause(error)
        raise InputError(f"dataset {name!r}: {cause}; {_path_advice(name)}") from error
    if not isinstance(records, list):
        return records
    classes = MetadataCatalog.get(name).get("thing_classes") or ()
    records, problems = review_records(records, len(classes) or None)
    if problems:
        raise InputError(f"dataset {name!r}: {problems[0].text}")
    paths = [path for record in records if (path := record.get("file_name")) and "://" not in path]
    if missing := locate_images("", paths).missing:
        path = paths[next(iter(missing))]
        raise InputError(
            f"dataset {name!r}: image {format_value(path)} does not exist (missing: {len(missing)} "
            f"of {len(records)}); {_path_advice(name)}"
        )
    return records if masks else list(map(_without_masks, records))


def _without_masks(record: dict) -> dict:
    """Returns a copy without masks; the original may belong to the user and is not changed."""
    if "annotations" not in record:
        return record
    annotations = [
        {key: value for key, value in annotation.items() if key != "segmentation"}
        for annotation in record["annotations"]
    ]
    return {**record, "annotations": annotations}


def _check_classes(records: list[dict], names: Sequence[str]) -> None:
    """Checks the classes of datasets that are combined, and logs the number of objects per class.

    Raises:
        InputError: the datasets have different classes, or class names are empty or not unique.
    """
    classes = {tuple(MetadataCatalog.get(name).get("thing_classes") or ()) for name in names}
    if len(classes) > 1:
        raise InputError(
            f"{_format_names(names)} have different classes; combine only datasets with the same "
            "classes"
        )
    for class_, count in Counter(*classes).items():
        if count > 1 or not class_.strip():
            raise InputError(
                f"{_format_names(names)}: {count} classes are named "
                f"{format_value(class_, quote=True)}; give every class a unique name"
            )
    if flat := sum(is_flat(a) for record in records for a in record["annotations"]):
        logger.warning(
            f"{_format_names(names)}: {flat} boxes have zero width or height; training and "
            "evaluation ignore them"
        )
    if any(classes):
        print_instances_class_histogram(records, *classes)


def check_objects(records: Sequence[dict], names: Sequence[str]) -> None:
    """Checks that the records contain an object to train on.

    Raises:
        InputError: there are no annotations, or all are crowd regions, flat or outside the image.
    """
    if isinstance(records, list) and (reason := explain_missing_objects(records)):
        raise InputError(f"{_format_names(names)}: {reason}; see {CHECK}")
