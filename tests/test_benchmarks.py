"""Tests that the benchmarks run without peers, list missing ones, and time the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, peers

ROOT = Path(__file__).parents[1]

# Measures everything once, on one image.
MEASURE = """
import sys
from pathlib import Path

sys.modules.update(dict.fromkeys({missing}))

from benchmarks import __main__, measure

measure.RUNS["cpu"] = 1
measure.FLUSH_BYTES = 2**20
__main__.IMAGES["cpu"] = 1
__main__.RESULTS = Path("results")
sys.argv[1:] = ["--results", "more/results"]
__main__.main()
"""
PEERS = (*peers.INSTALL, "iopath", "pycocotools")


def table_without(missing, folder: Path) -> str:
    """Returns the table of the benchmarks if ``missing`` cannot be imported."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE.format(missing=missing)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fails:" not in done.stdout
    assert done.stdout.count("Not installed, so not measured: ") == 1
    (results,) = (folder / "results").iterdir()
    assert (folder / "more/results" / results.name).read_text() == results.read_text()
    return results.read_text()


def test_all_ops_are_measured_without_peers(tmp_path):
    table = table_without(PEERS, tmp_path)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    ops = {op.removeprefix("| ") for op, _, what, *_ in rows if what == "ours"}
    assert ops == {
        "assign_targets", "sigmoid_focal_loss", "all losses", "post-processing", "batched_nms",
    }  # fmt: skip
    assert {what for _, _, what, *_ in rows} == {
        "what", "ours", "ours, gradient recomputed", "ours, channels_last",
    }  # fmt: skip
    assert table.count("Not installed, so not measured: ") == 1
    for name, command in peers.INSTALL.items():
        assert f"{name} (`{command}`)" in table


def test_only_installed_peers_are_measured():
    @peers.needs("torch")
    def installed(name):
        return {name: torch.sum}

    @peers.needs("no_such_package")
    def absent(name):
        raise AssertionError("must not be called")

    assert installed("torch") == {"torch": torch.sum}
    assert absent("peer") == {}
    assert peers.missing() == ""  # make env installs all peers


def test_gpu_timer_starts_after_the_work_is_queued(monkeypatch):
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("event")

        def synchronize(self):
            queue.append("wait")

        def elapsed_time(self, end):
            return 7.0

    class Buffer:
        def sum(self):  # the buffer must only be read
            queue.append("read")

    monkeypatch.setattr(measure, "_flush_buffer", lambda device: Buffer())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("spin"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = measure._seconds(lambda: queue.append("call"), torch.device("cuda"))
    assert seconds == pytest.approx(7e-3)
    assert queue == ["read", "spin", "event", "call", "event", "wait"]


def test_failing_peer_is_skipped_but_our_failure_raises(capsys):
    device = torch.device("cpu")

    def broken():
        raise MemoryError("too large")

    with pytest.raises(MemoryError):
        measure.compare("op", "work", {"ours": broken, "peer": int}, device, 1)
    rows = measure.compare("op", "work", {"ours": int, "peer": broken}, device, 1)
    assert [row.what for row in rows] == ["ours"]
    assert "peer fails: MemoryError: too large" in capsys.readouterr().out
