"""Makes a network faster: folds batch norms, sets memory format, precision and allocator."""

from __future__ import annotations

import ctypes
import sys

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenNormConv2d(Conv2d):
    """detectron2's convolution, with its frozen batch norm applied to the weights.

    The weights are far smaller than the feature maps, to which applying the norm takes about a
    tenth of an R-50 training step on a CPU. Parameters and buffers keep their names.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[B, C, H, W] -> Tensor[B, C', H', W']."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):  # folded permanently by ``accelerate``
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = (
            self.weight * scale[:, None, None, None],
            norm.bias - norm.running_mean * scale,
        )
        if self.bias is not None:
            bias = bias + self.bias * scale
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> None:
    """Turns detectron2's convolutions with a frozen batch norm into FrozenNormConv2d, in place."""
    for layer in model.modules():
        if type(layer) is Conv2d and isinstance(layer.norm, FrozenBatchNorm2d):
            layer.__class__ = FrozenNormConv2d


class InFloat32(nn.Module):
    """Runs a layer in float32 inside a network of lower precision."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor) -> Tensor:
        """Tensor of any dtype -> float32."""
        return self.layer(x.float())


def accelerate(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Makes a detector fast for inference, in place; it can no longer be trained or saved.

    Batch norms are folded into the preceding convolutions, which only changes rounding, and feature
    maps become channels_last. The network computes in ``dtype``, except the layers that predict
    distances and box quality: they are small, and bfloat16 is too coarse for them. Candidates and
    detections are always float32.

    Args:
        model: detector in evaluation mode; must be an FCOS unless ``dtype`` is float32.
        dtype: float32, bfloat16 or float16.

    Returns:
        ``model``.
    """
    fold_batch_norms(model)
    if dtype != torch.float32:
        model.backbone.to(dtype)
        head = model.head.to(dtype)
        head.bbox_pred, head.ctrness = InFloat32(head.bbox_pred), InFloat32(head.ctrness)
        if head.scales is not None:
            head.scales.float()
    return use_channels_last(model, dtype)


def fold_batch_norms(model: nn.Module, norms: tuple[type[nn.Module], ...] = NORMS) -> None:
    """Folds the norms of detectron2's convolutions into their weights, in place."""
    for layer in model.modules():
        norm = getattr(layer, "norm", None)
        if isinstance(layer, Conv2d) and isinstance(norm, norms):
            weight, bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias,
            )  # fmt: skip
            layer.weight, layer.bias, layer.norm = weight, bias, None


def use_channels_last(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Converts convolutions to channels_last and casts their input to ``dtype``."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)

    def convert(backbone: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0].to(dtype=dtype, memory_format=torch.channels_last)

    if hasattr(model, "backbone"):
        model.backbone.register_forward_pre_hook(convert)
    return model


def keep_freed_memory() -> None:
    """Makes the C allocator keep freed memory for reuse, as PyTorch does on GPUs.

    By default, glibc returns the memory of large tensors to the system, which clears every page
    again for the next tensor. This takes about a sixth of the time of inference on a CPU, and a
    tenth of a training step. The setting affects the whole process, so only commands call it. It
    has no effect without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the fastest convolutions on ``device``; float16 only on GPUs."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if able.get("avx512_bf16") or able.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32
