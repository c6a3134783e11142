"""Reads Pascal VOC, in various folder layouts, and "CVAT for images"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import InputError, format_value
from ..images import is_image
from .builder import Builder, Source, enclosing_box, rotated_box
from .files import read_text, read_xml

XML_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGGED = re.compile(r"(.*\S)\s+(-1|0|1)")  # line of a list for one class


# ---- Pascal VOC ----


def read_voc(entry: str | dict, split: str | None = None, all_classes: bool = True) -> Source:
    """Reads a Pascal VOC dataset or one of its splits.

    Difficult objects become crowd regions, which are excluded from evaluation. Coordinates are
    1-based in VOC and 0-based in COCO.

    Args:
        entry: folder of XML files and images, possibly in subfolders with common names; or {xml:
            folder, images: folder}.
        split: name of a list in ImageSets/Main without suffix, or path of a list; None reads all
            XML files.
        all_classes: use the classes of all splits, which then have the same ones.

    Raises:
        InputError: a folder or the list is missing or empty.
    """
    root, xml, images = _voc_folders(entry)
    # Excludes hidden files such as macOS's ._1.xml.
    annotated = {path.stem: path for path in sorted(xml.glob("[!.]*.[xX][mM][lL]"))}
    files = {path.stem: path.name for path in sorted(images.glob("*")) if is_image(path)}
    if split is None:
        stems, listed = list(annotated), str(xml)
    else:
        path = _list_file(root, split)
        stems, listed = list(_stems(path, annotated.keys() | files.keys())), str(path)
    if not stems:
        what = "contains no XML files" if split is None else "lists no images"
        raise InputError(f"{listed} {what}; correct the path")
    builder = Builder()
    for stem in dict.fromkeys(stems):
        _add_voc_image(builder, stem, annotated.get(stem), files.get(stem), xml)
    for stem in annotated.keys() - set(stems) if all_classes else ():
        builder.add_classes(_read_classes(annotated[stem]))
    content = builder.content()
    if not content["categories"]:
        raise InputError(
            f"no XML file in {xml} has an object with a name; check that the annotations are there"
        )
    return Source(str(root / Path(split or "voc").stem), str(images), content)


def _voc_folders(entry: str | dict) -> tuple[Path, Path, Path]:
    """Returns the folders of the dataset, its XML files and its images."""
    if isinstance(entry, dict):
        xml, images = Path(entry["xml"]), Path(entry["images"])
        root = xml
    else:
        root = Path(entry)
        xml, images = (_subfolder(root, names) for names in (XML_FOLDERS, IMAGE_FOLDERS))
        if xml == root and images != root and not any(root.glob("*.xml")):
            xml = images
    for folder in (xml, images):
        if not folder.is_dir():
            raise InputError(f"folder {folder} does not exist; correct the path in the config")
    return root, xml, images


def _subfolder(root: Path, names: Sequence[str]) -> Path:
    """Returns the subfolder with one of ``names``, ignoring case, or ``root`` if there is none."""
    found = {path.name.lower(): path for path in root.glob("*") if path.is_dir()}
    return next((found[name] for name in names if name in found), root)


def _list_file(root: Path, split: str) -> Path:
    main = _subfolder(_subfolder(root, ("imagesets",)), ("main",))
    for path in (main / f"{split}.txt", main / split, Path(split)):
        if "\0" not in str(path) and path.is_file():
            return path
    raise InputError(
        f"cannot read {main / f'{split}.txt'}: no such file; it must list the images of the split. "
        "Remove 'split' to use all XML files"
    )


def _stems(path: Path, known: set[str]) -> Iterator[str]:
    """Yields the names in a list, without folder and suffix."""
    for line in read_text(path).splitlines():
        name = line.strip().strip("\"'").strip().replace("\\", "/").rpartition("/")[2]
        if name:
            yield _stem(name, known)


def _stem(name: str, known: set[str]) -> str:
    flagged = FLAGGED.fullmatch(name)
    for text in (name, flagged[1] if flagged else name):
        stem = Path(text).stem if is_image(text) or text.lower().endswith(".xml") else text
        for candidate in (text, stem):
            if candidate in known:
                return candidate
    return stem


def _read_classes(path: Path) -> list[str]:
    """Reads the class names in an XML file; returns none if it is invalid."""
    try:
        return [item.findtext("name") or "" for item in read_xml(path).iter("object")]
    except InputError:
        return []


def _add_voc_image(
    builder: Builder, stem: str, path: Path | None, file_name: str | None, folder: Path
) -> None:
    if path is None and file_name is None:
        name = format_value(stem)
        builder.add_broken_image(
            f"image {name}: there is neither an image nor an XML file of this name in {folder}"
        )
        return
    if path is None:  # no objects
        builder.add_image(file_name)
        return
    try:
        root = read_xml(path)
    except InputError as error:
        builder.add_broken_image(str(error))
        return
    sides = (root.findtext(f"size/{side}", "") for side in ("width", "height"))
    image = builder.add_image(file_name or root.findtext("filename") or f"{stem}.jpg", *sides)
    for number, item in enumerate(root.iter("object")):
        place = f"{number} of {path.name}"
        corners = [_parse_number(item.findtext(f"bndbox/{side}")) for side in CORNERS]
        crowd = int((item.findtext("difficult") or "").strip() == "1")
        box = corners
        if not any(isinstance(corner, str) for corner in corners):
            x, y = corners[0] - 1, corners[1] - 1
            box = [x, y, corners[2] - x, corners[3] - y]
        builder.add_object(image, item.findtext("name"), box, place, crowd=crowd)


def _parse_number(text: str | None) -> float | str:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text or ""


# ---- CVAT ----


def read_cvat(path: str | Path, image_root: str) -> Source:
    """Reads the annotations.xml of a "CVAT for images" export.

    Raises:
        InputError: the file cannot be read, or contains tracks.
    """
    root = read_xml(path)
    if root.find("track") is not None:
        raise InputError(f"{path} contains tracks of a video; export the task as 'CVAT for images'")
    names = [(label.findtext("name") or "").strip() for label in root.iter("label")]
    builder = Builder(dict.fromkeys(filter(None, names)) or None)
    for item in root.iter("image"):
        name = item.get("name")
        image = builder.add_image(name, item.get("width"), item.get("height"))
        for number, shape in enumerate(item):
            if shape.tag != "tag":  # a label of the whole image
                values, place = {"tag": shape.tag, **shape.attrib}, f"{number} of {name}"
                builder.add_shape(image, shape.get("label"), values, _cvat_box, place)
    return Source(str(path), image_root, builder.content())


def _cvat_box(shape: dict[str, str]) -> list[float]:
    kind, angle = shape["tag"], float(shape.get("rotation") or 0)
    if kind == "box":
        x, y, right, bottom = (float(shape[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        return rotated_box([x, y, right - x, bottom - y], angle)
    if kind == "mask":
        return [float(shape[key]) for key in ("left", "top", "width", "height")]
    if kind == "ellipse":
        x, y, rx, ry = (float(shape[key]) for key in ("cx", "cy", "rx", "ry"))
        return rotated_box([x - rx, y - ry, 2 * rx, 2 * ry], angle)
    return enclosing_box(pair.split(",") for pair in shape["points"].split(";"))
