"""Tests names in the model zoo, and downloads of synthetic weights from a local server."""

import hashlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from PIL import Image
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights, fcos_resnet50_fpn

from fcos_d2 import FCOS, InputError, Predictor, model_zoo
from fcos_d2.commands import cli
from fcos_d2.config_file import read_cfg
from fcos_d2.model_zoo import Weights

NAME = "torchvision/fcos_R_50_FPN"


@pytest.fixture(scope="module")
def checkpoint():
    """Returns a checkpoint in torchvision's format with random weights and scores of about 0.5."""
    torch.manual_seed(0)
    weights = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    weights["head.classification_head.cls_logits.bias"].zero_()
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Starts a server, whose ``serve`` sets the response to a download of NAME."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests += 1
            status, content, sent = server.response
            if status is None:  # never responds
                server.closing.wait()
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.requests, server.closing = True, 0, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    server.folder = tmp_path / "cache" / "models"

    def serve(content, *, named=None, status=200, sent=None):
        digest = hashlib.sha256(named or content).hexdigest()[:8]
        url = f"http://127.0.0.1:{server.server_port}/models/fcos_resnet50_fpn_coco-{digest}.pth"
        monkeypatch.setitem(model_zoo.WEIGHTS, NAME, Weights(url, "BSD-3-Clause"))
        server.response = status, content, sent
        return url

    server.serve = serve
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """Writes photo.jpg to an empty working directory."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    return tmp_path


# ---- Names ----


@pytest.mark.parametrize("name", model_zoo.names())
def test_every_config_can_be_read_by_name(name):
    assert model_zoo.get_config_file(name).startswith(str(model_zoo.CONFIGS))
    assert model_zoo.get_config(name)


def test_name_may_have_a_suffix_and_replace_a_config_file(tmp_path, monkeypatch):
    path = model_zoo.get_config_file(f"{NAME}.yaml")
    assert path == model_zoo.get_config_file(NAME) and path.endswith(".yaml")
    monkeypatch.chdir(tmp_path)
    assert read_cfg(NAME).dump() == read_cfg(path).dump() == model_zoo.get_config(NAME).dump()


def test_published_weights_have_configs_and_urls():
    assert set(model_zoo.WEIGHTS) <= set(model_zoo.names())
    assert model_zoo.get_checkpoint_url(NAME) == FCOS_ResNet50_FPN_Weights.COCO_V1.url
    cfg = model_zoo.get_config(NAME, trained=True)
    assert isinstance(cfg, CfgNode) and f"zoo://{NAME}" == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: model_zoo.get_config_file("fcos_R_50_FPN_3x"),
            "no config 'fcos_R_50_FPN_3x'; did",
        ),
        (lambda: model_zoo.get_checkpoint_url("fcos_R_50_FPN_1x"), "did you mean mmdetection/fcos"),
        (lambda: Predictor.from_pretrained("yolo"), "no weights of 'yolo'; available: torchv"),
    ],
)
def test_error_for_an_unknown_name_lists_similar_ones(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_untrained_model_needs_no_download(server):
    server.serve(b"")
    model = model_zoo.get("digits/fcos_R_18_FPN_digits", device="cpu")
    assert isinstance(model, FCOS) and model.training
    assert not server.requests


# ---- Downloads ----


def test_pretrained_model_is_downloaded_once(server, checkpoint, photo, capsys):
    url = server.serve(checkpoint)
    words = ["photo.jpg", "--opts", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu"]
    assert cli.main(words) == 0
    assert Image.open("detections/photo.jpg").size == (320, 240)
    printed = capsys.readouterr().err
    assert f"{NAME}, trained on COCO (BSD-3-Clause): {url}" in printed
    assert [path.name for path in server.folder.iterdir() if path.suffix == ".pth"] == [
        url.rpartition("/")[2]
    ]
    predictor = Predictor.from_pretrained(NAME, threshold=0.1, device="cpu")
    assert server.requests == 1
    found = predictor("photo.jpg")
    assert len(found) and found.names[0] in predictor.class_names
    assert predictor.class_names[0] == "person" and len(predictor.class_names) == 80
    entry = found.to_coco(7)[0]
    assert entry["image_id"] == 7 and entry["category_id"] == found.category_ids[0]
    assert max(predictor._category_ids) == 90  # of COCO's 80 classes
    x0, y0, x1, y1 = found.boxes[0].tolist()
    assert entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])


@pytest.mark.parametrize(
    "fault, cause",
    [
        ({"named": b"other"}, "its SHA-256"),
        ({"sent": 20}, "its SHA-256"),
        ({"status": 404}, "404"),
        ({"status": None}, "timed out"),
    ],
)
def test_failed_download_leaves_no_file(server, monkeypatch, fault, cause):
    if cause == "timed out":
        monkeypatch.setattr(model_zoo, "TIMEOUT", 0.3)
    url = server.serve(b"weights" * 9, **fault)
    with pytest.raises(InputError) as caught:
        PathManager.get_local_path(f"zoo://{NAME}")
    message, file = str(caught.value), server.folder / url.rpartition("/")[2]
    assert message.startswith(f"cannot download {url} (") and cause in message
    assert message.endswith(f"save it as {file}") and "\n" not in message
    assert not [path for path in server.folder.iterdir() if path.suffix != ".lock"]


def test_error_without_a_connection_has_the_url(server, monkeypatch, photo, capsys):
    server.serve(b"weights")
    url = model_zoo.WEIGHTS[NAME].url.replace(str(server.server_port), "9")
    monkeypatch.setitem(model_zoo.WEIGHTS, NAME, Weights(url, "BSD-3-Clause"))
    assert cli.main(["photo.jpg"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: cannot download {url} (") and "refused" in last
