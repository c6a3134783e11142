"""Compares an uninterrupted training run with one that SIGKILL ends at random points.

    python tests/engine/kill_and_resume.py FOLDER CONFIG KILLS SEED [KEY VALUE ...]

Runs are forks of this process, so that they need not import anything, and kill themselves. Prints
the iteration, point and last checkpoint of each kill.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase, default_argument_parser

import train_net
from fcos_d2.engine import Trainer, run_script
from tests.tiny_training import metrics

STEPS = ("before_step", "after_step", "after_hooks")
# When the next file is opened, renamed or flushed: an image, a log or, most often, a checkpoint.
FILES = ("open", "os.rename", "fsync")


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(HookBase):
    """Kills this process in an iteration, at a point in STEPS or the next one in FILES."""

    def __init__(self, iteration: int, point: str):
        self.iteration, self.point, self.process = iteration, point, os.getpid()

    def before_step(self):
        if self.trainer.iter != self.iteration:
            return
        if self.point == "before_step":
            kill()
        elif self.point == "fsync":
            os.fsync = kill
        elif self.point in FILES:
            sys.addaudithook(self.on_event)

    def on_event(self, event: str, _: tuple) -> None:
        if event == self.point and os.getpid() == self.process:  # not a worker
            kill()

    def after_step(self):
        if self.trainer.iter == self.iteration and self.point in STEPS:
            kill()


def run(folder: Path, config: str, *words: str, killed_at: tuple[int, str] | None = None) -> int:
    """Trains or resumes in a forked process; returns its status in the format of os.waitpid."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 99
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if killed_at:
            build, hook = Trainer.build_hooks, [Kill(*killed_at)]
            first = killed_at[1] != "after_hooks"
            Trainer.build_hooks = lambda self: hook + build(self) if first else build(self) + hook
        words = ["--resume", "--config-file", config, *words, "OUTPUT_DIR", str(folder)]
        status = run_script(train_net.main, default_argument_parser().parse_args(words))
    finally:
        os._exit(status)


def last_checkpoint(folder: Path) -> dict | None:
    """Loads the checkpoint from which --resume would continue."""
    name = folder / "last_checkpoint"
    return torch.load(folder / name.read_text(), map_location="cpu") if name.exists() else None


def find_differences(one: object, other: object, path: str = "") -> list[str]:
    """Returns the paths of all values that are not bitwise equal in two checkpoints."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in find_differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)}"]
        pairs = zip(one, other, strict=True)
        return [d for n, pair in enumerate(pairs) for d in find_differences(*pair, f"{path}[{n}]")]
    return [] if one == other else [f"{path}: {one} and {other}"]


def main(folder: Path, config: str, kills: int, seed: int, *words: str) -> None:
    """Runs the comparison that the module docstring describes."""
    torch.set_num_threads(1)
    random.seed(seed)
    reference, killed = folder / "reference", folder / "killed"
    reference.mkdir()
    killed.mkdir()
    assert run(reference, config, *words) == 0, (reference / "output.txt").read_text()[-3000:]
    expected = last_checkpoint(reference)
    last, begin, points = expected["iteration"], 0, []
    for number in range(kills):
        # The kills are spread over the whole run, except for its last iteration.
        iteration = min(begin + random.randint(0, 2 * last // kills), last - 1)
        points.append((iteration, random.choice(STEPS + FILES)))
        # Alternates between 0 and 1 workers, since the order of the data must not depend on them.
        workers = ("DATALOADER.NUM_WORKERS", str(number % 2))
        status = run(killed, config, *words, *workers, killed_at=points[-1])
        assert os.WIFSIGNALED(status), (status, (killed / "output.txt").read_text()[-3000:])
        checkpoint = last_checkpoint(killed)
        begin = checkpoint["iteration"] + 1 if checkpoint else 0
        points[-1] += (begin - 1,)
    assert run(killed, config, *words) == 0, (killed / "output.txt").read_text()[-3000:]
    found = find_differences(expected, last_checkpoint(killed))
    assert found == [], found[:10]
    assert metrics(reference) == metrics(killed)
    assert not list(killed.glob("*.partial"))
    print(json.dumps(points))


if __name__ == "__main__":
    folder, config, kills, seed, *words = sys.argv[1:]
    main(Path(folder), config, int(kills), int(seed), *words)
