"""Images, videos and cameras as one stream of frames, and files for what is drawn and found."""

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

# What is written into a video file of each kind.
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".m4v": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
CODECS |= {".webm": "VP90"}
VIDEOS = frozenset(CODECS) | {".mpg", ".mpeg", ".wmv", ".flv"}
FRAMES_PER_SECOND = 5.0  # of a video made of images, or of a camera that does not say


class Source(NamedTuple):
    """One thing to read frames from."""

    path: str  # or the number of a camera
    kind: str  # "image", "video" or "camera"
    name: Path  # inside the folder that was named, or the file's own
    target: Path | None = None  # what it is drawn into


class Frame(NamedTuple):
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
        if is_folder := path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if is_image(file) or is_video(file)]
        else:
            matching = map(Path, sorted(glob.glob(str(path), recursive=True)))
            found = [path] if path.exists() else [file for file in matching if file.is_file()]
        if not found:
            reason = "the folder holds no image and no video" if is_folder else "no such file"
            skipped.add(text, reason)
        for file in found:
            kind = "video" if is_video(file) else "image"
            name = file.relative_to(path) if is_folder else Path(file.name)
            sources.append(Source(str(file), kind, name))
    return sources


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEOS


def read_frames(sources: Sequence[Source], skipped: Skipped) -> Iterator[Frame]:
    """The frames of all sources, one after the other."""
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
        rate, number = _property(capture, cv2.CAP_PROP_FPS) or FRAMES_PER_SECOND, 0
        while (frame := capture.read()[1]) is not None:
            yield Frame(source, number, rate, np.ascontiguousarray(frame[:, :, ::-1]))
            number += 1
        if not number:
            skipped.add(source.path, f"the {source.kind} yields no frame")
    finally:
        capture.release()


def count_frames(sources: Sequence[Source]) -> int | None:
    """How many frames there will be; None for a camera, which never ends."""
    if any(source.kind == "camera" for source in sources):
        return None
    videos = [source.path for source in sources if source.kind == "video"]
    total = len(sources) - len(videos)
    for path in videos:
        cv2 = import_opencv()
        capture = cv2.VideoCapture(path)
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
    cv2 = import_optional("cv2", "reading or writing a video", "opencv-python-headless")
    # What cannot be read is named by us.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


# ---- writing ----


def choose_targets(
    sources: Sequence[Source], output: Path, num_frames: int | None = None
) -> list[Source]:
    """The sources with the file that each is drawn into.

    Args:
        sources: what is read.
        output: a video file for all frames together; an image file for a single one; else a
            folder, in which every source has a file to itself.
        num_frames: how many frames are looked at; all where None.

    Raises:
        InputError: an image file for several frames, or of a format that cannot be written.
    """
    if output.is_dir() or not (is_image(output) or is_video(output)):
        names = distinct_names(map(_name_of_drawn, sources))
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


def _name_of_drawn(source: Source) -> Path:
    if source.kind != "image":
        return source.name.with_suffix(".mp4")
    return source.name if can_hold_rgb(source.name) else source.name.with_suffix(".png")


def check_targets(sources: Sequence[Source], json_file: Path | None) -> None:
    """Makes sure that nothing is written over anything that is read.

    Raises:
        InputError: an input would be overwritten, or frames and JSON are to be the same file.
    """
    inputs = {_identity(s.path): s.path for s in sources if s.kind != "camera"}
    inputs.pop(None, None)  # of files that are gone meanwhile
    frames = dict.fromkeys(source.target for source in sources if source.target)
    targets = [("--output", frame) for frame in frames]
    targets += [("--json", json_file)] if json_file else []
    for option, target in targets:
        if original := inputs.get(_identity(target)):
            raise InputError(
                f"{target} would overwrite the input {original}; choose another {option}"
            )
    if json_file and os.path.abspath(json_file) in map(os.path.abspath, frames):
        raise InputError(f"--json {json_file} is a frame of --output too; choose another --json")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What all names of a file have in common; None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class FrameWriter:
    """Writes drawn frames into the targets of their sources, which are images or videos."""

    def __init__(self):
        self._video = self._current = None
        self._size = (0, 0)

    def write(self, frame: Frame, found: Prediction) -> None:
        """Draws and adds one frame.

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
            self._add_frame(path, frame, drawn)

    def _add_frame(self, path: Path, frame: Frame, drawn: np.ndarray) -> None:
        cv2 = import_opencv()
        if path != self._current:
            self.close()
            # Most codecs want even sides.
            self._size = (drawn.shape[1] // 2 * 2, drawn.shape[0] // 2 * 2)
            codec = cv2.VideoWriter_fourcc(*CODECS.get(path.suffix.lower(), "mp4v"))
            self._video = cv2.VideoWriter(str(path), codec, frame.rate, self._size)
            if not self._video.isOpened():
                raise InputError(
                    f"cannot write video {path}; choose an --output that ends in .mp4 or .avi"
                )
            self._current = path
        fitted = ImageOps.pad(Image.fromarray(drawn), self._size, Image.Resampling.BICUBIC)
        self._video.write(np.ascontiguousarray(np.asarray(fitted)[:, :, ::-1]))

    def close(self) -> None:
        """Finishes the video that is being written."""
        if self._video is not None:
            self._video.release()
        self._video = self._current = None


class JsonWriter:
    """One JSON array, an entry per frame, valid however many there were."""

    def __init__(self, file: IO[str]):
        self._file, self._separator = file, "[\n"

    def write(self, frame: Frame, found: Prediction) -> None:
        """Adds one frame."""
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
        entry = {"file": frame.source.path, "frame": frame.frame, "width": width}
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
