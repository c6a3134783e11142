"""Maps whose elements share memory (stride 0) give what their copies give.

torch makes such maps itself, of the zeros of forward-mode derivatives for one.
"""

import pytest
import torch

from fcos_d2.ops import Targets, box_loss, make_levels, select_candidates, sigmoid_focal_loss

B, H, W = 2, 3, 4
EXPANDED = {
    "everywhere": (1, 1, 1, 1),
    "over points": (B, None, 1, 1),
    "over rows": (B, None, 1, W),
    "over columns": (B, None, H, 1),
    "over channels": (B, 1, H, W),
    "over images": (1, None, H, W),
}


@pytest.fixture(params=EXPANDED)
def expanded(request):
    """Makes a map [B, channels, H, W] of fewer numbers."""

    def make(channels: int) -> torch.Tensor:
        shape = [channels if size is None else size for size in EXPANDED[request.param]]
        return torch.randn(shape).expand(B, channels, H, W)

    return make


@pytest.mark.parametrize("classes", [1, 5])
def test_focal_loss(expanded, classes):
    logits = expanded(classes)
    labels = torch.randint(-1, classes + 1, (B, H * W), dtype=torch.int32)
    both = [x.detach().requires_grad_() for x in (logits, logits.contiguous())]
    losses = [sigmoid_focal_loss([x], labels) for x in both]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(
        *[torch.autograd.grad(*pair)[0] for pair in zip(losses, both, strict=True)]
    )


def test_box_loss(expanded):
    sides, quality = expanded(4).abs(), expanded(1)
    matched = torch.randint(-1, 2, (B, H * W), dtype=torch.int32)
    targets = Targets(None, matched, torch.rand(B, H * W, 4) + 0.1, torch.rand(B, H * W), None)
    got = box_loss([sides], [quality], targets)
    want = box_loss([sides.contiguous()], [quality.contiguous()], targets)
    torch.testing.assert_close(got, want)


def test_candidates(expanded):
    maps = [expanded(5), expanded(4).abs(), expanded(1)]
    levels, sizes = make_levels([(H, W)], [8]), torch.tensor([[24, 32]] * B)
    got, want = (
        select_candidates(*([x] for x in given), levels, sizes, topk=50)
        for given in (maps, [x.contiguous() for x in maps])
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
