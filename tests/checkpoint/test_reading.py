"""Checkpoints load without running code that they contain, or raise a one-line InputError."""

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from fcos_d2 import InputError
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.reading import Ignored, load_safely, load_trusted

from ..modeling.tiny import tiny_fcos

pytest_plugins = ["tests.script"]

FORMATS = ["zip", "legacy", *range(6)]  # of torch.save, and protocols of pickle


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path, call=os.system, arguments=None):
        self._call, self._arguments = call, arguments or (f"touch {path}",)

    def __reduce__(self):
        return self._call, self._arguments


def malicious_objects(trace):
    """Returns an object for each known way to run code when unpickled."""
    code = f"open({str(trace)!r}, 'w')"
    return {
        "system": Malicious(trace),
        "eval": Malicious(trace, eval, (code,)),
        "open": Malicious(trace, open, (str(trace), "w")),
        "torch": Malicious(trace, torch.hub.load, (str(trace.parent), "entry")),
        "nested": {"head.cls_logits.weight": Malicious(trace)},
        "storage": Malicious(trace, torch.storage._load_from_bytes, (dump(Malicious(trace), 2),)),
    }


def dump(content, format) -> bytes:
    """Serializes ``content`` with torch.save or pickle.dumps."""
    if isinstance(format, int):
        return pickle.dumps(content, protocol=format)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=format == "zip")
    return file.getvalue()


def load_error(path, load=load_safely) -> str:
    """Returns the one-line message of the InputError that loading ``path`` raises."""
    with pytest.raises(InputError) as caught:
        load(str(path))
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 900
    return message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("attack", malicious_objects(Path("trace")))
def test_malicious_file_is_rejected_without_running_its_code(format, attack, tmp_path):
    trace = tmp_path / "trace"
    weights = np.zeros(2, np.float32) if isinstance(format, int) else torch.zeros(2)
    content = {"model": {"a.weight": weights}, "extra": malicious_objects(trace)[attack]}
    for name in ("evil.pth", "evil.pkl", "evil.safetensors"):
        (tmp_path / name).write_bytes(dump(content, format))
        message = load_error(tmp_path / name, Checkpointer(nn.Linear(2, 2)).load)
        assert not trace.exists()
        if name.endswith(".safetensors") and isinstance(format, str):
            continue  # torch.load looks at the file name
        assert f"{name} was not loaded because it would call " in message
        assert f"fcos-d2 convert --trust-pickle {tmp_path / name} OUT" in message


def test_malicious_files_run_code_in_an_unsafe_loader(tmp_path):
    for name in ("system", "eval", "open"):
        trace = tmp_path / name
        (tmp_path / "evil.pkl").write_bytes(dump(malicious_objects(trace)[name], 2))
        load_trusted(str(tmp_path / "evil.pkl"))
        assert trace.exists()


@pytest.mark.parametrize("arguments", [(), ("--eval-only",), ("--resume",)])
def test_train_net_rejects_a_malicious_file_in_one_line(script, tmp_path, arguments):
    torch.save({"model": Malicious(tmp_path / "trace")}, tmp_path / "evil.pth")
    result = script(*arguments, "MODEL.WEIGHTS", "evil.pth")
    assert not (tmp_path / "trace").exists()
    assert result.status == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: evil.pth was not loaded because it would")


@pytest.mark.parametrize("text", ["SEED: {}", "_BASE_: base.yaml"], ids=["file", "its base"])
def test_config_that_calls_python_is_rejected_in_one_line(script, text):
    attack = "!!python/object/apply:os.system ['touch trace']"
    (script.folder / "base.yaml").write_text(f"SEED: {attack}")
    (script.folder / "evil.yaml").write_text(text.format(attack))
    result = script(config="evil.yaml")
    assert not (script.folder / "trace").exists()
    assert result.status == 2 and "Traceback" not in result.err
    assert "python/object/apply:os.system" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "numpy.load", "operator.call", "numpy.dtype.__reduce__"]
    + ["fcos_d2.checkpoint.reading.load_trusted", "collections.OrderedDict.__init__.__globals__"],
)
def test_unlisted_globals_are_rejected(name, tmp_path):
    """Uses the opcodes GLOBAL and STACK_GLOBAL; the latter resolves dots in names."""
    module, _, function = name.partition(".")
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, function))
    for program in (f"c{module}\n{function}\n.".encode(), b"\x80\x04" + texts + b"\x93."):
        (tmp_path / "program.pkl").write_bytes(program)
        assert f"would call {name};" in load_error(tmp_path / "program.pkl")


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote str."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python_2_pickle(content) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "float64, big-endian": np.linspace(0, 1, 5).astype(">f8"),
    "float16": np.array([[0.5, -2]], np.float16),
    "int64": np.array([2**40, -1]),
    "bool": np.array([True, False]),
    "permuted": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "column-major": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("format", [*FORMATS, "python 2"])
def test_arrays_are_loaded_as_saved(format, tmp_path):
    content = collections.OrderedDict(ARRAYS, number=np.float64(0.25))
    data = python_2_pickle(content) if format == "python 2" else dump(content, format)
    (tmp_path / "arrays.pkl").write_bytes(data)
    loaded = load_safely(str(tmp_path / "arrays.pkl"))
    assert loaded.pop("number") == 0.25
    for name, expected in ARRAYS.items():
        assert loaded[name].dtype.newbyteorder("=") == expected.dtype.newbyteorder("=")
        assert loaded[name].shape == expected.shape and (loaded[name] == expected).all()


@pytest.mark.parametrize("format", ["zip", 2, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        *(np.array([{}], object), np.array(["text"]), np.zeros(2, [("a", "f4")])),
        np.zeros(2, np.longdouble),
    ],
)
def test_arrays_of_unsupported_dtypes_are_rejected(array, format, tmp_path):
    """NumPy's unpickling would interpret the bytes of object arrays as pointers."""
    (tmp_path / "arrays.pkl").write_bytes(dump({"w": array}, format))
    message = load_error(tmp_path / "arrays.pkl")
    assert "is not a checkpoint that can be read (it holds an array of dtype" in message


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_torch_save_files_are_loaded_as_saved(format, tmp_path):
    x = torch.randn(2, 3, 4)
    names = ("float64", "float16", "bfloat16", "int64", "uint8", "bool")
    content = {
        "views": [x, x.mT, x[1, 1:, ::2], torch.ones(()).expand(4), torch.empty(0, 3)],
        "parameter": nn.Parameter(torch.ones(2)),
        "dtypes": [torch.ones(4).to(getattr(torch, name)) for name in names],
        "model": nn.BatchNorm2d(3).state_dict(),
        "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).state_dict(),
        "scheduler": {"milestones": collections.Counter([3, 4]), "device": torch.device("cpu")},
    }
    (tmp_path / "a.pth").write_bytes(dump(content, format))
    loaded = load_safely(str(tmp_path / "a.pth"))
    for key in ("views", "parameter", "dtypes"):
        torch.testing.assert_close(loaded[key], content[key], rtol=0, atol=0, check_stride=True)
    torch.testing.assert_close(loaded["model"], dict(content["model"]), rtol=0, atol=0)
    assert loaded["optimizer"] == content["optimizer"]
    assert loaded["scheduler"] == content["scheduler"]


def test_other_objects_in_a_checkpoint_are_ignored(tmp_path, monkeypatch):
    """Checks objects saved by torchvision and mmengine, and that torch's safe globals are kept."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    buffer.mean = lambda self: 0
    monkeypatch.setattr(sys.modules[buffer.__module__], "HistoryBuffer", buffer, raising=False)
    history = buffer()
    history.values = np.array([1.0, 2.0])
    history.methods = {"mean": Malicious("", builtins.getattr, (buffer, "mean"))}
    content = {
        "state_dict": {"w.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=0.02, device="cuda"),
        "message_hub": {"log_scalars": {"loss": history}},
    }
    torch.save(content, tmp_path / "trained.pth")
    monkeypatch.delitem(sys.modules, buffer.__module__)
    before = set(torch.serialization.get_safe_globals())
    loaded = load_safely(str(tmp_path / "trained.pth"))
    assert torch.equal(loaded["state_dict"]["w.weight"], torch.ones(2))
    assert type(loaded["args"]) is type(loaded["message_hub"]["log_scalars"]["loss"]) is Ignored
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("wrapper", ["zoo", "blobs", "bare", "width"])
def test_backbone_of_the_model_zoo_is_loaded_by_name_or_rejected_by_shape(wrapper, tmp_path):
    model, prefix = tiny_fcos(), "backbone.bottom_up."
    content = {
        key.removeprefix(prefix): np.full(value.shape, 0.5, np.float32)
        for key, value in model.state_dict().items()
        if key.startswith(prefix)
    }
    if wrapper == "width":
        content["stem.weight"] = np.zeros((16, 3, 3, 3), np.float32)
    if wrapper in ("zoo", "width"):
        content = {"model": content, "__author__": "someone", "matching_heuristics": True}
    if wrapper == "blobs":
        content = {"blobs": content | {"stem.weight_momentum": np.zeros(2)}}
    (tmp_path / "R-50.pkl").write_bytes(python_2_pickle(content))
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = True
    before = model.backbone.bottom_up.stages[0].weight.clone()
    if wrapper == "width":
        message = load_error(tmp_path / "R-50.pkl", checkpointer.load)
        assert "backbone.bottom_up.stem.weight expected (8, 3, 3, 3), got (16, 3, 3, 3)" in message
        assert torch.equal(model.backbone.bottom_up.stages[0].weight, before)
    else:
        checkpointer.load(str(tmp_path / "R-50.pkl"))
        assert (model.backbone.bottom_up.stem.weight == 0.5).all()


@pytest.mark.parametrize("format", [*FORMATS, "safetensors"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_file_is_rejected(format, fraction, tmp_path):
    weights = {f"{i}.weight": torch.randn(40, 40) for i in range(4)}
    if isinstance(format, int):
        weights = {key: value.numpy() for key, value in weights.items()}
    whole = safetensors.torch.save(weights) if format == "safetensors" else dump(weights, format)
    (tmp_path / "cut.pth").write_bytes(whole[: int(fraction * len(whole))])
    message = load_error(tmp_path / "cut.pth", Checkpointer(nn.Linear(2, 2)).load)
    assert "cut.pth is not a checkpoint that can be read" in message


OTHER_FILES = [b"\xff\xd8\xff\xe0 an image", b"<html>404</html>", b'{"model": 1}', b"\x00" * 100]
OTHER_FILES += [
    b"version https://git-lfs.github.com/spec",
    b"PK\x03\x04 no zip",
    b"(lp0\n.",
    b"\x80\x02}.",
]
OTHER_FILES += [
    struct.pack("<Q", 2**60) + b"{}",
    b"\x80\x02]q\x00h\x00a.",
    b"\x80\x02}q\x00U\x01ah\x00s.",
]


@pytest.mark.filterwarnings("ignore")
def test_files_of_other_types_are_rejected(tmp_path):
    program = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), program)
    for content in (*OTHER_FILES, program.getvalue()):
        (tmp_path / "other.pth").write_bytes(content)
        load_error(tmp_path / "other.pth", Checkpointer(nn.Linear(2, 2)).load)


def test_load_trusted_reads_files_that_load_safely_rejects(tmp_path):
    content = {"model": {"w": torch.ones(2)}, "args": types.SimpleNamespace(a=1)}
    for format in ("zip", "legacy", 4):
        (tmp_path / "a.pth").write_bytes(dump(content, format))
        assert "it would call " in load_error(tmp_path / "a.pth")
        assert load_trusted(str(tmp_path / "a.pth"))["args"].a == 1


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_attributes_of_a_dict_do_not_shadow_its_methods(format, tmp_path):
    weights = nn.Linear(2, 2).state_dict()
    for name in ("get", "values", "pop", "_metadata"):
        weights.__dict__[name] = "x"
    (tmp_path / "a.pth").write_bytes(dump({"model": weights, "__author__": "someone"}, format))
    model = nn.Linear(2, 2)
    Checkpointer(model).load(str(tmp_path / "a.pth"))
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize(
    "content",
    [
        {1: np.zeros(2)},
        {"blobs": [1], "a": np.zeros(2)},
        {"blobs": {1: np.zeros(2)}, "a": np.zeros(2)},
        {"model": {"a": np.zeros(2)}, "__author__": "x", "matching_heuristics": np.zeros(2)},
        {"weight": np.zeros((2, 2), complex), "bias": np.zeros(2)},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_dict_without_usable_weights_is_rejected_in_one_line(content, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(pickle.dumps(content))
    load_error(tmp_path / f"a{suffix}", Checkpointer(nn.Linear(2, 2)).load)
