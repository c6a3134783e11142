"""Writes a config for a folder of images and annotations, with comments that explain the choices.

    fcos-d2 new-config FOLDER -o mine.yaml
    fcos-d2 train --config-file mine.yaml

Recognizes COCO, YOLO, Pascal VOC, CVAT, LabelMe, VIA, Label Studio, CreateML, Roboflow's exports.
Without a validation set, a fifth of the images becomes one, listed in mine_val.txt: every class is
represented, and augmented copies of one photo stay together. An existing list is kept, so that
adding images does not move others. Exit status: 0; 1 if the data has defects that must be corrected
first; 2 if there is no data.
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
from ..data.custom import photo, share
from ..data.formats.folders import recognize
from ..data.inspection import inspect_dataset
from ..data.level_fit import pyramid_keys, sample_of, suggest_pyramid
from ..data.records import boxes_of, evenly_spaced
from ..errors import InputError, exit_status
from .arguments import parser_of

VALIDATION = 0.2  # share of the images
SLACK = 0.25  # by which the share of a class may differ from that
SHOWN = 8  # class names
SAMPLED = 2000  # images whose boxes are measured

# ---- a validation set ----


def choose_validation(labels: Mapping[str, Iterable[int]]) -> set[str]:
    """Selects a fifth of the images, with about a fifth of the photos of every class.

    The selection depends on a hash of the name of each photo; a few photos are moved for the sake
    of rare classes, the rarest first.

    Args:
        labels: classes in each image, by file name.
    """
    groups: dict[str, set[int]] = {}
    for name, classes in labels.items():
        groups.setdefault(photo(name), set()).update(classes)
    place = {group: share(group) for group in groups}
    chosen = {group for group in groups if place[group] < VALIDATION}
    counts = Counter(class_ for classes in groups.values() for class_ in classes)
    settled: set[int] = set()
    for class_, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        members = sorted((g for g in groups if class_ in groups[g]), key=place.get)
        free = [group for group in members if not groups[group] & settled]
        wanted = max(1, round(VALIDATION * count)) if count > 1 else 0
        slack = int(SLACK * wanted)
        have = len(chosen.intersection(members))
        missing, over = max(0, wanted - slack - have), max(0, have - wanted - slack)
        chosen |= set([group for group in free if group not in chosen][:missing])
        chosen -= set([group for group in reversed(free) if group in chosen][:over])
        settled.add(class_)
    return {name for name in labels if photo(name) in chosen}


# ---- the recipe ----

TEXT = """\
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
  MAX_ITER: {iterations}  # every image {epochs:.0f} times, and at least 1500 iterations
  CHECKPOINT_PERIOD: {period}
TEST: {{EVAL_PERIOD: {period}}}  # three evaluations
VIS_PERIOD: {period}
DATALOADER: {{NUM_WORKERS: {workers}}}  # for the CPU cores of this machine
OUTPUT_DIR: output/{name}
"""
SIZES = """\
  # For images of {width:.0f} x {height:.0f}, this makes 5 percent of the boxes smaller than
  # {small:.0f} pixels.
  MIN_SIZE_TRAIN: {train_sizes}
  MAX_SIZE_TRAIN: {longest}
  MIN_SIZE_TEST: {size}
  MAX_SIZE_TEST: {longest}"""
TILES = """\
  # In images of {width:.0f} x {height:.0f}, 5 percent of the boxes are under {small:.0f} pixels,
  # too small for downsampling: train on crops. Detect with fcos-d2 --tile {size}.
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
  BASE_LR: {rate:.6g}  # 0.01 for 16 images
  STEPS: {steps}
  WARMUP_ITERS: 500"""
FROM_SCRATCH = """\
MODEL:
  WEIGHTS: ""  # a small network for a CPU, trained from scratch
{levels}
SOLVER:
  IMS_PER_BATCH: {batch}
  BASE_LR: 0.0014  # AdamW, with a cosine schedule"""


class Fingerprint(NamedTuple):
    """The statistics on which the recipe depends."""

    width: float  # of the images, median
    height: float
    small: float  # 5th percentile of the shorter side of boxes, pixels
    records: list[dict]

    @property
    def short(self) -> float:
        """Shorter side of the images."""
        return min(self.width, self.height)


def fingerprint(records: list[dict]) -> Fingerprint:
    """Measures a dataset.

    Raises:
        InputError: it has no boxes.
    """
    boxes = [boxes_of([a for a in r["annotations"] if not a["iscrowd"]]) for r in records]
    sides = np.concatenate([b[:, 2:] - b[:, :2] for b in boxes] or [np.zeros((0, 2))]).min(axis=1)
    if not (sides > 0).any():
        raise InputError("there are no boxes with area; check that these are the right annotations")
    sizes = np.median([(r["width"], r["height"]) for r in records], axis=0)
    return Fingerprint(*sizes, float(np.quantile(sides[sides > 0], 0.05)), records)


def recipe(found: Fingerprint, has_gpu: bool) -> dict:
    """Values for ``TEXT``: fine-tuning on a GPU, training from scratch on a CPU."""
    pixels, most, batch, epochs = (24, 800, _gpu_batch(), 12) if has_gpu else (20, 480, 4, 20)
    # 5 percent of the boxes become smaller than so many pixels; at most twice the original size.
    size = np.clip(pixels / found.small * found.short, min(128, found.short), most)
    size = max(32, round(min(size, 2 * found.short) / 8) * 8)
    is_tiled = pixels / 2 > found.small * size / found.short
    if is_tiled:
        size = int(max(most, 512) // 32 * 32)
    scale = 1 if is_tiled else size / found.short
    longest = int(np.ceil(1.25 * scale * max(found.width, found.height) / 32) * 32)
    steps = np.linspace(0.8, 1, 5) if has_gpu else np.linspace(0.9, 1.1, 4)
    iterations = int(max(1500, round(epochs * len(found.records) / batch, -2)))
    base = "torchvision/fcos_R_50_FPN" if has_gpu else "digits/fcos_R_18_FPN_digits"
    values = {
        "width": found.width,
        "height": found.height,
        "small": found.small * scale,
        "size": size,
        "longest": longest,
        "train_sizes": sorted({round(size * step) for step in steps}),
        "batch": batch,
        "rate": 0.01 * batch / 16,
        "steps": [iterations * 2 // 3, iterations * 8 // 9],
        "weights": model_zoo.PREFIX + base,
        "levels": _levels(found, has_gpu, found.short * scale, longest),
    }
    return {
        "base": base,
        "sizes": (TILES if is_tiled else SIZES).format(**values),
        "training": (FINE_TUNING if has_gpu else FROM_SCRATCH).format(**values),
        "iterations": iterations,
        "epochs": iterations * batch / len(found.records),
        "period": max(1, iterations // 3),
        "workers": min(4, max(0, (os.cpu_count() or 1) - 1)),
    }


def _gpu_batch() -> int:
    """Images per iteration, which take about 2 GB each at 800 pixels."""
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return int(np.clip(2 ** int(np.log2(max(memory / 2**31, 1))), 2, 16))


def _levels(found: Fingerprint, has_gpu: bool, size: float, longest: int) -> str:
    """Levels for the measured boxes; on a GPU those of the published weights if possible."""
    records = evenly_spaced(found.records, SAMPLED)
    samples = [sample_of(r, round(size), longest) for r in records]
    pyramid = suggest_pyramid(samples, found.small * size / found.short)
    _, *keys = pyramid_keys(pyramid)
    reason = f"  # Levels of strides {', '.join(map(str, pyramid.strides))} fit the measured boxes."
    if has_gpu and pyramid.strides[0] >= 8:
        reason, keys = "  # The levels P3 to P7 of the weights fit the measured boxes.", ["  FCOS:"]
    return "\n".join([reason, *keys, "    NUM_CLASSES: null  # as many as in the data"])


# ---- the file ----


def write_config(folder: Path, output: Path, has_gpu: bool) -> int:
    """Writes the config and, if necessary, the list of validation images.

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
    values, classes = recipe(fingerprint(found[0].records), has_gpu), found[0].class_names
    base = os.path.relpath(model_zoo.get_config_file(values.pop("base")), output.parent)
    lines = [f"    {key}: {json.dumps(e, ensure_ascii=False)}" for key, e in entries.items()]
    more = ", ..." if len(classes) > SHOWN else ""
    text = TEXT.format(
        num_images=len(found[0].records),
        num_classes=len(classes),
        classes=", ".join(classes[:SHOWN]) + more,
        base=json.dumps(base),
        entries="\n".join(lines),
        **values,
        **{"why": why, "train": train, "test": test, "name": name},
    )
    output.write_text(text)
    read_cfg(str(output))
    print(f"{output}: {len(found[0].records)} images to train on, {len(classes)} classes")
    if problems := sum(inspection.num_problems for inspection in found):
        print(
            f"{problems} problems must be corrected first: "
            f"fcos-d2 check --config-file {output} --clean"
        )
        return 1
    print(f"now: fcos-d2 train --config-file {output}")
    return 0


def assign_roles(found: dict, name: str, output: Path) -> tuple[dict[str, dict], str, str, str]:
    """Entries by name, the names to train and to test on, and the reason."""
    entries = {f"{name}_{split}": entry for split, entry in found.items() if split != "all"}
    if "trainval" in found and "test" in found:
        entries = {f"{name}_{split}": found[split] for split in ("trainval", "test")}
        return entries, f"{name}_trainval", f"{name}_test", "The lists in the folder."
    tested = next((split for split in ("val", "test") if split in found), None)
    if "train" in found and tested:
        return entries, f"{name}_train", f"{name}_{tested}", "The splits in the folder."
    split = "train" if "train" in found else next(iter(found))
    entry, path = found[split], output.with_name(f"{output.stem}_val.txt")
    if path.exists():
        why = f"The images in {path}, which existed, stay the validation set."
    else:
        names = _choose(name, entry)
        path.write_text("\n".join(sorted(names)) + "\n")
        why = f"{len(names)} images are for validation; images added later are for training."
    entries.pop(f"{name}_{split}", None)
    entries[f"{name}_train"] = {**entry, "part": f"not {path}"}
    entries[f"{name}_val"] = {**entry, "part": str(path)}
    return entries, f"{name}_train", f"{name}_val", why


def _choose(name: str, entry: dict) -> set[str]:
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
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images and annotations")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="to train on; default: the GPU if there is one"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = parse(arguments)
    has_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    return exit_status(write_config, options.folder, options.output, has_gpu)
