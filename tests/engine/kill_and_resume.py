"""Trains once undisturbed, then again with kill -9 at random moments, and compares what is left.

    python tests/engine/kill_and_resume.py FOLDER CONFIG KILLS SEED [KEY VALUE ...]

Every training is a fork of this process, which has imported everything but started nothing. Prints
the number of kills, and the iteration of the last checkpoint after each of them.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser

import train_net
from fcos_d2.engine import run_script
from tests.tiny_training import metrics


def start(folder: Path, config: str, *words: str) -> int:
    """Starts a training in a process of its own; its number."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        words = ["--resume", "--config-file", config, *words, "OUTPUT_DIR", str(folder)]
        status = run_script(train_net.main, default_argument_parser().parse_args(words))
    finally:
        os._exit(status)


def starts(folder: Path) -> int:
    """How many trainings got to their first iteration."""
    log = folder / "output.txt"
    return log.read_text().count("Starting training from") if log.exists() else 0


def run_to_the_end(folder: Path, *words: str) -> float:
    """Seconds from the first iteration of a training to its end."""
    before, child = starts(folder), start(folder, *words)
    while starts(folder) == before and not os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.01)
    begin = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert status == 0, (folder / "output.txt").read_text()[-3000:]
    return time.monotonic() - begin


def kill_somewhere(folder: Path, longest: float, *words: str) -> None:
    """Starts a training and kills it up to ``longest`` seconds after its first iteration began."""
    before, child = starts(folder), start(folder, *words)
    while starts(folder) == before:
        time.sleep(0.01)
    time.sleep(random.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it had ended: make it longer or the kills fewer"


def last_checkpoint(folder: Path) -> dict | None:
    """What --resume would read: always a whole file."""
    name = folder / "last_checkpoint"
    return torch.load(folder / name.read_text(), map_location="cpu") if name.exists() else None


def differences(one: object, other: object, path: str = "") -> list[str]:
    """Where two checkpoints differ by a bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)}"]
        pairs = zip(one, other, strict=True)
        return [d for n, pair in enumerate(pairs) for d in differences(*pair, f"{path}[{n}]")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def main(folder: Path, config: str, kills: int, seed: int, *words: str) -> None:
    """See the top of the file."""
    torch.set_num_threads(1)
    random.seed(seed)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    duration = run_to_the_end(undisturbed, config, *words)
    iterations = []
    for number in range(kills):
        # Workers or none: the order of the data must not depend on them.
        workers = ("DATALOADER.NUM_WORKERS", str(number % 2))
        kill_somewhere(killed, 1.5 * duration / (kills + 1), config, *words, *workers)
        checkpoint = last_checkpoint(killed)
        iterations.append(checkpoint["iteration"] if checkpoint else None)
    run_to_the_end(killed, config, *words)
    found = differences(last_checkpoint(undisturbed), last_checkpoint(killed))
    assert found == [], found[:10]
    assert metrics(undisturbed) == metrics(killed)
    assert not list(killed.glob("*.partial"))
    print(json.dumps({"kills": kills, "last_checkpoints": iterations}))


if __name__ == "__main__":
    folder, config, kills, seed, *words = sys.argv[1:]
    main(Path(folder), config, int(kills), int(seed), *words)
