"""Peak memory of the ops on the CPU, measured by wrapping malloc (memory.c)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import subprocesses

pytestmark = [
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(not subprocesses.BUILT.exists(), reason="nothing is compiled"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD needs Linux"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]

# Prints the peak memory of each workload, minus its inputs, relative to the size of the maps.
MEASURE = """
import ctypes, json, sys, torch
from fcos_d2.ops import *
from tests.ops import inputs
torch.set_num_threads(2)
torch.manual_seed(0)
counter = ctypes.CDLL(sys.argv[1])
reset_peak, peak = counter.fcos_test_reset_peak, counter.fcos_test_peak
reset_peak.restype = peak.restype = ctypes.c_long
levels = inputs.pyramid(800, 1344)
shares = {}

def measure(name, function, maps):
    function()
    before = reset_peak()
    function()
    shares[name] = (peak() - before) / sum(level.nbytes for level in maps)

def postprocess(images, prior, topk):
    logits, ltrb, quality = inputs.predictions(levels, images, 80, prior=prior)
    sizes = torch.tensor([[800, 1344]] * images)

    def detect():
        found = select_candidates(logits, ltrb, quality, levels, sizes, topk=topk)
        return batched_nms_padded(*found)

    measure(f"{images} images, prior {prior}, top {topk}", detect, [*logits, *ltrb, *quality])

def train(boxes):
    logits, ltrb, quality = inputs.predictions(levels, 2, 80)
    maps = [level.requires_grad_() for level in (*logits, *ltrb, *quality)]
    truth = inputs.ground_truth([boxes] * 2, 80, 800, 1344)

    def assign():
        return assign_targets(*truth, levels, inputs.RANGES, num_classes=80)

    def step():
        targets = assign()
        box, centerness = box_loss(ltrb, quality, targets)
        loss = sigmoid_focal_loss(logits, targets.labels, save_gradient=True)
        return torch.autograd.grad(loss + box + centerness, maps)

    measure(f"assignment of {boxes} boxes", assign, maps)
    measure(f"step with {boxes} boxes", step, maps)

for images in 1, 2:
    for prior in -20, -5, 25:
        postprocess(images, prior, 1000)
postprocess(1, -20, 1)
train(8)
train(1000)
print(json.dumps(shares))
"""


@pytest.fixture(scope="module")
def shares(tmp_path_factory) -> dict[str, float]:
    library = tmp_path_factory.mktemp("memory") / "memory.so"
    source = Path(__file__).with_name("memory.c")
    command = ["cc", "-O1", "-fPIC", "-shared", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    command = ["-W", "ignore", "-c", MEASURE, str(library)]
    done = subprocesses.run_python(subprocesses.ROOT, *command, LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# No candidates, thousands, or all.
@pytest.mark.parametrize("prior", [-20, -5, 25])
@pytest.mark.parametrize("images", [1, 2])
def test_postprocessing_memory_is_at_most_5_percent_of_the_head_outputs(shares, images, prior):
    # The fixed-size results alone take nearly 2 percent.
    assert 0.018 < shares[f"{images} images, prior {prior}, top 1000"] <= 0.05


def test_postprocessing_memory_depends_on_topk(shares):
    assert shares["1 images, prior -20, top 1"] < 0.01


@pytest.mark.parametrize("boxes", [8, 1000])
def test_loss_memory_barely_exceeds_the_gradients(shares, boxes):
    assert 1 <= shares[f"step with {boxes} boxes"] <= 1.2


def test_assignment_memory_does_not_grow_with_the_number_of_boxes(shares):
    assert shares["assignment of 1000 boxes"] <= 1.1 * shares["assignment of 8 boxes"]
