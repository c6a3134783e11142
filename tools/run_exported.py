#!/usr/bin/env python3
"""Runs a file from tools/export_model.py on images with only its runtime, numpy and Pillow.

    python tools/run_exported.py model.onnx image.jpg [--score 0.5]      needs onnxruntime
    python tools/run_exported.py model.xml image.jpg                     needs openvino
    python tools/run_exported.py model.pt2 image.jpg                     needs torch

Prints one line of JSON per object, with its box in pixels of the upright image. Skips files that
cannot be read, and exits with status 1. Applications can copy this code, which imports neither
fcos_d2 nor detectron2.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

METADATA = "fcos_d2.json"


def load(path: str) -> tuple[Callable, dict]:
    """Loads a detector (uint8 [B, C, H, W] -> boxes, scores, classes, counts) and its metadata."""
    if path.endswith(".onnx"):
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        session = onnxruntime.InferenceSession(path, providers=providers)
        metadata = session.get_modelmeta().custom_metadata_map[METADATA]
        return lambda images: session.run(None, {"images": images}), json.loads(metadata)

    if path.endswith(".xml"):
        import openvino

        # Without this hint, OpenVINO uses the less accurate bfloat16 on CPUs that support it.
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().read_model(path)
        compiled = openvino.compile_model(model, "CPU", exact)
        metadata = model.get_rt_info(METADATA).astype(str)
        return lambda images: list(compiled(images).values()), json.loads(metadata)

    import torch

    with zipfile.ZipFile(path) as archive:
        compiled = [n for n in archive.namelist() if n.endswith("wrapper_metadata.json")]
        if compiled:  # --format aoti
            metadata = json.loads(archive.read(compiled[0]))[METADATA]
            detect = torch._inductor.aoti_load_package(path)
        else:
            metadata = archive.read(f"{archive.namelist()[0].split('/')[0]}/extra/{METADATA}")
            detect = torch.export.load(path).module()
    metadata = json.loads(metadata)
    return lambda images: [x.numpy() for x in detect(torch.from_numpy(images))], metadata


def read(path: Path) -> Image.Image:
    """Reads an image as RGB and applies its EXIF orientation, as in training.

    Raises:
        ValueError: the image has more than 8 bits per channel, which Pillow would clip at 255.
        Exception: Pillow cannot read the file.
    """
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its pixels have more than 8 bits (Pillow's mode {image.mode}); convert it to 8 bits"
        )
    return image.convert("RGB")


def prepare(image: Image.Image, metadata: dict) -> np.ndarray:
    """Returns uint8 [C, H, W], resized as in evaluation, in the model's channel order."""
    if metadata["min_size"]:  # 0: images are not resized
        scale = metadata["min_size"] / min(image.size)
        scale = min(scale, metadata["max_size"] / max(image.size))
        size = tuple(max(1, int(side * scale + 0.5)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
    order = metadata["channels"]
    pixels = np.asarray(image.convert("RGB" if order == "BGR" else order))
    pixels = np.atleast_3d(pixels)[:, :, :: -1 if order == "BGR" else 1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--score", type=float, default=0.5, help="threshold (default: %(default)s)")
    options = parser.parse_args(arguments)
    detect, metadata = load(options.model)
    names, status = metadata["classes"], 0
    for path in options.images:
        try:
            image = read(path)
        except Exception as error:  # Pillow raises many types for invalid files
            print(f"skipped {path}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            status = 1
            continue
        pixels = prepare(image, metadata)
        boxes, scores, classes, counts = (column[0] for column in detect(pixels[None]))
        scale = np.tile(np.divide(image.size, pixels.shape[:0:-1]), 2)  # to pixels of the image
        for i in range(counts):
            if scores[i] >= options.score:
                name = names[classes[i]] if names else int(classes[i])
                line = {"image": str(path), "class": name, "score": round(float(scores[i]), 4)}
                print(json.dumps(line | {"box": [round(float(x), 2) for x in boxes[i] * scale]}))
    return status


if __name__ == "__main__":
    sys.exit(main())
