"""Fixtures for all tests."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skips tests marked cuda if there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Uses one thread, which is faster for tiny tensors."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Seeds every test, so that its results do not depend on other tests."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    """Runs a test on every available device."""
    return torch.device(request.param)
