"""Random inputs of all ops, for tests and benchmarks."""

import math

import torch

from fcos_d2.ops import Levels, Targets, assign_targets, make_levels

RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, math.inf))
STRIDES = (8, 16, 32, 64, 128)


def pyramid(height: int = 256, width: int = 320, num_levels: int = 5, offset=0.5) -> Levels:
    """Returns the levels of a padded image of the given size in pixels."""
    strides = STRIDES[:num_levels]
    shapes = [(math.ceil(height / s), math.ceil(width / s)) for s in strides]
    return make_levels(shapes, strides, offset=offset)


def ranges(num_levels: int) -> list[tuple[float, float]]:
    """Returns the size ranges of the first levels; the last one is unbounded."""
    return [*RANGES[: num_levels - 1], (RANGES[num_levels - 1][0], math.inf)]


def boxes(count: int, height: int = 256, width: int = 320, generator=None, integer=False):
    """Returns float32 [count, 4] inside the image, with log-uniform sizes from 4 pixels up."""
    limit = torch.tensor([width, height], dtype=torch.float32)
    size = torch.exp(torch.rand(count, 2, generator=generator) * math.log(min(height, width) / 4))
    size = torch.minimum(size * 4, limit)
    corner = torch.rand(count, 2, generator=generator) * (limit - size)
    out = torch.cat((corner, corner + size), dim=1)
    return out.round() if integer else out


def ground_truth(counts, num_classes: int, height=256, width=320, generator=None, integer=False):
    """Returns (boxes, classes, offsets) of a batch with ``counts[b]`` boxes in image b."""
    total = sum(counts)
    classes = torch.randint(num_classes, (total,), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return boxes(total, height, width, generator, integer), classes, offsets


def predictions(levels: Levels, images: int, num_classes: int, dtype=torch.float32, **options):
    """Returns logits, ltrb and quality per level; ``options``: prior, channels_last, device."""
    prior = options.get("prior", -3.0)
    device = options.get("device", "cpu")
    layout = torch.channels_last if options.get("channels_last") else torch.contiguous_format

    def maps(channels, make):
        return [
            make(images, channels, h, w).to(device, dtype).to(memory_format=layout)
            for h, w in levels.shapes
        ]

    return (
        maps(num_classes, lambda *s: torch.randn(*s) * 2 + prior),
        maps(4, lambda *s: torch.rand(*s) * 4 + 0.05),
        maps(1, lambda *s: torch.randn(*s)),
    )


def targets(levels: Levels, counts, num_classes: int, device="cpu", **options) -> Targets:
    """Returns the targets of random ground truth."""
    packed = [t.to(device) for t in ground_truth(counts, num_classes, **options)]
    return assign_targets(*packed, levels, ranges(len(levels.strides)), num_classes=num_classes)
