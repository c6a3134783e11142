"""Writes a config, with explanations, for a folder of images and annotations.

    fcos-d2 new-config FOLDER -o mine.yaml
    fcos-d2 train --config-file mine.yaml

Reads COCO, YOLO, Pascal VOC, CVAT, LabelMe, VIA, Label Studio, CreateML and Roboflow's exports. If
there is no validation set, a fifth of the images is held out and listed in mine_val.txt: every
class is represented, and augmented copies of an image stay together. An existing list is kept, so
that adding images does not move others. The exit status is 1 if the data has defects that must be
corrected first, and 2 if there is no data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import model_zoo
from ..config_file import read_cfg
from ..data import register_datasets
from ..data.catalog import review_dataset
from ..data.custom import hash_fraction, original_name
from ..data.formats.folders import recognize
from ..data.inspection import inspect_dataset
from ..data.level_fit import make_sample, pyramid_keys, suggest_pyramid
from ..data.records import evenly_spaced, xyxy_boxes
from ..errors import InputError, exit_status
from .arguments import make_parser

VALIDATION = 0.2  # fraction of the images
SLACK = 0.25  # tolerated relative deviation from this fraction in a class
MAX_NAMES = 8  # class names listed in the config
MAX_MEASURED = 2000  # images whose boxes are measured

# ---- Validation set ----


def choose_validation(labels: Mapping[str, Iterable[int]]) -> set[str]:
    """Selects a fifth of the images, with about a fifth of those of every class.

    Selects images by a hash of their original names, then adds and removes images to balance the
    classes, starting with the rarest.

    Args:
        labels: classes in each image, by file name.
    """
    groups: dict[str, set[int]] = {}
    for name, classes in labels.items():
        groups.setdefault(original_name(name), set()).update(classes)
    position = {group: hash_fraction(group) for group in groups}
    chosen = {group for group in groups if position[group] < VALIDATION}
    counts = Counter(class_ for classes in groups.values() for class_ in classes)
    balanced: set[int] = set()
    for class_, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        members = sorted((g for g in groups if class_ in groups[g]), key=position.get)
        free = [group for group in members if not groups[group] & balanced]
        wanted = max(1, round(VALIDATION * count)) if count > 1 else 0
        slack = int(SLACK * wanted)
        have = len(chosen.intersection(members))
        missing, excess = max(0, wanted - slack - have), max(0, have - wanted - slack)
        chosen |= set([group for group in free if group not in chosen][:missing])
        chosen -= set([group for group in reversed(free) if group in chosen][:excess])
        balanced.add(class_)
    return {name for name in labels if original_name(name) in chosen}


# ---- Settings ----

TEMPLATE = """\
# {num_images} images with {num_classes} classes: {classes}
_BASE_: {base}
DATASETS:
  # {why}
  REGISTER:
{entries}
  TRAIN: [{train}]
  TEST: [{test}]
INPUT:
{sizes}
  RANDOM_FLIP: "horizontal"  # "none" if left and right differ, as in text
{training}
  MAX_ITER: {iterations}  # {epochs:.0f} epochs, and at least 1500 iterations
  CHECKPOINT_PERIOD: {period}
TEST: {{EVAL_PERIOD: {period}}}  # three evaluations
VIS_PERIOD: {period}
DATALOADER: {{NUM_WORKERS: {workers}}}  # for the CPU cores of this computer
OUTPUT_DIR: output/{name}
"""
SIZES = """\
  # Images of {width:.0f} x {height:.0f} are resized so that 5% of the boxes are smaller than
  # {small:.0f} pixels.
  MIN_SIZE_TRAIN: {train_sizes}
  MAX_SIZE_TRAIN: {longest}
  MIN_SIZE_TEST: {size}
  MAX_SIZE_TEST: {longest}"""
TILES = """\
  # In images of {width:.0f} x {height:.0f}, 5% of the boxes are smaller than {small:.0f} pixels,
  # too small for downsampling: train on crops, and detect with fcos-d2 --tile {size}.
  CROP: {{ENABLED: True, TYPE: "absolute", SIZE: [{size}, {size}]}}
  MIN_SIZE_TRAIN: [{size}]
  MAX_SIZE_TRAIN: {size}
  MIN_SIZE_TEST: 0  # no resizing"""
FINE_TUNING = """\
MODEL:
  WEIGHTS: "{weights}"  # trained on COCO; the class layer is reinitialized
{levels}
SOLVER:
  IMS_PER_BATCH: {batch}  # for the memory of the GPU
  BASE_LR: {rate:.6g}  # 0.01 for a batch of 16
  STEPS: {steps}
  WARMUP_ITERS: 500"""
FROM_SCRATCH = """\
MODEL:
  WEIGHTS: ""  # a small network for a CPU, trained from scratch
{levels}
SOLVER:
  IMS_PER_BATCH: {batch}
  BASE_LR: 0.0014  # AdamW, with a cosine schedule"""


class Statistics(NamedTuple):
    """Statistics of a dataset that determine the settings, in pixels."""

    width: float  # median of the images
    height: float
    small: float  # 5th percentile of the shorter side of boxes
    records: list[dict]

    @property
    def short(self) -> float:
        """Shorter side of the images."""
        return min(self.width, self.height)


def measure(records: list[dict]) -> Statistics:
    """Measures the images and boxes of a dataset.

    Raises:
        InputError: it has no boxes.
    """
    boxes = [xyxy_boxes([a for a in r["annotations"] if not a["iscrowd"]]) for r in records]
    sides = np.concatenate([b[:, 2:] - b[:, :2] for b in boxes] or [np.zeros((0, 2))]).min(axis=1)
    if not (sides > 0).any():
        raise InputError("there are no boxes with area; check that these are the right annotations")
    sizes = np.median([(r["width"], r["height"]) for r in records], axis=0)
    return Statistics(*sizes, float(np.quantile(sides[sides > 0], 0.05)), records)


def choose_settings(data: Statistics, has_gpu: bool) -> dict:
    """Returns values for ``TEMPLATE``: fine-tunes on a GPU, trains from scratch on a CPU."""
    pixels, most, batch, epochs = (24, 800, _gpu_batch(), 12) if has_gpu else (20, 480, 4, 20)
    # Make 5% of the boxes smaller than ``pixels``, but enlarge images to at most twice their size.
    size = np.clip(pixels / data.small * data.short, min(128, data.short), most)
    size = max(32, round(min(size, 2 * data.short) / 8) * 8)
    is_tiled = pixels / 2 > data.small * size / data.short
    if is_tiled:
        size = int(max(most, 512) // 32 * 32)
    scale = 1 if is_tiled else size / data.short
    longest = int(np.ceil(1.25 * scale * max(data.width, data.height) / 32) * 32)
    steps = np.linspace(0.8, 1, 5) if has_gpu else np.linspace(0.9, 1.1, 4)
    iterations = int(max(1500, round(epochs * len(data.records) / batch, -2)))
    base = "torchvision/fcos_R_50_FPN" if has_gpu else "digits/fcos_R_18_FPN_digits"
    values = {
        "width": data.width,
        "height": data.height,
        "small": data.small * scale,
        "size": size,
        "longest": longest,
        "train_sizes": sorted({round(size * step) for step in steps}),
        "batch": batch,
        "rate": 0.01 * batch / 16,
        "steps": [iterations * 2 // 3, iterations * 8 // 9],
        "weights": model_zoo.PREFIX + base,
        "levels": _levels(data, has_gpu, data.short * scale, longest),
    }
    return {
        "base": base,
        "sizes": (TILES if is_tiled else SIZES).format(**values),
        "training": (FINE_TUNING if has_gpu else FROM_SCRATCH).format(**values),
        "iterations": iterations,
        "epochs": iterations * batch / len(data.records),
        "period": max(1, iterations // 3),
        "workers": min(4, max(0, (os.cpu_count() or 1) - 1)),
    }


def _gpu_batch() -> int:
    """Returns the batch size for the GPU; an image of 800 pixels takes about 2 GB."""
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return int(np.clip(2 ** int(np.log2(max(memory / 2**31, 1))), 2, 16))


def _levels(data: Statistics, has_gpu: bool, size: float, longest: int) -> str:
    """Returns config lines with levels that fit the boxes: the pretrained ones, if they do."""
    records = evenly_spaced(data.records, MAX_MEASURED)
    samples = [make_sample(r, round(size), longest) for r in records]
    pyramid = suggest_pyramid(samples, data.small * size / data.short)
    _, *keys = pyramid_keys(pyramid)
    reason = f"  # Levels of strides {', '.join(map(str, pyramid.strides))} fit the measured boxes."
    if has_gpu and pyramid.strides[0] >= 8:
        reason, keys = "  # The levels P3 to P7 of the weights fit the measured boxes.", ["  FCOS:"]
    return "\n".join([reason, *keys, "    NUM_CLASSES: null  # as many as in the data"])


# ---- Config file ----


def write_config(folder: Path, output: Path, has_gpu: bool) -> int:
    """Writes the config and, if necessary, the list of validation images; returns the exit status.

    Raises:
        InputError: the folder contains no data, or the file exists.
    """
    if output.exists():
        raise InputError(f"{output} exists; remove it or choose another -o")
    name = re.sub(r"\W+", "_", output.stem).strip("_") or "mine"
    output.parent.mkdir(parents=True, exist_ok=True)
    entries, train, test, why = assign_roles(recognize(folder), name, output)
    register_datasets(entries)
    found = [inspect_dataset(n, read_images=False) for n in (train, test)]
    values, classes = choose_settings(measure(found[0].records), has_gpu), found[0].class_names
    base = os.path.relpath(model_zoo.get_config_file(values.pop("base")), output.parent)
    lines = [f"    {key}: {json.dumps(e, ensure_ascii=False)}" for key, e in entries.items()]
    more = ", ..." if len(classes) > MAX_NAMES else ""
    text = TEMPLATE.format(
        num_images=len(found[0].records),
        num_classes=len(classes),
        classes=", ".join(classes[:MAX_NAMES]) + more,
        base=json.dumps(base),
        entries="\n".join(lines),
        **values,
        **{"why": why, "train": train, "test": test, "name": name},
    )
    output.write_text(text)
    read_cfg(str(output))
    print(f"{output}: {len(found[0].records)} training images, {len(classes)} classes")
    if problems := sum(inspection.num_problems for inspection in found):
        print(
            f"{problems} problems must be corrected first: "
            f"fcos-d2 check --config-file {output} --clean"
        )
        return 1
    print(f"next: fcos-d2 train --config-file {output}")
    return 0


def assign_roles(found: dict, name: str, output: Path) -> tuple[dict[str, dict], str, str, str]:
    """Returns dataset entries by name, the names for training and testing, and the reason."""
    entries = {f"{name}_{split}": entry for split, entry in found.items() if split != "all"}
    if "trainval" in found and "test" in found:
        entries = {f"{name}_{split}": found[split] for split in ("trainval", "test")}
        return entries, f"{name}_trainval", f"{name}_test", "Uses the image lists of the folder."
    tested = next((split for split in ("val", "test") if split in found), None)
    if "train" in found and tested:
        return entries, f"{name}_train", f"{name}_{tested}", "Uses the splits of the folder."
    split = "train" if "train" in found else next(iter(found))
    entry, path = found[split], output.with_name(f"{output.stem}_val.txt")
    if path.exists():
        why = f"Uses the existing {path} for validation; new images are for training."
    else:
        names = _hold_out(name, entry)
        path.write_text("\n".join(sorted(names)) + "\n")
        why = f"Holds out {len(names)} images for validation; new images are for training."
    entries.pop(f"{name}_{split}", None)
    entries[f"{name}_train"] = {**entry, "part": f"not {path}"}
    entries[f"{name}_val"] = {**entry, "part": str(path)}
    return entries, f"{name}_train", f"{name}_val", why


def _hold_out(name: str, entry: dict) -> set[str]:
    """Returns the names of the images for validation."""
    register_datasets({name: entry})
    content = review_dataset(name)[1].content
    classes: dict[object, set] = {image["id"]: set() for image in content["images"]}
    for annotation in content.get("annotations", ()):
        classes[annotation["image_id"]].add(annotation["category_id"])
    labels = {image["file_name"]: classes[image["id"]] for image in content["images"]}
    chosen = choose_validation(labels)
    if not chosen or len(chosen) == len(labels):
        raise InputError(f"{len(labels)} images are too few to split; add more")
    return chosen


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of images and annotations")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="config to write")
    add("--device", choices=("cpu", "cuda"), help="for training (default: cuda if available)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    has_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    return exit_status(write_config, options.folder, options.output, has_gpu)
