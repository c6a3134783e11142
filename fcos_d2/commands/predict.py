"""Detects objects in images, folders, videos and camera streams.

    fcos-d2 photo.jpg                                with a COCO model, which is downloaded once
    fcos-d2 photos/ 'more/*.jpg' --model mmdetection/fcos_R_101_FPN_2x --output found/
    fcos-d2 street.mp4 --config-file output/digits/config.yaml --output street_found.mp4
    fcos-d2 photos/ --config-file FILE --weights FILE --output all.mp4 --json all.json
    fcos-d2 --webcam 0 --output camera.mp4 --frames 300

Writes images with detections to the folder detections, unless --output or --json is given. The
score threshold of a class is the best one measured in the last evaluation, or 0.5 if there is none;
--score sets one for all classes. Needs no display. The exit status is 1 if an input was skipped,
and 2 if an error ended the command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from .. import model_zoo
from ..errors import InputError, exit_status
from ..media import (
    FrameWriter,
    JsonWriter,
    Skipped,
    Source,
    check_targets,
    choose_targets,
    count_frames,
    find_sources,
    open_json,
    read_frames,
)
from ..modeling.acceleration import keep_freed_memory
from ..predictor import Predictor
from ..tiling import TiledPredictor
from .arguments import DEFAULT, make_parser

PRETRAINED = "torchvision/fcos_R_50_FPN"


def run(options: argparse.Namespace) -> int:
    """Detects objects in all inputs and writes them; returns the exit status.

    Raises:
        InputError: the inputs, the config, the weights or the output cannot be used.
    """
    skipped = Skipped()
    sources = find_sources(options.inputs, skipped)
    if options.webcam is not None:
        sources.append(Source(str(options.webcam), "camera", Path(f"camera_{options.webcam}")))
    if not sources:
        raise InputError("no input can be read; pass images, videos, or folders of them")
    if options.output:
        sources = choose_targets(sources, options.output, options.frames)
    check_targets(sources, options.json)
    keep_freed_memory()
    predictor = load_predictor(options)
    if options.tile:
        predictor = TiledPredictor(predictor, options.tile, batch_size=options.batch_size)
    total = count_frames(sources)
    if options.frames and (total is None or total > options.frames):
        total = options.frames
    with ExitStack() as stack:
        writers = [stack.enter_context(closing(FrameWriter()))] if options.output else []
        if options.json:
            file = stack.enter_context(open_json(options.json))
            writers.append(stack.enter_context(closing(JsonWriter(file))))
        frames = stack.enter_context(closing(read_frames(sources, skipped)))
        bar = stack.enter_context(tqdm(total=total, unit="image", disable=None))
        num_images, num_objects = _process(predictor, frames, writers, bar, options)
    targets = ", ".join(str(path) for path in (options.output, options.json) if path)
    print(f"{num_objects} objects in {num_images} images: {targets}")
    return 1 if skipped else 0


def load_predictor(options: argparse.Namespace) -> Predictor:
    """Loads the predictor of --config-file or --model.

    Raises:
        InputError: the config or the weights cannot be used.
    """
    config, weights = options.config_file, options.weights
    if config is None:
        config = model_zoo.get_config_file(options.model)
        published = model_zoo.WEIGHTS.get(options.model)
        if published and not weights:
            weights = f"{model_zoo.PREFIX}{options.model}"
            tqdm.write(
                f"{options.model}, trained on COCO ({published.license}): {published.url}",
                file=sys.stderr,
            )
    return Predictor.from_config(config, options.opts, weights, options.score)


def _process(predictor, frames, writers, bar, options) -> tuple[int, int]:
    """Detects objects batch by batch and writes them; returns the numbers of images and objects."""
    num_images = num_objects = 0
    frames = islice(frames, options.frames)
    while batch := list(islice(frames, options.batch_size)):
        predictions = predictor.predict([frame.image for frame in batch])
        for frame, found in zip(batch, predictions, strict=True):
            for writer in writers:
                writer.write(frame, found)
            num_objects += len(found)
        num_images += len(batch)
        bar.update(len(batch))
    return num_images, num_objects


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    parser.prog = "fcos-d2"
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="images, videos, folders or glob patterns")
    add("--model", default=PRETRAINED, metavar="NAME", help=f"model in the zoo {DEFAULT}")
    add("--config-file", metavar="FILE", help="config of your own model, instead of --model")
    add("--weights", default="", metavar="FILE", help="weights to load instead of the final ones")
    add("--output", type=Path, metavar="PATH", help="folder, image or video to write")
    add("--json", type=Path, metavar="FILE", help="write boxes, classes and scores to FILE")
    add("--score", type=float, metavar="S", help="score threshold of all classes")
    add("--batch-size", type=int, default=1, metavar="N", help=f"images per batch {DEFAULT}")
    add("--tile", type=int, metavar="N", help="detect in overlapping tiles of N x N pixels")
    add("--webcam", type=int, metavar="N", help="index of a camera, such as 0")
    add("--frames", type=int, metavar="N", help="stop after N images or frames")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys to override")
    options = parser.parse_args(arguments)
    if not options.inputs and options.webcam is None:
        parser.error("no input is given; pass images, videos or folders, or --webcam 0")
    if not options.output and not options.json:
        options.output = Path("detections")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.frames is not None and options.frames < 1:
        parser.error(f"--frames must be at least 1, got {options.frames}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return exit_status(run, parse(arguments))
