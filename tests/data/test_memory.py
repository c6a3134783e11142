"""Tests that the memory of training data is bounded, and shared by all workers.

python -m tests.data.test_memory    prints the memory of this process and its workers as JSON
"""

import json
import multiprocessing
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_d2.config_file import read_cfg
from fcos_d2.engine import Trainer
from tests.catalogs import coco_content
from tests.tiny_training import python

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/PID/smaps_rollup"
)

BOXES = 8.6  # per image, as in COCO train2017
# Limits, relative to the size of the annotation file.
PEAK = 8  # while it is parsed; pycocotools' objects alone take six
HELD = 1  # after it is loaded, in addition to LIBRARIES
LIBRARIES = 16  # MiB that libraries allocate at their first use
WORKER = 40  # MiB of private memory per worker
CONFIG = """
DATASETS: {REGISTER: {many: {json: many.json, images: images}}, TRAIN: [many]}
MODEL: {META_ARCHITECTURE: FCOS, DEVICE: cpu, FCOS: {NUM_CLASSES: 80}}
INPUT: {MIN_SIZE_TRAIN: [48], MAX_SIZE_TRAIN: 64}
DATALOADER: {NUM_WORKERS: 2}
"""


def write_coco(folder: Path, num_images: int) -> None:
    """Writes many.json, as large per image as COCO train2017, and equal images."""
    rng = np.random.default_rng(0)
    Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / "image.jpg")
    (folder / "images").mkdir()
    objects = {}
    for number in range(num_images):
        boxes = np.round(rng.uniform(1, 20, (rng.poisson(BOXES), 4)), 2)
        objects[f"{number:012d}.jpg"] = [(int(rng.integers(1, 81)), box) for box in boxes]
        link = folder / "images" / f"{number:012d}.jpg"
        link.symlink_to((folder / "image.jpg").resolve())
    content = coco_content(objects, [f"class {number}" for number in range(80)], (64, 48))
    for annotation in content["annotations"]:
        polygon = np.round(rng.uniform(100, 400, 2 * rng.integers(6, 40)), 2).tolist()
        annotation["segmentation"] = [polygon]
    (folder / "many.json").write_text(json.dumps(content))
    (folder / "many.yaml").write_text(CONFIG)


def resident(key: str = "VmRSS") -> float:
    """Returns the current or peak (VmHWM) memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def private(pid: int) -> float:
    """Returns the private memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure() -> dict:
    """Builds the training loader, and reads some batches."""
    cfg = read_cfg("many.yaml")
    before = resident()
    loader = Trainer.build_train_loader(cfg)
    built = {"peak": resident("VmHWM") - before, "held": resident() - before}
    batches = iter(loader)
    assert all(len(batch) == cfg.SOLVER.IMS_PER_BATCH for batch in islice(batches, 20))
    workers = multiprocessing.active_children()
    return built | {"workers": [private(worker.pid) for worker in workers]}


@pytest.mark.parametrize(
    "num_images", [4_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["small", "coco"]
)
def test_memory_is_bounded_by_the_annotation_file_and_shared_by_workers(num_images, tmp_path):
    write_coco(tmp_path, num_images)
    size = (tmp_path / "many.json").stat().st_size / 2**20
    done = python("-m", "tests.data.test_memory", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < PEAK * size, (size, found)
    assert found["held"] < HELD * size + LIBRARIES, (size, found)
    assert len(found["workers"]) == 2 and max(found["workers"]) < WORKER, found


if __name__ == "__main__":
    print(json.dumps(measure()))
