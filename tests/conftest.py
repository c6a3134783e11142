"""Fixtures of all tests: the devices at hand, and random numbers that no test can disturb."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skips tests marked cuda where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors are tiny here: two threads would spend their time waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seed, so that it fails alone as it fails in the suite."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    """Each device in turn."""
    return torch.device(request.param)
