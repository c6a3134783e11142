"""What `make gpu-check` hands to compute-sanitizer."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fcos_d2.ops import backend

from . import drive_kernels


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.add(function.name().rpartition("::")[2])
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("implementation", ["compiled"], indirect=True)
def test_every_op_is_driven(implementation):
    with Recorder() as recorder:
        drive_kernels.main("cpu")
    assert set(backend()) <= recorder.names
