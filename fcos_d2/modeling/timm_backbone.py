"""timm models as backbones of FCOS: any model whose feature maps form a pyramid.

Feature maps are named by stride like those of detectron2's ResNets, so that one config fits both:
res2 has stride 4, res3 8, res4 16 and res5 32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..errors import InputError, import_optional, one_line_cause, suggest
from .backbone import build_fpn

NORMS = ("", "FrozenBN", "SyncBN")
# Not square, to detect models that mix up height and width; multiples of 64, since FCOS pads images
# to a multiple of the largest stride.
PROBE_SIZE = (128, 192)

logger = logging.getLogger(__name__)


class FeatureMap(NamedTuple):
    """One feature map that a timm model can return.

    Attributes:
        index: its index in timm's ``out_indices``.
        stride: in pixels.
        channels: number of channels.
    """

    index: int
    stride: int
    channels: int


class Blueprint(NamedTuple):
    """Arguments to create a timm model, which happens repeatedly: first to inspect its shapes.

    Attributes:
        name: one of ``timm.list_models()``, with or without a tag of pretrained weights.
        options: further arguments of ``timm.create_model``.
        ese_in_all_blocks: see ``TimmBackbone``.
    """

    name: str
    options: dict
    ese_in_all_blocks: bool = False

    def create(self, indices: Sequence[int] | None = None, pretrained: bool = False) -> nn.Module:
        """Creates a model that returns the feature maps ``indices``, by default timm's choice.

        Raises:
            InputError: timm is not installed, has no such model, or cannot build it.
        """
        timm = import_timm()
        if not timm.is_model(self.name):
            raise InputError(_unknown_model(self.name, timm.list_models()))
        options = self.options if indices is None else {**self.options, "out_indices": indices}
        try:
            body = timm.create_model(
                self.name, pretrained=pretrained, features_only=True, **options
            )
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"MODEL.TIMM.NAME {self.name}: timm cannot build it as a backbone "
                f"({one_line_cause(error)}); choose another model, or correct MODEL.TIMM.OPTIONS"
            ) from error
        if self.ese_in_all_blocks:
            _add_ese(body)
        return body

    def pyramid(self) -> dict[str, FeatureMap]:
        """Returns the deepest feature map of each stride by name, in ascending order of stride."""
        with torch.device("meta"):  # shapes without initializing parameters
            info = self.create().feature_info.info
        maps = {
            feature["reduction"]: FeatureMap(index, feature["reduction"], feature["num_chs"])
            for index, feature in enumerate(info)
        }
        # "res1" has stride 2; a map of stride 1 is of no use to a detector.
        named = {f"res{i}": maps[2**i] for i in range(1, 8) if 2**i in maps}
        if len(named) < 2:
            raise InputError(
                f"MODEL.TIMM.NAME {self.name} only has feature maps of stride "
                f"{', '.join(map(str, maps))}, but an FPN needs several; choose a model with "
                "a pyramid, such as convnext_tiny or swin_tiny_patch4_window7_224"
            )
        self._check_sizes(list(named.values()))
        return named

    def _check_sizes(self, maps: Sequence[FeatureMap]) -> None:
        """Raises InputError unless feature maps have the size of the padded image over stride."""
        with torch.device("meta"):
            body = self.create([feature.index for feature in maps]).eval()
            try:
                found = body(torch.zeros(1, 3, *PROBE_SIZE))
            except (AssertionError, RuntimeError, ValueError) as error:
                swin = """set MODEL.TIMM.OPTIONS '["strict_img_size=False"]'"""
                raise InputError(
                    f"MODEL.TIMM.NAME {self.name} does not accept images of arbitrary size "
                    f"({one_line_cause(error)}); "
                    + (swin if "swin" in self.name else "choose another model")
                ) from error
        first = 1 if _is_channels_last(body) else 2
        for feature, tensor in zip(maps, found, strict=True):
            size = tuple(tensor.shape[first : first + 2])
            expected = tuple(side // feature.stride for side in PROBE_SIZE)
            if size != expected:
                raise InputError(
                    f"MODEL.TIMM.NAME {self.name}: its feature map of stride {feature.stride} has "
                    f"size {size} for an image of {PROBE_SIZE} instead of {expected}, so an "
                    "FPN cannot add it to the next one; choose another model"
                )

    def ancestors(self, indices: Sequence[int]) -> set[str]:
        """Returns the names of the parameters that the feature maps ``indices`` depend on.

        timm's models share no common structure, but autograd knows what a tensor depends on.
        """
        with torch.device("meta"), torch.enable_grad():
            body = self.create(indices).eval()
            names, parameters = zip(*body.named_parameters(), strict=True)
            total = sum(feature.sum() for feature in body(torch.zeros(1, 3, *PROBE_SIZE)))
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        pairs = zip(names, gradients, strict=True)
        return {name for name, gradient in pairs if gradient is not None}


class TimmBackbone(Backbone):
    """A timm model that returns feature maps Tensor[B, C, H / stride, W / stride] by name.

    Parameters are initialized randomly, without network access: MODEL.WEIGHTS "timm://NAME"
    downloads the model's pretrained weights when a checkpoint is loaded.

    Args:
        name: one of ``timm.list_models()``, with or without a tag of pretrained weights.
        out_features: feature maps to return, from "res1" (stride 2) to "res7" (stride 128); layers
            that none of them depends on are left out where timm can.
        norm: "" keeps the model's batch norms, "FrozenBN" makes their statistics and weights
            constant, "SyncBN" synchronizes their statistics across GPUs.
        freeze_at: 0 trains everything; n freezes all parameters that feature map res<n> depends on,
            and turns their batch norms into FrozenBN. For detectron2's ResNets, 2 to 5 mean the
            same, and 1 is the stem.
        options: further arguments of ``timm.create_model``, written "key=value".
        ese_in_all_blocks: for VoVNets, add attention (eSE, 1911.06667) to all blocks, as the
            detectors of CenterMask and AdelaiDet do, not only to the last of each stage.

    Raises:
        InputError: timm is not installed or has no such model, or the model has no feature maps of
            these strides or only accepts images of one size.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        *,
        norm: str = "",
        freeze_at: int = 0,
        options: Sequence[str] = (),
        ese_in_all_blocks: bool = False,
    ):
        super().__init__()
        if norm not in NORMS:
            raise InputError(f"MODEL.TIMM.NORM must be one of {NORMS}, got {norm!r}")
        arguments = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
        blueprint = Blueprint(name, arguments, ese_in_all_blocks)
        maps = blueprint.pyramid()
        if not out_features or not set(out_features) <= set(maps):
            raise InputError(
                f"MODEL.TIMM.NAME {name} has feature maps {', '.join(maps)}, got "
                f"MODEL.FPN.IN_FEATURES {list(out_features)}; name some of these"
            )
        if freeze_at > 0 and f"res{freeze_at}" not in maps:
            known = [0, *(int(feature[3:]) for feature in maps)]
            raise InputError(
                f"MODEL.BACKBONE.FREEZE_AT must be one of {known} for {name}, got {freeze_at}"
            )
        chosen = {feature: maps[feature] for feature in maps if feature in out_features}
        indices = [feature.index for feature in chosen.values()]
        self.body = blueprint.create(indices)
        self._out_features = list(chosen)
        self._out_feature_strides = {key: value.stride for key, value in chosen.items()}
        self._out_feature_channels = {key: value.channels for key, value in chosen.items()}
        self._channels_last = _is_channels_last(self.body)
        used, frozen = blueprint.ancestors(indices), set()
        if freeze_at > 0:
            frozen = blueprint.ancestors([maps[f"res{freeze_at}"].index])
        self._freeze(used, frozen)
        self._set_norm(norm)

    @property
    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of RGB pixels in [0, 255] that timm's weights expect."""
        pretrained = self.body.pretrained_cfg
        return tuple([255 * value for value in pretrained[key]] for key in ("mean", "std"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Tensor[B, 3, H, W] -> Tensor[B, C, H / stride, W / stride] by name."""
        maps = self.body(x)
        if self._channels_last:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def _freeze(self, used: set[str], frozen: set[str]) -> None:
        from timm.layers import freeze_batch_norm_2d

        for name, parameter in self.body.named_parameters():
            # DistributedDataParallel rejects trainable parameters that no output depends on.
            parameter.requires_grad_(name in used - frozen)
        for name, module in list(self.body.named_modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
                parent, _, child = name.rpartition(".")
                self.body.get_submodule(parent).add_module(child, freeze_batch_norm_2d(module))

    def _set_norm(self, norm: str) -> None:
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        if norm:
            convert = {"FrozenBN": freeze_batch_norm_2d, "SyncBN": convert_sync_batchnorm}[norm]
            self.body = convert(self.body)


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Builds ``MODEL.TIMM.NAME`` with an FPN; MODEL.BACKBONE.FREEZE_AT applies.

    Raises:
        InputError: see ``TimmBackbone``.
        ValueError: see ``build_fpn``.
    """
    return build_fpn(cfg, build_timm_backbone(cfg))


@BACKBONE_REGISTRY.register()
def build_fcos_d2_vovnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Builds "ese_vovnet39b", "ese_vovnet57b" or "ese_vovnet99b", eSE in all blocks, with an FPN.

    Raises:
        InputError: see ``TimmBackbone``.
        ValueError: see ``build_fpn``.
    """
    return build_fpn(cfg, build_timm_backbone(cfg, ese_in_all_blocks=True))


def build_timm_backbone(cfg, **options) -> TimmBackbone:
    """Builds ``MODEL.TIMM.NAME`` alone; ``options`` are further arguments of TimmBackbone."""
    timm = cfg.MODEL.TIMM
    body = TimmBackbone(
        timm.NAME,
        cfg.MODEL.FPN.IN_FEATURES,
        norm=timm.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        options=timm.OPTIONS,
        **options,
    )
    if cfg.MODEL.WEIGHTS.startswith("timm://"):
        _warn_about_pixels(body, cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return body


def _warn_about_pixels(
    body: TimmBackbone, channel_order: str, mean: Sequence[float], std: Sequence[float]
) -> None:
    expected = body.pixel_statistics
    close = all(
        math.isclose(value, wanted, abs_tol=0.5)
        for values, wants in zip((mean, std), expected, strict=True)
        for value, wanted in zip(values, wants, strict=True)
    )
    if channel_order != "RGB" or not close:
        mean, std = ([round(value, 3) for value in values] for values in expected)
        logger.warning(
            f"timm's weights were trained with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {mean} and "
            f"MODEL.PIXEL_STD {std}, but the config has other values"
        )


def import_timm() -> ModuleType:
    """Imports timm.

    Raises:
        InputError: timm is not installed.
    """
    return import_optional("timm", "the backbone of MODEL.TIMM")


def _unknown_model(name: str, models: list[str]) -> str:
    # "convnext" may mean any "convnext_...", however long its name.
    longer = [model for model in models if name and model.startswith(name)]
    advice = suggest(name.partition(".")[0], models, "timm.list_models() has all names", longer)
    return f"MODEL.TIMM.NAME: timm has no model {name!r}; {advice}"


def _is_channels_last(body: nn.Module) -> bool:
    return str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")


def _add_ese(body: nn.Module) -> None:
    from timm.layers import EffectiveSEModule
    from timm.models.vovnet import OsaBlock

    for block in [module for module in body.modules() if isinstance(module, OsaBlock)]:
        if block.attn is None:
            block.attn = EffectiveSEModule(block.conv_concat.conv.out_channels)
