"""Tests tools/install_detectron2.py."""

import ast
import re
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from . import load_script

MODEL_ZOO = """
import pkg_resources
cfg_file = pkg_resources.resource_filename(
    "detectron2.model_zoo", os.path.join("configs", config_path)
)
"""
EDITED = 'cfg_file = os.path.join(os.path.dirname(__file__), "configs", config_path)'


@pytest.fixture
def tool() -> ModuleType:
    return load_script("tools/install_detectron2.py")


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_local_source_gets_the_setuptools_edit_in_a_copy(tool, tmp_path):
    original = write(tmp_path / "mine/detectron2/model_zoo/model_zoo.py", MODEL_ZOO)
    tree = tool.fetch_source(tmp_path / "mine", "main", tmp_path / "scratch")
    edited = (tree / "detectron2/model_zoo/model_zoo.py").read_text()
    assert edited == f"\n{EDITED}\n{tool.NOTICE}" and original.read_text() == MODEL_ZOO
    with pytest.raises(SystemExit, match="--source .*/other has no detectron2/model_zoo"):
        tool.fetch_source(tmp_path / "other", "main", tmp_path / "scratch")


def test_required_edit_without_a_match_is_an_error(tool, tmp_path):
    write(tmp_path / "detectron2/data/build.py", "already = 'edited'\n")
    (change,) = (edit for edit in tool.RELEASE_EDITS if "data/build" in edit[0])
    with pytest.raises(SystemExit, match="edit of detectron2/data/build.py found no match"):
        tool.edit(tmp_path, *change, required=True)


def test_missing_operator_raises_with_alternatives(tool, tmp_path):
    operators = load_script(write(tmp_path / "_C.py", tool.COMPILED_OPERATORS))
    with pytest.raises(ImportError, match=r"detectron2\._C\.box_iou_rotated is not part .* source"):
        operators.box_iou_rotated  # noqa: B018
    # detectron2's collect_env calls these.
    assert "without compiled operators" in operators.get_compiler_version()
    assert operators.get_cuda_version() and operators.has_cuda() is False
    assert not hasattr(operators, "__wrapped__")


def test_download_is_pinned_by_hash_and_errors_are_one_line(tool, monkeypatch, tmp_path):
    def run(command, **options):
        assert "--require-hashes" in command
        assert (tmp_path / "requirements.txt").read_text().endswith(f"sha256:{tool.SHA256}\n")
        refused = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n  Expected ...\nerror: download\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=refused)

    monkeypatch.setattr(tool.subprocess, "run", run)
    with pytest.raises(SystemExit) as error:
        tool.fetch_release(tmp_path)
    assert "(ERROR: THESE PACKAGES DO NOT MATCH THE HASHES)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def fake_detectron2(monkeypatch, tmp_path):
    """Returns a function that puts a fake detectron2 with this model_zoo on the path."""

    def make(model_zoo: str) -> None:
        write(tmp_path / "detectron2" / "__init__.py", "__version__ = '0.6'\n")
        write(tmp_path / "detectron2" / "model_zoo.py", model_zoo)
        for name in ("modeling", "evaluation"):
            write(tmp_path / "detectron2" / f"{name}.py", "")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


def test_importable_detectron2_is_kept(tool, monkeypatch, tmp_path, capsys, fake_detectron2):
    fake_detectron2(model_zoo="")
    monkeypatch.setattr(tool, "pip", lambda *arguments, **options: pytest.fail("pip was called"))
    tool.main([])
    assert capsys.readouterr().out == f"detectron2 0.6 in {tmp_path / 'detectron2'}: kept\n"


def test_failed_import_is_reported(tool, monkeypatch, tmp_path, fake_detectron2):
    fake_detectron2(model_zoo="import missing_module")
    monkeypatch.setattr(tool, "pip", lambda *arguments, **options: None)
    monkeypatch.setattr(tool, "fetch_release", lambda folder: folder)
    problem = "cannot be imported (ModuleNotFoundError: No module named 'missing_module')"
    with pytest.raises(SystemExit, match=re.escape(problem)):
        tool.main([])


@pytest.mark.slow
def test_release_builds_a_pure_and_complete_wheel(tool, tmp_path):
    tree = tool.fetch_release(tmp_path)
    for path, *_ in tool.RELEASE_EDITS:
        ast.parse((tree / path).read_text())
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)]
    tool.pip(*wheel, problem="cannot build", remedy="")
    contents = zipfile.ZipFile(tmp_path / "detectron2-0.6-py3-none-any.whl").namelist()
    configs = [name for name in contents if name.startswith("detectron2/model_zoo/configs/")]
    assert len(configs) == 128
    for name in ("_C.py", "projects/point_rend/__init__.py", "modeling/meta_arch/fcos.py"):
        assert f"detectron2/{name}" in contents
