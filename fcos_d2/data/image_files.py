"""Finds the images of an annotation file, even if they have moved since it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import format_value

MOST_SEARCHED = 20_000  # files to look at for a suggestion
NO_FILE = "no such file"  # reason


class Located(NamedTuple):
    """The result of ``locate_images``."""

    paths: list[str | None]  # relative to the folder; None for a missing file
    missing: dict[int, str]  # index of each missing file -> reason


def locate_images(root: str, names: Sequence[str]) -> Located:
    """Finds image files under ``root``.

    If a name is not a path under ``root``, the file whose path has the longest end in common with
    it is used, ignoring case, URL encoding and the kind of slashes.

    Args:
        root: the folder to which names are relative. URLs are not searched.
        names: as in the annotation file.
    """
    if "://" in root:
        return Located(list(names), {})
    present = _present(root, names)
    paths: list[str | None] = [
        n if there else None for n, there in zip(names, present, strict=True)
    ]
    if all(present):
        return Located(paths, {})
    tree, missing = _Tree(root), {}
    for place, name in enumerate(names):
        if paths[place] is None:
            found = tree.find(name)
            if len(found) == 1:
                paths[place] = found[0]
            else:
                missing[place] = _reason(found)
    return Located(paths, missing)


def _reason(found: list[str]) -> str:
    if not found:
        return NO_FILE
    some = " and ".join(map(format_value, found[:2]))
    return f"{len(found)} files match, such as {some}; write the full path"


def _present(root: str, names: Sequence[str]) -> list[bool]:
    """Lists folders instead of testing each file, which is much faster for 118,000 images."""
    split = [os.path.split(os.path.join(root, name)) for name in names]
    listed = {folder: _listed(folder) for folder in {folder for folder, _ in split}}
    return [name in listed[folder] for folder, name in split]


def _listed(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except (OSError, ValueError):  # ValueError: not a valid path
        return frozenset()


class _Tree:
    """All files under a folder, by every end of their path in lower case."""

    def __init__(self, root: str):
        self._by_end: dict[str, list[str]] = {}
        for path in _files(root):
            for end in _ends(path):
                self._by_end.setdefault(end.lower(), []).append(path)

    def find(self, name: str) -> list[str]:
        """The files that ``name`` may refer to; several if it is ambiguous."""
        written = _plain(name)
        for text in dict.fromkeys((written, unquote(written))):
            for end in _ends(text):
                if found := self._by_end.get(end.lower()):
                    whole = [path for path in found if path.lower() == end.lower()]
                    return [end] if end in whole else whole or found
        return []


def _ends(path: str) -> Iterator[str]:
    """The path without its first components, from the longest to the name of the file."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return ("/".join(parts[first:]) for first in range(len(parts)))


def _plain(name: str) -> str:
    """Converts paths of Windows, URLs and Label Studio's local files to a path with slashes."""
    text = name.replace("\\", "/")
    if "?d=" in text:
        return text.partition("?d=")[2]
    return text.partition("?")[0] if "://" in text else text


def _files(root: str) -> Iterator[str]:
    """Paths of all files under ``root``, relative to it and with slashes."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # reached through a link
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        beginning = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(files):
            if not name.startswith("."):
                yield name if beginning == "." else f"{beginning}/{name}"


def suggest_folder(root: str, name: str, more: Sequence[str] = ()) -> str | None:
    """A folder near ``root`` that contains an image; None if none is found soon.

    Args:
        root: the folder without the image.
        name: of the image.
        more: further folders to search, such as that of the annotation file.
    """
    wanted = _plain(name).rpartition("/")[2].lower()
    place = Path(root).absolute()
    near = [folder for folder in (place, *place.parents[:2]) if folder.name]  # not the root
    found = ((folder, path) for folder in (*map(Path, more), *near) for path in _files(str(folder)))
    for folder, path in islice(found, MOST_SEARCHED):
        if path.rpartition("/")[2].lower() == wanted:
            return os.path.relpath((folder / path).parent)
    return None
