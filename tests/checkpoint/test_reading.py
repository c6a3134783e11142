"""Files of weights are read without running what is in them, or are refused in one line."""

import argparse
import builtins
import collections
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fcos_d2 import InputError
from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.pickles import Record
from fcos_d2.checkpoint.reading import load_safely, load_trusted

from ..fuzz.weights import archive, legacy
from ..modeling.tiny import tiny_fcos

pytest_plugins = ["tests.script"]


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path, call=os.system, arguments=None):
        self._call, self._arguments = call, arguments or (f"touch {path}",)

    def __reduce__(self):
        return self._call, self._arguments


def attacks(trace):
    """Objects that run code when they are unpickled, in the ways that are in use."""
    code = f"open({str(trace)!r}, 'w')"
    return {
        "system": Malicious(trace),
        "eval": Malicious(trace, eval, (code,)),
        "exec": Malicious(trace, exec, (code,)),
        "open": Malicious(trace, open, (str(trace), "w")),
        "torch": Malicious(trace, torch.hub.load, (str(trace.parent), "entry")),
        "nested": {"head.cls_logits.weight": Malicious(trace)},
        "storage": Malicious(
            trace, torch.storage._load_from_bytes, (saved(Malicious(trace), pickle.dumps),)
        ),
    }


def saved(content, how) -> bytes:
    """What torch.save or pickle.dumps makes of ``content``."""
    if how is pickle.dumps:
        return pickle.dumps(content, protocol=2)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    return file.getvalue()


@pytest.mark.parametrize("how", ["zip", "legacy", pickle.dumps], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("attack", attacks(Path("trace")))
def test_a_malicious_pickle_runs_nothing_and_is_refused_in_one_line(how, suffix, attack, tmp_path):
    trace = tmp_path / "trace"
    content = {"model": {"a.weight": torch.zeros(2)}, "extra": attacks(trace)[attack]}
    if how is pickle.dumps:
        content["model"] = {"a.weight": np.zeros(2, np.float32)}
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(saved(content, how))
    with pytest.raises(InputError) as caught:
        Checkpointer(nn.Linear(2, 2)).load(str(path))
    message = str(caught.value)
    assert not trace.exists()
    assert "\n" not in message and len(message) < 600
    assert f"{path} would call " in message
    assert f"python tools/convert_weights.py --trust-pickle {path} OUT" in message


@pytest.mark.parametrize("arguments", [(), ("--eval-only",), ("--resume",)])
def test_train_net_refuses_a_malicious_file_in_one_line(script, tmp_path, arguments):
    torch.save({"model": Malicious(tmp_path / "trace")}, tmp_path / "evil.pth")
    result = script(*arguments, "MODEL.WEIGHTS", "evil.pth")
    assert not (tmp_path / "trace").exists()
    assert result.status == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: evil.pth would call ")


@pytest.mark.parametrize("text", ["SEED: {}", "_BASE_: base.yaml"], ids=["file", "its base"])
def test_a_config_that_calls_python_is_refused_in_one_line(script, text):
    attack = "!!python/object/apply:os.system ['touch trace']"
    (script.folder / "base.yaml").write_text(f"SEED: {attack}")
    (script.folder / "evil.yaml").write_text(text.format(attack))
    result = script(config="evil.yaml")
    assert not (script.folder / "trace").exists()
    assert result.status == 2 and "Traceback" not in result.err
    assert "python/object/apply:os.system" in result.err.splitlines()[-1]


def test_the_attacks_of_this_test_are_real(tmp_path):
    for name in ("system", "eval", "open"):
        trace = tmp_path / name
        (tmp_path / "evil.pkl").write_bytes(saved(attacks(trace)[name], pickle.dumps))
        load_trusted(str(tmp_path / "evil.pkl"))
        assert trace.exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "builtins.exec", "numpy.load", "torch.load", "operator.call"]
    + ["fcos_d2.checkpoint.reading.load_trusted", "fcos_d2.checkpoint.pickles.ALLOWED"],
)
def test_nothing_but_the_named_calls_can_be_named(name, tmp_path):
    """By the opcodes GLOBAL and STACK_GLOBAL."""
    module, _, function = name.rpartition(".")
    old = f"c{module}\n{function}\n.".encode()
    new = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, function)
    )
    for program in (old, new + b"\x93."):
        (tmp_path / "program.pkl").write_bytes(program)
        with pytest.raises(InputError, match=f"would call {name} "):
            load_safely(str(tmp_path / "program.pkl"))


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote str."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "float64, big-endian": np.linspace(0, 1, 5).astype(">f8"),
    "float16": np.array([[0.5, -2]], np.float16),
    "int64": np.array([2**40, -1]),
    "bool": np.array([True, False]),
    "permuted": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "column-major": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "no dimension": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "python 2", "torch"])
def test_arrays_come_back_as_tensors(name, protocol, tmp_path):
    content = {"model": {"w": ARRAYS[name]}, "number": np.float64(0.25)}
    path = tmp_path / "arrays.pkl"
    if protocol == "torch":
        torch.save(content, path)
    elif protocol == "python 2":
        with open(path, "wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_safely(str(path))
    tensor, expected = loaded["model"]["w"], ARRAYS[name]
    assert tensor.shape == expected.shape and loaded["number"] == 0.25
    assert tensor.numpy().dtype == expected.dtype.newbyteorder("=")
    assert np.array_equal(tensor.numpy(), expected)


def test_arrays_are_found_in_all_containers(tmp_path):
    array = np.arange(3.0)
    content = {"state": ("MT19937", [array, {"pos": array}]), "w": collections.OrderedDict(a=array)}
    torch.save(content, tmp_path / "arrays.pth")
    loaded = load_safely(str(tmp_path / "arrays.pth"))
    first, second = loaded["state"][1]
    for tensor in (first, second["pos"], loaded["w"]["a"]):
        assert torch.equal(tensor, torch.arange(3, dtype=torch.float64))


def test_weights_that_are_tied_stay_tied(tmp_path):
    array, tensor = np.arange(3.0), torch.arange(4.0)
    (tmp_path / "tied.pkl").write_bytes(pickle.dumps({"a": array, "b": array}))
    loaded = load_safely(str(tmp_path / "tied.pkl"))
    assert loaded["a"] is loaded["b"]
    for how in ("zip", "legacy"):
        (tmp_path / "tied.pth").write_bytes(saved({"a": tensor, "b": tensor[1:]}, how))
        loaded = load_safely(str(tmp_path / "tied.pth"))
        loaded["a"][1] = 7
        assert loaded["b"].tolist() == [7, 2, 3]


def with_note(tensor):
    tensor.note = "an attribute"
    return tensor


TORCH = {
    "views": lambda: [(x := torch.randn(2, 3, 4)), x.mT, x[1, 1:, ::2], torch.ones(()).expand(4)],
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "empty": lambda: [(x := torch.empty(0)), x.view(torch.int32), torch.empty(0, 3)],
    "parameters": lambda: [nn.Parameter(torch.ones(2)), with_note(nn.Parameter(torch.ones(2)))],
    "attributes": lambda: with_note(torch.ones(2)),
    "a model": lambda: nn.BatchNorm2d(3).state_dict(),
    "an optimizer": lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1).state_dict(),
    "dtypes": lambda: [
        torch.ones(4).to(getattr(torch, name))
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")
        + ("uint8", "bool", "complex64", "complex128")
    ],
    "new dtypes": lambda: [torch.ones(4).to(getattr(torch, n)) for n in ("uint16", "float8_e5m2")],
}


def assert_same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.stride() == theirs.stride() and ours.tolist() == theirs.tolist()
    elif isinstance(theirs, (dict, list)):
        assert len(ours) == len(theirs)
        for key, value in theirs.items() if isinstance(theirs, dict) else enumerate(theirs):
            assert_same(ours[key], value)
    else:
        assert ours == theirs


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("name", TORCH)
def test_what_torch_saved_comes_back(name, how, tmp_path):
    content = TORCH[name]()
    (tmp_path / "a.pth").write_bytes(saved(content, how))
    assert_same(load_safely(str(tmp_path / "a.pth")), content)


def rewritten(content: bytes, change) -> bytes:
    """A zip file of torch.save after ``change(writer, name, record)`` for each of its records."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as reader, zipfile.ZipFile(file, "w") as writer:
        for name in reader.namelist():
            change(writer, name, reader.read(name))
    return file.getvalue()


def test_numbers_of_the_other_byte_order_are_read(tmp_path):
    values = torch.tensor([1.5, -2.0])

    def change(writer, name, record):
        if name.endswith("/byteorder"):
            record = b"big"
        if name.endswith("/data/0"):
            record = values.numpy().astype(">f4").tobytes()
        writer.writestr(name, record)

    (tmp_path / "a.pth").write_bytes(rewritten(saved(values, "zip"), change))
    assert torch.equal(load_safely(str(tmp_path / "a.pth")), values)


def test_wrong_sums_of_records_are_not_looked_at(tmp_path):
    """torch.save writes them if it is told to save time."""
    content = saved(torch.arange(4.0), "zip")
    with zipfile.ZipFile(io.BytesIO(content)) as reader:
        sums = [struct.pack("<L", entry.CRC) for entry in reader.infolist() if entry.CRC]
    for correct in sums:
        content = content.replace(correct, bytes(4))
    (tmp_path / "a.pth").write_bytes(content)
    assert load_safely(str(tmp_path / "a.pth")).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "array",
    [np.array([{}], object), np.array(["text"]), np.zeros(2, [("a", "f4")]), np.zeros(2, "M8[s]")],
)
def test_arrays_of_other_than_numbers_are_refused(array, tmp_path):
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"w": array}))
    with pytest.raises(InputError, match="no checkpoint that can be read .*dtype"):
        load_safely(str(tmp_path / "arrays.pkl"))


def test_arrays_whose_bytes_do_not_fill_their_shape_are_refused(tmp_path):
    program = pickle.dumps(np.arange(4, dtype=np.float32), protocol=2)
    assert b"K\x04\x85" in program  # the shape (4,)
    (tmp_path / "arrays.pkl").write_bytes(program.replace(b"K\x04\x85", b"K\x7f\x85"))
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        load_safely(str(tmp_path / "arrays.pkl"))


def test_records_beside_the_weights_are_read_past(tmp_path, monkeypatch):
    """As torchvision's script and mmengine write them."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    buffer.mean = lambda self: 0
    monkeypatch.setattr(
        sys.modules["mmengine.logging.history_buffer"], "HistoryBuffer", buffer, raising=False
    )
    history = buffer()
    history.values = np.array([1.0, 2.0])
    history.methods = collections.OrderedDict(
        mean=Malicious("", builtins.getattr, (buffer, "mean"))
    )
    content = {
        "state_dict": {"w.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=0.02, device="cuda"),
        "message_hub": {"log_scalars": {"loss": history}},
    }
    torch.save(content, tmp_path / "trained.pth")
    monkeypatch.delitem(sys.modules, "mmengine.logging.history_buffer")
    loaded = load_safely(str(tmp_path / "trained.pth"))
    assert torch.equal(loaded["state_dict"]["w.weight"], torch.ones(2))
    assert type(loaded["args"]) is type(loaded["message_hub"]["log_scalars"]["loss"]) is Record


def test_reading_leaves_torchs_own_list_of_what_is_safe_alone(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace()}, tmp_path / "a.pth")
    load_safely(str(tmp_path / "a.pth"))
    assert set(torch.serialization.get_safe_globals()) == before


def imagenet_weights(model) -> dict:
    """The backbone's weights as the model zoo's files have them: arrays, without a prefix."""
    prefix = "backbone.bottom_up."
    return {
        key.removeprefix(prefix): np.full(value.shape, 0.5, np.float32)
        for key, value in model.state_dict().items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("zoo", [True, False])
def test_a_backbone_of_the_model_zoo_is_loaded_by_name(zoo, tmp_path):
    model = tiny_fcos()
    content = imagenet_weights(model)
    if zoo:
        content = {"model": content, "__author__": "Torchvision", "matching_heuristics": True}
    with open(tmp_path / "R-50.pkl", "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = True
    checkpointer.load(str(tmp_path / "R-50.pkl"))
    assert (model.backbone.bottom_up.stem.weight == 0.5).all()


def test_a_backbone_of_another_width_is_refused_with_the_tensors(tmp_path):
    model = tiny_fcos()
    content = imagenet_weights(model)
    content["stem.weight"] = np.zeros((16, 3, 3, 3), np.float32)
    content = {"model": content, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = True
    before = model.backbone.bottom_up.stages[0].weight.clone()
    with pytest.raises(InputError) as caught:
        checkpointer.load(str(tmp_path / "R-50.pkl"))
    expected = "backbone.bottom_up.stem.weight expected (8, 3, 3, 3), got (16, 3, 3, 3)"
    assert expected in str(caught.value)
    assert torch.equal(model.backbone.bottom_up.stages[0].weight, before)


@pytest.mark.parametrize("how", ["zip", "legacy", pickle.dumps], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_file_that_is_cut_off_is_refused(how, share, tmp_path):
    content = {"model": {f"{i}.weight": torch.randn(40, 40) for i in range(4)}}
    if how is pickle.dumps:
        content["model"] = {key: value.numpy() for key, value in content["model"].items()}
    whole = saved(content, how)
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError) as caught:
        Checkpointer(nn.Linear(2, 2)).load(str(path))
    assert "\n" not in str(caught.value)
    assert f"{path} is no checkpoint that can be read" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xd8\xff\xe0 a picture", b"<html>404</html>", b"version https://git-lfs.github.com/spec"]
    + [b"\x89PNG\r\n\x1a\n", b'{"model": 1}', b"\x00" * 100, b"PK\x03\x04 no zip", b"(lp0\n."],
)
def test_a_foreign_file_is_refused(content, tmp_path):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(InputError) as caught:
        Checkpointer(nn.Linear(2, 2)).load(str(tmp_path / "other.pth"))
    assert "other.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_torchscript_archive_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pth"))
    with pytest.raises(InputError, match="script.pth is no checkpoint that can be read"):
        load_safely(str(tmp_path / "script.pth"))


def test_trusted_files_are_read_whatever_is_in_them(tmp_path):
    content = {"model": {"w": torch.ones(2)}, "args": types.SimpleNamespace(a=1)}
    torch.save(content, tmp_path / "torch.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content))
    for name in ("torch.pth", "plain.pkl"):
        with pytest.raises(InputError, match="would call (types.SimpleNamespace|torch)"):
            load_safely(str(tmp_path / name))
        assert load_trusted(str(tmp_path / name))["args"].a == 1


BESIDE = {
    "keys": {("a", 1): 1, 2**40: 2, 0.5: 3, np.int64(3): 4, "b": 5, 7: 6},
    "many keys": {n: None for n in range(100_000)},
    "sets": [{"a", "b"}, {1, 2}, set()],
    "complex": 1 + 2j,
    "devices": [torch.device("cpu"), torch.device("cuda", 1)],
    "bytes": b"abc",
}


@pytest.mark.parametrize("how", ["torch", 3, 4, 5])
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_weights_comes_back(name, how, tmp_path):
    path, content = tmp_path / "a.pth", BESIDE[name]
    if how == "torch":
        torch.save(content, path)
        content = content.decode() if isinstance(content, bytes) else content
    else:
        path.write_bytes(pickle.dumps(content, protocol=how))
    loaded = load_safely(str(path))
    assert loaded == content and type(loaded) is type(content)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_legacy_files_of_any_protocol_are_read(protocol, tmp_path):
    options = {"_use_new_zipfile_serialization": False, "pickle_protocol": protocol}
    torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pth", **options)
    assert load_safely(str(tmp_path / "a.pth"))["w"].tolist() == [0, 1, 2]
    assert load_trusted(str(tmp_path / "a.pth"))["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["bits8", "float4_e2m1fn_x2"])
def test_tensors_of_parts_of_bytes_are_refused(dtype, tmp_path):
    torch.save(torch.empty(2, dtype=torch.uint8).view(getattr(torch, dtype)), tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"would call torch.{dtype}"):
        load_safely(str(tmp_path / "a.pth"))


# ---- Programs that cost more than their size, or make no sense ----


def text(value: str) -> bytes:
    """The instruction for a text."""
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


TWICE = b"N\x85" + b"2\x86" * 100  # a tuple that has the one before twice, 100 times
# A list that a tuple is put into, and a call by an old instruction that makes a tuple of it.
REMADE = b"]q\x00" + TWICE + b"a0(ctorch._tensor\n_rebuild_from_type_v2\ncbuiltins\nset\nNh\x00No"
REMADE_BY_CALL = REMADE.replace(b"0(c", b"0c").replace(b"cbuiltins", b"(cbuiltins")[:-1] + b"tR"
SCALAR = b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
PROGRAMS = {
    "tuples as keys": (b"}" + TWICE + b"Ns", "a key of a dict"),
    "tuples as keys, by setitems": (b"}(" + TWICE + b"Nu", "a key of a dict"),
    "tuples as keys of a pair": (
        b"ccollections\nOrderedDict\n]](" + TWICE + b"Nea\x85R",
        "a key of an OrderedDict",
    ),
    "tuples that were built": (b"}" + TWICE + b"Nb" + b"Ns", "a key of a dict"),
    "tuples in a set": (b"\x8f(" + TWICE + b"\x90", "a key of a dict"),
    "tuples remade by an old instruction": (b"}" + REMADE + b"Ns", "it makes an object by OBJ"),
    "tuples remade by a call": (b"}" + REMADE_BY_CALL + b"Ns", "not made as torch.save has it"),
    "a call by another old instruction": (b"(icollections\nOrderedDict\n", "an object by INST"),
    "many large numbers as keys": (
        b"}("
        + b"".join(b"\x8a\x08" + struct.pack("<q", n << 40) + b"N" for n in range(2000))
        + b"u",
        "more than 1000 keys of dicts are tuples or large numbers",
    ),
    "many fractions as keys": (
        b"}(" + b"".join(b"G" + struct.pack(">d", n + 0.5) + b"N" for n in range(2000)) + b"u",
        "more than 1000 keys of dicts are tuples or large numbers",
    ),
    "a long text as a key": (b"}" + text("a" * 20_000) + b"Ns", "a key of a dict .* too long"),
    "long numbers as keys": (b"}\x8a\x0a" + b"\x01" * 10 + b"Ns", "a key of a dict"),
    "a dtype of lists": (
        b"]q\x00" + b"](h\x00h\x00eq\x00" * 100 + SCALAR + b"h\x00\x85RU\x04abcd\x86R",
        "dtype",
    ),
    "many arguments": (b"cargparse\nNamespace\n(" + b"N" * 1000 + b"tR", "arguments"),
    "another codec": (
        b"c_codecs\nencode\n" + text("a" * 999) + text("punycode") + b"\x86R",
        "in latin1, not in punycode",
    ),
    "a slot far away": (b"Nr\xff\xff\xff\x7f", "slot 2147483647 of its memo"),
    "a mark as an object": (b"(\x85", "do not fit together"),
    "nothing on the stack": (b"0", "do not fit together"),
    "an unknown slot": (b"h\x07", "do not fit together"),
    "a function that changes": (
        b"cbuiltins\nbytes\nN}" + text("__defaults__") + b")s\x86b",
        "changes what is not its own",
    ),
}
WRAPPERS = {
    "pickle": bytes,
    "zip": archive,
    "legacy": legacy,
    "legacy with a zip behind": lambda code: legacy(code) + archive(b"\x80\x02}."),
    "zip with a legacy behind": lambda code: archive(code) + legacy(b"\x80\x02}."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_costly_or_broken_program_is_refused_in_every_format(name, wrapper, tmp_path):
    code, cause = PROGRAMS[name]
    (tmp_path / "a.pth").write_bytes(WRAPPERS[wrapper](b"\x80\x02" + code + b"."))
    with pytest.raises(InputError, match=f"a.pth is no checkpoint that can be read .*{cause}"):
        load_safely(str(tmp_path / "a.pth"))


def test_a_mark_can_be_popped(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02N(0.")
    assert load_safely(str(tmp_path / "a.pkl")) is None


@pytest.mark.parametrize("wrapper", ["pickle", "zip"])
def test_a_call_allocates_nothing(wrapper, tmp_path):
    for name in ("builtins\nbytearray", "builtins\ncomplex", "torch\ndevice"):
        code = b"\x80\x02c" + name.encode() + b"\nJ\x00\x00\x00\x04\x85R."  # of 2**26
        (tmp_path / "a.pth").write_bytes(WRAPPERS[wrapper](code))
        assert type(load_safely(str(tmp_path / "a.pth"))) is Record


def test_pairs_of_an_ordered_dict_are_taken_once(tmp_path):
    """As Python 2 wrote them; named often, a list of many would make many dicts."""
    make = b"ccollections\nOrderedDict\nh\x00R"
    code = b"\x80\x02](](" + text("a") + b"K\x01ee\x85q\x000](" + make * 2 + b"e."
    (tmp_path / "a.pkl").write_bytes(code)
    assert load_safely(str(tmp_path / "a.pkl")) == [{"a": 1}, {}]


DATA = bytes(4000)


class SharedBytes:
    """Pickled as an array whose bytes are those of all others."""

    def __reduce__(self):
        function, arguments, state = np.zeros(1000, np.float32).__reduce__()
        return function, arguments, (*state[:4], DATA)


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_that_share_their_bytes_are_no_more_than_the_file(protocol, tmp_path):
    content = {i: SharedBytes() for i in range(10)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(InputError, match="hold more bytes than the file"):
        load_safely(str(tmp_path / "a.pkl"))


def test_records_that_share_their_bytes_are_no_more_than_the_file(tmp_path):
    def change(writer, name, record):
        folder, _, key = name.rpartition("/data/")
        if key == "0" or not key.isdigit():
            writer.writestr(name, record)
        else:  # one more entry of the directory for what is there
            entry = writer.getinfo(f"{folder}/data/0")
            shared = zipfile.ZipInfo(name)
            for field in ("header_offset", "CRC", "file_size", "compress_size"):
                setattr(shared, field, getattr(entry, field))
            writer.filelist.append(shared)

    content = saved([torch.zeros(10_000) for _ in range(10)], "zip")
    small = rewritten(content, change)
    assert len(small) < len(content) / 5
    (tmp_path / "a.pth").write_bytes(small)
    with pytest.raises(InputError, match="hold more bytes than the file"):
        load_safely(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_names_of_records_are_exact(how, tmp_path):
    """Else what is stored once would be read once for each way to write its name."""
    (tmp_path / "a.pth").write_bytes(saved(torch.zeros(2), how).replace(b"cpu", b"CPU"))
    assert load_safely(str(tmp_path / "a.pth")).tolist() == [0, 0]  # where it was is not used
    content = rewritten(
        saved(torch.zeros(2), "zip"),
        lambda writer, name, record: writer.writestr(name.replace("/data/0", "/DATA/0"), record),
    )
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(InputError, match="it has no data/0"):
        load_safely(str(tmp_path / "a.pth"))


def test_a_compressed_file_is_refused(tmp_path):
    def change(writer, name, record):
        writer.writestr(name, record, compress_type=zipfile.ZIP_DEFLATED)

    (tmp_path / "a.pth").write_bytes(rewritten(saved(torch.zeros(9999), "zip"), change))
    with pytest.raises(InputError, match="it is compressed"):
        load_safely(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("size, stride", [((9,), (1,)), ((1,) * 21, (1,) * 21), ((2**62,), (4,))])
@pytest.mark.parametrize("wrapper", [archive, legacy])
def test_tensors_beyond_their_numbers_are_refused(wrapper, size, stride, tmp_path):
    def numbers(values):
        code = b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values)
        return b"(" + code + b"t"

    storage = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04"
    arguments = b"(" + storage + b"tQK\x00" + numbers(size) + numbers(stride)
    code = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89)tR"
    (tmp_path / "a.pth").write_bytes(wrapper(b"\x80\x02" + code + b"."))
    with pytest.raises(InputError, match="out of bounds|21 dimensions|overflow"):
        load_safely(str(tmp_path / "a.pth"))


# ---- What is no dict of weights ----


@pytest.mark.parametrize("how", ["zip", "legacy", pickle.dumps], ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_attributes_of_a_dict_hide_none_of_its_methods(suffix, how, tmp_path):
    values = {"weight": torch.full((2, 2), 3.0), "bias": torch.zeros(2)}
    if how is pickle.dumps:
        values = {key: value.numpy() for key, value in values.items()}
    weights = collections.OrderedDict(values)
    for name in ("get", "values", "pop", "_metadata"):
        weights.__dict__[name] = "x"
    path = tmp_path / f"a{suffix}"
    path.write_bytes(saved({"model": weights, "__author__": "someone"}, how))
    model = nn.Linear(2, 2)
    Checkpointer(model).load(str(path))
    assert (model.weight == 3).all()


@pytest.mark.parametrize(
    "content",
    [
        {1: np.zeros(2)},
        {"blobs": [1], "a": np.zeros(2)},
        {"blobs": {1: np.zeros(2)}, "a": np.zeros(2)},
        {"model": {"a": np.zeros(2)}, "__author__": "x", "matching_heuristics": np.zeros(2)},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_a_dict_of_something_else_is_refused_in_one_line(content, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"a{suffix}") as caught:
        Checkpointer(nn.Linear(2, 2)).load(str(tmp_path / f"a{suffix}"))
    assert "\n" not in str(caught.value)
