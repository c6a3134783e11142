"""Distributed training: NCCL on GPUs, gloo on CPUs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._compat import create_local_process_group
from ..errors import InputError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def is_torchrun() -> bool:
    """Returns whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def init_torchrun() -> None:
    """Initializes the process group of a process that torchrun started.

    Raises:
        InputError: this machine runs more processes than it has GPUs.
    """
    local_rank, local_size = (int(os.environ[name]) for name in TORCHRUN[1::2])
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise InputError(
            f"torchrun started {local_size} processes, but only {gpus} "
            f"{'GPU is' if gpus == 1 else 'GPUs are'} available; pass --nproc-per-node {gpus}"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpus else "gloo")
    create_local_process_group(local_size)
    comm.synchronize()


def wrap_ddp(model: nn.Module, **options) -> nn.Module:
    """Calls detectron2's create_ddp_model, also for models on the CPU.

    Raises:
        InputError: the model has SyncBN on the CPU, which torch does not support.
    """
    device = next(model.parameters()).device
    is_cpu = device.type == "cpu"
    is_synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if is_cpu and is_synced and dist.is_initialized():  # even with a single process
        raise InputError(
            "SyncBN needs GPUs for distributed training; set MODEL.FCOS.NORM, "
            "MODEL.RESNETS.NORM and MODEL.FPN.NORM to GN or BN, or start without torchrun"
        )
    return create_ddp_model(model, device_ids=None if is_cpu else [device.index], **options)


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """Returns the model inside DistributedDataParallel, or ``model`` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def broadcast_buffers(model: nn.Module) -> None:
    """Broadcasts the buffers of rank 0 to all processes.

    Batch norm statistics differ between processes, each of which evaluates a part of the images.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather_rows(row: Tensor) -> Tensor:
    """Gathers the Tensor[N] of each of W processes as Tensor[W, N] on every process."""
    count = comm.get_world_size()
    if count == 1:
        return row[None]
    rows = row.new_empty(count * len(row))
    dist.all_gather_into_tensor(rows, row)
    return rows.view(count, -1)
