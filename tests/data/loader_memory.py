"""What training data costs in memory, measured in a process of its own; prints MiB as JSON.

python -m tests.data.loader_memory WORKERS     in a folder that write_coco has filled
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fcos_d2.config_file import read_cfg
from fcos_d2.engine import Trainer

BOXES = 8.6  # per image, as in COCO train2017
CONFIG = """
DATASETS: {REGISTER: {many: {json: many.json, images: images}}, TRAIN: [many]}
MODEL: {META_ARCHITECTURE: FCOS, DEVICE: cpu, FCOS: {NUM_CLASSES: 80}}
INPUT: {MIN_SIZE_TRAIN: [48], MAX_SIZE_TRAIN: 64}
"""


def write_coco(folder: Path, num_images: int) -> None:
    """many.json, which per image is as large as COCO train2017's, and ``images``, all the same."""
    rng = np.random.default_rng(0)
    Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / "image.jpg")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, num_images + 1):
        name = f"{number:012d}.jpg"
        (folder / "images" / name).symlink_to((folder / "image.jpg").resolve())
        image = {"id": number, "file_name": name, "width": 64, "height": 48, "license": 3}
        images.append(image | {"url": f"http://localhost/images/train2017/{name}", "date": "2013"})
        for _ in range(rng.poisson(BOXES)):
            x, y, width, height = np.round(rng.uniform(1, 20, 4), 2).tolist()
            polygon = np.round(rng.uniform(100, 400, 2 * rng.integers(6, 40)), 2).tolist()
            annotation = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
            annotation |= {"bbox": [x, y, width, height], "area": width * height}
            annotation |= {"category_id": int(rng.integers(1, 81)), "segmentation": [polygon]}
            annotations.append(annotation)
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "many.json").write_text(json.dumps(content))
    (folder / "many.yaml").write_text(CONFIG)


def resident(key: str = "VmRSS") -> float:
    """Memory of this process now, or (VmHWM) at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def private(pid: int) -> float:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure(workers: int) -> dict:
    """Builds the training's loader and reads some batches."""
    cfg = read_cfg("many.yaml", ["DATALOADER.NUM_WORKERS", workers])
    before = resident()
    loader = Trainer.build_train_loader(cfg)
    built = {"peak": resident("VmHWM") - before, "held": resident() - before}
    batches = iter(loader)
    assert all(len(batch) == cfg.SOLVER.IMS_PER_BATCH for batch in islice(batches, 20))
    workers = multiprocessing.active_children()
    return built | {"workers": [private(worker.pid) for worker in workers]}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
