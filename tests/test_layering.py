"""Who may import whom: rules that keep every part usable and testable without the others."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "fcos_d2").rglob("*.py"))
CORE, CPU, CUDA, BINDINGS = (ROOT / "csrc" / name for name in ("core", "cpu", "cuda", "bindings"))

# Importer -> what it must not import, both as prefixes of module names.
OUTSIDE = ("train_net", "tools", "tests", "demo", "benchmarks")
RULES = {
    "fcos_d2": OUTSIDE,
    "fcos_d2.config": ("fcos_d2.modeling", "fcos_d2.ops", "fcos_d2.engine", "fcos_d2.data"),
    "fcos_d2.ops": ("detectron2", "fvcore", "iopath", "torchvision", "yacs", "numpy"),
    "fcos_d2.ops.reference": ("fcos_d2.ops._library", "fcos_d2._C"),
    "fcos_d2.ops.levels": ("fcos_d2.ops._library", "fcos_d2.ops.reference"),
    "fcos_d2.modeling": (
        "fcos_d2.engine", "fcos_d2.checkpoint", "fcos_d2.export", "fcos_d2.visualization",
        "fcos_d2.inference",
        "fcos_d2.data", "fcos_d2.collect_env", "fcos_d2.ops.reference", "fcos_d2.ops._library",
        "detectron2.engine", "detectron2.data", "detectron2.checkpoint",
    ),
    "fcos_d2.modeling.head": (
        "fcos_d2.modeling.losses", "fcos_d2.modeling.postprocess", "fcos_d2.modeling.fcos",
        "fcos_d2.modeling.proposals", "fcos_d2.modeling.backbone",
    ),
    "fcos_d2.modeling.losses": (
        "fcos_d2.modeling.head", "fcos_d2.modeling.postprocess", "fcos_d2.modeling.fcos",
        "fcos_d2.modeling.proposals", "fcos_d2.modeling.backbone",
    ),
    "fcos_d2.modeling.postprocess": (
        "fcos_d2.modeling.head", "fcos_d2.modeling.losses", "fcos_d2.modeling.fcos",
        "fcos_d2.modeling.proposals", "fcos_d2.modeling.backbone",
    ),
    "fcos_d2.modeling.backbone": ("fcos_d2.ops", "fcos_d2.modeling"),
    "fcos_d2.modeling.structures": (
        "fcos_d2.modeling.head", "fcos_d2.modeling.losses", "fcos_d2.modeling.postprocess",
        "fcos_d2.modeling.fcos", "fcos_d2.modeling.proposals", "fcos_d2.modeling.backbone",
    ),
    "fcos_d2.data": (
        "fcos_d2.modeling", "fcos_d2.ops", "fcos_d2.engine", "fcos_d2.visualization",
        "fcos_d2.inference",
    ),
    "fcos_d2.checkpoint.conversion": ("fcos_d2.modeling", "fcos_d2.engine"),
    "fcos_d2.checkpoint.formats": (
        "fcos_d2.modeling", "fcos_d2.engine", "fcos_d2.checkpoint.conversion", "detectron2",
    ),
    "fcos_d2.errors": ("fcos_d2", "torch", "detectron2"),
    "fcos_d2.inference": ("fcos_d2.engine", "fcos_d2.predictor", "fcos_d2.commands"),
    "fcos_d2.predictor": ("fcos_d2.engine", "fcos_d2.commands"),
    "fcos_d2.checkpoint": ("fcos_d2.engine", "fcos_d2.inference", "fcos_d2.data"),
    "fcos_d2.evaluation": ("fcos_d2.engine", "fcos_d2.inference"),
    "fcos_d2.export": ("fcos_d2.engine", "fcos_d2.inference"),
    "fcos_d2.visualization": ("fcos_d2.engine", "fcos_d2.inference", "fcos_d2.data"),
}  # fmt: skip
# Measures how levels fit a dataset with the model's own rules; nothing in data imports it.
EXCEPT = {"fcos_d2.data.level_fit": ("fcos_d2.modeling", "fcos_d2.ops")}
ONLY = {  # importer -> the parts of this package it may import
    "fcos_d2.ops": ("fcos_d2.ops",),
    "fcos_d2.errors": (),
}
# Only these modules read a config: everything below takes plain arguments.
MAY_READ_CFG = (
    "fcos_d2.config",
    "fcos_d2.config_file",
    "fcos_d2.config_values",
    "fcos_d2.engine",
    "fcos_d2.inference",
)
MAY_READ_CFG += ("fcos_d2.predictor", "fcos_d2.model_zoo", "fcos_d2.commands")
MAY_READ_CFG += ("fcos_d2.lazy_config",)
READS_CFG = re.compile(r"from_config|build_\w+")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Returns the names of all modules and their members that ``module`` imports anywhere."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def violations(module: str, imports: set[str]) -> list[str]:
    broken = [
        f"{module} imports {name}"
        for importer, forbidden in RULES.items()
        if within(module, (importer,))
        for name in imports
        if within(name, forbidden) and not within(name, EXCEPT.get(module, ()))
    ]
    broken += [
        f"{module} imports {name}"
        for importer, allowed in ONLY.items()
        if within(module, (importer,))
        for name in imports
        if within(name, ("fcos_d2",)) and not within(name, allowed)
    ]
    return broken


def functions_with_cfg(source: str) -> list[str]:
    """Returns the outermost functions (``<module>`` for none) that contain the name ``cfg``."""
    found = []
    for top in ast.walk(ast.parse(source)):
        bodies = top.body if isinstance(top, (ast.Module, ast.ClassDef)) else []
        for node in bodies:
            if isinstance(node, ast.ClassDef):
                continue
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
            if "cfg" in names:
                found.append(getattr(node, "name", "<module>"))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_nothing_forbidden(path):
    imports = imported(path.read_text(), name_of(path), path.name == "__init__.py")
    assert violations(name_of(path), imports) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_config_is_read_only_where_it_may_be(path):
    if within(name_of(path), MAY_READ_CFG):
        return
    functions = functions_with_cfg(path.read_text())
    assert [name for name in functions if not READS_CFG.fullmatch(name)] == []


def test_scripts_import_neither_each_other_nor_internals():
    for path in [ROOT / "train_net.py", *(ROOT / "tools").glob("*.py")]:
        imports = imported(path.read_text(), path.stem)
        assert not [name for name in imports if within(name, ("tests", "train_net"))], path
        assert not [name for name in imports if re.match(r"fcos_d2\.ops\._", name)], path
        # Its import warns about torch.jit.script, unless fcos_d2 is the one that imports it.
        assert not [name for name in imports if within(name, ("detectron2.modeling",))], path


def test_compiled_library_is_called_only_through_the_dispatcher():
    """No reference uses it, and only the module that declares the ops loads it."""
    for path in MODULES:
        text = path.read_text()
        if path.name != "_library.py":
            assert "load_library" not in text and "_C*.so" not in text, path
        if path.parent.name == "reference":
            assert "torch.ops" not in text


def test_detectron2s_compiled_extension_is_never_imported():
    for path in MODULES:
        imports = imported(path.read_text(), name_of(path), path.name == "__init__.py")
        assert not [name for name in imports if within(name, ("detectron2._C",))], path


# ---- csrc ----

IN_CSRC = "csrc/{0.name}".format
SOURCES = ("*.h", "*.cuh", "*.inl", "*.cpp", "*.cu")
TORCH = re.compile(r"torch|ATen|c10|caffe2|pybind11|Python\.h")
CUDA_RUNTIME = re.compile(r"cuda|cub/|thrust|cooperative_groups|nvrtc|curand|cublas")


def includes(folder: Path) -> list[tuple[str, str]]:
    """Returns (file, included) of every include line below ``folder``."""
    pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
    files = [path for kind in SOURCES for path in folder.rglob(kind)]
    return [(f.name, found) for f in files for found in pattern.findall(f.read_text())]


@pytest.mark.parametrize("folder", [CORE, CPU, CUDA], ids=IN_CSRC)
def test_no_formula_and_no_kernel_includes_torch(folder):
    assert [pair for pair in includes(folder) if TORCH.search(pair[1])] == []


@pytest.mark.parametrize("folder", [CORE, CPU], ids=IN_CSRC)
def test_formulas_and_cpu_loops_need_no_cuda(folder):
    assert [pair for pair in includes(folder) if CUDA_RUNTIME.search(pair[1])] == []


@pytest.mark.parametrize(
    "folder, others", [(CORE, "cpu|cuda|bindings"), (CPU, "cuda|bindings"), (CUDA, "cpu|bindings")]
)
def test_sources_include_only_what_lies_below_them(folder, others):
    assert [pair for pair in includes(folder) if re.search(rf"\b({others})/", pair[1])] == []


# ---- side effects of imports ----

WATCH = """
import os
import sys

import torch


def audit(event, arguments):
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.mkdir"):
        raise AssertionError(f"{event} {arguments}")
    if event == "open":
        path, mode, flags = arguments
        if flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull:
            raise AssertionError(f"{path} is opened to be written")


sys.addaudithook(audit)
"""

TORCH_ALONE = """
import sys

MISSING = ("detectron2", "fvcore", "iopath", "torchvision", "omegaconf", "yacs", "pycocotools",
           "matplotlib", "PIL", "sklearn", "cv2")


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

USE_OPS = """
import fcos_d2
from fcos_d2 import ops

assert not torch.cuda.is_initialized()
assert not {name.partition(".")[0] for name in sys.modules} & set(MISSING)
levels = ops.make_levels([(2, 2)], [8])
box, ids = torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (torch.tensor([1]), torch.tensor([0, 1]))
print(ops.assign_targets(box, *ids, levels, [(-1, 99.0)], num_classes=3).labels.tolist())
try:
    fcos_d2.FCOS
except ImportError as error:
    print(error)
"""

# Imports of other packages may have side effects; they come before the watch begins.
OTHERS_FIRST = """
import detectron2.engine
import detectron2.evaluation
import detectron2.model_zoo
import detectron2.modeling
import detectron2.utils.visualizer
import sklearn.datasets
from detectron2.config import get_cfg, global_cfg

before, global_before = get_cfg().dump(), dict(global_cfg)
"""

IMPORT_ALL = """
import fcos_d2
import fcos_d2.data
import fcos_d2.engine
import fcos_d2.modeling
import fcos_d2.ops

assert get_cfg().dump() == before and dict(global_cfg) == global_before
assert "FCOS" not in get_cfg().MODEL
assert not torch.cuda.is_initialized()
print("unchanged")
"""


def run_python(code: str, folder: Path) -> list[str]:
    """Returns the lines that ``code`` prints in a new interpreter; its folder stays empty."""
    # Our own checkout comes first, in case another one is installed.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-W", "ignore", "-B", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout.splitlines()


def test_ops_work_with_torch_alone_and_importing_them_has_no_side_effects(tmp_path):
    labels, error = run_python(TORCH_ALONE + WATCH + USE_OPS, tmp_path)
    assert labels == "[[1, 1, 1, 1]]"
    assert "needs detectron2" in error and "python tools/install_detectron2.py" in error


def test_importing_the_package_changes_no_config_and_opens_nothing(tmp_path):
    assert run_python(OTHERS_FIRST + WATCH + IMPORT_ALL, tmp_path)[-1] == "unchanged"


@pytest.mark.parametrize(
    "act",
    [
        "open('x', 'w')",
        "os.open('x', os.O_RDWR)",
        "import pathlib; pathlib.Path('x').touch()",
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "os.system('true')",
    ],
)
def test_forbidden_side_effect_is_found(act, tmp_path):
    with pytest.raises(AssertionError, match="AssertionError"):
        run_python(WATCH.replace("import torch", "") + act, tmp_path)


# ---- tests of the checks ----


@pytest.mark.parametrize(
    "module, source",
    [
        ("fcos_d2.ops.box_loss", "from detectron2.layers import cat"),
        ("fcos_d2.ops.box_loss", "def f():\n    from ..config import add_fcos_config"),
        ("fcos_d2.ops.box_loss", "from .. import errors"),
        ("fcos_d2.ops.reference", "from ._library import LIBRARY"),
        ("fcos_d2.ops.reference", "from . import _library"),
        ("fcos_d2.modeling.head", "from .losses import FCOSLoss"),
        ("fcos_d2.modeling.losses", "from . import head"),
        ("fcos_d2.modeling.postprocess", "import fcos_d2.modeling.losses as losses"),
        ("fcos_d2.modeling.fcos", "from ..engine import Trainer"),
        ("fcos_d2.modeling.fcos", "from ..checkpoint import Checkpointer"),
        ("fcos_d2.checkpoint.conversion", "from ..modeling import FCOS"),
        ("fcos_d2.data.mapper", "import tools.report"),
        ("fcos_d2.engine.trainer", "from train_net import main"),
    ],
)
def test_forbidden_import_is_found(module, source):
    assert violations(module, imported(source, module))


def test_config_in_a_method_or_a_helper_is_found():
    source = "class A:\n  def forward(self): return cfg\ndef from_config(cfg): return cfg\n"
    assert sorted(functions_with_cfg(source)) == ["forward", "from_config"]
    assert functions_with_cfg("cfg = get_cfg()") == ["<module>"]


def test_include_of_torch_is_found(tmp_path):
    (tmp_path / "kernel.cu").write_text(
        '#include <vector>\n  # include <torch/all.h>\n//#include "x"'
    )
    assert [name for _, name in includes(tmp_path)] == ["vector", "torch/all.h"]
