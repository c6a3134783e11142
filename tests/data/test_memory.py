"""Training data of any size: bounded by its file while it is read, and shared by all workers."""

import json
import os

import pytest

from tests.tiny_training import python

from .loader_memory import write_coco

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="needs /proc/PID/smaps_rollup"
)

# Of the size of the annotation file.
PEAK = 8  # while Python objects are made of it; pycocotools' alone take six
HELD = 1  # by what stays for the training, beside
LIBRARIES = 16  # MiB that libraries take at their first use
WORKER = 40  # MiB that a worker may have to itself


@pytest.mark.parametrize(
    "num_images", [4_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["small", "coco"]
)
def test_a_coco_file_takes_memory_by_its_size_once_for_all_workers(num_images, tmp_path):
    write_coco(tmp_path, num_images)
    size = (tmp_path / "many.json").stat().st_size / 2**20
    done = python("-m", "tests.data.loader_memory", 2, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < PEAK * size, (size, found)
    assert found["held"] < HELD * size + LIBRARIES, (size, found)
    assert len(found["workers"]) == 2 and max(found["workers"]) < WORKER, found
