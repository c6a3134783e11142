"""Tests the documentation: links resolve, commands are valid, examples run."""

import ast
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from mkdocs.commands.build import build
from mkdocs.config import load_config

from fcos_d2.commands import cli
from fcos_d2.config import add_fcos_config

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_ZOO.md", "SECURITY.md")),
    ROOT / "csrc" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Placeholders.
PLACEHOLDER = re.compile(r"FILE|HOST|NAME|\.\.\.")


def blocks(page: Path, *languages: str) -> list[str]:
    """Returns the code blocks of a page in the given languages; "" means no language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands() -> list:
    """Returns (page, words) of every command in the shell blocks of the pages."""
    found = []
    for page in PAGES:
        for block in blocks(page, "", "bash", "sh"):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] in ("python", "torchrun", "make", "fcos-d2"):
                    found.append(pytest.param(page, words, id=f"{page.stem}: {' '.join(words)}"))
    return found


def config_keys(cfg: CfgNode, prefix: str = "") -> set[str]:
    keys = set()
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        keys |= config_keys(value, f"{name}.") if isinstance(value, CfgNode) else {name}
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    inside = [target for target in targets if not re.match(r"https?:", target)]
    assert [target for target in inside if not (page.parent / target).exists()] == []


def test_commands_are_found():
    assert len(commands()) > 30


@pytest.mark.parametrize("page, words", commands())
def test_command_is_valid(page, words):
    """Its script, flags, config file and config keys exist."""
    program, *words = words
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    source = source_of(program, words)
    if source is None:  # a module of the standard library
        return
    text = source.read_text()
    module = re.search(r"^from (fcos_d2[.\w]*) import main\b", text, re.MULTILINE)
    if module and not any(PLACEHOLDER.search(word) for word in words):
        if program == "fcos-d2" and words[0] in cli.COMMANDS:
            name, *flags = cli.COMMANDS[words.pop(0)]
            module, words = f"fcos_d2.commands.{name}", [*flags, *words]
        else:
            module, words = module[1], words[script_at(words) + (program != "fcos-d2") :]
        importlib.import_module(module).parse(words)  # exits if it cannot
    elif not module:
        known = text + detectron2_flags(source)
        flags = [w.partition("=")[0] for w in words[script_at(words) :] if w.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in known] == []
    for flag, value in zip(words, words[1:], strict=False):
        made_on_the_way = not value.startswith("configs/")
        if flag == "--config-file" and not PLACEHOLDER.search(value) and not made_on_the_way:
            assert (ROOT / value).is_file()
    keys = [word for word in words if re.fullmatch(r"[A-Z_]+(\.[A-Z0-9_]+)*", word)]
    keys = [key for key in keys if "." in key or key == "OUTPUT_DIR"]
    cfg = get_cfg()
    add_fcos_config(cfg)
    assert [key for key in keys if key not in config_keys(cfg)] == []


def script_at(words: list[str]) -> int:
    return next((i for i, word in enumerate(words) if word.endswith(".py")), 0)


def source_of(program: str, words: list[str]) -> Path | None:
    """Returns the file that parses the flags of a command."""
    if program == "fcos-d2":
        return ROOT / "demo" / "demo.py"
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        if words[1].partition(".")[0] not in ("fcos_d2", "benchmarks", "tests"):
            return None
        return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    script = ROOT / words[script_at(words)]
    assert script.is_file(), script
    return script


def detectron2_flags(source: Path) -> str:
    """Returns the source of detectron2's parser if the script uses it."""
    if "default_argument_parser" not in source.read_text():
        return ""
    from detectron2.engine import defaults

    return Path(defaults.__file__).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_can_be_parsed(page):
    for code in blocks(page, "python"):
        ast.parse(code)


def test_site_builds_without_broken_links_and_references(tmp_path):
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    build(config)  # strict: a warning raises
    found = (tmp_path / "api/ops/index.html").read_text()
    assert 'id="fcos_d2.ops.assign_targets.assign_targets"' in found


def test_examples_of_the_operators_run():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "ops.md"), module_relative=False)
    assert tried > 20 and failed == 0


# ---- Figures ----

# What a line of a page compares: op, workload and, in the order of the line, peers in the results.
FIGURES = {
    "README.md": {
        "assignment of targets": ("assign_targets", "2 x 100 boxes", "detectron2"),
        "focal loss, forward": (
            "sigmoid_focal_loss", "2 images, float32", "fvcore", "torch.compile of fvcore",
        ),
        "all losses": ("all losses", "2 x 100 boxes, float32", "detectron2"),
        "post-processing": (
            "post-processing", "2 images, 16.7k candidates, float32", "detectron2", "torchvision",
        ),
        "whole R-50 detector in float32: inference": (
            "inference", "R-50-FPN, 1 image, 800 x 1344", "detectron2", "torchvision",
        ),
        "whole R-50 detector in float32: training": (
            "training step", "R-50-FPN, 2 images, 800 x 1344", "detectron2", "torchvision",
        ),
    },
    "docs/benchmarks.md": {
        "assignment": ("assign_targets", "2 x 100 boxes", "detectron2"),
        "focal loss": (
            "sigmoid_focal_loss", "2 images, float32", "torch.compile of fvcore", "fvcore",
        ),
        "the same in bfloat16": (
            "sigmoid_focal_loss", "2 images, bfloat16", "torch.compile of fvcore", "fvcore",
        ),
        "all losses": ("all losses", "2 x 100 boxes, float32", "detectron2"),
        "post-processing": (
            "post-processing", "1 image, 16.7k candidates, float32", "torchvision", "detectron2",
        ),
        "the same, every logit": (
            "post-processing", "1 image, all logits pass, float32", "torchvision", "detectron2",
        ),
        "`batched_nms`, 1,000": ("batched_nms", "1000 boxes", "torchvision, shifted boxes"),
        "5,000": ("batched_nms", "5000 boxes", "torchvision, loop over classes"),
        "20,000": ("batched_nms", "20000 boxes", "torchvision, loop over classes"),
    },
}  # fmt: skip
LINES = [(page, line) for page, lines in FIGURES.items() for line in lines]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def measured() -> dict[tuple, tuple[float, float]]:
    """Returns {(op, workload, peer): (milliseconds, speedup of ours)} of the README's results."""
    name = re.search(r"benchmarks/results/cpu-[\w-]+\.md", (ROOT / "README.md").read_text())[0]
    lines = (ROOT / name).read_text().splitlines()
    rows = [cells(line) for line in lines if line.startswith("| ")]
    return {tuple(row[:3]): (float(row[3]), float(row[4].rstrip("x") or 1)) for row in rows[1:]}


@pytest.mark.parametrize("page, start", LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_figures_match_the_results(page, start):
    text = (ROOT / page).read_text()
    (line,) = re.findall(rf"^\| {re.escape(start)}.*$", text, re.MULTILINE)
    op, workload, *peers = FIGURES[page][start]
    found = measured()
    stated = {
        unit: [float(number) for number in re.findall(rf"([\d.]+) ?{unit}\b", line)]
        for unit in ("x", "ms")
    }
    rows = [found[op, workload, peer] for peer in peers]
    factors = [factor for _, factor in rows][: len(stated["x"])]
    times = [found[op, workload, "ours"][0], *(time for time, _ in rows)]
    assert stated["x"] == pytest.approx(factors, rel=0.05)
    assert stated["ms"] in ([], pytest.approx(times, rel=0.05))
