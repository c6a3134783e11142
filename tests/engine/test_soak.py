"""Training and inference do not leak memory over thousands of calls."""

import gc
import itertools
import os

import pytest
import torch

from ..modeling.tiny import sample, tiny_fcos

pytestmark = pytest.mark.slow

WARM_UP = 0.2  # fraction of the calls before memory is first measured
MAX_GROWTH = 0.01  # of resident memory after that, relative


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_no_leak(call, times: int) -> None:
    for _ in range(int(times * WARM_UP)):
        call()
    before = resident_bytes()
    for _ in range(times - int(times * WARM_UP)):
        call()
    after = resident_bytes()
    assert after - before < MAX_GROWTH * before, f"{before / 2**20:.1f} -> {after / 2**20:.1f} MiB"


def batch(generator: torch.Generator) -> list[dict]:
    """Returns two images of varying size with 0 to 3 objects each."""
    samples = []
    for _ in range(2):
        height, width = (int(torch.randint(32, 97, (), generator=generator)) for _ in range(2))
        count = int(torch.randint(0, 4, (), generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 16
        boxes = torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=generator) * 12), 1)
        samples.append(sample(height, width, boxes.tolist(), [0] * count))
    return samples


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("training, times", [(False, 10_000), (True, 2_000)])
def test_memory_does_not_grow(training, times):
    generator = torch.Generator().manual_seed(0)
    batches = itertools.cycle([batch(generator) for _ in range(50)])
    model = tiny_fcos(INFERENCE_TH_TEST=0.001).train(training)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def infer():
        with torch.no_grad():
            model(next(batches))

    def step():
        optimizer.zero_grad()
        sum(model(next(batches)).values()).backward()
        optimizer.step()

    assert_no_leak(step if training else infer, times)
