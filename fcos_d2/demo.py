"""The command ``fcos-d2``: finds objects in images, folders, videos or a camera's pictures.

    fcos-d2 photos/ 'more/*.jpg' --config-file output/digits/config.yaml --output found/
    fcos-d2 street.mp4 --config-file FILE --weights FILE --output street_found.mp4
    fcos-d2 photos/ --config-file FILE --output all.mp4 --json all.json
    fcos-d2 --webcam 0 --config-file FILE --output camera.mp4 --frames 300

Every class is cut at the score measured best in the last evaluation, unless --score is given. No
display is needed. Exit status: 0, 1 if some input was skipped, 2 if nothing can be done.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from .data.images import can_hold_rgb, distinct_names, is_image, read_image, why_unreadable
from .errors import InputError, exit_status
from .predictor import Prediction, Predictor
from .visualization.boxes import PANEL_SIDE, draw_objects

# What is written into a video file of each kind.
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".m4v": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
CODECS |= {".webm": "VP90"}
VIDEOS = frozenset(CODECS) | {".mpg", ".mpeg", ".wmv", ".flv"}
FRAMES_PER_SECOND = 5.0  # of a video made of images, or of a camera that does not say


class Source(NamedTuple):
    """One thing to read pictures from."""

    path: str  # or the number of a camera
    kind: str  # "image", "video" or "camera"
    name: Path  # inside the folder that was named, or the file's own
    target: Path | None = None  # what it is drawn into


class Picture(NamedTuple):
    """One image, or one frame."""

    source: Source
    frame: int | None  # from 0; None for an image
    rate: float  # frames per second of the source
    image: np.ndarray  # uint8 [H, W, 3], RGB


class Skipped(list):
    """What could not be read and why, told when it happens."""

    def add(self, path: str, reason: str) -> None:
        """Names it on stderr."""
        self.append(path)
        tqdm.write(f"skipped {path}: {reason}", file=sys.stderr)


# ---- reading ----


def find_sources(inputs: Sequence[str], skipped: Skipped) -> list[Source]:
    """Files, folders and patterns -> files in the order of the command line."""
    sources: list[Source] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            found = [(file, file.relative_to(path)) for file in sorted(path.rglob("*"))]
            found = [pair for pair in found if is_image(pair[0]) or is_video(pair[0])]
            empty = "the folder holds no image and no video"
        elif path.exists():
            found, empty = [(path, Path(path.name))], ""
        else:
            files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
            found = [(file, Path(file.name)) for file in files if file.is_file()]
            empty = "no such file"
        if not found:
            skipped.add(text, empty)
        for file, name in found:
            kind = "video" if is_video(file) else "image"
            sources.append(Source(str(file), kind, name))
    return sources


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEOS


def read_pictures(sources: Sequence[Source], skipped: Skipped) -> Iterator[Picture]:
    """The pictures of all sources, one after the other."""
    for source in sources:
        if source.kind != "image":
            yield from _read_frames(source, skipped)
            continue
        try:
            yield Picture(source, None, FRAMES_PER_SECOND, read_image(source.path, "RGB"))
        except Exception as error:  # Pillow raises whatever a broken file leads it to
            skipped.add(source.path, why_unreadable(error))


def _read_frames(source: Source, skipped: Skipped) -> Iterator[Picture]:
    cv2 = import_opencv()
    capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
    try:
        rate, number = _property(capture, cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND, 0
        while (frame := capture.read()[1]) is not None:
            yield Picture(source, number, rate, np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
        if not number:
            skipped.add(source.path, f"the {source.kind} yields no frame")
    finally:
        capture.release()


def count_pictures(sources: Sequence[Source]) -> int | None:
    """How many pictures there will be; None for a camera, which never ends."""
    total = 0
    for source in sources:
        if source.kind == "camera":
            return None
        if source.kind == "image":
            total += 1
            continue
        cv2 = import_opencv()
        capture = cv2.VideoCapture(source.path)
        total += int(_property(capture, cv2.CAP_PROP_FRAME_COUNT) or 0)
        capture.release()
    return total


def _property(capture, key: int) -> float | None:
    """A property of a video; None where it is not known, which may be 0, -1 or NaN."""
    value = capture.get(key)
    return value if 0 < value < math.inf else None


def import_opencv():
    """OpenCV, which reads and writes videos.

    Raises:
        InputError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            "videos and cameras need OpenCV; install it with: pip install opencv-python-headless"
        ) from error
    # What cannot be read is named by us.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


# ---- writing ----


def choose_targets(
    sources: Sequence[Source], output: Path, num_pictures: int | None = None
) -> list[Source]:
    """The sources with the file that each is drawn into.

    Args:
        sources: what is read.
        output: a video file for all pictures together; an image file for a single one; else a
            folder, in which every source has a file to itself.
        num_pictures: how many pictures are looked at; all where None.

    Raises:
        InputError: an image file for several pictures, or of a format that cannot be written.
    """
    if output.is_dir() or not (is_image(output) or is_video(output)):
        names = [_name_of_drawn(source) for source in sources]
        targets = [output / n for n in distinct_names(names, [_folder(s) for s in sources])]
        return [s._replace(target=t) for s, t in zip(sources, targets, strict=True)]
    is_single = num_pictures == 1 or [source.kind for source in sources] == ["image"]
    if is_image(output) and not is_single:
        raise InputError(
            f"--output {output} holds one picture, but the inputs are more than one; name a folder "
            "or a video file"
        )
    if is_image(output) and not can_hold_rgb(output):
        raise InputError(f"--output {output}: its format cannot be written; name a .png or .jpg")
    return [source._replace(target=output) for source in sources]


def _name_of_drawn(source: Source) -> Path:
    if source.kind != "image":
        return source.name.with_suffix(".mp4")
    return source.name if can_hold_rgb(source.name) else source.name.with_suffix(".png")


def _folder(source: Source) -> str:
    """The name of the folder that the source's name starts from."""
    return Path(os.path.abspath(source.path)).parents[len(source.name.parts) - 1].name


def check_targets(sources: Sequence[Source], json_file: Path | None) -> None:
    """Makes sure that nothing is written over anything that is read.

    Raises:
        InputError: an input would be overwritten, or pictures and JSON are to be the same file.
    """
    inputs = {_identity(s.path): s.path for s in sources if s.kind != "camera"}
    inputs.pop(None, None)  # of files that are gone meanwhile
    pictures = dict.fromkeys(source.target for source in sources if source.target)
    targets = [("--output", picture) for picture in pictures]
    targets += [("--json", json_file)] if json_file else []
    for option, target in targets:
        if original := inputs.get(_identity(target)):
            raise InputError(
                f"{target} would be written over the input {original}; choose another {option}"
            )
    if json_file and os.path.abspath(json_file) in map(os.path.abspath, pictures):
        raise InputError(f"--json {json_file} is a picture of --output too; choose another --json")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What all names of a file have in common; None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class PictureWriter:
    """Writes drawn pictures into the targets of their sources, which are images or videos.

    Args:
        rate: frames per second of videos; that of the source where None.
    """

    def __init__(self, rate: float | None = None):
        self._rate = rate
        self._video = self._current = None
        self._size = (0, 0)

    def write(self, picture: Picture, drawn: np.ndarray) -> None:
        """Adds one picture.

        Raises:
            InputError: the file cannot be written.
        """
        path = picture.source.target
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_video(path):
                Image.fromarray(drawn).save(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot write {path}: {error}; choose another --output") from error
        if is_video(path):
            self._add_frame(path, picture, drawn)

    def _add_frame(self, path: Path, picture: Picture, drawn: np.ndarray) -> None:
        cv2 = import_opencv()
        if path != self._current:
            self.close()
            # Most codecs want even sides.
            self._size = (drawn.shape[1] // 2 * 2, drawn.shape[0] // 2 * 2)
            codec = cv2.VideoWriter_fourcc(*CODECS.get(path.suffix.lower(), "mp4v"))
            rate = self._rate or picture.rate
            self._video = cv2.VideoWriter(str(path), codec, rate, self._size)
            if not self._video.isOpened():
                raise InputError(
                    f"cannot write video {path}; choose an --output that ends in .mp4 or .avi"
                )
            self._current = path
        self._video.write(np.ascontiguousarray(_fit_into(drawn, self._size)[:, :, ::-1]))

    def close(self) -> None:
        """Finishes the video that is being written."""
        if self._video is not None:
            self._video.release()
        self._video = self._current = None


def _fit_into(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image in the middle of a black picture of ``size`` (width, height), undistorted."""
    picture = Image.fromarray(image)
    if picture.size == size:
        return image
    scale = min(size[0] / picture.width, size[1] / picture.height)
    inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = Image.new("RGB", size)
    corner = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    canvas.paste(picture.resize(inner, Image.Resampling.BICUBIC), corner)
    return np.asarray(canvas)


class JsonWriter:
    """One JSON array, an entry per picture, valid however many there were."""

    def __init__(self, file: IO[str], names: Sequence[str] | None):
        self._file, self._names, self._separator = file, names, "[\n"

    def write(self, picture: Picture, found: Prediction) -> None:
        """Adds one picture."""
        names = self._names
        objects = [
            {
                "box": [round(v, 2) for v in box],
                "class": names[class_] if names else str(class_),
                "class_id": class_,
                "score": round(score, 4),
            }
            for box, class_, score in zip(
                found.boxes.tolist(), found.classes, found.scores, strict=True
            )
        ]
        height, width = picture.image.shape[:2]
        entry = {"file": picture.source.path, "frame": picture.frame, "width": width}
        self._file.write(self._separator)
        json.dump(entry | {"height": height, "objects": objects}, self._file)
        self._separator = ",\n"

    def close(self) -> None:
        """Ends the array."""
        self._file.write("\n]\n" if self._separator.startswith(",") else "[]\n")


def open_json(path: Path) -> IO[str]:
    """The file for ``JsonWriter``.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --json") from error


# ---- the command ----


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
    predictor = Predictor.from_config(
        options.config_file, options.opts, options.weights, options.score
    )
    total = count_pictures(sources)
    if options.frames and (total is None or total > options.frames):
        total = options.frames
    with contextlib.ExitStack() as stack:
        writer = json_writer = None
        if options.output:
            writer = PictureWriter(options.fps)
            stack.callback(writer.close)
        if options.json:
            file = stack.enter_context(open_json(options.json))
            json_writer = JsonWriter(file, predictor.class_names)
            stack.callback(json_writer.close)
        pictures = stack.enter_context(contextlib.closing(read_pictures(sources, skipped)))
        bar = stack.enter_context(tqdm(total=total, unit="image", disable=None))
        shown, objects = _process(predictor, pictures, writer, json_writer, bar, options)
    places = [options.output, options.json]
    print(f"{objects} objects in {shown} images: {', '.join(str(p) for p in places if p)}")
    return 1 if skipped else 0


def _process(predictor, pictures, writer, json_writer, bar, options) -> tuple[int, int]:
    """Detects, draws and writes batch by batch; numbers of pictures and of objects."""
    shown = objects = 0
    pictures = islice(pictures, options.frames)
    while batch := list(islice(pictures, options.batch_size)):
        predictions = predictor.predict([picture.image for picture in batch])
        for picture, found in zip(batch, predictions, strict=True):
            if json_writer:
                json_writer.write(picture, found)
            if writer:
                scale = max(1.0, PANEL_SIDE / max(picture.image.shape[:2]))
                boxes, classes, scores = found
                names = predictor.class_names
                writer.write(
                    picture, draw_objects(picture.image, boxes, classes, names, scores, scale)
                )
            objects += len(found.classes)
        shown += len(batch)
        bar.update(len(batch))
    return shown, objects


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="fcos-d2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="images, videos, folders or patterns")
    add("--config-file", required=True, metavar="FILE", help="that the model was trained with")
    add("--weights", default="", metavar="FILE", help="default: what training left in OUTPUT_DIR")
    add("--output", type=Path, metavar="PATH", help="folder, image file or video file")
    add("--json", type=Path, metavar="FILE", help="boxes, classes and scores of all pictures")
    add("--score", type=float, metavar="S", help="lowest score shown, of all classes")
    add("--batch-size", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--webcam", type=int, metavar="N", help="number of a camera, like 0")
    add("--frames", type=int, metavar="N", help="stop after so many pictures")
    add("--fps", type=float, metavar="F", help="of written videos; default: the source's")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override the config")
    options = parser.parse_args(arguments)
    if not options.inputs and options.webcam is None:
        parser.error("nothing to look at; name images, folders or videos, or pass --webcam 0")
    if not options.output and not options.json:
        parser.error("nothing to write; pass --output PATH or --json FILE")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.frames is not None and options.frames < 1:
        parser.error(f"--frames must be at least 1, got {options.frames}")
    if options.fps is not None and not 0 < options.fps < math.inf:
        parser.error(f"--fps must be above 0, got {options.fps}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    return exit_status(run, parse(arguments))
