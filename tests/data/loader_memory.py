"""What training data costs in memory, measured in a process of its own; prints MiB as JSON.

python -m tests.data.loader_memory coco WORKERS     in a folder that write_coco has filled
python -m tests.data.loader_memory records COUNT    kept by TrainLoader, and in a list of dicts
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from fcos_d2.config_file import read_cfg
from fcos_d2.engine import Trainer, TrainLoader

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


def private(pid: int | str = "self") -> float:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure_coco(workers: int) -> dict:
    """Builds the training's loader and reads some batches."""
    cfg = read_cfg("many.yaml", ["DATALOADER.NUM_WORKERS", workers])
    before = resident()
    loader = Trainer.build_train_loader(cfg)
    built = {"peak": resident("VmHWM") - before, "held": resident() - before}
    batches = iter(loader)
    assert all(len(batch) == cfg.SOLVER.IMS_PER_BATCH for batch in islice(batches, 20))
    workers = multiprocessing.active_children()
    return built | {"workers": [private(worker.pid) for worker in workers]}


class AsTheyAre(Dataset):
    """Records as a list of dicts, whose reference counts every reader changes."""

    def __init__(self, records: list[dict]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        return self._records[index]


def memory_of_worker(record: dict) -> float:
    """A mapper; every 100th record is worth a look at the memory."""
    assert len(record["annotations"]) == int(BOXES)
    return private() if record["image_id"] % 100 == 0 else 0.0


def growth_of_worker(records: list[dict] | Dataset) -> float:
    """What a worker takes to itself while it reads every record once."""
    loader = TrainLoader(
        records,
        mapper=memory_of_worker, total_batch_size=100, aspect_ratio_grouping=False, num_workers=1,
    )  # fmt: skip
    seen = [value for batch in islice(loader, len(records) // 100) for value in batch if value]
    return max(seen) - seen[0]


def measure_records(count: int) -> dict:
    """Both ways to keep records, in this order: the second one leaves traces in this process."""
    rng = np.random.default_rng(0)
    records = [
        {"image_id": number, "annotations": [{"bbox": box} for box in boxes]}
        for number, boxes in enumerate(rng.uniform(0, 9, (count, int(BOXES), 4)).tolist())
    ]
    kept = {"serialized": records, "as_they_are": AsTheyAre(records)}
    return {name: growth_of_worker(dataset) for name, dataset in kept.items()}


if __name__ == "__main__":
    measure = {"coco": measure_coco, "records": measure_records}[sys.argv[1]]
    print(json.dumps(measure(int(sys.argv[2]))))
