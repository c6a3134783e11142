"""Reads images, videos and cameras as a stream of frames; writes drawn frames and detections."""

from __future__ import annotations

import glob
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from .data.images import can_hold_rgb, distinct_names, is_image, read_image
from .errors import InputError, import_optional
from .predictor import Prediction

# Codec by suffix of the written video.
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".m4v": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
CODECS |= {".webm": "VP90"}
VIDEOS = frozenset(CODECS) | {".mpg", ".mpeg", ".wmv", ".flv"}
FRAMES_PER_SECOND = 5.0  # of videos made of images, and of cameras that do not report a rate


class Source(NamedTuple):
    """An image, a video or a camera."""

    path: str  # the index of a camera
    kind: str  # "image", "video" or "camera"
    name: Path  # relative to the input folder, if it is in one
    target: Path | None = None  # file to write


class Frame(NamedTuple):
    """An image, or a frame of a video or camera."""

    source: Source
    number: int | None  # from 0; None for an image
    rate: float  # frames per second of the source
    image: np.ndarray  # uint8 [H, W, 3], RGB


class Skipped(list):
    """Inputs that could not be read."""

    def add(self, path: str, reason: str) -> None:
        """Appends an input and reports it on stderr."""
        self.append(path)
        tqdm.write(f"skipped {path}: {reason}", file=sys.stderr)


# ---- Reading ----


def find_sources(inputs: Sequence[str], skipped: Skipped) -> list[Source]:
    """Expands files, folders and glob patterns to images and videos, in the order of ``inputs``."""
    sources: list[Source] = []
    for name in inputs:
        path = Path(name).expanduser()
        if is_folder := path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if is_image(file) or is_video(file)]
        else:
            matching = map(Path, sorted(glob.glob(str(path), recursive=True)))
            found = [path] if path.exists() else [file for file in matching if file.is_file()]
        if not found:
            reason = "the folder has no images or videos" if is_folder else "no such file"
            skipped.add(name, reason)
        for file in found:
            kind = "video" if is_video(file) else "image"
            relative = file.relative_to(path) if is_folder else Path(file.name)
            sources.append(Source(str(file), kind, relative))
    return sources


def is_video(path: Path) -> bool:
    """Returns whether a file has the suffix of a video."""
    return path.suffix.lower() in VIDEOS


def read_frames(sources: Sequence[Source], skipped: Skipped) -> Iterator[Frame]:
    """Yields the frames of all sources in order; adds sources without frames to ``skipped``."""
    for source in sources:
        if source.kind != "image":
            yield from _read_video(source, skipped)
            continue
        try:
            yield Frame(source, None, FRAMES_PER_SECOND, read_image(source.path, "RGB"))
        except InputError as error:
            skipped.add(source.path, str(error))


def _read_video(source: Source, skipped: Skipped) -> Iterator[Frame]:
    cv2 = import_opencv()
    capture = cv2.VideoCapture(int(source.path) if source.kind == "camera" else source.path)
    try:
        rate, number = _get_property(capture, cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND, 0
        while (frame := capture.read()[1]) is not None:
            yield Frame(source, number, rate, np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
        if not number:
            skipped.add(source.path, f"no frame of the {source.kind} can be read")
    finally:
        capture.release()


def count_frames(sources: Sequence[Source]) -> int | None:
    """Returns the total number of frames; None if there is a camera."""
    if any(source.kind == "camera" for source in sources):
        return None
    videos = [source.path for source in sources if source.kind == "video"]
    total = len(sources) - len(videos)
    for path in videos:
        cv2 = import_opencv()
        capture = cv2.VideoCapture(path)
        total += int(_get_property(capture, cv2.CAP_PROP_FRAME_COUNT) or 0)
        capture.release()
    return total


def _get_property(capture, key: int) -> float | None:
    """Returns a property of a video; None if it is unknown, for which OpenCV has 0, -1 or NaN."""
    value = capture.get(key)
    return value if 0 < value < math.inf else None


def import_opencv():
    """Imports OpenCV, and silences it: ``Skipped`` reports files that it cannot read.

    Raises:
        InputError: it is not installed.
    """
    cv2 = import_optional("cv2", "reading or writing a video", "opencv-python-headless")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


# ---- Writing ----


def choose_targets(
    sources: Sequence[Source], output: Path, num_frames: int | None = None
) -> list[Source]:
    """Returns the sources with their targets.

    Args:
        sources: sources without targets.
        output: a video file for all frames, an image file for a single one, or a folder with one
            file per source.
        num_frames: maximum number of frames; None for all.

    Raises:
        InputError: ``output`` is an image file and there are several frames, or its format cannot
            be written.
    """
    if output.is_dir() or not (is_image(output) or is_video(output)):
        names = distinct_names(map(_target_name, sources))
        return [s._replace(target=output / name) for s, name in zip(sources, names, strict=True)]
    is_single = num_frames == 1 or [source.kind for source in sources] == ["image"]
    if is_image(output) and not is_single:
        raise InputError(
            f"--output {output} is one image, but there are several to write; choose a folder "
            "or a video file"
        )
    if is_image(output) and not can_hold_rgb(output):
        raise InputError(f"--output {output}: the format cannot be written; choose .png or .jpg")
    return [source._replace(target=output) for source in sources]


def _target_name(source: Source) -> Path:
    if source.kind != "image":
        return source.name.with_suffix(".mp4")
    return source.name if can_hold_rgb(source.name) else source.name.with_suffix(".png")


def check_targets(sources: Sequence[Source], json_file: Path | None) -> None:
    """Checks that no input is overwritten.

    Raises:
        InputError: an input would be overwritten, or a target is also ``json_file``.
    """
    inputs = {_file_id(s.path): s.path for s in sources if s.kind != "camera"}
    inputs.pop(None, None)  # files that no longer exist
    outputs = dict.fromkeys(source.target for source in sources if source.target)
    targets = [("--output", output) for output in outputs]
    targets += [("--json", json_file)] if json_file else []
    for option, target in targets:
        if original := inputs.get(_file_id(target)):
            raise InputError(
                f"{target} would overwrite the input {original}; choose another {option}"
            )
    if json_file and os.path.abspath(json_file) in map(os.path.abspath, outputs):
        raise InputError(f"--json {json_file} is also an --output; choose another --json")


def _file_id(path: str | Path) -> tuple[int, int] | None:
    """Returns device and inode, which all names of a file share; None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class FrameWriter:
    """Draws detections on frames and writes them to the targets, which are images or videos."""

    def __init__(self):
        self._video = self._path = None
        self._size = (0, 0)

    def write(self, frame: Frame, found: Prediction) -> None:
        """Draws and writes one frame.

        Raises:
            InputError: the file cannot be written.
        """
        path, drawn = frame.source.target, found.draw()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_video(path):
                Image.fromarray(drawn).save(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot write {path}: {error}; choose another --output") from error
        if is_video(path):
            self._append_to_video(path, frame, drawn)

    def _append_to_video(self, path: Path, frame: Frame, drawn: np.ndarray) -> None:
        cv2 = import_opencv()
        if path != self._path:
            self.close()
            # Most codecs need even sides.
            self._size = (drawn.shape[1] // 2 * 2, drawn.shape[0] // 2 * 2)
            codec = cv2.VideoWriter_fourcc(*CODECS.get(path.suffix.lower(), "mp4v"))
            self._video = cv2.VideoWriter(str(path), codec, frame.rate, self._size)
            if not self._video.isOpened():
                raise InputError(
                    f"cannot write video {path}; choose an --output that ends in .mp4 or .avi"
                )
            self._path = path
        fitted = ImageOps.pad(Image.fromarray(drawn), self._size, Image.Resampling.BICUBIC)
        self._video.write(np.ascontiguousarray(np.asarray(fitted)[:, :, ::-1]))

    def close(self) -> None:
        """Closes the current video."""
        if self._video is not None:
            self._video.release()
        self._video = self._path = None


class JsonWriter:
    """Writes detections as a JSON array with one entry per frame."""

    def __init__(self, file: IO[str]):
        self._file, self._separator = file, "[\n"

    def write(self, frame: Frame, found: Prediction) -> None:
        """Writes the entry of one frame."""
        columns = (found.boxes.tolist(), found.names, found.classes.tolist(), found.scores.tolist())
        objects = [
            {
                "box": [round(v, 2) for v in box],
                "class": name,
                "class_id": class_,
                "score": round(score, 4),
            }
            for box, name, class_, score in zip(*columns, strict=True)
        ]
        height, width = frame.image.shape[:2]
        entry = {"file": frame.source.path, "frame": frame.number, "width": width}
        self._file.write(self._separator)
        json.dump(entry | {"height": height, "objects": objects}, self._file)
        self._separator = ",\n"

    def close(self) -> None:
        """Closes the array, but not the file."""
        self._file.write("\n]\n" if self._separator.startswith(",") else "[]\n")


def open_json(path: Path) -> IO[str]:
    """Opens a file for ``JsonWriter``.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --json") from error
