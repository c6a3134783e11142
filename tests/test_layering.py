"""Tests the import rules that keep every part usable and testable without the others."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "fcos_d2").rglob("*.py"))
CORE, CPU, CUDA, BINDINGS = (ROOT / "csrc" / name for name in ("core", "cpu", "cuda", "bindings"))

# Importer -> forbidden imports, both as prefixes of module names.
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
# Assigns boxes with the model's losses; nothing in data imports it.
EXCEPT = {"fcos_d2.data.level_fit": ("fcos_d2.modeling", "fcos_d2.ops")}
ONLY = {  # importer -> parts of this package that it may import
    "fcos_d2.ops": ("fcos_d2.ops",),
    "fcos_d2.errors": (),
}
# Only these modules read a config; all others take plain arguments.
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
    """Returns the full names of everything that the source of ``module`` imports."""
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
    """Returns the outermost functions that use the name ``cfg``, or ``<module>`` outside them."""
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
def test_module_follows_the_import_rules(path):
    imports = imported(path.read_text(), name_of(path), path.name == "__init__.py")
    assert violations(name_of(path), imports) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_some_modules_read_the_config(path):
    if within(name_of(path), MAY_READ_CFG):
        return
    functions = functions_with_cfg(path.read_text())
    assert [name for name in functions if not READS_CFG.fullmatch(name)] == []


def test_scripts_do_not_import_each_other_or_internals():
    for path in [ROOT / "train_net.py", *(ROOT / "tools").glob("*.py")]:
        imports = imported(path.read_text(), path.stem)
        assert not [name for name in imports if within(name, ("tests", "train_net"))], path
        assert not [name for name in imports if re.match(r"fcos_d2\.ops\._", name)], path
        # Importing it warns about torch.jit.script, unless fcos_d2 imports it first.
        assert not [name for name in imports if within(name, ("detectron2.modeling",))], path


def test_compiled_library_is_called_only_through_the_dispatcher():
    """Only the module that declares the ops loads the library, and no reference uses it."""
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
def test_formulas_and_kernels_do_not_include_torch(folder):
    assert [pair for pair in includes(folder) if TORCH.search(pair[1])] == []


@pytest.mark.parametrize("folder", [CORE, CPU], ids=IN_CSRC)
def test_formulas_and_cpu_loops_do_not_include_cuda(folder):
    assert [pair for pair in includes(folder) if CUDA_RUNTIME.search(pair[1])] == []


@pytest.mark.parametrize(
    "folder, others", [(CORE, "cpu|cuda|bindings"), (CPU, "cuda|bindings"), (CUDA, "cpu|bindings")]
)
def test_sources_include_only_lower_layers(folder, others):
    assert [pair for pair in includes(folder) if re.search(rf"\b({others})/", pair[1])] == []


# ---- Side effects of imports ----

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
            raise AssertionError(f"{path} is opened for writing")


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

# Imports of other packages may have side effects, so they precede WATCH.
IMPORT_OTHERS = """
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
    """Runs ``code`` in a new interpreter, which must not write files; returns the lines printed."""
    # This checkout comes first, in case another one is installed.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-W", "ignore", "-B", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return done.stdout.splitlines()


def test_ops_need_only_torch_and_have_no_side_effects_on_import(tmp_path):
    labels, error = run_python(TORCH_ALONE + WATCH + USE_OPS, tmp_path)
    assert labels == "[[1, 1, 1, 1]]"
    assert "needs detectron2" in error and "python tools/install_detectron2.py" in error


def test_package_has_no_side_effects_on_import(tmp_path):
    assert run_python(IMPORT_OTHERS + WATCH + IMPORT_ALL, tmp_path)[-1] == "unchanged"


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
def test_side_effect_is_detected(act, tmp_path):
    with pytest.raises(AssertionError, match="AssertionError"):
        run_python(WATCH.replace("import torch", "") + act, tmp_path)


# ---- Tests of the checks ----


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
def test_forbidden_import_is_detected(module, source):
    assert violations(module, imported(source, module))


def test_config_in_a_method_or_at_module_level_is_detected():
    source = "class A:\n  def forward(self): return cfg\ndef from_config(cfg): return cfg\n"
    assert sorted(functions_with_cfg(source)) == ["forward", "from_config"]
    assert functions_with_cfg("cfg = get_cfg()") == ["<module>"]


def test_include_is_detected(tmp_path):
    (tmp_path / "kernel.cu").write_text(
        '#include <vector>\n  # include <torch/all.h>\n//#include "x"'
    )
    assert [name for _, name in includes(tmp_path)] == ["vector", "torch/all.h"]
