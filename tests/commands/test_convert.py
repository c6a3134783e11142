"""Tests the convert command."""

import pickle
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from detectron2.modeling import build_model
from torchvision.models.detection import fcos_resnet50_fpn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import export_weights, import_weights
from fcos_d2.commands import convert
from tests.checkpoint import peers
from tests.modeling.tiny import tiny_cfg, tiny_fcos


@pytest.fixture
def script(tmp_path, capsys):
    """Returns a function that runs the command on files in tmp_path."""

    def run(source, target, *options):
        status = convert.main([str(tmp_path / source), str(tmp_path / target), *options])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def small_cfg():
    """Returns a config of a ResNet-50, torchvision's only backbone, with few channels."""
    widths = {"STEM_OUT_CHANNELS": 4, "RES2_OUT_CHANNELS": 16, "WIDTH_PER_GROUP": 4}
    options = [item for key, width in widths.items() for item in (f"MODEL.RESNETS.{key}", width)]
    name = "build_fcos_d2_resnet_fpn_backbone"
    return tiny_cfg("MODEL.BACKBONE.NAME", name, *options, NUM_CLASSES=80)


def small_weights() -> dict:
    state = build_model(small_cfg()).state_dict()
    return {key: value for key, value in state.items() if not key.startswith("losses.")}


def read(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    content = torch.load(path)
    return content.get("model", content)


def assert_refused(result, *parts):
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_with_the_printed_options(script, tmp_path, caplog, suffix):
    """The options are quoted for a shell."""
    theirs = export_weights(small_weights(), "torchvision")
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    result = script("theirs.pth", f"ours{suffix}")
    assert result.status == 0 and result.err == ""
    first, second, third = result.out.splitlines()
    assert first.endswith("theirs.pth: recognized as torchvision, convention torchvision")
    assert second.endswith(f"ours{suffix}: {len(theirs)} tensors for fcos_d2")
    assert third.startswith("use with: MODEL.FCOS.CONVENTION torchvision INPUT.FORMAT RGB ")
    cfg = small_cfg()
    cfg.merge_from_list(shlex.split(third.removeprefix("use with: ")))
    model = build_model(cfg)
    Checkpointer(model).load(str(tmp_path / "theirs.pth"))
    assert not [line for line in caplog.messages if "instead of" in line]
    again = build_model(cfg)
    Checkpointer(again).load(str(tmp_path / f"ours{suffix}"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["adelaidet", "detectron2", "torchvision"])
def test_round_trip_preserves_the_weights(script, tmp_path, name, suffix):
    ours = small_weights()
    torch.save({"model": ours, "iteration": 3}, tmp_path / "ours.pth")
    there = script("ours.pth", f"theirs{suffix}", "--to", name)
    assert there.status == 0 and f"for {name}" in there.out
    assert f"exact if all other settings match MODEL.FCOS.CONVENTION {name}" in there.out
    back = script(f"theirs{suffix}", f"back{suffix}")
    assert back.status == 0 and f"recognized as {name}" in back.out
    if name != "adelaidet":  # the others have no scales, which are 1
        ours = {key: value for key, value in ours.items() if not key.endswith(".scale")}
    torch.testing.assert_close(read(tmp_path / f"back{suffix}"), ours, rtol=0, atol=0)


def test_weights_for_torchvision_have_its_keys(script, tmp_path):
    with torch.device("meta"):
        names = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    ours = import_weights(peers.random_weights("torchvision_R_50"), 80).weights
    torch.save(ours, tmp_path / "ours.pth")
    assert script("ours.pth", "theirs.pth", "--to", "torchvision").status == 0
    written = torch.load(tmp_path / "theirs.pth")
    counters = {name for name in names if name.endswith("num_batches_tracked")}
    assert written.keys() == names.keys() - counters


def test_weights_that_the_format_cannot_express_are_refused(script, tmp_path):
    weights = small_weights()
    scales = {f"head.scales.{i}.scale": torch.tensor([1.0 + i]) for i in range(3)}
    torch.save(weights | scales, tmp_path / "ours.pth")
    result = script("ours.pth", "theirs.pth", "--to", "detectron2")
    assert_refused(result, "head.scales are 1, 2, 3, which they cannot express")
    torch.save(export_weights(weights, "torchvision"), tmp_path / "other.pth")
    assert_refused(script("other.pth", "theirs.pth", "--to", "adelaidet"), "LOCATION_OFFSET 0.5")
    assert not (tmp_path / "theirs.pth").exists()


def test_unusable_files_are_refused(script, tmp_path):
    assert_refused(script("absent.pth", "ours.pth"), "absent.pth: No such file")
    torch.save([1, 2], tmp_path / "list.pth")
    assert_refused(script("list.pth", "ours.pth"), "list.pth cannot be used", "got list")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    result = script("other.pth", "ours.pth", "--to", "adelaidet")
    assert_refused(result, "other.pth is not a known FCOS: its first keys are a.weight")
    assert_refused(script("other.pth", "no/such/folder.pth"), "cannot write", "No such file")


def test_unknown_weights_of_a_trusted_pickle_are_copied(script, tmp_path):
    content = {"model": {"a.weight": torch.ones(2)}, "args": SimpleNamespace(a=1)}
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps(content))
    assert_refused(script("pickle.pkl", "ours.pth"), "would call", "--trust-pickle")
    result = script("pickle.pkl", "ours.safetensors", "--trust-pickle")
    assert result.status == 0 and "not a known FCOS, copied unchanged" in result.out
    assert read(tmp_path / "ours.safetensors")["a.weight"].tolist() == [1, 1]


def test_ema_is_converted_if_the_checkpoint_has_one(script, tmp_path):
    weights = tiny_fcos().state_dict()
    average = {f"module.{key}": value + 1 for key, value in weights.items()}
    torch.save({"model": weights, "ema": average, "iteration": 7}, tmp_path / "ours.pth")
    assert script("ours.pth", "average.safetensors").status == 0
    expected = {key: value + 1 for key, value in weights.items()}
    torch.testing.assert_close(read(tmp_path / "average.safetensors"), expected)
