"""Draws the training curves, detections and mistakes of a training run.

    fcos-d2 report OUTPUT_DIR [--images N] [--score S] [--mistakes N]

Runs the final model in OUTPUT_DIR on the first test set, and writes curves.png, contact_sheet.png
and report/index.html, a page to browse the mistakes. The images of the contact sheet are evenly
spaced over the test set, not selected.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

from ..config_file import choose_device, read_cfg
from ..data import load_dataset
from ..data.images import read_image
from ..data.records import evenly_spaced
from ..errors import InputError, exit_status
from ..evaluation import Objects, ground_truth
from ..evaluation.report import write_report
from ..inference import accelerated, build_test_loader, load_detector
from ..modeling.acceleration import keep_freed_memory
from ..predictor import FINAL_WEIGHTS
from ..visualization.boxes import PANEL_SIDE, draw_objects
from ..visualization.curves import ap_series, plot_training, read_metrics
from ..visualization.sheet import contact_sheet
from .arguments import DEFAULT, make_parser

DEMO_CONFIG = "configs/digits/fcos_R_18_FPN_digits.yaml"
PAIRS_PER_ROW = 3


def report(output_dir: Path, num_images: int, min_score: float, num_mistakes: int) -> None:
    """Writes the figures and the page, and prints their paths.

    Raises:
        InputError: a file of the training run is missing or cannot be used.
    """
    keep_freed_memory()
    cfg = _load_config(output_dir)
    metrics = read_metrics(_require(output_dir / "metrics.json", "train first"))
    name = cfg.DATASETS.TEST[0]
    records = load_dataset(name, filter_empty=False)
    sample = evenly_spaced(records, num_images)
    found = _detect(cfg, _require(output_dir / FINAL_WEIGHTS, "finish training"))
    averages = ap_series(metrics).items()
    precision = ", ".join(f"{name} {series.values[-1]:.1f}" for name, series in averages)
    shown = f"{len(sample)} of {len(records)} images, evenly spaced"
    heading = f"{name}:  {shown};  score ≥ {min_score}" + (f";  {precision}" if precision else "")
    class_names = MetadataCatalog.get(name).thing_classes
    sheet = _sheet(sample, found, class_names, min_score, heading)
    plot_training(metrics, output_dir / "curves.png")
    Image.fromarray(sheet).save(output_dir / "contact_sheet.png")
    page = write_report(
        output_dir / "report",
        f"{output_dir.name} on {name}",
        records,
        [found[record["image_id"]] for record in records],
        class_names,
        metrics,
        num_mistakes,
    )
    print(precision.replace(", ", "   ") or f"AP unknown: {output_dir} was never evaluated")
    print(f"curves         {output_dir / 'curves.png'}")
    print(f"contact sheet  {output_dir / 'contact_sheet.png'}")
    print(f"page           {page}")


def _require(path: Path, remedy: str) -> Path:
    """Returns ``path`` if it is a file; raises an error with the command that creates it if not."""
    if path.is_file():
        return path
    config = path.parent / "config.yaml"
    command = f"python train_net.py --config-file {config} --resume"
    if not config.is_file():
        command = f"python train_net.py --config-file {DEMO_CONFIG} OUTPUT_DIR {path.parent}"
    raise InputError(f"{path} does not exist; {remedy}: {command}")


def _load_config(output_dir: Path) -> CfgNode:
    path = _require(output_dir / "config.yaml", "train first")
    cfg = read_cfg(str(path))
    choose_device(cfg)
    if not cfg.DATASETS.TEST:
        raise InputError(f"{path}: DATASETS.TEST is empty; set it to a dataset with ground truth")
    return cfg


def _detect(cfg: CfgNode, weights: Path) -> dict[object, Objects]:
    """Returns the model's detections in the first test set by image id."""
    model, found = accelerated(cfg, load_detector(cfg, str(weights))), {}
    with torch.no_grad():
        for batch in tqdm(build_test_loader(cfg, cfg.DATASETS.TEST[0]), disable=None):
            for inputs, output in zip(batch, model(batch), strict=True):
                found[inputs["image_id"]] = Objects.from_instances(output["instances"])
    return found


def _sheet(
    sample: Sequence[Mapping],
    found: Mapping[object, Objects],
    class_names: Sequence[str],
    min_score: float,
    heading: str,
) -> np.ndarray:
    panels, captions = [], []
    for record in sample:
        image = read_image(record["file_name"], "RGB")
        scale = PANEL_SIDE / max(image.shape[:2])
        truth = ground_truth(record)
        classes = np.where(truth.crowd, -1, truth.classes)
        panels.append(draw_objects(image, truth.boxes, classes, class_names, None, scale))
        boxes, classes, scores, _ = found[record["image_id"]].above(min_score)
        panels.append(draw_objects(image, boxes, classes, class_names, scores, scale))
        captions += [Path(record["file_name"]).name, ""]
    width = 2 * min(PAIRS_PER_ROW, len(sample))
    rows, names = (
        [cells[i : i + width] for i in range(0, len(cells), width)] for cells in (panels, captions)
    )
    titles = ["ground truth", "detections"] * PAIRS_PER_ROW
    return contact_sheet(rows, titles[:width], heading, names, group=2)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="folder of the training run")
    add("--images", type=int, default=12, metavar="N", help=f"images on the sheet {DEFAULT}")
    add("--score", type=float, default=0.5, metavar="S", help=f"score threshold {DEFAULT}")
    add("--mistakes", type=int, default=24, metavar="N", help=f"mistakes of each kind {DEFAULT}")
    options = parser.parse_args(arguments)
    for name in ("images", "mistakes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(report, *vars(parse(arguments)).values())
