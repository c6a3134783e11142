"""Tests setup.py, requirements.lock and `make env`."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fcos_d2" / "_C.so"


def run_setup(*arguments: str, before: str = "", **environment: str):
    """Runs setup.py in a new process, after the code ``before``."""
    code = f"""
import importlib.util, runpy, setuptools, site, sys
{before}
sys.argv = ["setup.py", *{arguments}]
runpy.run_path("setup.py", run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


# Hides the environment's packages, as pip does.
HIDE = "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"


def test_torch_is_found_although_pip_hides_it():
    done = run_setup("--version", before=HIDE, FCOS_D2_CUDA="0")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0.1.0", done.stderr


def test_setup_without_torch_reports_the_commands():
    done = run_setup("build_ext", before=HIDE + "site.addsitedir = lambda path: None")
    assert done.returncode == 1
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert "pip install torch torchvision" in lines and "pip install -e ." in lines
    assert "uv pip install --no-build-isolation -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_install_without_compiler_succeeds_with_a_message():
    done = run_setup("--quiet", "build_ext", CXX="no-such-compiler", FCOS_D2_CUDA="0")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "no-such-compiler" in line)
    assert "reference ops" in line


@pytest.mark.parametrize(
    "options", [[], ["-W", "default"], ["-W", "error::FutureWarning"]], ids=str
)
def test_importing_prints_nothing_and_keeps_warning_filters(options):
    code = """
import warnings
warnings.filterwarnings("error", "a filter of the user")
before = list(warnings.filters)
import fcos_d2, fcos_d2.engine
assert list(warnings.filters) == before
"""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch.jit.script" not in done.stderr
    assert options or done.stdout == done.stderr == ""


@pytest.mark.skipif(not LIBRARY.exists(), reason="fcos_d2/_C.so is not built")
def test_library_reports_how_it_was_built():
    torch = pytest.importorskip("torch")
    torch.ops.load_library(str(LIBRARY))
    info = json.loads(torch.ops.fcos_d2.build_info())
    assert info.keys() == {"torch", "compiler", "cxx_standard"}
    assert info["cxx_standard"] >= 202002


@pytest.fixture(scope="module")
def lock() -> dict[str, list[str]]:
    """Reads requirements.lock: name==version and any condition -> hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {line.split(" --hash=")[0].strip(): line.split(" --hash=")[1:] for line in lines}


def test_packages_are_pinned_by_version_and_hash(lock):
    pin = re.compile(r"[a-z0-9-]+==[\w.+]+( ; .+)?")
    assert len(lock) > 80 and all(map(pin.fullmatch, lock))
    assert all(hashes for hashes in lock.values())
    hashes = [hash.strip() for hashes in lock.values() for hash in hashes]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash) for hash in hashes)
    # Options could redirect pip to another registry.
    assert not any("--" in requirement for requirement in lock)


def test_direct_dependencies_are_pinned_to_allowed_versions(lock):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    detectron2 = runpy.run_path(str(ROOT / "tools" / "install_detectron2.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    locked = {pin.split("==")[0]: pin.split("==")[1].split(" ;")[0] for pin in lock}
    for requirement in map(Requirement, [*declared, *detectron2["REQUIREMENTS"]]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("changed", "work"),
    [
        ([], []),
        (["requirements.lock"], ["pip install", "build_ext"]),
        (["csrc/cpu/box_loss.cpp"], ["build_ext"]),
    ],
)
def test_make_env_repeats_only_necessary_steps(tmp_path, changed, work):
    sources = ["Makefile", "pyproject.toml", "requirements.lock", "setup.py"]
    sources += ["tools/install_detectron2.py", "csrc/cpu/box_loss.cpp"]
    for moment, name in enumerate([*sources, ".venv/installed", ".venv/built", *changed]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (moment, moment))
    make = ["make", "--dry-run", "--file", str(ROOT / "Makefile"), "env"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [name for name in ("pip install", "build_ext") if name in done.stdout] == work


@pytest.mark.slow
def test_wheel_contains_the_library_and_only_changed_files_are_recompiled(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "output", "datasets", "*.so")
    )
    environment = os.environ | {"FCOS_D2_CUDA": "0"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], env=environment, check=True)
    (wheel,) = tmp_path.glob("fcos_d2-*.whl")
    contents = zipfile.ZipFile(wheel).namelist()
    assert "fcos_d2/_C.so" in contents
    assert not [name for name in contents if name.startswith(("tests", "csrc", "tools"))]

    (tree / "csrc" / "cpu" / "box_loss.cpp").touch()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tree, env=environment, capture_output=True, text=True)
    compiled = re.findall(r"-c (\S+\.cpp)", done.stdout)
    assert [Path(source).name for source in compiled] == ["box_loss.cpp"], done.stdout


@pytest.mark.slow
def test_source_distribution_built_without_cuda_contains_the_kernels(tmp_path):
    done = run_setup("--quiet", "sdist", "--dist-dir", str(tmp_path), FCOS_D2_CUDA="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"fcos_loss.cu", "block.h", "cuda.cpp"} <= names, done.stderr
