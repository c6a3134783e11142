"""Where the images of an annotation file lie, whatever their paths were where it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import format_value

MOST_FOLDERS = 1000  # that are listed; of more, every file is asked for
MOST_SEARCHED = 20_000  # files that are looked through for a place to suggest


class Located(NamedTuple):
    """What came of a list of file names."""

    paths: list[str | None]  # relative to the folder, as they are on disk; None for a missing file
    missing: dict[int, str]  # place in the list -> why it is missing


def locate_images(root: str, names: Sequence[str]) -> Located:
    """Finds image files under ``root``.

    A name that is no path under ``root`` becomes the longest tail of it that is one, whatever its
    slashes, case and URL encoding; else the one file under ``root`` whose path ends most like it.

    Args:
        root: the folder that names start from. One with "://" is not looked into.
        names: as they are in the annotation file.
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
        return "no such file"
    some = " and ".join(map(format_value, found[:2]))
    return f"{len(found)} files match, such as {some}; write the full path"


def _present(root: str, names: Sequence[str]) -> list[bool]:
    """Lists folders instead of asking for every file: a fraction of a second for 118,000 images."""
    split = [os.path.split(os.path.join(root, name)) for name in names]
    folders = {folder for folder, _ in split}
    if len(folders) > MOST_FOLDERS:
        return [os.path.isfile(os.path.join(*pair)) for pair in split]
    listed = {folder: _listed(folder) for folder in folders}
    return [name in listed[folder] for folder, name in split]


def _listed(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except (OSError, ValueError):  # ValueError: the name of no folder at all
        return frozenset()


class _Tree:
    """All files under a folder, by their paths in lower case."""

    def __init__(self, root: str):
        self._by_path: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in _files(root):
            self._by_path.setdefault(path.lower(), []).append(path)
            self._by_name.setdefault(path.lower().rpartition("/")[2], []).append(path)

    def find(self, name: str) -> list[str]:
        """The files that ``name`` may mean: one, or none, or several that it fits equally well."""
        written = _plain(name)
        for text in dict.fromkeys((written, unquote(written))):
            parts = [part for part in text.split("/") if part not in ("", ".", "..")]
            for first in range(len(parts)):
                tail = "/".join(parts[first:])
                if found := self._by_path.get(tail.lower()):
                    return [tail] if tail in found else found
            if found := self._by_name.get(parts[-1].lower() if parts else ""):
                return _most_alike(parts, found)
        return []


def _most_alike(parts: list[str], paths: list[str]) -> list[str]:
    """Those of ``paths`` that agree with ``parts`` on most folders, counted from the end."""
    wanted = [part.lower() for part in reversed(parts)]

    def agreement(path: str) -> int:
        found = path.lower().split("/")[::-1]
        return len(os.path.commonprefix([wanted, found]))

    best = max(map(agreement, paths))
    return [path for path in paths if agreement(path) == best]


def _plain(name: str) -> str:
    """A path with slashes, out of one of Windows, a URL, or one of Label Studio's local files."""
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


def suggest_folder(root: str, names: Sequence[str], more: Sequence[str] = ()) -> str | None:
    """A folder near ``root`` in which the first of ``names`` lies; None if it is not found soon.

    Args:
        root: where the images are not.
        names: of the images.
        more: further folders to look into, like that of the annotation file.
    """
    wanted = {_plain(name).rpartition("/")[2].lower() for name in names[:1]}
    near = [Path(root), *Path(root).absolute().parents[:2]]
    count = 0
    for folder in (*map(Path, more), *near):
        is_searched = folder.is_dir() and folder.absolute() != folder.absolute().parent
        for path in _files(str(folder)) if is_searched else ():
            count += 1
            if path.rpartition("/")[2].lower() in wanted:
                return os.path.relpath((folder / path).parent)
            if count > MOST_SEARCHED:
                return None
    return None
