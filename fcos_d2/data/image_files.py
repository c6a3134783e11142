"""Finds the images of an annotation file, even if they were moved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import format_value

MAX_SEARCHED = 20_000  # files searched for a suggestion
NO_FILE = "no such file"


class Located(NamedTuple):
    """The result of ``locate_images``."""

    paths: list[str | None]  # relative to the folder; None for a missing file
    missing: dict[int, str]  # index of each missing file -> reason


def locate_images(root: str, names: Sequence[str]) -> Located:
    """Finds image files under ``root``.

    If ``root`` has no file of a name, the file whose path shares the longest suffix with it is
    used, ignoring case, URL encoding and the kind of slashes.

    Args:
        root: folder to which names are relative. URLs are not searched.
        names: names in the annotation file.
    """
    if "://" in root:
        return Located(list(names), {})
    exist = _exist(root, names)
    if all(exist):
        return Located(list(names), {})
    paths: list[str | None] = []
    index, missing = _PathIndex(root), {}
    for place, (name, exists) in enumerate(zip(names, exist, strict=True)):
        found = [name] if exists else index.find(name)
        paths.append(found[0] if len(found) == 1 else None)
        if len(found) != 1:
            missing[place] = _describe_missing(found)
    return Located(paths, missing)


def _describe_missing(found: list[str]) -> str:
    if not found:
        return NO_FILE
    some = " and ".join(map(format_value, found[:2]))
    return f"{len(found)} files match, such as {some}; write the full path"


def _exist(root: str, names: Sequence[str]) -> list[bool]:
    """Returns which files exist; listing folders is much faster than testing 118,000 files."""
    split = [os.path.split(os.path.join(root, name)) for name in names]
    listed = {folder: _list_folder(folder) for folder in {folder for folder, _ in split}}
    return [name in listed[folder] for folder, name in split]


def _list_folder(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except (OSError, ValueError):  # ValueError: the path contains a null byte or a surrogate
        return frozenset()


class _PathIndex:
    """Indexes the files under a folder by all suffixes of their paths, in lower case."""

    def __init__(self, root: str):
        self._by_suffix: dict[str, list[str]] = {}
        for path in _walk(root):
            for suffix in _path_suffixes(path):
                self._by_suffix.setdefault(suffix.lower(), []).append(path)

    def find(self, name: str) -> list[str]:
        """Returns the files that ``name`` may refer to; several if it is ambiguous."""
        normalized = _normalize(name)
        for text in dict.fromkeys((normalized, unquote(normalized))):
            for suffix in _path_suffixes(text):
                if found := self._by_suffix.get(suffix.lower()):
                    whole = [path for path in found if path.lower() == suffix.lower()]
                    return [suffix] if suffix in whole else whole or found
        return []


def _path_suffixes(path: str) -> Iterator[str]:
    """Yields the path without its first components, from the longest to the file name."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ("/".join(parts[first:]) for first in range(len(parts)))


def _normalize(name: str) -> str:
    """Converts Windows paths, URLs and Label Studio's local files to a path with slashes."""
    text = name.replace("\\", "/")
    if "?d=" in text:
        return text.partition("?d=")[2]
    return text.partition("?")[0] if "://" in text else text


def _walk(root: str) -> Iterator[str]:
    """Yields the paths of all files under ``root``, relative to it and with slashes."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a symbolic link
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        parent = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            if not name.startswith("."):
                yield name if parent == "." else f"{parent}/{name}"


def suggest_folder(root: str, name: str, more: Sequence[str] = ()) -> str | None:
    """Searches folders near ``root`` for an image; returns its folder, or None.

    Args:
        root: folder that does not contain the image.
        name: name of the image.
        more: other folders to search, such as that of the annotation file.
    """
    wanted = _normalize(name).rpartition("/")[2].lower()
    place = Path(root).absolute()
    near = [folder for folder in (place, *place.parents[:2]) if folder.name]  # without "/"
    found = ((folder, path) for folder in (*map(Path, more), *near) for path in _walk(str(folder)))
    for folder, path in islice(found, MAX_SEARCHED):
        if path.rpartition("/")[2].lower() == wanted:
            return os.path.relpath((folder / path).parent)
    return None
