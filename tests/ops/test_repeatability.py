"""Every op gives the same bits every time, on any number of threads."""

import pytest
import torch

from . import isolated
from .calls import assignment, bits, box, candidates, flat_nms, focal_loss, padded_nms

# The reference is as repeatable as torch is.
pytestmark = [
    pytest.mark.parametrize("implementation", ["compiled"], indirect=True),
    pytest.mark.skipif(not isolated.BUILT.exists(), reason="nothing is compiled"),
]
RUNS = 100


@pytest.fixture
def threads():
    """Sets the number of threads, and the old one again at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_repeatable(run, threads) -> None:
    threads(1)
    first = bits(run())
    for number in range(RUNS):
        threads(1 + number % 3)
        assert bits(run()) == first


@pytest.mark.parametrize("make", [assignment, flat_nms])
def test_targets_and_kept_boxes(make, threads):
    assert_repeatable(make(), threads)


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_padded_detections(method, threads):
    assert_repeatable(padded_nms(method), threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("make", [focal_loss, box, candidates])
def test_losses_gradients_and_candidates(make, dtype, channels_last, threads):
    assert_repeatable(make(dtype, channels_last), threads)
