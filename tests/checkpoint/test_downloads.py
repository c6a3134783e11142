"""The network is used only for URLs, whose downloads are cached."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler
from torch import nn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.engine import setup_cfg
from fcos_d2.errors import InputError

from ..tiny_training import ROOT, python, write_config

# Audit hooks notice connections of all libraries; the address of a Unix domain socket is a string.
# network.txt also records connections whose RuntimeError was caught.
GUARD = """
import sys

def guard(event, arguments):
    is_remote = event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple)
    if is_remote or event in ("socket.getaddrinfo", "urllib.Request"):
        with open("network.txt", "a") as file:
            print(event, *arguments[:2], file=file)
        raise RuntimeError(f"network: {event} {arguments}")

sys.addaudithook(guard)
"""
RUN = """
import importlib, json, pkgutil, runpy, fcos_d2

for module in pkgutil.walk_packages(fcos_d2.__path__, "fcos_d2."):
    # Compiled libraries are not Python modules, and importing __main__ runs a command.
    if not module.name.startswith("fcos_d2._C") and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, (words, end.code)
print("done")
"""


def test_imports_and_commands_with_local_files_do_not_use_the_network(tmp_path):
    config = ["--config-file", str(write_config(tmp_path))]
    train_net = [str(ROOT / "train_net.py"), *config]
    weights = ["MODEL.WEIGHTS", "output/model_final.pth", "MODEL.DEVICE", "cpu"]
    export = [str(ROOT / "tools/export_model.py"), *config, "--format"]
    demo = [str(ROOT / "demo/demo.py"), *config]
    commands = [
        [*train_net, "DATALOADER.NUM_WORKERS", "2"],
        [*train_net, "--eval-only", *weights],
        [*train_net, "--resume", "SOLVER.MAX_ITER", "3"],
        [*demo, "1.png", "--output", "found"],
        [*export, "torch_export", "--output", "model.pt2", *weights],
    ]
    done = python("-c", GUARD + RUN, json.dumps(commands), cwd=tmp_path)
    assert done.stdout.endswith("done\n"), done.stderr
    assert (tmp_path / "found").is_dir() and (tmp_path / "model.pt2").is_file()
    assert not (tmp_path / "network.txt").exists(), (tmp_path / "network.txt").read_text()


def test_guard_detects_a_download(tmp_path):
    code = "import fvcore.common.download as d; d.download('http://127.0.0.1/model.pth', '.')"
    done = python("-c", GUARD + code, cwd=tmp_path)
    assert "RuntimeError: network: " in done.stderr
    assert "127.0.0.1" in (tmp_path / "network.txt").read_text()


@pytest.mark.parametrize(
    "url", ["https://host.invalid/a/../../../x.pth", "detectron2://a/../../x.pkl", "http://h/..?a"]
)
def test_url_that_leads_out_of_the_cache_is_rejected(url, tmp_path):
    with pytest.raises(InputError, match="leads out of its folder; write it without"):
        Checkpointer(nn.Linear(1, 1)).load(url)
    if url.startswith("http"):
        (tmp_path / "config.yaml").write_text(f"_BASE_: {url}\n")
        options = ["--config-file", str(tmp_path / "config.yaml")]
        with pytest.raises(InputError, match="leads out of its folder"):
            setup_cfg(default_argument_parser().parse_args(options))


def test_other_urls_are_downloaded_into_the_cache_by_iopath(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)

    def download(url, folder, filename):
        path = Path(folder) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return str(path)

    monkeypatch.setattr("iopath.common.file_io.download", download)
    url = "https://host.invalid/some/folder/x..pth"
    Checkpointer(other).load(url)
    assert torch.equal(other.weight, model.weight)
    assert (tmp_path / "cache/some/folder/x..pth").exists()
    assert type(PathManager._PathManager__get_path_handler(url)) is HTTPURLHandler
