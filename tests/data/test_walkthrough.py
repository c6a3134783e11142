"""Runs the commands of docs/custom_data.md in this process, with fewer images and iterations."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.engine import default_argument_parser

import train_net
from fcos_d2.commands import predict
from fcos_d2.data.digits import __main__ as make_digits
from fcos_d2.engine import run_script
from tests.tools import ROOT, load_script

pytest_plugins = ["tests.script"]
TEXT = (ROOT / "docs" / "custom_data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
SHORT = ["SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1", "VIS_PERIOD", "0"]
SHORT += ["TEST.EVAL_PERIOD", "0", "MODEL.FCOS.INFERENCE_TH_TEST", "0.01"]
STATUSES = [0, 0, 1, 1, 0, 0, 0, 0, 1]  # exit status of each command


def execute(words: list[str]) -> int:
    """Runs a command line, and returns its exit status."""
    if words[0] == "fcos-d2":
        return predict.main(words[1:])
    if words[0] != "python":
        return subprocess.run(words, check=False).returncode
    if words[1:3] == ["-m", "fcos_d2.data.digits"]:
        return make_digits.main(words[3:])
    if words[1] == "train_net.py":
        return run_script(train_net.main, default_argument_parser().parse_args(words[2:]))
    return load_script(words[1]).main(words[2:])


@pytest.fixture
def shell(quiet_loggers, tmp_path, monkeypatch, capsys):
    """Returns a function that runs a command of the page in an empty folder with configs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def run(command: str, *more: str) -> SimpleNamespace:
        status = execute([*shlex.split(command), *more])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run


def follow(shell, training: list[str], export: list[str]) -> list[SimpleNamespace]:
    """Runs all commands of the page in order."""
    more = {"--export": export, "train_net": training}
    return [
        shell(command, *next((more[k] for k in more if k in command), [])) for command in COMMANDS
    ]


def test_commands_of_the_page_work(shell, digits_root):
    done = follow(shell, SHORT, ["--images", "40", "--root", str(digits_root)])
    assert [d.status for d in done] == STATUSES, [d.err[-500:] for d in done]
    export, config, check, clean, _, _, _, _, found = done
    assert "labels in dice/labels.json" in export.out
    assert "dice.yaml: 32 training images, 8 classes" in config.out
    assert "image dice/photos/photo_0002.png: " in check.out
    assert "repaired: 1 boxes with negative width or height: corners swapped" in check.out
    assert re.search(r"joker +0 +0 +never used", check.out)
    assert "labels_clean.json" in clean.out
    assert len(list(Path("output/dice/data/dice_train").iterdir())) == 6
    thresholds = json.loads(Path("output/dice/score_thresholds.json").read_text())
    names = ["nil", "ace", "deuce", "trey", "cater", "cinque", "sice", "joker"]
    assert [entry["name"] for entry in thresholds["classes"]] == names
    assert Path("output/dice/report/index.html").is_file()
    # One of 40 photos is truncated, and skipped.
    assert "skipped dice/photos/photo_0002.png: " in found.err
    assert len(json.loads(Path("output/dice/found.json").read_text())) == 39
    assert Path("output/dice/found.mp4").stat().st_size > 1000


def test_training_on_a_truncated_image_is_rejected(shell, digits_root):
    assert shell(COMMANDS[0], "--images", "40", "--root", str(digits_root)).status == 0
    assert shell(COMMANDS[1]).status == 0
    epoch = ["SOLVER.MAX_ITER", "8"]
    refused = shell("python train_net.py --config-file dice.yaml", *SHORT, *epoch)
    last = refused.err.strip().splitlines()[-1]
    assert refused.status == 2 and last.startswith("error: cannot read image dice/photos/")


def test_export_rejects_existing_folders_and_too_many_images(shell, digits_root):
    Path("dice").mkdir()
    refused = shell(COMMANDS[0], "--root", str(digits_root))
    assert refused.status == 2 and "dice already exists" in refused.err
    Path("dice").rmdir()
    refused = shell(COMMANDS[0], "--root", str(digits_root), "--images", "41")
    assert refused.status == 2 and "--images must be from 2 to 40" in refused.err


@pytest.mark.slow
def test_commands_of_the_page_train_a_working_detector(shell, tmp_path):
    training = ["SOLVER.MAX_ITER", "900", "TEST.EVAL_PERIOD", "0"]
    done = follow(shell, training, ["--images", "1600", "--root", str(tmp_path / "datasets")])
    assert [d.status for d in done] == STATUSES, done[6].err[-500:]
    results = json.loads(Path("output/dice/metrics.json").read_text().splitlines()[-1])
    assert results["bbox/AP50"] > 10  # measured: 13.6
    assert results["best_f1/F1"] > results["best_f1/F1_at_0.5"]
