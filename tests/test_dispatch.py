"""Tests that compiled kernels replace the reference."""

import subprocess
import sys


def test_compiled_kernel_replaces_the_reference():
    code = """
import torch
from fcos_d2 import ops
logits, labels = [torch.zeros(1, 2, 1, 1, requires_grad=True)], torch.zeros(1, 1, dtype=torch.int32)
before = ops.sigmoid_focal_loss(logits, labels).item()
kernel = lambda logits, labels, alpha, gamma: torch.full((), 42.0)
library = torch.library.Library("fcos_d2", "IMPL")
library.impl("sigmoid_focal_loss", kernel, "CPU", allow_override=True)
assert ops.backend()["sigmoid_focal_loss"]["CPU"] == "compiled"
loss = ops.sigmoid_focal_loss(logits, labels)
loss.backward()
assert loss.item() == 42 != before and logits[0].grad.abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
