"""The install: what setup.py finds and builds, what is pinned, when `make env` has work to do."""

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "fcos_d2" / "_C.so"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup() -> ModuleType:
    return load(ROOT / "setup.py")


@pytest.fixture
def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", line)[0].lower().replace("_", "-") for line in requirements}


def hide_torch(monkeypatch: pytest.MonkeyPatch, packages: Path) -> None:
    """Leaves no torch on the path, and `packages` as this environment's site-packages."""
    visible = [path for path in sys.path if not (Path(path) / "torch").is_dir()]
    monkeypatch.setattr(sys, "path", visible)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(packages / "none"))


def test_torch_is_found_where_pip_hides_it(setup, monkeypatch, tmp_path):
    hide_torch(monkeypatch, tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    first = sys.path[0]
    assert setup.find_torch() == tmp_path / "torch"
    assert sys.path[0] == first and str(tmp_path) in sys.path[-2:]


def test_setup_without_torch_names_the_two_commands():
    hidden = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name);"
        "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert "pip install torch torchvision" in lines and "pip install -e ." in lines
    assert "uv pip install --no-build-isolation -e ." in done.stderr
    assert "Traceback" not in done.stderr


def test_torch_version_is_read_without_importing_torch(setup, tmp_path):
    (tmp_path / "version.py").write_text("debug = False\n__version__ = '2.15.0+cu132'\n")
    assert setup.read_torch_version(tmp_path) == "2.15.0+cu132"


def test_install_without_compiler_builds_nothing_and_says_so(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "COMPILER", ["no-such-compiler"])
    assert setup.find_libraries() == []
    message = capsys.readouterr().err
    assert "no-such-compiler" in message and "reference ops" in message
    assert message.count("\n") == 1


def test_library_is_named_without_a_python_version(setup):
    name = setup.BuildLibraries.get_ext_filename(None, "fcos_d2._C")
    assert Path(name) == Path("fcos_d2/_C.so")


class Compiler:
    """Plays the compiler: writes the two files that a compiler writes, and counts its runs."""

    def __init__(self, *sources: Path) -> None:
        self.runs = 0
        self.sources = sources

    def __call__(self, command: list[str], check: bool) -> None:
        self.runs += 1
        target = Path(command[command.index("-o") + 1])
        target.write_text("object")
        target.with_suffix(".d").write_text(
            f"{target}: " + " \\\n ".join(str(path).replace(" ", "\\ ") for path in self.sources)
        )


@pytest.fixture
def compile_twice(setup, monkeypatch, tmp_path):
    """Compiles a.cpp, which includes `a header.h`, calls a function, and compiles it again."""
    source, header = tmp_path / "a.cpp", tmp_path / "a header.h"
    target = tmp_path / "build" / "a.o"

    def run(change, flags=("-O3",)) -> int:
        for path in (source, header):
            path.write_text("")
            os.utime(path, (1, 1))
        compiler = Compiler(source, header)
        monkeypatch.setattr(setup.subprocess, "run", compiler)
        setup.compile_source(str(source), target, ["-O3"])
        change(source, header, target)
        setup.compile_source(str(source), target, list(flags))
        return compiler.runs

    return run


def test_unchanged_source_is_not_compiled_again(compile_twice):
    assert compile_twice(lambda source, header, target: None) == 1


def test_changed_header_compiles_again(compile_twice):
    later = 2**33
    assert compile_twice(lambda source, header, target: os.utime(header, (later, later))) == 2


def test_removed_header_compiles_again(compile_twice):
    assert compile_twice(lambda source, header, target: header.unlink()) == 2


def test_other_flags_compile_again(compile_twice):
    assert compile_twice(lambda source, header, target: None, flags=("-O0",)) == 2


def test_interrupted_compilation_is_done_again(setup, monkeypatch, tmp_path):
    source, target = tmp_path / "a.cpp", tmp_path / "a.o"
    source.write_text("")
    compiler = Compiler(source)

    def interrupted(command, check):
        compiler(command, check)
        raise KeyboardInterrupt

    monkeypatch.setattr(setup.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.compile_source(str(source), target, [])
    monkeypatch.setattr(setup.subprocess, "run", compiler)
    setup.compile_source(str(source), target, [])
    assert compiler.runs == 2


@pytest.mark.skipif(not LIBRARY.exists(), reason="fcos_d2/_C.so is not built")
def test_library_says_what_it_was_built_for():
    torch = pytest.importorskip("torch")
    torch.ops.load_library(str(LIBRARY))
    info = json.loads(torch.ops.fcos_d2.build_info())
    assert info.keys() == {"torch", "compiler", "cxx_standard", "flags"}
    assert info["cxx_standard"] >= 202002 and "-O3" in info["flags"]


@pytest.fixture(scope="module")
def lock() -> dict[str, list[str]]:
    """requirements.lock: name==version, with the condition if there is one -> its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {line.split(" --hash=")[0].strip(): line.split(" --hash=")[1:] for line in lines}


def test_everything_is_locked_to_one_version_by_its_hashes(lock):
    pin = re.compile(r"[a-z0-9-]+==[\w.+]+( ; .+)?")
    assert len(lock) > 80 and all(map(pin.fullmatch, lock))
    assert all(hashes for hashes in lock.values())
    hashes = [hash.strip() for hashes in lock.values() for hash in hashes]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash) for hash in hashes)
    # One option more in the file, and pip could be sent to another registry.
    assert not any("--" in requirement for requirement in lock)


def test_every_direct_dependency_is_locked_and_fits(lock, pyproject):
    detectron2 = load(ROOT / "tools" / "install_detectron2.py")
    project = pyproject["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    locked = {pin.split("==")[0]: pin.split("==")[1].split(" ;")[0] for pin in lock}
    for requirement in map(Requirement, [*declared, *detectron2.REQUIREMENTS]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_detectron2_is_built_from_what_its_installer_lists():
    detectron2 = load(ROOT / "tools" / "install_detectron2.py")
    import tomllib

    project = tomllib.loads(detectron2.PYPROJECT)["project"]
    assert project["dependencies"] == list(detectron2.REQUIREMENTS)


def test_torch_is_neither_pinned_nor_downloaded_by_a_plain_install(pyproject):
    assert "torch" not in names(pyproject["build-system"]["requires"])
    assert "dynamic" not in pyproject["project"]
    assert "torch>=2.10" in pyproject["project"]["dependencies"]


@pytest.fixture
def tree(tmp_path) -> Path:
    """The files that `make env` looks at, all of the same age, and newer stamps."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "install_detectron2.py", tmp_path / "tools")
    (tmp_path / ".venv").mkdir()
    for age, name in ((20, ".venv/installed"), (10, ".venv/built")):
        (tmp_path / name).touch()
        set_age(tmp_path / name, age)
    for path in tmp_path.rglob("*"):
        if ".venv" not in path.parts and path.is_file():
            set_age(path, 30)
    return tmp_path


def set_age(path: Path, seconds: int) -> None:
    moment = 1_000_000_000 - seconds
    os.utime(path, (moment, moment))


def work_of_make_env(tree: Path) -> str:
    make = ["make", "--dry-run", "env"]
    return subprocess.run(make, cwd=tree, capture_output=True, text=True, check=True).stdout


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_second_make_env_does_nothing(tree):
    assert ".venv" not in work_of_make_env(tree)


@needs_make
def test_new_pin_installs_again(tree):
    set_age(tree / "requirements.lock", 0)
    assert "pip install" in work_of_make_env(tree)


@needs_make
def test_changed_kernel_builds_but_does_not_install(tree):
    set_age(tree / "csrc" / "bindings" / "cpu.cpp", 0)
    work = work_of_make_env(tree)
    assert "build_ext" in work and "pip install" not in work


@pytest.mark.slow
def test_wheel_contains_the_library(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "output", "datasets", "*.so")
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tree)], check=True)
    (wheel,) = tmp_path.glob("fcos_d2-*.whl")
    contents = zipfile.ZipFile(wheel).namelist()
    assert "fcos_d2/_C.so" in contents
    assert not [name for name in contents if name.startswith(("tests", "csrc", "tools"))]
