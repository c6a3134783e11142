"""Fuzz target: files of weights, read as MODEL.WEIGHTS is.

A file is given as it is, or is a random pickle program, or holds a random checkpoint. Whatever it
is, it loads or is refused in one line that names it, the model of a refused one is untouched, and
nothing in it is run.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import PREFIXES, WRAPPERS
from fcos_d2.checkpoint.formats import LAYOUTS
from fcos_d2.checkpoint.pickles import ALLOWED

from ..modeling.tiny import tiny_fcos
from .choices import HOSTILE, Choices, spoil
from .oracle import only_reading, result_or_refusal, scratch

# ---- Files as programs ----

CALLABLE = (
    *ALLOWED,
    *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch.FloatTensor"),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor"),
    *("os.system", "builtins.eval", "builtins.exec", "torch.load", "posix.system", "nt.system"),
)
SIMPLE = (
    *(pickle.NONE, pickle.NEWTRUE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
    *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.LIST),
    *(pickle.DICT, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.POP),
    *(pickle.POP_MARK, pickle.DUP, pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.NEWOBJ_EX),
    *(pickle.BINPERSID, pickle.MEMOIZE, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.STACK_GLOBAL, pickle.OBJ, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.STOP),
)
TEXTS = (
    *("model", "a.weight", "storage", "0", "cpu", "f4", "<", "|", "|O", "head.cls_logits.weight"),
    *("touch trace", "latin1", "C", "u1", "f16", "meta", "cuda:0", "\xe9", "os", "system", "data"),
)
SIZES = (0, 1, 2, 4, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def program(choices: Choices) -> bytes:
    """A pickle of up to 255 instructions, most of them of some sense."""
    code = b"\x80" + bytes([choices.of((2, 0, 4, 5))])
    for _ in range(choices.number(256)):
        kind = choices.of(
            ("simple", "global", "text", "number", "memo", "bytes", "array", "tensor")
        )
        code += _instruction(kind, choices)
    return code + choices.of((pickle.STOP, b"", pickle.STOP + b"behind"))


def _instruction(kind: str, choices: Choices) -> bytes:
    if kind == "simple":
        return choices.of(SIMPLE) * choices.of((1, 1, 1, 2, 500))
    if kind == "global":
        module, _, name = choices.of(CALLABLE).rpartition(".")
        return f"c{module}\n{name}\n".encode()
    if kind == "text":
        text = choices.of(TEXTS).encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if kind == "number":
        return choices.of(
            (
                pickle.BININT + struct.pack("<I", choices.of(SIZES)),
                pickle.BININT1 + bytes([choices.number(256)]),
                pickle.BINFLOAT + struct.pack(">d", choices.of((0.0, np.nan, np.inf))),
                pickle.LONG1 + b"\x09" + b"\xff" * 9,
                pickle.INT + b"9" * 5000 + b"\n",
            )
        )
    if kind == "memo":
        code = choices.of((pickle.LONG_BINPUT, pickle.LONG_BINGET))
        return code + struct.pack("<I", choices.of(SIZES))
    if kind == "bytes":
        code = choices.of((pickle.BINBYTES, pickle.BINSTRING, pickle.BINUNICODE))
        return code + struct.pack("<I", choices.of(SIZES[:6])) + bytes(choices.number(20))
    whole = pickle.dumps(np.ones(2, np.float32), 2) if kind == "array" else TENSOR
    return whole[2:-1]


# The instructions that stand for one float32 tensor of 4 numbers, with the head and the end.
TENSOR = pickle.dumps((), 2)[:2] + (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x04\x85K\x01\x85\x89ccollections\n"
    b"OrderedDict\n)RtR."
)


def archive(code: bytes) -> bytes:
    """The zip file that torch.save makes of a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, content in (("data.pkl", code), ("version", b"3\n"), ("data/0", bytes(16))):
            writer.writestr(f"archive/{name}", content)
    return file.getvalue()


def legacy(code: bytes) -> bytes:
    """The file that torch.save made before 1.6."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    head += pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return head + code + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def random_program(choices: Choices) -> bytes:
    """A program alone, or as torch.save would have wrapped it."""
    wrap = choices.of((bytes, archive, legacy, lambda code: legacy(code) + archive(b"N.")))
    return wrap(program(choices))


# ---- Files with checkpoints ----

SHAPES = ((4,), (1,), (), (0,), (4, 4, 3, 3), (3, 32, 3, 3), (80,), (91, 2), (1, 1, 1, 1, 1))
TENSORS = (
    lambda shape: torch.ones(shape),
    lambda shape: torch.full(shape, torch.nan),
    lambda shape: torch.ones(shape, dtype=torch.float16),
    lambda shape: torch.ones(shape, dtype=torch.int64),
    lambda shape: torch.ones(shape, dtype=torch.bool),
    lambda shape: torch.ones(shape, dtype=torch.complex64),
    lambda shape: torch.ones(shape, dtype=torch.float8_e4m3fn),
    lambda shape: torch.ones(shape, device="meta"),
    lambda shape: torch.ones(shape).to_sparse(),
    lambda shape: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8),
    lambda shape: torch.ones(()).expand(shape),
    lambda shape: nn.Parameter(torch.ones(shape)),
    lambda shape: torch.ones(()).expand(*shape, 2**20, 2**20),
)
LEAVES = ("weight", "bias", "running_var", "running_mean", "num_batches_tracked", "scale", "")
NUMBERS = ("0", "1", "2", "3", "9", "77", "9" * 5000, "\u0661")
META = ("", "norm_on_bbox=True", "x=dict(mean=[1, 2, 3], std=[1, 1, 1])", "(" * 300, "a=-" * 900)


class Small(nn.Module):
    """Names of a detector, as few as there can be."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3)})
        self.head = nn.ModuleDict({n: nn.Conv2d(4, 3, 3) for n in ("cls_logits", "ctrness")})


@cache
def reader(is_detector: bool, reset_class_layer: bool) -> Checkpointer:
    """What reads weights into a model of few channels, which is a real one for the details."""
    model = tiny_fcos(levels=("p3",)).eval() if is_detector else Small()
    checkpointer = Checkpointer(model)
    checkpointer.reset_class_layer = reset_class_layer
    return checkpointer


def tensor(choices: Choices) -> object:
    """A tensor of any kind, or something that is none."""
    make = choices.of((*TENSORS, None))
    shape = choices.of(SHAPES)
    return choices.of(HOSTILE) if make is None else make(shape)


def checkpoint(choices: Choices) -> bytes:
    """Weights that may be of any implementation, with anything around them."""
    wanted = reader(choices.of((False, True)), True).model.state_dict()
    kind = choices.of(("complete", "ours", *LAYOUTS))
    weights = dict(wanted) if kind == "complete" else {}
    markers = () if isinstance(kind, str) else choices.of(kind.markers)
    weights |= dict.fromkeys(markers, torch.ones(3, 32, 3, 3))
    for _ in range(choices.number(6)):
        weights[_name(kind, choices, list(wanted))] = tensor(choices)
    content: object = spoil(choices, weights, most=2) if choices.number(2) else weights
    for _ in range(choices.number(4)):
        meta = {"cfg": choices.of((*META, *HOSTILE)), "epoch": 3}
        wrapper = choices.of((*WRAPPERS, "blobs", "matching_heuristics"))
        content = {wrapper: content, "meta": meta, "__author__": choices.of(("someone", "Caffe2"))}
    save = choices.of((torch.save, _save_legacy, _save_pickle))
    file = io.BytesIO()
    save(content, file)
    return file.getvalue()


def _name(kind, choices: Choices, names: list[str]) -> str:
    template = choices.of(names) if isinstance(kind, str) else choices.of(kind.modules)[0]
    name = re.sub(r"\{.*?\}", lambda _: choices.of(NUMBERS), template).replace("**", "stem")
    leaf = "" if isinstance(kind, str) else "." + choices.of(LEAVES)
    return choices.of(("", *PREFIXES, "\n")) + name + leaf


def _save_legacy(content: object, file: io.BytesIO) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def _save_pickle(content: object, file: io.BytesIO) -> None:
    """With arrays in place of the tensors that can be arrays."""

    def converted(value):
        if isinstance(value, dict):
            return OrderedDict((key, converted(entry)) for key, entry in value.items())
        plain = type(value) is Tensor and value.layout == torch.strided and not value.is_quantized
        if plain and value.device.type == "cpu" and value.numel() < 10_000:
            return value.numpy() if value.dtype != torch.float8_e4m3fn else 1
        return None if isinstance(value, Tensor) else value

    pickle.dump(converted(content), file, protocol=2)


# ---- The check ----


def check(data: bytes) -> None:
    """One file of weights."""
    choices = Choices(data)
    make = choices.of((Choices.rest, random_program, checkpoint))
    path = scratch(f"weights{choices.of(('.pth', '.pkl', '.pyth'))}")
    checkpointer = reader(choices.of((False, False, False, True)), choices.of((True, False)))
    path.write_bytes(make(choices))
    state = [*checkpointer.model.parameters(), *checkpointer.model.buffers()]
    before = [value._version for value in state]
    has_loaded = False
    with result_or_refusal(str(path)), only_reading():
        checkpointer.load(str(path))
        has_loaded = True
    unchanged = before == [value._version for value in state]
    assert has_loaded or unchanged, "a refused file changed the model"
