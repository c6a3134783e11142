"""Draws and checks the datasets of a config before training.

    fcos-d2 visualize --config-file FILE [--output DIR] [--images N]
    fcos-d2 check --config-file FILE [--clean] [--skip-images]

Draws augmented training images, with their boxes and the points assigned to them on each level.
--check instead reads all images and annotations, and reports defects, classes, boxes without an
assigned point, and levels that would fit better; the exit status is 1 if the data must be corrected
before training. --clean also writes annotation files that are repaired and free of defects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from ..config import fcos_settings
from ..config_file import read_cfg
from ..data import (
    FCOSDatasetMapper,
    check_class_order,
    check_num_classes,
    class_names,
    load_dataset,
)
from ..data.defects import describe_repairs
from ..data.images import distinct_names
from ..data.inspection import (
    Contents,
    Inspection,
    clean,
    describe_contents,
    inspect_dataset,
)
from ..data.level_fit import (
    MAX_MISSED,
    STRIDES,
    LevelFit,
    Pyramid,
    Sample,
    image_levels,
    make_sample,
    measure_fit,
    pyramid_keys,
    suggest_pyramid,
)
from ..data.records import evenly_spaced, explain_missing_objects
from ..errors import InputError, exit_status
from ..modeling.losses import FCOSLoss
from ..modeling.structures import PointGrid, pack_ground_truth
from ..visualization.assignment import draw_assignment, to_rgb
from ..visualization.boxes import PANEL_SIDE, draw_objects
from ..visualization.sheet import contact_sheet
from .arguments import DEFAULT, make_config_parser

MAX_LISTED = 20  # defects that are printed; more are only counted
MAX_MEASURED = 2000  # images whose assignment is computed, which are enough for a precision of 0.1%


# ---- Drawing ----


def draw(cfg: CfgNode, names: Sequence[str], folder: Path, num_images: int) -> None:
    """Draws training images and the points assigned to each object.

    Raises:
        InputError: a dataset cannot be read.
    """
    losses, grid = _assignment_rules(cfg)
    mapper = FCOSDatasetMapper(cfg, is_train=True)
    for name in names:
        records = load_dataset(name, filter_empty=False, masks=cfg.MODEL.MASK_ON)
        records = evenly_spaced(records, num_images)
        (folder / name).mkdir(parents=True, exist_ok=True)
        files = [Path(record["file_name"]) for record in records]
        targets = distinct_names(Path(file.name).with_suffix(".png") for file in files)
        for record, target in zip(records, targets, strict=True):
            drawing = _draw_record(mapper(dict(record)), cfg.INPUT.FORMAT, losses, grid, name)
            Image.fromarray(drawing).save(folder / name / target)
        print(f"{name}: images in {folder / name}")


def _draw_record(sample: dict, image_format: str, losses, grid, name: str) -> np.ndarray:
    image, truth = to_rgb(sample["image"], image_format), sample["instances"]
    scale = max(1.0, PANEL_SIDE / max(image.shape[:2]))
    boxes = truth.gt_boxes.tensor
    objects = draw_objects(
        image, boxes.numpy(), truth.gt_classes.tolist(), class_names(name), scale=scale
    )
    levels = image_levels(image.shape[:2], grid)
    targets = losses.assign(pack_ground_truth([truth]), levels)
    points = draw_assignment(
        image, targets.labels[0], levels, losses.num_classes, targets.centerness[0], boxes
    )
    title = f"{Path(sample['file_name']).name}, {len(boxes)} objects"
    return contact_sheet([[objects], [points]], [title])


def _assignment_rules(cfg: CfgNode, pyramid: Pyramid | None = None) -> tuple[FCOSLoss, PointGrid]:
    """Returns the assignment rules of the config, optionally with other levels."""
    if pyramid is not None:
        cfg = cfg.clone()
        cfg.MODEL.FCOS.FPN_STRIDES = pyramid.strides
        cfg.MODEL.FCOS.SIZES_OF_INTEREST = pyramid.sizes_of_interest
    fcos = fcos_settings(cfg)
    try:
        losses = FCOSLoss(cfg)
    except ValueError as error:
        raise InputError(str(error)) from error
    return losses, PointGrid(fcos.FPN_STRIDES, fcos.LOCATION_OFFSET, fcos.LOCATION_PITCH)


# ---- Checking ----


def check(cfg: CfgNode, names: Sequence[str], read_images: bool, write_clean: bool) -> bool:
    """Prints a report on the datasets; returns whether training can use them as they are.

    Raises:
        InputError: an annotation file cannot be read.
    """
    masks = cfg.MODEL.MASK_ON
    inspections = [inspect_dataset(name, read_images, masks) for name in names]
    reasons = []
    for inspection in inspections:
        contents = describe_contents(inspection)
        _print_contents(inspection, contents)
        if inspection.records:
            _print_levels(cfg, inspection)
        if reason := explain_missing_objects(inspection.records):
            reasons.append(f"{inspection.name}: {reason}")
    print()
    reasons += _mismatches(cfg, inspections)
    for line in reasons:
        print(line)
    problems = len(reasons) + sum(inspection.num_problems for inspection in inspections)
    if write_clean:
        _write_clean(inspections, masks)
    elif problems > len(reasons) or any(inspection.repaired for inspection in inspections):
        print("pass --clean to write annotation files without defects")
    print(f"problems to correct: {problems}" if problems else "ready to train")
    return not problems


def _print_contents(inspection: Inspection, contents: Contents) -> None:
    print(f"\n{inspection.name}")
    print(f"  {len(inspection.records)} images, {contents.num_boxes} usable boxes")
    for line in describe_repairs(inspection.repaired):
        print(f"  repaired: {line}")
    defects = [f"image {name}: {why}" for name, why in inspection.image_problems.items()]
    defects += [problem.text for problem in inspection.problems]
    if defects:
        print(f"\n  defects: {len(defects)}")
    for line in defects[:MAX_LISTED]:
        print(f"    {line}")
    if len(defects) > MAX_LISTED:
        print(f"    and {len(defects) - MAX_LISTED} more")
    for what, count in contents.notes.items():
        print(f"  note: {count} {what}")
    print("\n  class                     boxes    images")
    counts = zip(contents.boxes_per_class, contents.images_per_class, strict=True)
    most = max(contents.boxes_per_class, default=1)
    for name, (boxes, images) in zip(inspection.class_names, counts, strict=True):
        bar = "#" * round(20 * boxes / max(most, 1))
        print(f"  {name[:22]:22} {boxes:8} {images:9}  {bar if boxes else 'never used'}")


def _mismatches(cfg: CfgNode, inspections: Sequence[Inspection]) -> list[str]:
    """Describes mismatches between datasets, or between a dataset and the model."""
    lines = []
    for inspection in inspections:
        try:
            check_num_classes(inspection.name, cfg.MODEL.FCOS.NUM_CLASSES)
            check_class_order([inspections[0].name], inspection.name)
        except InputError as error:
            lines.append(str(error))
    trained = {
        r["file_name"] for i in inspections if i.name in cfg.DATASETS.TRAIN for r in i.records
    }
    for inspection in inspections:
        if inspection.name in cfg.DATASETS.TEST:
            shared = sum(record["file_name"] in trained for record in inspection.records)
            if shared:
                lines.append(
                    f"{shared} of the {len(inspection.records)} images of {inspection.name} are "
                    "also in the training data, which makes evaluation meaningless; set 'part'"
                )
    return lines


def _write_clean(inspections: Sequence[Inspection], masks: bool) -> None:
    """Writes copies without defects of the annotation files that have some."""
    defective = [i for i in inspections if i.num_problems or i.repaired]
    for inspection in defective:
        if not inspection.files:
            print(f"--clean: {inspection.name} has no annotation file; correct it in Python")
    for file, content, num_before, repaired, removed in clean(inspections, defective, masks):
        for line in describe_repairs(repaired):
            print(f"repaired: {line}")
        for line in removed:
            print(f"removed: {line}")
        count, path = len(content["annotations"]), Path(file.removesuffix(".gz"))
        path = path.with_name(f"{path.stem}_clean.json")
        if not count:
            print(f"not written: {path} would keep none of {num_before} annotations")
            continue
        path.write_text(json.dumps(content))
        print(
            f"{count} of {num_before} annotations: {path}; use it in the config instead of {file}"
        )


def _print_levels(cfg: CfgNode, inspection: Inspection) -> None:
    """Prints how well the configured and the suggested levels fit at the training sizes."""
    records = evenly_spaced(inspection.records, MAX_MEASURED)
    sizes = sorted({min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)})
    samples = {
        size: [make_sample(r, size, cfg.INPUT.MAX_SIZE_TRAIN) for r in records] for size in sizes
    }
    rules = _assignment_rules(cfg)
    fits = {size: measure_fit(samples[size], *rules) for size in sizes}
    for size, fit in fits.items():
        print(f"\n  levels at INPUT.MIN_SIZE_TRAIN {size}, {fit.num_images} images")
        _print_fit(fit, *rules)
    _print_suggestion(cfg, samples[sizes[0]], fits[sizes[0]])


def _print_suggestion(cfg: CfgNode, samples: Sequence[Sample], configured: LevelFit) -> None:
    pyramid = suggest_pyramid(samples)
    fit = measure_fit(samples, *_assignment_rules(cfg, pyramid))
    left_out = _format_fraction(fit.without_points, fit.num_boxes)
    if fit.without_points >= configured.without_points:
        print(f"  the levels fit; levels of the paper's proportions would leave out {left_out}")
    else:
        print(f"\n  other levels would leave out only {left_out}:")
        for line in pyramid_keys(pyramid):
            print(f"    {line}")
    if min(pyramid.strides) == STRIDES[0] and fit.too_small > MAX_MISSED * fit.num_boxes:
        print("  many objects are small; raise INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST")


def _print_fit(fit: LevelFit, losses: FCOSLoss, grid: PointGrid) -> None:
    print("    stride   box sizes        boxes   points per image")
    for stride, (low, high), boxes, points in zip(
        grid.strides, losses.size_ranges, fit.boxes_per_level, fit.points_per_level, strict=True
    ):
        # The range limits distances, which are about half of the longer side of a box.
        sizes = f"{max(0, 2 * low):.0f} to {2 * high:.0f}".replace("to inf", "and more")
        print(f"    {stride:6}   {sizes:14} {boxes:7} {points / fit.num_images:11.1f}")
    without_points = _format_fraction(fit.without_points, fit.num_boxes)
    causes = f"{fit.too_small} too small, {fit.covered} covered by smaller boxes"
    print(f"    boxes without an assigned point: {without_points} ({causes})")
    positive = sum(fit.points_per_level)
    print(f"    ambiguous points: {_format_fraction(fit.ambiguous, positive)}")


def _format_fraction(count: int, total: int) -> str:
    return f"{count} of {total} ({count / max(total, 1):.1%})"


def run(options: argparse.Namespace) -> int:
    """Draws or checks the datasets; returns the exit status.

    Raises:
        InputError: the config or a dataset cannot be used.
    """
    cfg = read_cfg(options.config_file, options.opts)
    names = options.dataset or list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        raise InputError("there is no dataset; set DATASETS.TRAIN or pass --dataset NAME")
    if options.check or options.clean:
        return int(not check(cfg, names, not options.skip_images, options.clean))
    draw(cfg, names, options.output or Path(cfg.OUTPUT_DIR) / "data", options.images)
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_config_parser(__doc__, required=False)
    add = parser.add_argument
    add("--dataset", action="append", metavar="NAME", help="dataset to use instead of the config's")
    add("--check", action="store_true", help="check the datasets instead of drawing them")
    add("--clean", action="store_true", help="write annotation files without defects")
    add("--skip-images", action="store_true", help="check without reading images")
    add("--output", type=Path, metavar="DIR", help="folder to draw to (default: OUTPUT_DIR/data)")
    add("--images", type=int, default=12, metavar="N", help=f"images of each dataset {DEFAULT}")
    options = parser.parse_intermixed_args(arguments)
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(run, parse(arguments))
