"""Data sets by name, and every problem with one of them as a single line that says what to do.

Everything is loaded by detectron2 itself; what happens here is registration of the built-in data
sets, a look at what was loaded, and the words for what was not.
"""

import contextlib
import difflib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
)
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils.file_io import PathManager
from pycocotools import coco

from ..errors import InputError, format_value
from . import digits
from .annotation_checks import (
    count_flat_boxes,
    is_usable_mask,
    problem_in_coco_file,
    problem_in_records,
    read_coco,
)
from .custom import ensure_annotations

MOST_FOLDERS = 1000  # that are listed to find missing images; more of them would take too long

logger = logging.getLogger(__name__)
_one_at_a_time = threading.RLock()


def register_digits(root: str | os.PathLike | None = None) -> None:
    """Names ``digits_train`` and ``digits_val``; writes nothing. A second call moves them.

    Args:
        root: the folder that holds ``digits/``. Default: $DETECTRON2_DATASETS or ./datasets.
    """
    root = digits.default_root() if root is None else os.fspath(root)
    for split in digits.SPLITS:
        name = f"digits_{split}"
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, partial(_load_digits, name))
        MetadataCatalog.get(name).set(
            thing_classes=list(digits.CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(digits.CLASSES))},
            json_file=str(digits.annotation_file(root, split)),
            image_root=str(digits.image_folder(root, split)),
            evaluator_type="coco",
            digits_root=str(root),
        )


def _load_digits(name: str) -> list[dict]:
    prepare(name)
    metadata = MetadataCatalog.get(name)
    return load_coco_json(metadata.json_file, metadata.image_root, name)


def prepare(name: str) -> None:
    """Guarantees that the annotation file of data set ``name`` is there; makes what can be made.

    That is the built-in data, and COCO files of data sets in the config that have none.

    Whoever opens ``MetadataCatalog.get(name).json_file`` calls this first: COCOEvaluator does so
    when it is constructed, before any data is loaded.

    Raises:
        InputError: no such data set, or its annotation file is absent.
    """
    if name not in DatasetCatalog:
        raise InputError(_unknown_name(name))
    metadata = MetadataCatalog.get(name)
    if metadata.get("digits_root"):
        digits.ensure_digits(metadata.digits_root)
    ensure_annotations(name)
    json_file = metadata.get("json_file")
    if json_file and "://" not in json_file and not PathManager.exists(json_file):
        raise InputError(
            f"data set {name!r}: annotation file {json_file} does not exist; "
            f"{_where_data_lives(name)}"
        )


def load_dataset(
    names: str | Sequence[str], filter_empty: bool = True, masks: bool = False, **options
) -> Sequence[dict]:
    """detectron2's ``get_detection_dataset_dicts``, with its result checked.

    Args:
        names: registered data sets; those of one call must have the same classes.
        filter_empty: leave out images without any annotation that is not a crowd.
        masks: keep ``segmentation``, for a model that needs it. It is most of the memory that COCO
            takes, and detectron2 leaves out an object whose polygons all have under three points.
        options: further arguments of ``get_detection_dataset_dicts``.

    Returns:
        one dict per image, as detectron2 made it. Where any has ``annotations`` all have: an image
        that came without is one without objects.

    Raises:
        InputError: unknown name; annotation file absent, broken or not COCO; annotation without
            box, with a box of negative or non-finite size, of an unknown class or image, or with
            an ``iscrowd`` other than 0 and 1; no image with objects; image file missing. Boxes of
            zero size are legal (no point serves them): only a warning.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("no data set is named; set DATASETS.TRAIN or DATASETS.TEST")
    for name in names:
        prepare(name)
    try:
        with _unmatched_annotations() as unmatched, _tidied_annotations(masks):
            records = _load(names, **options)
    except Exception as error:
        problem = _explain(error, names, masks)
        if problem is None:  # a bug in somebody's own loader deserves its traceback
            raise
        raise InputError(problem) from error
    if unmatched:
        _raise_first(map(_problem_in_annotation_file, names))
    if not isinstance(records, list):  # a torch Dataset is not looked through
        return records
    _check_annotations(records, names)
    if filter_empty:  # only now, so that what is no number does not pass for a crowd
        records = _with_objects(records, names)
    _check_image_files(records, names)
    if not masks:
        _leave_out_masks(records)
    return records


def _load(names: list[str], check_consistency: bool = True, **options) -> Sequence[dict]:
    """detectron2's loading; only the first record tells it whether there are annotations."""
    records = get_detection_dataset_dicts(
        names, filter_empty=False, check_consistency=False, **options
    )
    if not isinstance(records, list) or not any("annotations" in record for record in records):
        return records
    for index, record in enumerate(records):
        if "annotations" not in record:
            records[index] = {**record, "annotations": []}
    if check_consistency:
        with contextlib.suppress(AttributeError):  # no class names, as in detectron2
            classes = MetadataCatalog.get(names[0]).thing_classes
            check_metadata_consistency("thing_classes", names)
            print_instances_class_histogram(records, classes)
    return records


def _with_objects(records: list[dict], names: Sequence[str]) -> list[dict]:
    if "annotations" not in records[0]:
        return records
    kept = filter_images_with_only_crowd_annotations(records)
    if not kept:
        raise InputError(
            f"{_label(names)}: no image has an object; DATALOADER.FILTER_EMPTY_ANNOTATIONS False "
            "keeps images without objects"
        )
    return kept


def _leave_out_masks(records: list[dict]) -> None:
    """Replaces the records one after the other, so that they never take more than they did.

    What is in them may be the user's own and stays as it is.
    """
    for index, record in enumerate(records):
        if "annotations" in record:
            annotations = [
                {key: value for key, value in annotation.items() if key != "segmentation"}
                for annotation in record["annotations"]
            ]
            records[index] = {**record, "annotations": annotations}


def check_num_classes(names: str | Sequence[str], num_classes: int) -> None:
    """Makes sure that every data set has as many classes as the model.

    Raises:
        InputError: it has another number of classes.
    """
    for name in [names] if isinstance(names, str) else names:
        classes = class_names(name)
        if classes is not None and len(classes) != num_classes:
            some = ", ".join(map(format_value, classes[:3])) + (", ..." if len(classes) > 3 else "")
            raise InputError(
                f"data set {name!r} has {len(classes)} classes ({some}) but the model has "
                f"{num_classes}; set MODEL.FCOS.NUM_CLASSES {len(classes)}"
            )


def count_classes(name: str) -> int | None:
    """How many classes a data set has; None if it declares none."""
    names = class_names(name)
    return None if names is None else len(names)


def class_names(name: str) -> list[str] | None:
    """Class names of a data set in the order of the model's classes; None if it declares none.

    Cheap after ``load_dataset``; before it, the annotation file may have to be read for them.

    Raises:
        InputError: unknown name, or an annotation file that cannot be used.
    """
    if name in DatasetCatalog and (known := MetadataCatalog.get(name).get("thing_classes")):
        return known  # of a data set that need not be there yet
    prepare(name)
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        return None
    categories = read_coco(json_file)["categories"]
    return [category["name"] for category in sorted(categories, key=lambda c: c["id"])]


def _unknown_name(name: str) -> str:
    known = DatasetCatalog.list()
    close = difflib.get_close_matches(name, known, n=3)
    advice = f"did you mean {' or '.join(close)}? Otherwise describe it" if close else "describe it"
    return (
        f"unknown data set {name!r}; {advice} in the config: DATASETS: {{REGISTER: {{{name}: "
        "{json: annotations.json, images: image_folder}}}"
    )


def _where_data_lives(name: str) -> str:
    if MetadataCatalog.get(name).get("described"):
        return f"correct the paths in DATASETS.REGISTER.{name}"
    root = os.getenv("DETECTRON2_DATASETS")
    state = f"it is {root}" if root else "it is not set, which means ./datasets"
    return (
        "check the path it was registered with, or set DETECTRON2_DATASETS to the folder that "
        f"holds all data sets ({state})"
    )


def _label(names: Sequence[str]) -> str:
    return f"data set{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"


def _explain(error: Exception, names: Sequence[str], masks: bool) -> str | None:
    """Why detectron2 failed to load ``names``, or None if that is not for us to say."""
    if isinstance(error, InputError):
        return str(error)
    for find in (partial(_problem_in_annotation_file, masks=masks), _problem_in_loaded):
        for problem in map(find, names):
            if problem:
                return problem
    classes = {tuple(MetadataCatalog.get(name).get("thing_classes") or ()) for name in names}
    if len(classes) > 1:
        return f"{_label(names)} have different classes; use data sets of the same classes together"
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{_label(names)}: {text}; {_where_data_lives(names[0])}"
    if isinstance(error, AssertionError) and text:
        return f"{_label(names)}: {text}"
    return None


def _raise_first(problems: Iterable[str | None]) -> None:
    for problem in problems:
        if problem:
            raise InputError(problem)


@contextlib.contextmanager
def _unmatched_annotations() -> Iterator[list]:
    """Gets a line for each file with annotations of unknown images.

    The COCO API drops such annotations, so nothing in the loaded dicts tells of them; detectron2
    counts them and logs a warning, which is overheard here.
    """
    heard = []

    def overhear(record: logging.LogRecord) -> bool:
        if "match to images in the file" in record.getMessage():
            heard.append(record.getMessage())
        return True

    source = logging.getLogger("detectron2.data.datasets.coco")
    source.addFilter(overhear)
    try:
        yield heard
    finally:
        source.removeFilter(overhear)


@contextlib.contextmanager
def _tidied_annotations(masks: bool) -> Iterator[None]:
    """Hides from detectron2 what makes it lose objects while it reads a COCO file.

    That is ``"iscrowd": null``, which it takes for a crowd, and, where no masks are wanted, a mask
    that it cannot use. Its reader has an option for neither, but looks up the class that it indexes
    the file with when it is called.
    """
    is_reading = True

    def tidy(annotation: dict) -> None:
        if annotation.get("iscrowd", 0) is None:
            annotation["iscrowd"] = 0
        if not masks and not is_usable_mask(annotation.get("segmentation")):
            del annotation["segmentation"]

    with _one_at_a_time:
        original = coco.COCO

        class Tidied(original):
            def createIndex(self):
                if is_reading:  # whoever imported this class meanwhile keeps it
                    for annotation in self.dataset.get("annotations", ()):
                        tidy(annotation)
                super().createIndex()

        coco.COCO = Tidied
        try:
            yield
        finally:
            coco.COCO, is_reading = original, False


def _check_annotations(records: list[dict], names: Sequence[str]) -> None:
    num_classes = len(MetadataCatalog.get(names[0]).get("thing_classes") or ()) or None
    annotations = list(chain.from_iterable(r.get("annotations", ()) for r in records))
    num_flat = count_flat_boxes(annotations, num_classes)
    if num_flat is None:
        _raise_first(map(_problem_in_annotation_file, names))
        raise InputError(f"{_label(names)}: {problem_in_records(records, num_classes)}")
    if num_flat:
        logger.warning(
            f"{_label(names)}: {num_flat} boxes have zero width or height; "
            "no point serves them, so they are not learned"
        )


def _problem_in_annotation_file(name: str, masks: bool = False) -> str | None:
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("source_file") or metadata.get("json_file")
    return problem_in_coco_file(json_file, masks) if json_file else None


def _problem_in_loaded(name: str) -> str | None:
    """Loads one data set once more and says what is wrong with it, if it is an annotation."""
    try:
        records = DatasetCatalog.get(name)
        if not isinstance(records, list):  # a torch Dataset, which may have no end
            return None
        problem = problem_in_records(records, len(MetadataCatalog.get(name).thing_classes))
    except Exception:  # whatever it is, it was not an annotation
        return None
    return problem and f"{_label([name])}: {problem}"


def _check_image_files(records: list[dict], names: Sequence[str]) -> None:
    """Lists folders instead of asking for every file: a fraction of a second for 118,000 images."""
    folders: dict[str, list[str]] = {}
    for record in records:
        folder, file_name = os.path.split(record.get("file_name", ""))
        if file_name and "://" not in folder:
            folders.setdefault(folder, []).append(file_name)
    if len(folders) > MOST_FOLDERS:
        return
    missing = []
    for folder, file_names in folders.items():
        present = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ()
        missing += [os.path.join(folder, name) for name in file_names if name not in present]
    if missing:
        raise InputError(
            f"{_label(names)}: image {format_value(missing[0])} does not exist (missing: "
            f"{len(missing)} of {len(records)}); {_where_data_lives(names[0])}"
        )
