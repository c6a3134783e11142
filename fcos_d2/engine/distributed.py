"""Several processes that train together: NCCL where there are GPUs, gloo where there are none."""

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


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun started."""
    return all(name in os.environ for name in TORCHRUN)


def join_torchrun() -> None:
    """Makes this process, which torchrun started, a member of its group.

    Raises:
        InputError: more processes on this machine than GPUs.
    """
    local_rank, local_size = (int(os.environ[name]) for name in TORCHRUN[1::2])
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise InputError(
            f"torchrun started {local_size} processes, but {gpus} "
            f"{'GPU is' if gpus == 1 else 'GPUs are'} there; pass --nproc-per-node {gpus}"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if gpus else "gloo")
    create_local_process_group(local_size)
    comm.synchronize()


def distribute(model: nn.Module, **options) -> nn.Module:
    """``model``, in DistributedDataParallel if there are other processes.

    Args:
        model: on the device that it trains on.
        options: of detectron2's create_ddp_model.

    Raises:
        InputError: SyncBN on the CPU, which torch does not have.
    """
    device = next(model.parameters()).device
    is_cpu = device.type == "cpu"
    is_synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if is_cpu and is_synced and dist.is_initialized():  # torchrun may have started one process
        raise InputError(
            "SyncBN needs GPUs where several processes train; set MODEL.FCOS.NORM, "
            "MODEL.RESNETS.NORM and MODEL.FPN.NORM to GN or BN, or start without torchrun"
        )
    if comm.get_world_size() == 1:
        return model
    return create_ddp_model(model, device_ids=None if is_cpu else [device.index], **options)


def bare(model: nn.Module) -> nn.Module:
    """The detector inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the buffers of the first one.

    Statistics of BN differ between them, and each evaluates a part of the images.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather_rows(values: Tensor) -> list[list[float]]:
    """Tensor[N] of every process -> W rows of N numbers, on every process.

    Waits for the device, once.
    """
    size = comm.get_world_size()
    if size == 1:
        return [values.tolist()]
    rows = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(rows, values)
    return torch.stack(rows).tolist()
