"""Detectron2's installer: its edits, its refusals and what it leaves alone."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "install_detectron2.py"

# The lines of v0.6 that are edited, and what becomes of them.
BEFORE_AND_AFTER = {
    "data/build.py": ("h = np.zeros((n,), dtype=np.int)", "h = np.zeros((n,), dtype=int)"),
    "data/datasets/pascal_voc.py": (
        "fileids = np.loadtxt(f, dtype=np.str)",
        "fileids = np.loadtxt(f, dtype=str)",
    ),
    "evaluation/pascal_voc_evaluation.py": ("d = d.astype(np.bool)", "d = d.astype(bool)"),
    "evaluation/sem_seg_evaluation.py": (
        "iou = np.full(n, np.nan, dtype=np.float)",
        "iou = np.full(n, np.nan, dtype=float)",
    ),
    "structures/masks.py": (
        "keep = np.asarray(k, dtype=np.bool)",
        "keep = np.asarray(k, dtype=bool)",
    ),
    "utils/video_visualizer.py": ("c = np.zeros(n, dtype=np.bool)", "c = np.zeros(n, dtype=bool)"),
    "utils/visualizer.py": (
        "import cv2\nmask = seg.astype(np.bool)",
        "try:\n    import cv2\nexcept ImportError:\n    cv2 = None\nmask = seg.astype(bool)",
    ),
    "data/transforms/transform.py": (
        "def resize(interp=Image.LINEAR, other=cv2.INTER_LINEAR): ...",
        "def resize(interp=Image.BILINEAR, other=cv2.INTER_LINEAR): ...",
    ),
    "model_zoo/model_zoo.py": (
        "import pkg_resources\n"
        "import torch\n"
        "cfg_file = pkg_resources.resource_filename(\n"
        '    "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        ")",
        'import torch\ncfg_file = os.path.join(os.path.dirname(__file__), "configs", config_path)',
    ),
    "evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        "\nCOCOeval_opt = COCOeval",
    ),
    "export/__init__.py": (
        "from .api import *",
        "try:\n    from .api import *\nexcept ImportError:\n    pass",
    ),
    "modeling/box_regression.py": (
        "@torch.jit.script\nclass Box2BoxTransform: ...",
        "class Box2BoxTransform: ...",
    ),
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_under_test", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool() -> ModuleType:
    return load(TOOL)


@pytest.fixture
def tree(tool, tmp_path) -> Path:
    """A source tree with just the lines that the tool looks for."""
    files = {f"detectron2/{path}": before for path, (before, _) in BEFORE_AND_AFTER.items()}
    files |= {f"projects/{source}/__init__.py": "" for source in tool.PROJECTS}
    files |= {"detectron2/projects/__init__.py": "", "setup.py": "", "setup.cfg": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


def answer(monkeypatch, tool, stderr: str) -> None:
    """Makes every call of pip fail with these words."""
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(tool, "pip", lambda *arguments: failed)


@pytest.mark.parametrize("path", BEFORE_AND_AFTER)
def test_edit_gives_the_line_that_current_libraries_accept(tool, tree, path):
    tool.prepare(tree)
    text = (tree / "detectron2" / path).read_text()
    assert text == BEFORE_AND_AFTER[path][1] + "\n" + tool.NOTICE
    ast.parse(text)


def test_every_edit_is_tested(tool):
    assert {edit.path for edit in tool.EDITS} == {f"detectron2/{path}" for path in BEFORE_AND_AFTER}


@pytest.mark.parametrize("path", BEFORE_AND_AFTER)
def test_edit_without_a_match_is_an_error(tool, tree, path):
    (tree / "detectron2" / path).write_text("already = 'edited'\n")
    with pytest.raises(SystemExit, match=f"edit of detectron2/{path} found no match"):
        tool.prepare(tree)


def test_projects_and_operators_join_the_package(tool, tree):
    tool.prepare(tree)
    for name in tool.PROJECTS.values():
        assert (tree / "detectron2" / "projects" / name / "__init__.py").exists()
    assert (tree / "detectron2" / "_C.py").exists() and (tree / "pyproject.toml").exists()
    assert not (tree / "setup.py").exists() and not (tree / "setup.cfg").exists()


@pytest.fixture
def operators(tool, tmp_path) -> ModuleType:
    (tmp_path / "_C.py").write_text(tool.COMPILED_OPERATORS)
    return load(tmp_path / "_C.py")


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("modulated_deform_conv_forward", "torchvision.ops.deform_conv2d"),
        ("InstanceAnnotation", "use_fast_impl=False"),
        ("COCOevalAccumulate", "use_fast_impl=False"),
        ("box_iou_rotated", "--git"),
    ],
)
def test_missing_operator_names_itself_and_a_replacement(operators, name, instead):
    with pytest.raises(ImportError) as error:
        getattr(operators, name)
    assert f"detectron2._C.{name}" in str(error.value) and instead in str(error.value)


def test_missing_operators_do_not_stop_collect_env(operators):
    assert "without compiled operators" in operators.get_compiler_version()
    assert "without compiled operators" in operators.get_cuda_version()
    assert operators.has_cuda() is False
    assert not hasattr(operators, "__wrapped__")


def test_other_hash_is_refused_and_both_are_named(tool, tmp_path):
    (tmp_path / "sdist").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(SystemExit) as error:
        tool.verify_hash(tmp_path / "sdist")
    assert found in str(error.value) and tool.SDIST_SHA256 in str(error.value)
    assert "\n" not in str(error.value)


def test_hash_that_pip_refused_is_named_beside_the_expected_one(tool, monkeypatch, tmp_path):
    other = "0123456789abcdef" * 4
    answer(monkeypatch, tool, f"ERROR: ...\n  Expected sha256 x\n       Got        {other}\n")
    with pytest.raises(SystemExit) as error:
        tool.download(tmp_path)
    assert other in str(error.value) and tool.SDIST_SHA256 in str(error.value)


def test_failed_download_says_why_and_what_to_do(tool, monkeypatch, tmp_path):
    reason = "ERROR: No matching distribution found for pb1-detectron2==0.6"
    answer(monkeypatch, tool, f"{reason}\nerror: subprocess-exited-with-error\n")
    with pytest.raises(SystemExit) as error:
        tool.download(tmp_path)
    assert reason in str(error.value) and "network" in str(error.value)
    assert "\n" not in str(error.value)


def test_pip_downloads_only_what_has_the_hash(tool, monkeypatch, tmp_path):
    asked = {}

    def pip(*arguments):
        asked["arguments"] = arguments
        asked["requirements"] = (tmp_path / "requirements.txt").read_text()
        return subprocess.CompletedProcess([], 1, stdout="", stderr="")

    monkeypatch.setattr(tool, "pip", pip)
    with pytest.raises(SystemExit):
        tool.download(tmp_path)
    assert "--require-hashes" in asked["arguments"]
    assert asked["requirements"] == f"{tool.SDIST} --hash=sha256:{tool.SDIST_SHA256}\n"


def test_member_outside_the_archive_is_refused(tool, tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../evil.py"), io.BytesIO())
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(SystemExit, match="not safe to unpack"):
        tool.extract(tmp_path / "evil.tar.gz", inside)
    assert not (tmp_path / "evil.py").exists()


@pytest.mark.parametrize(
    ("package", "version", "problem", "command"),
    [
        ("torch", None, "torch is not installed", "pip install torch torchvision"),
        ("setuptools", "65.5.0", "setuptools 65.5.0 is older", "pip install --upgrade setuptools"),
    ],
)
def test_missing_tool_of_the_build_is_named(tool, monkeypatch, package, version, problem, command):
    def look_up(name):
        if name != package:
            return "99.0"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(tool.importlib.metadata, "version", look_up)
    monkeypatch.setattr(tool, "find_importable", lambda: None)
    with pytest.raises(SystemExit) as error:
        tool.main([])
    assert problem in str(error.value) and command in str(error.value)


def fake_detectron2(folder: Path, model_zoo: str) -> None:
    for name in ("modeling", "evaluation"):
        (folder / "detectron2" / name).mkdir(parents=True)
    (folder / "detectron2" / "__init__.py").write_text("__version__ = '0.6'\n")
    (folder / "detectron2" / "model_zoo.py").write_text(model_zoo)


def test_importable_detectron2_is_kept(tool, monkeypatch, tmp_path, capsys):
    fake_detectron2(tmp_path, model_zoo="")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(tool, "pip", lambda *arguments: pytest.fail("pip was called"))
    tool.main([])
    assert capsys.readouterr().out == f"detectron2 0.6 in {tmp_path / 'detectron2'}: kept\n"


def test_detectron2_that_does_not_import_is_not_kept(tool, monkeypatch, tmp_path):
    fake_detectron2(tmp_path, model_zoo="import a_module_that_is_gone")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert tool.find_importable() is None


@pytest.mark.slow
def test_wheel_of_the_release_is_pure_and_complete(tool, tmp_path):
    tool.main(["--wheel", str(tmp_path)])
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == "detectron2-0.6-py3-none-any.whl"
    contents = zipfile.ZipFile(wheel).namelist()
    assert (
        len([name for name in contents if name.startswith("detectron2/model_zoo/configs/")]) == 128
    )
    for name in ("_C.py", "projects/point_rend/__init__.py", "modeling/meta_arch/fcos.py"):
        assert f"detectron2/{name}" in contents
