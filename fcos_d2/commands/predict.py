"""Detects objects in images, folders, videos or a camera's frames.

    fcos-d2 photo.jpg                                a model pretrained on COCO, downloaded once
    fcos-d2 photos/ 'more/*.jpg' --model mmdetection/fcos_R_101_FPN_2x --output found/
    fcos-d2 street.mp4 --config-file output/digits/config.yaml --output street_found.mp4
    fcos-d2 photos/ --config-file FILE --weights FILE --output all.mp4 --json all.json
    fcos-d2 --webcam 0 --output camera.mp4 --frames 300

Drawn images go into the folder detections unless --output or --json says otherwise. Classes are
cut at the scores measured best in the last evaluation, or at 0.5, unless --score is given. No
display is needed. Exit status: 0, 1 if some input was skipped, 2 if nothing can be done.
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
from .arguments import parser_of

PRETRAINED = "torchvision/fcos_R_50_FPN"


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; the exit status.

    Raises:
        InputError: inputs, config, weights or output that cannot be used.
    """
    skipped = Skipped()
    sources = find_sources(options.inputs, skipped)
    if options.webcam is not None:
        sources.append(Source(str(options.webcam), "camera", Path(f"camera_{options.webcam}")))
    if not sources:
        raise InputError("there is no input that can be read")
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
        shown, objects = _process(predictor, frames, writers, bar, options)
    places = [options.output, options.json]
    print(f"{objects} objects in {shown} images: {', '.join(str(p) for p in places if p)}")
    return 1 if skipped else 0


def load_predictor(options: argparse.Namespace) -> Predictor:
    """The predictor of --config-file, or of --model.

    Raises:
        InputError: config or weights that cannot be used.
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
    """Detects and writes batch by batch; numbers of frames and of objects."""
    shown = objects = 0
    frames = islice(frames, options.frames)
    while batch := list(islice(frames, options.batch_size)):
        predictions = predictor.predict([frame.image for frame in batch])
        for frame, found in zip(batch, predictions, strict=True):
            for writer in writers:
                writer.write(frame, found)
            objects += len(found)
        shown += len(batch)
        bar.update(len(batch))
    return shown, objects


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.prog = "fcos-d2"
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="images, videos, folders or patterns")
    add("--model", default=PRETRAINED, metavar="NAME", help="of MODEL_ZOO.md; default: %(default)s")
    add("--config-file", metavar="FILE", help="instead of --model: of a model of your own")
    add("--weights", default="", metavar="FILE", help="default: what training left in OUTPUT_DIR")
    add("--output", type=Path, metavar="PATH", help="folder, image file or video file")
    add("--json", type=Path, metavar="FILE", help="boxes, classes and scores of all frames")
    add("--score", type=float, metavar="S", help="lowest score shown, of all classes")
    add("--batch-size", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--tile", type=int, metavar="N", help="detect in overlapping tiles of N x N pixels")
    add("--webcam", type=int, metavar="N", help="number of a camera, like 0")
    add("--frames", type=int, metavar="N", help="stop after so many frames")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override the config")
    options = parser.parse_args(arguments)
    if not options.inputs and options.webcam is None:
        parser.error("nothing to look at; name images, folders or videos, or pass --webcam 0")
    if not options.output and not options.json:
        options.output = Path("detections")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.frames is not None and options.frames < 1:
        parser.error(f"--frames must be at least 1, got {options.frames}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return exit_status(run, parse(arguments))
