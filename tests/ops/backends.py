"""Registers the ops in other namespaces, with other kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

from fcos_d2.ops import _library

Overloads = dict[str, torch._ops.OpOverload]
_LIBRARIES = []  # torch unregisters the ops of a library that is garbage-collected


def register_ops(namespace: str, kernel_of: Callable[[str], Callable]) -> Overloads:
    """Registers ``torch.ops.<namespace>.<name>`` for every op, with kernels from ``kernel_of``."""
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    for name, op in _library.OPS.items():
        library.define(op.schema)
        library.impl(name, kernel_of(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", op.fake, lib=library)
        if op.backward is not None:
            torch.library.register_autograd(
                f"{namespace}::{name}", op.backward, setup_context=op.setup_context, lib=library
            )
    return overloads_of(namespace)


def overloads_of(namespace: str) -> Overloads:
    """Returns the ops of a namespace, by name."""
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in _library.OPS}


@contextmanager
def use(overloads: Overloads) -> Iterator[None]:
    """Makes the wrappers call ``overloads``."""
    with ExitStack() as stack:
        for module in {sys.modules[op.fake.__module__] for op in _library.OPS.values()}:
            for attribute, value in list(vars(module).items()):
                if isinstance(value, torch._ops.OpOverload):
                    other = overloads[value.name().split("::")[1]]
                    stack.enter_context(mock.patch.object(module, attribute, other))
        yield


def reference_of(name: str) -> Callable:
    """Returns the reference implementation of an op."""
    return _library.OPS[name].reference


def on_gpu(name: str) -> Callable:
    """Returns a kernel that runs the op on the GPU for tensors on the CPU."""
    op = overloads_of("fcos_d2")[name]

    def run(*arguments):
        copies = tree_map_only(torch.Tensor, _to_gpu, arguments)
        results = tree_map_only(torch.Tensor, torch.Tensor.cpu, op(*copies))
        if op._schema.is_mutable:  # only the first argument is
            for original, changed in zip(arguments[0], copies[0], strict=True):
                original.copy_(changed)
        return results

    return run


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor with its strides, storage offset and alignment."""
    storage = tensor.untyped_storage().cuda()
    out = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return out.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
