#!/usr/bin/env python3
"""Installs Detectron2, which no package registry has under its own name.

    python tools/install_detectron2.py               keep what is importable, else install v0.6
    python tools/install_detectron2.py --force       install v0.6 in any case
    python tools/install_detectron2.py --git [REV]   build upstream main or REV, operators included
    python tools/install_detectron2.py --wheel DIR   leave the wheel in DIR and install nothing
    python tools/install_detectron2.py --requirements   print what v0.6 needs and install nothing

v0.6 comes from the registry's `pb1-detectron2`, known by its hash: the Python files of the official
release without its C++ sources. The edits below let it run on today's numpy, Pillow, setuptools and
torch. The result is a pure wheel named detectron2 that any Python 3 can install; an operator that
it lacks says so, and names a replacement, when it is used.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMAND = "python tools/install_detectron2.py"

PROJECTS = {
    "DeepLab/deeplab": "deeplab",
    "Panoptic-DeepLab/panoptic_deeplab": "panoptic_deeplab",
    "PointRend/point_rend": "point_rend",
}
NOTICE = "\n# Modified from Detectron2 v0.6 by tools/install_detectron2.py of fcos_d2.\n"


class Edit(NamedTuple):
    """Replaces every match of a regular expression in one file; at least one must be there."""

    path: str
    pattern: str
    replacement: str


# numpy 1.24 removed its aliases of the builtin types.
_NUMPY_ALIAS = (r"\bnp\.(bool|int|float|str)\b", r"\1")
EDITS = (
    Edit("detectron2/data/build.py", *_NUMPY_ALIAS),
    Edit("detectron2/data/datasets/pascal_voc.py", *_NUMPY_ALIAS),
    Edit("detectron2/evaluation/pascal_voc_evaluation.py", *_NUMPY_ALIAS),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", *_NUMPY_ALIAS),
    Edit("detectron2/structures/masks.py", *_NUMPY_ALIAS),
    Edit("detectron2/utils/video_visualizer.py", *_NUMPY_ALIAS),
    Edit("detectron2/utils/visualizer.py", *_NUMPY_ALIAS),
    # Pillow 10 removed the older of the two names.
    Edit("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    # setuptools 82 removed pkg_resources.
    Edit("detectron2/model_zoo/model_zoo.py", r"(?m)^import pkg_resources\n", ""),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2.model_zoo", os\.path\.join\((.*)\)\s*\)',
        r"os.path.join(os.path.dirname(__file__), \1)",
    ),
    # As upstream main does without compiled code: the default evaluator is pycocotools' own.
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        r"from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "\nCOCOeval_opt = COCOeval\n",
    ),
    # OpenCV is no requirement of Detectron2, and only masks are drawn with it.
    Edit(
        "detectron2/utils/visualizer.py",
        r"(?m)^import cv2\n",
        "try:\n    import cv2\nexcept ImportError:\n    cv2 = None\n",
    ),
    # torch no longer brings caffe2; TracingAdapter, which flop counting needs too, does without it.
    Edit(
        "detectron2/export/__init__.py",
        r"(?m)^from \.api import \*\n",
        "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
    ),
    # torch 2.15 warns of torch.jit.script; in eager code the decorator changes nothing.
    Edit("detectron2/modeling/box_regression.py", r"(?m)^@torch\.jit\.script\n", ""),
)

COMPILED_OPERATORS = '''\
"""Stands in for Detectron2's compiled operators, which this build leaves out."""

_INSTEAD = {
    "deform_conv": "torchvision.ops.deform_conv2d",
    "COCOeval": "COCOEvaluator(..., use_fast_impl=False)",
    "InstanceAnnotation": "COCOEvaluator(..., use_fast_impl=False)",
}
_FROM_SOURCE = "Detectron2 built from source (tools/install_detectron2.py --git)"


def get_compiler_version():
    return "none: built without compiled operators"


def get_cuda_version():
    return "none: built without compiled operators"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    instead = next((use for part, use in _INSTEAD.items() if part in name), _FROM_SOURCE)
    raise ImportError(f"detectron2._C.{name} is not part of this build; use {instead}")
'''

# The requirements of v0.6 without those of its dead parts (caffe2: future, pydot), its pinned
# formatter (black, which only pretty-prints a LazyConfig) and its upper bound on iopath.
REQUIREMENTS = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "0.6"
description = "Detectron2 v0.6 without compiled operators, edited for current numpy and torch"
authors = [{{ name = "FAIR" }}]
license = "Apache-2.0"
requires-python = ">=3.8"
dependencies = {json.dumps(REQUIREMENTS, indent=4)}

[project.urls]
Source = "https://github.com/facebookresearch/detectron2"

[tool.setuptools.packages.find]
include = ["detectron2*"]
namespaces = false

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*.yaml", "configs/**/*.py"]
"""


def fail(problem: str, remedy: str) -> NoReturn:
    """Stops with one line: what failed, and what to do about it."""
    raise SystemExit(f"install_detectron2: {problem}; {remedy}")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter's pip and returns what it said."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)


def last_error(output: str) -> str:
    """Returns the last line in which pip or git says what went wrong."""
    # pip closes with lines of a single word, which say only that some program failed.
    causes = re.findall(r"(?im)^\s*((?:fatal|\w*error): (?!\S+$).+)", output)
    return causes[-1].strip() if causes else "pip gave no reason"


def find_importable() -> str | None:
    """Returns version and folder of this environment's Detectron2, None if it does not import."""
    # model_zoo is imported too: it is the part that an unedited v0.6 trips over first.
    probe = (
        "import os, detectron2, detectron2.modeling, detectron2.evaluation, detectron2.model_zoo;"
        "print(detectron2.__version__, 'in', os.path.dirname(detectron2.__file__))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def require(package: str, command: str, oldest: int = 0) -> None:
    """Stops where a package is missing, or too old a version of it, that the build runs on."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        fail(f"{package} is not installed", f"run: {command} && {COMMAND}")
    if int(version.split(".")[0]) < oldest:
        fail(f"{package} {version} is older than {oldest}", f"run: {command} && {COMMAND}")


def verify_hash(archive: Path, expected: str = SDIST_SHA256) -> None:
    """Stops unless the archive is the one this tool was written for."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != expected:
        refuse_hash(found, expected)


def refuse_hash(found: str, expected: str = SDIST_SHA256) -> NoReturn:
    """Stops and names both hashes."""
    fail(
        f"{SDIST} has sha256 {found}, expected {expected}",
        f"the registry serves another file: install from source instead: {COMMAND} --git",
    )


def download(folder: Path) -> Path:
    """Downloads the pinned sdist."""
    # pip checks the hash before it runs the sdist's setup.py to learn the package's name.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    done = pip(
        *("download", "--require-hashes", "--no-deps", "--no-binary", ":all:"),
        *("--no-build-isolation", "--dest", str(folder), "-r", str(requirements)),
    )
    if done.returncode:
        if other := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
            refuse_hash(other[1])
        fail(
            f"cannot download {SDIST} ({last_error(done.stderr)})",
            f"check the network and pip's index, then run: {COMMAND}",
        )
    archive = next(folder.glob("*.tar.gz"))
    verify_hash(archive)
    return archive


def extract(archive: Path, folder: Path) -> Path:
    """Unpacks an archive and returns its only folder; a member that points outside is refused."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        fail(f"{archive.name} is not safe to unpack ({error})", f"run: {COMMAND} --git")
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    return tree


def apply_edit(tree: Path, edit: Edit) -> None:
    """Applies one edit; one that changes nothing means that the source is not the expected one."""
    path = tree / edit.path
    text, matches = re.subn(edit.pattern, edit.replacement, path.read_text(encoding="utf-8"))
    if not matches:
        fail(f"edit of {edit.path} found no match of {edit.pattern!r}", f"run: {COMMAND} --git")
    path.write_text(text.removesuffix(NOTICE) + NOTICE, encoding="utf-8")


def prepare(tree: Path) -> None:
    """Turns the unpacked v0.6 into a package that builds without a compiler."""
    for edit in EDITS:
        apply_edit(tree, edit)
    for source, name in PROJECTS.items():
        shutil.move(tree / "projects" / source, tree / "detectron2" / "projects" / name)
    (tree / "detectron2" / "_C.py").write_text(COMPILED_OPERATORS, encoding="utf-8")
    (tree / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    for replaced in ("setup.py", "setup.cfg"):
        (tree / replaced).unlink()


def build_wheel(source: str, folder: Path, *options: str) -> Path:
    """Builds a wheel of a source folder or repository."""
    done = pip("wheel", "--no-deps", *options, "--wheel-dir", str(folder), source)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        fail(
            f"cannot build {source} ({last_error(done.stderr)})",
            "the lines above say why; fix that and run the same command again",
        )
    return next(folder.glob("detectron2-*.whl"))


def build_release(folder: Path) -> Path:
    """Builds the wheel of v0.6 with the environment's setuptools, so that none is downloaded."""
    tree = extract(download(folder), folder)
    prepare(tree)
    return build_wheel(str(tree), folder, "--no-build-isolation")


def build_from_git(revision: str, folder: Path) -> Path:
    """Builds the wheel of an upstream revision against this environment's torch."""
    return build_wheel(f"git+{REPOSITORY}@{revision}", folder, "--no-build-isolation")


def install(wheel: Path, with_deps: bool) -> None:
    """Installs the wheel, with its requirements or alone, in place of any other Detectron2."""
    # pip keeps what has the same version, and v0.6 and main both call themselves 0.6.
    if any(importlib.metadata.distributions(name="detectron2")):
        pip("uninstall", "--yes", "detectron2").check_returncode()
    done = pip("install", *(() if with_deps else ("--no-deps",)), str(wheel))
    if done.returncode:
        fail(
            f"cannot install {wheel.name} ({last_error(done.stderr)})",
            f"make room for its requirements, or check pip's index, then run: {COMMAND}",
        )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force", action="store_true", help="replace an importable detectron2")
    parser.add_argument("--git", metavar="REV", nargs="?", const="main", help="build upstream REV")
    parser.add_argument("--wheel", metavar="DIR", type=Path, help="leave the wheel in DIR")
    parser.add_argument("--no-deps", action="store_true", help="its requirements are there")
    parser.add_argument("--requirements", action="store_true", help="print them, one per line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Keeps, builds or installs Detectron2, as the command line says."""
    args = parse_arguments(arguments)
    if args.requirements:
        print("\n".join(REQUIREMENTS))
        return
    # --git and --wheel ask for a build by name, so that what is there does not answer them.
    if not (args.force or args.git or args.wheel) and (found := find_importable()):
        print(f"detectron2 {found}: kept")
        return
    require("pip", "python -m ensurepip")
    # Both releases run setup.py on the environment's torch to describe themselves to pip.
    require("torch", "pip install torch torchvision")
    require("setuptools", "pip install --upgrade setuptools", oldest=77)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheel = build_from_git(args.git, folder) if args.git else build_release(folder)
        if args.wheel:
            args.wheel.mkdir(parents=True, exist_ok=True)
            print(shutil.copy(wheel, args.wheel))
            return
        install(wheel, with_deps=not args.no_deps)
    if not (found := find_importable()):
        fail(
            "detectron2 is installed but does not import",
            "run: python -c 'import detectron2.modeling'",
        )
    print(f"detectron2 {found}: installed")


if __name__ == "__main__":
    main()
