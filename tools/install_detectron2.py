#!/usr/bin/env python3
"""Installs Detectron2, which no package registry has under its own name.

    python tools/install_detectron2.py                 install v0.6 unless detectron2 is importable
    python tools/install_detectron2.py --force         install v0.6 in any case
    python tools/install_detectron2.py --git [REV]     build upstream main, or REV
    python tools/install_detectron2.py --source PATH   build the source in a local folder
    python tools/install_detectron2.py --requirements  print the requirements of v0.6 and exit

v0.6 is the package `pb1-detectron2`, pinned by its hash: the Python files of the official release
without its C++ sources. The edits below make it compatible with current versions of numpy, Pillow,
setuptools and torch. Calling a missing operator raises an error. Source builds include the
operators and need only the edit for setuptools.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMAND = "python tools/install_detectron2.py"
NOTICE = "\n# Modified from Detectron2 by tools/install_detectron2.py of fcos_d2.\n"

# (file, regular expression, replacement of all its matches)
SETUPTOOLS_EDITS = (  # setuptools 82 removed pkg_resources
    ("detectron2/model_zoo/model_zoo.py", r"(?m)^import pkg_resources\n", ""),
    (
        "detectron2/model_zoo/model_zoo.py",
        r'pkg_resources\.resource_filename\(\s*"detectron2.model_zoo", os\.path\.join\((.*)\)\s*\)',
        r"os.path.join(os.path.dirname(__file__), \1)",
    ),
)
NUMPY_ALIASES = (  # numpy 1.24 removed its aliases of the builtin types
    "data/build.py",
    "data/datasets/pascal_voc.py",
    "evaluation/pascal_voc_evaluation.py",
    "evaluation/sem_seg_evaluation.py",
    "structures/masks.py",
    "utils/video_visualizer.py",
    "utils/visualizer.py",
)
RELEASE_EDITS = (
    *SETUPTOOLS_EDITS,
    *((f"detectron2/{path}", r"\bnp\.(bool|int|float|str)\b", r"\1") for path in NUMPY_ALIASES),
    # Pillow 10 removed the older name.
    ("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    # As in upstream main without compiled code, the default evaluator is pycocotools'.
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "\nCOCOeval_opt = COCOeval\n",
    ),
    # OpenCV is not a requirement of Detectron2, which uses it only to draw masks.
    (
        "detectron2/utils/visualizer.py",
        r"(?m)^import cv2\n",
        "try:\n    import cv2\nexcept ImportError:\n    cv2 = None\n",
    ),
    # torch no longer contains caffe2; TracingAdapter, which flop counting uses, does not need it.
    (
        "detectron2/export/__init__.py",
        r"(?m)^from \.api import \*\n",
        "try:\n    from .api import *\nexcept ImportError:\n    pass\n",
    ),
)

COMPILED_OPERATORS = '''\
"""Stands in for Detectron2's compiled operators, which this build leaves out."""


def get_compiler_version():
    return "none: built without compiled operators"


get_cuda_version = get_compiler_version


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"detectron2._C.{name} is not part of this build; use torchvision.ops.deform_conv2d, "
        "COCOEvaluator(..., use_fast_impl=False), or Detectron2 built from source"
    )
'''

# The requirements of v0.6 without those of caffe2 (future, pydot), its pinned formatter (black,
# which only pretty-prints a LazyConfig) and its upper bound on iopath.
REQUIREMENTS = [
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
]
SETUP = f"""\
from setuptools import find_packages, setup

projects = {{
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
}}
setup(
    name="detectron2",
    version="0.6",
    packages=[*find_packages(include=["detectron2*"]), *projects],
    package_dir=projects,
    package_data={{"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]}},
    install_requires={REQUIREMENTS},
)
"""


def fail(problem: str, remedy: str) -> NoReturn:
    """Exits with a one-line message."""
    raise SystemExit(f"install_detectron2: {problem}; {remedy}")


def run(*command: str, problem: str, remedy: str) -> None:
    """Runs a command; if it fails, exits with the last error that it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        # Ignores pip's last lines, which have a single word after "error:".
        causes = re.findall(r"(?im)^\s*((?:fatal|\w*error): (?!\S+$).+)", done.stderr)
        fail(f"{problem} ({causes[-1].strip() if causes else 'no reason given'})", remedy)


def pip(*arguments: str, problem: str, remedy: str) -> None:
    """Runs this interpreter's pip."""
    run(sys.executable, "-m", "pip", *arguments, problem=problem, remedy=remedy)


def probe() -> tuple[str | None, str]:
    """Returns version and folder of this environment's Detectron2, or None and the error."""
    # model_zoo cannot be imported from unedited sources.
    code = (
        "import os, detectron2, detectron2.modeling, detectron2.evaluation, detectron2.model_zoo;"
        "print(detectron2.__version__, 'in', os.path.dirname(detectron2.__file__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1]
    return done.stdout.strip().splitlines()[-1], ""


def edit(tree: Path, path: str, pattern: str, replacement: str, required: bool) -> None:
    """Applies an edit; exits if a required edit does not match."""
    file = tree / path
    text, matches = re.subn(pattern, replacement, file.read_text(encoding="utf-8"))
    if matches:
        file.write_text(text.removesuffix(NOTICE) + NOTICE, encoding="utf-8")
    elif required:
        fail(f"edit of {path} found no match of {pattern!r}", f"run: {COMMAND} --git")


def fetch_release(folder: Path) -> Path:
    """Downloads v0.6 and edits it so that it builds without a compiler."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
    # pip checks the hash before it runs the sdist's setup.py, which imports torch.
    pip(
        *("download", "--require-hashes", "--no-deps", "--no-binary", ":all:"),
        *("--no-build-isolation", "--dest", str(folder), "-r", str(requirements)),
        problem=f"cannot download {SDIST}",
        remedy=f"install torch, check the network and pip's index, then run: {COMMAND}",
    )
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "release", filter="data")
    (tree,) = (folder / "release").iterdir()
    for change in RELEASE_EDITS:
        edit(tree, *change, required=True)
    (tree / "detectron2" / "_C.py").write_text(COMPILED_OPERATORS, encoding="utf-8")
    (tree / "setup.py").write_text(SETUP, encoding="utf-8")
    return tree


def fetch_source(source: Path | None, revision: str, folder: Path) -> Path:
    """Copies ``source``, or clones a revision of upstream if it is None, and edits the copy."""
    tree = folder / "source"
    if source is None:
        for command in (
            ["init", "--quiet", str(tree)],
            ["-C", str(tree), "fetch", "--depth", "1", REPOSITORY, revision],
            ["-C", str(tree), "checkout", "--quiet", "FETCH_HEAD"],
        ):
            run("git", *command, problem=f"cannot clone {revision}", remedy="check the network")
    elif not (source / "detectron2" / "model_zoo" / "model_zoo.py").is_file():
        fail(f"--source {source} has no detectron2/model_zoo/model_zoo.py", "pass a checkout of it")
    else:
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(".git", "build"))
    for change in SETUPTOOLS_EDITS:
        edit(tree, *change, required=False)
    return tree


def install(tree: Path, with_deps: bool) -> None:
    """Builds a source tree with this environment's torch, and replaces any other Detectron2."""
    remedy = f"fix that, then run: {COMMAND}"
    # Forced, because v0.6 and main have the same version number.
    options = ["--force-reinstall", "--no-deps", "--no-build-isolation"]
    pip("install", *options, str(tree), problem="cannot build detectron2", remedy=remedy)
    if with_deps:
        pip("install", "detectron2", problem="cannot install its requirements", remedy=remedy)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--force", action="store_true", help="replace an importable detectron2")
    parser.add_argument("--git", metavar="REV", nargs="?", const="main", help="build upstream REV")
    parser.add_argument("--source", metavar="PATH", type=Path, help="build a local folder")
    parser.add_argument("--no-deps", action="store_true", help="skip its requirements")
    parser.add_argument("--requirements", action="store_true", help="print them, one per line")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the script."""
    args = parse_arguments(arguments)
    if args.requirements:
        print("\n".join(REQUIREMENTS))
        return
    # --git and --source ask for a specific build, so an installed one does not satisfy them.
    if not (args.force or args.git or args.source) and (found := probe()[0]):
        print(f"detectron2 {found}: kept")
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.git or args.source:
            tree = fetch_source(args.source, args.git, Path(scratch))
        else:
            tree = fetch_release(Path(scratch))
        install(tree, with_deps=not args.no_deps)
    found, problem = probe()
    if not found:
        fail(f"installed detectron2 cannot be imported ({problem})", "install what is missing")
    print(f"detectron2 {found}: installed")


if __name__ == "__main__":
    main()
