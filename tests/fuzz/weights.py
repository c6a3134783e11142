"""Fuzz target: weight files, read like MODEL.WEIGHTS.

A file holds a random checkpoint in one of the supported formats, and may be truncated or damaged.
It must load, or be rejected with a one-line error that names it, without changing the model or
running code.
"""

from __future__ import annotations

import io
import pickle
from functools import cache

import safetensors.torch
import torch
from torch import Tensor, nn

from fcos_d2.checkpoint import Checkpointer
from fcos_d2.checkpoint.conversion import PREFIXES, WRAPPERS
from fcos_d2.checkpoint.formats import FORMATS

from ..modeling.tiny import tiny_fcos
from .choices import HOSTILE, Choices, corrupt
from .oracle import allow_input_error, forbid_side_effects, scratch

SHAPES = ((4,), (1,), (), (0,), (4, 4, 3, 3), (3, 32, 3, 3), (80,), (91, 2), (1, 1, 1, 1, 1))
TENSORS = (
    lambda shape: torch.ones(shape),
    lambda shape: torch.full(shape, torch.nan),
    lambda shape: torch.ones(shape, dtype=torch.float16),
    lambda shape: torch.ones(shape, dtype=torch.int64),
    lambda shape: torch.ones(shape, dtype=torch.complex64),
    lambda shape: torch.ones(shape, dtype=torch.float8_e4m3fn),
    lambda shape: torch.ones(shape, device="meta"),
    lambda shape: torch.ones(shape).to_sparse(),
    lambda shape: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8),
    lambda shape: nn.Parameter(torch.ones(shape)),
    lambda shape: torch.ones(()).expand(*shape, 2**20, 2**20),
    None,  # no tensor
)
LEAVES = ("weight", "bias", "running_var", "running_mean", "num_batches_tracked", "scale", "")
META = ("", "norm_on_bbox=True", "x=dict(mean=[1, 2, 3], std=[1, 1, 1])", "mean=[[[", "std=[-.-]")


@cache
def reader(reset_class_layer: bool) -> Checkpointer:
    """Returns a Checkpointer of a real model with few channels."""
    checkpointer = Checkpointer(tiny_fcos(levels=("p3",)).eval())
    checkpointer.reset_class_layer = reset_class_layer
    return checkpointer


def checkpoint(choices: Choices) -> object:
    """Returns weights of any implementation, in arbitrary wrappers."""
    state = reader(True).model.state_dict()
    known = choices.of((None, *FORMATS))
    modules = list(known.modules.items()) if known else [(key, "") for key in state]
    weights = dict(state) if choices.number(2) else {}
    for theirs, ours in modules if known else ():
        if ours in ("head", "head.cls_logits", "head.ctrness"):  # these identify the format
            leaves = ("cls_logits.weight", "ctrness.weight") if ours == "head" else ("weight",)
            weights |= {f"{theirs}.{leaf}": torch.ones(3, 32, 3, 3) for leaf in leaves}
    for _ in range(choices.number(6)):
        name = choices.of(("", *PREFIXES, "\n")) + choices.of(modules)[0] + "."
        make, shape = choices.of(TENSORS), choices.of(SHAPES)
        weights[name + choices.of(LEAVES)] = make(shape) if make else choices.of(HOSTILE)
    content: object = corrupt(choices, weights, max_changes=2) if choices.number(2) else weights
    for _ in range(choices.number(4)):
        wrapper = choices.of((*WRAPPERS, "matching_heuristics"))
        meta = {"cfg": choices.of((*META, *HOSTILE))}
        content = {wrapper: content, "meta": meta, "__author__": choices.of(("someone", "Caffe2"))}
    return content


def save(content: object, how: str) -> bytes:
    """Serializes ``content`` in one of the file formats, without what it cannot hold."""

    def array(value: object) -> object:
        if isinstance(value, dict):
            return {key: array(entry) for key, entry in value.items()}
        if not isinstance(value, Tensor):
            return value
        try:
            return value.detach().numpy() if value.numel() < 10_000 else None
        except (RuntimeError, TypeError):  # sparse, quantized, meta or float8
            return None

    if how == "safetensors":
        pairs = content.items() if isinstance(content, dict) else ()
        plain = {k: v for k, v in pairs if isinstance(v, Tensor) and array(v) is not None}
        names = {k: str(k).encode(errors="replace").decode() for k in plain}  # UTF-8 only
        return safetensors.torch.save({names[k]: v.clone() for k, v in plain.items()})
    if how == "pickle":
        return pickle.dumps(array(content), protocol=2)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=how == "zip")
    return file.getvalue()


def check(data: bytes) -> None:
    """Checks one weight file."""
    choices = Choices(data)
    how = choices.of(("zip", "legacy", "pickle", "safetensors"))
    content = bytearray(save(checkpoint(choices), how))
    for _ in range(choices.number(3) if how != "pickle" else 0):  # its memo may fill memory
        content[choices.number(len(content))] = choices.number(256)
    if choices.number(4) == 3:
        del content[choices.number(len(content)) :]
    path = scratch(f"weights{choices.of(('.pth', '.pkl', '.pyth', '.safetensors'))}")
    path.write_bytes(content)
    checkpointer = reader(choices.of((True, False)))
    state = [*checkpointer.model.parameters(), *checkpointer.model.buffers()]
    before = [value._version for value in state]
    has_loaded = False
    with allow_input_error(str(path)), forbid_side_effects():
        checkpointer.load(str(path))
        has_loaded = True
    unchanged = before == [value._version for value in state]
    assert has_loaded or unchanged, "a rejected file changed the model"
