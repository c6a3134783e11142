#!/usr/bin/env python3
"""Runs a file of tools/export_model.py on images, with its runtime, numpy and Pillow alone.

    python tools/run_exported.py model.onnx image.jpg [--score 0.5]      needs onnxruntime
    python tools/run_exported.py model.pt2 image.jpg                     needs torch
    python tools/run_exported.py model.ts image.jpg                      needs torch

Prints one line of JSON per object. Neither fcos_d2 nor detectron2 is imported: copy from here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

METADATA = "fcos_d2.json"


def load(path: str) -> tuple[Callable, dict]:
    """The detector, uint8 [B, 3, H, W] -> boxes, scores, classes, counts; and what it asks for."""
    if path.endswith(".onnx"):
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(path, providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map[METADATA]
        return lambda images: session.run(None, {"images": images}), json.loads(metadata)

    import torch

    files = {METADATA: ""}
    if path.endswith(".pt2"):
        module = torch.export.load(path, extra_files=files).module()
    else:
        module = torch.jit.load(path, _extra_files=files)
    metadata = json.loads(files[METADATA])
    return lambda images: [x.numpy() for x in module(torch.from_numpy(images))], metadata


def prepare(image: Image.Image, metadata: dict) -> np.ndarray:
    """uint8 [3, H, W], resized as for the model's evaluation, in the model's channel order."""
    scale = metadata["min_size"] / min(image.size)
    scale = min(scale, metadata["max_size"] / max(image.size))
    size = tuple(int(side * scale + 0.5) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    if metadata["channels"] == "BGR":
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--score", type=float, default=0.5, help="lowest (default: %(default)s)")
    options = parser.parse_args(arguments)
    detect, metadata = load(options.model)
    names = metadata["classes"]
    for path in options.images:
        image = Image.open(path)
        pixels = prepare(image, metadata)
        boxes, scores, classes, counts = (column[0] for column in detect(pixels[None]))
        back = np.tile(np.divide(image.size, pixels.shape[:0:-1]), 2)  # to pixels of the file
        for i in range(counts):
            if scores[i] >= options.score:
                name = names[classes[i]] if names else int(classes[i])
                line = {"image": str(path), "class": name, "score": round(float(scores[i]), 4)}
                print(json.dumps(line | {"box": [round(float(x), 2) for x in boxes[i] * back]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
