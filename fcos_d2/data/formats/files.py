"""Reads JSON, XML, YAML and text files of various encodings."""

from __future__ import annotations

import gzip
import json
import os
import re
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import yaml
from detectron2.utils.file_io import PathManager

from ...errors import InputError, format_value, one_line_cause

GZIP = b"\x1f\x8b"
DECLARATION = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


def read_json(path: str | os.PathLike):
    """Reads a JSON file in UTF-8, UTF-16 or UTF-32, with or without a BOM; decompresses gzip.

    Raises:
        InputError: the file cannot be read or is not valid JSON.
    """
    path = os.fspath(path)
    try:
        with PathManager.open(path, "rb") as file:
            content = file.read()
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        content = content.decode(json.detect_encoding(content))  # releases the bytes
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno} column {error.colno}; "
            "copy or export it again"
        ) from error
    except (EOFError, OSError, RecursionError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from error


def read_text(path: str | os.PathLike) -> str:
    """Reads a text file in UTF-8 or UTF-16, with or without a BOM.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = Path(path).read_bytes()
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_xml(path: str | os.PathLike) -> ElementTree.Element:
    """Reads an XML file in any encoding that Python supports, and returns the root element.

    Raises:
        InputError: the file cannot be read or is not valid XML.
    """
    try:
        content = Path(path).read_bytes()
        declared = DECLARATION.match(content)
        if declared:  # expat supports no multi-byte encodings except Unicode
            text = content[declared.end() :].decode(declared[1].decode())
            return ElementTree.fromstring(text)
        return ElementTree.fromstring(content)
    except (LookupError, OSError, RecursionError, ValueError, ElementTree.ParseError) as error:
        raise _unreadable(path, error) from error


def read_yaml(path: str | os.PathLike) -> dict:
    """Reads a YAML file that contains a mapping.

    Raises:
        InputError: the file cannot be read or contains no mapping.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must contain a mapping of keys, like YOLO's data.yaml")
    return content


def _unreadable(path: str | os.PathLike, error: Exception) -> InputError:
    cause = format_value(getattr(error, "strerror", None) or one_line_cause(error))
    return InputError(
        f"cannot read annotation file {path}: {cause}; check the path and permissions, or export "
        "it again"
    )
