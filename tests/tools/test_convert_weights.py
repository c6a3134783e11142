"""tools/convert_weights.py: what it writes, what it says, and how it refuses."""

import importlib.util
import pickle
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2.checkpoint import Checkpointer
from tests.checkpoint import peer_weights
from tests.checkpoint.peer_weights import LEVELS, small_cfg

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_weights.py"


def load_script():
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert_weights = load_script()


@pytest.fixture
def script(tmp_path, capsys):
    """Runs the script on names of files in tmp_path."""

    def run(source, target, *options):
        status = convert_weights.main([str(tmp_path / source), str(tmp_path / target), *options])
        printed = capsys.readouterr()
        return SimpleNamespace(status=status, out=printed.out, err=printed.err)

    return run


def save(tmp_path, peer, name="theirs.pth") -> str:
    torch.save({"model": peer.theirs}, tmp_path / name)
    return name


def assert_refused(result, *parts):
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def test_what_was_recognised_is_printed_with_the_options_to_use(script, tmp_path):
    result = script(save(tmp_path, peer_weights.torchvision()), "ours.pth")
    assert result.status == 0 and result.err == ""
    first, second, third = result.out.splitlines()
    assert first.endswith("theirs.pth: recognised as torchvision, convention torchvision")
    assert second.endswith("ours.pth: 319 tensors for fcos_d2")
    assert third.startswith("use with: MODEL.FCOS.CONVENTION torchvision INPUT.FORMAT RGB ")


def test_the_printed_options_are_those_that_the_weights_need(script, tmp_path, caplog):
    """They go into a shell as they are, and then the written file loads and agrees."""
    peer = peer_weights.torchvision()
    result = script(save(tmp_path, peer), "ours.pth")
    options = shlex.split(result.out.splitlines()[-1].removeprefix("use with: "))
    cfg = small_cfg()
    cfg.merge_from_list(options)
    model = build_model(cfg)
    Checkpointer(model).load(str(tmp_path / "ours.pth"))
    Checkpointer(model).load(str(tmp_path / "theirs.pth"))
    assert not [line for line in caplog.messages if "instead of" in line]
    assert torch.equal(model.head.ctrness.weight, peer.ours["head.ctrness.weight"])


@pytest.mark.parametrize("layout", ["adelaidet", "detectron2", "torchvision"])
def test_there_and_back_gives_the_same_weights(script, tmp_path, layout):
    classes = {"classes": 80} if layout == "torchvision" else {}
    peer = getattr(peer_weights, layout)(**classes)
    torch.save({"model": peer.ours, "iteration": 3}, tmp_path / "ours.pth")
    there = script("ours.pth", "theirs.pth", "--to", layout)
    assert there.status == 0
    assert f"for {layout}" in there.out
    assert f"exact where everything else is as in MODEL.FCOS.CONVENTION {layout}" in there.out
    back = script("theirs.pth", "back.pth")
    assert back.status == 0 and f"recognised as {layout}" in back.out
    weights = torch.load(tmp_path / "back.pth")["model"]
    assert weights.keys() == peer.ours.keys()
    assert all(torch.equal(weights[key], peer.ours[key]) for key in weights)


def test_torchvision_loads_what_is_written_for_it(script, tmp_path):
    from torchvision.models.detection import fcos_resnet50_fpn

    with torch.device("meta"):
        names = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(peer_weights.torchvision(classes=80).ours, tmp_path / "ours.pth")
    assert script("ours.pth", "theirs.pth", "--to", "torchvision").status == 0
    written = torch.load(tmp_path / "theirs.pth")
    counters = {name for name in names if name.endswith("num_batches_tracked")}
    assert written.keys() == names.keys() - counters


def test_weights_that_cannot_be_exact_elsewhere_are_refused_and_nothing_is_written(
    script, tmp_path
):
    scales = {f"head.scales.{i}.scale": torch.tensor([1.0 + i]) for i in range(LEVELS)}
    torch.save({**peer_weights.detectron2().ours, **scales}, tmp_path / "ours.pth")
    result = script("ours.pth", "theirs.pth", "--to", "detectron2")
    assert_refused(result, "head.scales are 1, 2, 3, 4, 5", "written exactly")
    source = save(tmp_path, peer_weights.torchvision(), "other.pth")
    assert_refused(script(source, "theirs.pth", "--to", "adelaidet"), "LOCATION_OFFSET 0.5")
    assert not (tmp_path / "theirs.pth").exists()


def test_files_that_cannot_be_used_are_refused(script, tmp_path):
    assert_refused(script("absent.pth", "ours.pth"), "absent.pth: No such file")
    (tmp_path / "text.pth").write_text("hello")
    assert_refused(script("text.pth", "ours.pth"), "text.pth is no checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    assert_refused(script("list.pth", "ours.pth"), "list.pth cannot be used", "got list")
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "other.pth")
    result = script("other.pth", "ours.pth", "--to", "adelaidet")
    assert_refused(result, "other.pth holds no FCOS that is known: it has a.weight")
    source = save(tmp_path, peer_weights.cvpods())
    assert_refused(script(source, "no/such/folder.pth"), "cannot write", "No such file")


def test_unknown_weights_are_copied_and_so_are_those_of_a_trusted_pickle(script, tmp_path):
    content = {"model": {"a.weight": torch.ones(2)}, "args": SimpleNamespace(a=1)}
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps(content))
    assert_refused(script("pickle.pkl", "ours.pth"), "would call", "--trust-pickle")
    result = script("pickle.pkl", "ours.pth", "--trust-pickle")
    assert result.status == 0 and "no FCOS that is known, copied as it is" in result.out
    assert torch.load(tmp_path / "ours.pth")["model"]["a.weight"].tolist() == [1, 1]


def test_average_of_our_own_training_is_what_is_converted(script, tmp_path):
    weights = {
        "head.cls_logits.weight": torch.zeros(3, 4, 3, 3),
        "head.ctrness.weight": torch.ones(2),
    }
    average = {f"module.{key}": value + 1 for key, value in weights.items()}
    torch.save({"model": weights, "ema": average, "iteration": 7}, tmp_path / "ours.pth")
    assert script("ours.pth", "average.pth").status == 0
    found = torch.load(tmp_path / "average.pth")["model"]
    torch.testing.assert_close(found, {key: value + 1 for key, value in weights.items()})
