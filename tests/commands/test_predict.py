"""Tests the predict command with every kind of input and output."""

import json
import sys
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fcos_d2.commands import predict
from fcos_d2.errors import InputError
from fcos_d2.evaluation import THRESHOLD_FILE
from fcos_d2.media import Skipped, check_targets, choose_targets, find_sources
from tests.modeling.tiny import tiny_cfg, tiny_fcos

cv2 = pytest.importorskip("cv2", reason="videos need OpenCV")

NAMES = ["disc", "box", "cross"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns OUTPUT_DIR of a training run, whose model has detections in every image."""
    folder = tmp_path_factory.mktemp("trained")
    sizes = ("INPUT.MIN_SIZE_TEST", 64, "OUTPUT_DIR", str(folder), "DATASETS.TRAIN", ())
    (folder / "config.yaml").write_text(tiny_cfg(*sizes, "DATASETS.TEST", ()).dump())
    torch.manual_seed(0)  # fixtures of a module are not seeded
    model = tiny_fcos()
    nn.init.constant_(model.head.cls_logits.bias, 1.0)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    write_thresholds(folder, [0.0, 0.0, 0.0])
    return folder


def write_thresholds(folder, scores) -> None:
    classes = [{"name": n, "threshold": s} for n, s in zip(NAMES, scores, strict=True)]
    (folder / THRESHOLD_FILE).write_text(json.dumps({"classes": classes}))


@pytest.fixture
def photos(tmp_path):
    """Writes three images, one of them in a subfolder, and a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.jpg", "more/c.png"]):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64 + number, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def write_video(path, frames=5, size=(64, 48)):
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    video = cv2.VideoWriter(str(path), codec, 10, size)
    for number in range(frames):
        video.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
    video.release()
    return path


def frames_of(path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return frames


@pytest.fixture
def fcos_d2(trained, capsys):
    """Returns a function that runs the command and returns its exit status, stdout and stderr."""

    def run(*arguments):
        status = predict.main([*map(str, arguments), "--config-file", str(trained / "config.yaml")])
        return status, *capsys.readouterr()

    return run


def test_output_folder_has_the_names_of_the_input_folder(fcos_d2, photos, tmp_path):
    status, out, err = fcos_d2(photos, "--output", tmp_path / "found", "--batch-size", 2)
    assert status == 0 and "skipped" not in err
    assert "in 3 images" in out
    for name in ("a.png", "b.jpg", "more/c.png"):
        drawn = np.asarray(Image.open(tmp_path / "found" / name))
        assert drawn.shape[1] == 320  # small images are enlarged to fit their labels
        assert (drawn.astype(int) - drawn.mean()).std() > 1
    assert not (tmp_path / "found" / "notes.txt").exists()


def test_every_input_has_its_own_output_file(photos, tmp_path):
    for name in ("a.xpm", "bare.psd", "w.avi", "w.mkv"):
        (photos / name).touch()
    copytree(photos / "more", tmp_path / "other" / "more")
    sources = find_sources([str(photos), str(tmp_path / "other")], Skipped())
    found = {
        str(Path(s.path).relative_to(tmp_path)): str(s.target.relative_to("found"))
        for s in choose_targets(sources, Path("found"))
    }
    assert found == {
        "photos/a.png": "a.png",
        "photos/a.xpm": "a_2.png",
        "photos/b.jpg": "b.jpg",
        "photos/bare.psd": "bare.png",
        "photos/more/c.png": "more/c.png",
        "photos/w.avi": "w.mp4",
        "photos/w.mkv": "w_2.mp4",
        "other/more/c.png": "more/c_2.png",
    }


def error_of(inputs, output, json_file=None) -> str:
    """Returns the message of the error that the output causes."""
    with pytest.raises(InputError) as caught:
        sources = choose_targets(find_sources(inputs, Skipped()), Path(output))
        check_targets(sources, json_file)
    return str(caught.value)


def test_output_image_is_refused_for_several_images(fcos_d2, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    write_video(photos / "w.avi")
    for inputs in (["."], ["w.avi"], ["a.png", "w.avi"]):
        assert "one.png is one image, but there are several" in error_of(inputs, "one.png")
    assert fcos_d2("w.avi", "--output", tmp_path / "one.png", "--frames", 1)[0] == 0
    assert Image.open(tmp_path / "one.png").size == (320, 240)


@pytest.mark.parametrize(
    "inputs, output, original",
    [
        ("photos", "photos", "photos/a.png"),
        ("photos/a.png", "link", "photos/a.png"),
        ("photos/a.png", "hard.png", "photos/a.png"),
        ("w.mp4", ".", "w.mp4"),
    ],
)
def test_no_input_is_overwritten(photos, tmp_path, monkeypatch, inputs, output, original):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.mp4").touch()
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "hard.png").hardlink_to(photos / "a.png")
    expected = f"would overwrite the input {original}; choose another --output"
    assert expected in error_of([inputs], output)


def test_json_must_differ_from_inputs_and_outputs(photos, tmp_path):
    image = photos / "a.png"
    assert "choose another --json" in error_of([str(photos)], "all.mp4", Path("all.mp4"))
    assert "would overwrite the input" in error_of([str(image)], "found", image)


def test_glob_pattern_and_single_file_are_read(fcos_d2, photos, tmp_path):
    assert fcos_d2(photos / "*.jpg", "--output", tmp_path / "all")[0] == 0
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["b.jpg"]
    assert fcos_d2(photos / "a.png", "--output", tmp_path / "one.jpg")[0] == 0
    assert Image.open(tmp_path / "one.jpg").size == (320, 240)


def test_json_has_the_class_names_and_boxes_of_every_image(fcos_d2, photos, tmp_path):
    status, _, _ = fcos_d2(photos, "--json", tmp_path / "found.json")
    entries = json.loads((tmp_path / "found.json").read_text())
    assert status == 0 and [e["width"] for e in entries] == [64, 65, 66]
    assert [e["file"] for e in entries] == [
        str(photos / name) for name in ("a.png", "b.jpg", "more/c.png")
    ]
    for entry in entries:
        assert entry["frame"] is None and entry["objects"]
        for item in entry["objects"]:
            x0, y0, x1, y1 = item["box"]
            assert 0 <= x0 <= x1 <= entry["width"] and 0 <= y0 <= y1 <= entry["height"]
            assert item["class"] == NAMES[item["class_id"]] and 0 <= item["score"] <= 1


def test_images_of_different_sizes_are_padded_in_a_video(fcos_d2, photos, tmp_path):
    Image.new("RGB", (48, 96)).save(photos / "z.png")
    assert fcos_d2(photos, "--output", tmp_path / "all.mp4", "--score", 1.0)[0] == 0
    frames = frames_of(tmp_path / "all.mp4")
    assert len(frames) == 4 and {frame.shape for frame in frames} == {(240, 320, 3)}


@pytest.mark.parametrize("rate, expected", [(None, 10), (0.0, 5), (-1.0, 5), (float("nan"), 5)])
def test_output_video_has_the_frame_rate_of_the_input_or_five(
    fcos_d2, tmp_path, monkeypatch, rate, expected
):
    video, real = write_video(tmp_path / "street.avi"), cv2.VideoCapture

    class Capture:
        def __init__(self, path):
            self.capture = capture = real(path)
            self.read, self.release = capture.read, capture.release

        def get(self, key):
            return self.capture.get(key) if rate is None else rate

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    status, out, _ = fcos_d2(video, "--output", tmp_path / "found", "--batch-size", 2)
    monkeypatch.undo()
    assert status == 0 and "in 5 images" in out
    found = tmp_path / "found" / "street.mp4"
    assert real(str(found)).get(cv2.CAP_PROP_FPS) == pytest.approx(expected)
    frames = frames_of(found)
    assert len(frames) == 5 and frames[0].shape == (240, 320, 3)


def test_frames_limits_the_number_of_frames(fcos_d2, tmp_path):
    video = write_video(tmp_path / "street.avi", frames=9)
    status, out, _ = fcos_d2(video, "--frames", 4, "--json", tmp_path / "f", "--batch-size", 3)
    assert status == 0 and "in 4 images" in out
    assert [e["frame"] for e in json.loads((tmp_path / "f").read_text())] == [0, 1, 2, 3]


def test_camera_is_read_until_its_stream_ends(fcos_d2, tmp_path, monkeypatch):
    video = str(write_video(tmp_path / "camera.avi", frames=3))
    opened, real = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: opened.append(path) or real(video))
    status, out, _ = fcos_d2("--webcam", 7, "--output", tmp_path)
    assert status == 0 and "in 3 images" in out and opened == [7]
    monkeypatch.undo()
    assert len(frames_of(tmp_path / "camera_7.mp4")) == 3


def test_unreadable_inputs_are_reported_and_skipped(fcos_d2, photos, tmp_path):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:200])
    (photos / "broken.mp4").write_bytes(b"no video")
    Image.fromarray(np.full((48, 64), 30_000, np.uint16)).save(photos / "deep.png")
    (tmp_path / "empty").mkdir()
    missing = [tmp_path / "none.png", tmp_path / "*.gif", tmp_path / "empty"]
    status, out, err = fcos_d2(photos, *missing, "--json", tmp_path / "found.json")
    assert status == 1 and "in 3 images" in out
    assert len(json.loads((tmp_path / "found.json").read_text())) == 3
    for path in (*(photos / name for name in ("broken.png", "broken.mp4", "deep.png")), *missing):
        assert f"skipped {path}: " in err
    assert err.count("skipped") == 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.png", "--output", "x"], "no input can be read"),
        (["a.png", "--output", "x", "--weights", "none.pth"], "none.pth: no such file"),
        (["a.png", "--output", "x", "--opts", "MODEL.FCOS.NMS", "1"], "unknown config key"),
        (["a.png", "--output", "a.xpm"], "cannot be written; choose .png or .jpg"),
        (["a.png", "--output", "/proc/x/a"], "cannot write"),
        (["a.png", "--output", "/proc/x/a.mp4"], "cannot write"),
        (["a.png", "--output", "b.jpg/a.mp4"], "cannot write"),
        (["a.png", "--json", "more"], "cannot write more: Is a directory; choose another --json"),
        (["a.png", "--json", "b.jpg/x"], "cannot write b.jpg/x: "),
    ],
)
def test_errors_are_one_line(fcos_d2, photos, monkeypatch, arguments, message):
    monkeypatch.chdir(photos)
    status, _, err = fcos_d2(*arguments)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and message in last


@pytest.mark.parametrize("arguments", [[], ["a.png", "--output", "x", "--frames", "0"]])
def test_invalid_command_line_is_refused(fcos_d2, arguments):
    with pytest.raises(SystemExit) as caught:
        fcos_d2(*arguments)
    assert caught.value.code == 2


def test_error_without_opencv_has_the_command_to_install_it(fcos_d2, tmp_path, monkeypatch):
    video = write_video(tmp_path / "street.avi")
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, _, err = fcos_d2(video, "--output", tmp_path / "x")
    assert status == 2 and "pip install opencv-python-headless" in err


# ---- Thresholds ----


def scores_by_class(fcos_d2, photos, path, *arguments) -> dict[str, list[float]]:
    assert fcos_d2(photos / "a.png", "--json", path, *arguments)[0] == 0
    (entry,) = json.loads(path.read_text())
    return {name: [o["score"] for o in entry["objects"] if o["class"] == name] for name in NAMES}


def test_every_class_has_its_own_score_threshold(fcos_d2, trained, photos, tmp_path):
    everything = scores_by_class(fcos_d2, photos, tmp_path / "f")
    assert all(len(scores) > 3 for scores in everything.values())
    best = sorted(everything["box"])
    limits = [max(everything["disc"]) + 0.01, (best[-3] + best[-2]) / 2, 0.0]
    write_thresholds(trained, limits)
    try:
        found = scores_by_class(fcos_d2, photos, tmp_path / "f")
        assert not found["disc"] and len(found["box"]) == 2
        assert found["cross"] == everything["cross"]
        one_for_all = scores_by_class(fcos_d2, photos, tmp_path / "f", "--score", 0.0)
        assert one_for_all == everything
    finally:
        write_thresholds(trained, [0.0, 0.0, 0.0])


def test_thresholds_of_another_model_are_refused(fcos_d2, trained, photos, tmp_path):
    content = {"classes": [{"name": "one", "threshold": 0.5}]}
    before = (trained / THRESHOLD_FILE).read_text()
    for text in (json.dumps(content), "[]", "{"):
        (trained / THRESHOLD_FILE).write_text(text)
        status, _, err = fcos_d2(photos, "--output", tmp_path / "x")
        assert status == 2 and "--eval-only" in err
    (trained / THRESHOLD_FILE).write_text(before)
