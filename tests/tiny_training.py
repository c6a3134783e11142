"""A tiny training run: six images of two shapes, their config, and a way to run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]

CONFIG = """
MODEL:
  META_ARCHITECTURE: "FCOS"
  BACKBONE: {NAME: "build_fcos_d2_resnet_fpn_backbone", FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: "BN", OUT_FEATURES: ["res2", "res3"]}
  FPN: {IN_FEATURES: ["res2", "res3"], OUT_CHANNELS: 32}
  FCOS:
    NUM_CLASSES: 2
    IN_FEATURES: ["p2", "p3"]
    FPN_STRIDES: [4, 8]
    SIZES_OF_INTEREST: [16]
    TOP_LEVELS: 0
    NUM_CLS_CONVS: 1
    NUM_BOX_CONVS: 1
    INFERENCE_TH_TEST: 0.001
DATASETS: {TRAIN: ["tiny_shapes"], TEST: ["tiny_shapes"]}
INPUT: {MIN_SIZE_TRAIN: [48], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 64}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {OPTIMIZER: "ADAMW", IMS_PER_BATCH: 2, MAX_ITER: 2, BASE_LR: 0.001, WARMUP_ITERS: 1}
SEED: 1
VERSION: 2
"""


def write_shapes(folder: Path) -> Path:
    """Writes six 48 x 64 images with one object of each of two classes, and their COCO file."""
    images, annotations = [], []
    for number in range(1, 7):
        pixels = np.full((48, 64, 3), 90, np.uint8)
        for category, (x, y, w, h) in enumerate([(4, 5, 14, 12), (25, 15, 34, 30)], 1):
            pixels[y : y + h, x : x + w] = 255 * (category - 1), 10 * number, 200
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            annotations.append(annotation | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
    categories = [{"id": 1, "name": "small"}, {"id": 2, "name": "large"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "shapes.json").write_text(json.dumps(content))
    return folder / "shapes.json"


def write_config(folder: Path) -> Path:
    """Writes the shapes, and a config that registers them."""
    folder.mkdir(exist_ok=True)
    data = {"tiny_shapes": {"json": str(write_shapes(folder)), "images": str(folder)}}
    text = CONFIG.replace("DATASETS: {", f"DATASETS: {{REGISTER: {json.dumps(data)}, ")
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


def python(*words, cwd: Path, timeout: float = 1200, **options) -> subprocess.CompletedProcess:
    """Runs Python in ``cwd`` with one thread, and this checkout first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout, **options)


def metrics(folder: Path) -> list[dict]:
    """Reads metrics.json without timings."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    clocks = ("time", "data_time", "eta_seconds")
    return [{key: v for key, v in line.items() if key not in clocks} for line in lines]
