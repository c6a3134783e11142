"""Random weights of other implementations, with the names that those have, in small.

Every tensor is written down with its name there and its name here, so that a converter's table is
compared with another one that was written independently. Convolutions have the shapes of a
ResNet-50 whose widths are a sixteenth; the head has 32 channels, which group norm needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..modeling.tiny import tiny_cfg

CHANNELS = 32
NUM_CLASSES = 5
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}  # of ResNet-50
LEVELS = 5
STEM = 4


class Peer:
    """Weights under two names.

    Attributes:
        theirs: by the names of the other implementation.
        ours: the same tensors by the names of this package.
    """

    def __init__(self):
        self.theirs: dict[str, Tensor] = {}
        self.ours: dict[str, Tensor] = {}

    def add(self, theirs: str, ours: str, *shape: int, value: Tensor | None = None) -> None:
        """One tensor; variances are positive."""
        value = torch.randn(shape) if value is None else value
        if theirs.endswith("running_var"):
            value = value.abs() + 0.1
        self.theirs[theirs] = value
        self.ours[ours] = value

    def conv(self, theirs: str, ours: str, cin: int, cout: int, size: int, bias: bool) -> None:
        self.add(f"{theirs}.weight", f"{ours}.weight", cout, cin, size, size)
        if bias:
            self.add(f"{theirs}.bias", f"{ours}.bias", cout)

    def affine(self, theirs: str, ours: str, channels: int) -> None:
        for leaf in ("weight", "bias"):
            self.add(f"{theirs}.{leaf}", f"{ours}.{leaf}", channels)

    def norm(self, theirs: str, ours: str, channels: int, counter: bool = False) -> None:
        """A batch norm; its counter has no place here."""
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            self.add(f"{theirs}.{leaf}", f"{ours}.{leaf}", channels)
        if counter:
            self.theirs[f"{theirs}.num_batches_tracked"] = torch.tensor(7)


def bottlenecks() -> Iterator[tuple[int, int, int, int, int]]:
    """(Stage, block, channels in, inside, out) of the small ResNet-50."""
    channels = STEM
    for stage, count in BLOCKS.items():
        inside = STEM * 2 ** (stage - 2)
        for block in range(count):
            yield stage, block, channels, inside, 4 * inside
            channels = 4 * inside


def add_resnet(
    peer: Peer,
    theirs: str,
    *,
    stem: str = "",
    counter: bool = False,
    deformable: tuple[str, str] | None = None,
) -> None:
    """The backbone as torchvision names it.

    Args:
        peer: where it goes.
        theirs: prefix of their names.
        stem: what else is before the stem's names.
        counter: batch norms count batches.
        deformable: names of the offsets and of the convolution inside a deformable ``conv2``.
    """
    ours = "backbone.bottom_up"
    peer.conv(f"{theirs}{stem}.conv1", f"{ours}.stem.conv1", 3, STEM, 7, bias=False)
    peer.norm(f"{theirs}{stem}.bn1", f"{ours}.stem.conv1.norm", STEM, counter)
    for stage, block, cin, inside, cout in bottlenecks():
        there, here = f"{theirs}.layer{stage - 1}.{block}", f"{ours}.res{stage}.{block}"
        sizes = {1: (cin, inside, 1), 2: (inside, inside, 3), 3: (inside, cout, 1)}
        for k, (a, b, size) in sizes.items():
            name = f"{there}.conv{k}"
            if deformable and k == 2 and stage > 2:
                peer.conv(f"{name}{deformable[0]}", f"{here}.conv2_offset", a, 27, 3, bias=True)
                name += deformable[1]
            peer.conv(name, f"{here}.conv{k}", a, b, size, bias=False)
            peer.norm(f"{there}.bn{k}", f"{here}.conv{k}.norm", b, counter)
        if block == 0:
            peer.conv(f"{there}.downsample.0", f"{here}.shortcut", cin, cout, 1, bias=False)
            peer.norm(f"{there}.downsample.1", f"{here}.shortcut.norm", cout, counter)


def add_detectron2_backbone(
    peer: Peer, levels: int = LEVELS, deformable: bool = False, counter: bool = False
) -> None:
    """Backbone and pyramid as detectron2, AdelaiDet, cvpods and this package name them."""
    resnet = Peer()
    add_resnet(resnet, "", deformable=(".offset", "") if deformable else None, counter=counter)
    for name, value in resnet.ours.items():
        peer.add(name, name, value=value)
    top = "backbone.top_block.p{}" if levels == LEVELS else None
    add_pyramid(peer, "backbone.fpn_lateral{}", "backbone.fpn_output{}", top)


def add_pyramid(
    peer: Peer, lateral: str, output: str, top: str | None, shift: int = 0, top_shift: int = 0
) -> None:
    """P3 to P5, and P6 and P7 if they have a name; shifts are taken off their numbers."""
    for p in (3, 4, 5):
        cin = STEM * 2**p
        there = lateral.format(p - shift), output.format(p - shift)
        peer.conv(there[0], f"backbone.fpn_lateral{p}", cin, CHANNELS, 1, bias=True)
        peer.conv(there[1], f"backbone.fpn_output{p}", CHANNELS, CHANNELS, 3, bias=True)
    for p in (6, 7) if top else ():
        there, here = top.format(p - top_shift), f"backbone.top_block.p{p}"
        peer.conv(there, here, CHANNELS, CHANNELS, 3, bias=True)


def add_outputs(
    peer: Peer, logits: str, box: str, quality: str, classes: int = NUM_CLASSES
) -> None:
    """The three predictions."""
    peer.conv(logits, "head.cls_logits", CHANNELS, classes, 3, bias=True)
    peer.conv(box, "head.bbox_pred", CHANNELS, 4, 3, bias=True)
    peer.conv(quality, "head.ctrness", CHANNELS, 1, 3, bias=True)


def add_towers(peer: Peer, names: dict[str, str], *, convs: int = 4, deformable: bool = False):
    """Towers with group norm, numbered as in a Sequential: theirs by our name."""
    for ours, theirs in names.items():
        for i in range(convs):
            there, here = f"{theirs}.{3 * i}", f"head.{ours}.{3 * i}"
            if deformable and i == convs - 1:
                peer.conv(f"{there}.offset", f"{here}.offset", CHANNELS, 27, 3, bias=True)
                there, here = f"{there}.conv", f"{here}.conv"
            peer.conv(there, here, CHANNELS, CHANNELS, 3, bias=True)
            peer.affine(f"{theirs}.{3 * i + 1}", f"head.{ours}.{3 * i + 1}", CHANNELS)


def add_scales(
    peer: Peer, theirs: str, levels: int = LEVELS, shape: tuple[int, ...] = (1,)
) -> None:
    """One factor per level, of another shape there perhaps."""
    for level in range(levels):
        value = 0.5 + torch.rand(1)
        peer.add(f"{theirs}.{level}.scale", f"head.scales.{level}.scale", value=value)
        peer.theirs[f"{theirs}.{level}.scale"] = value.reshape(shape)


def original(deformable: bool = False) -> Peer:
    """tianzhi0549/FCOS; its variances differ by the epsilon."""
    peer = Peer()
    names = (".offset", ".conv") if deformable else None
    add_resnet(peer, "backbone.body", stem=".stem", deformable=names)
    for key, value in peer.ours.items():
        if key.endswith("running_var"):
            peer.ours[key] = (value.double() - 1e-5).float()
    names = [f"backbone.fpn.{name}{{}}" for name in ("fpn_inner", "fpn_layer", "top_blocks.p")]
    add_pyramid(peer, *names, shift=1)
    towers = {"cls_tower": "rpn.head.cls_tower", "bbox_tower": "rpn.head.bbox_tower"}
    add_towers(peer, towers, deformable=deformable)
    add_outputs(peer, "rpn.head.cls_logits", "rpn.head.bbox_pred", "rpn.head.centerness")
    add_scales(peer, "rpn.head.scales")
    return peer


def adelaidet(
    deformable: bool = False,
    shared: bool = False,
    batch_norm: bool = False,
    levels: int = LEVELS,
) -> Peer:
    """aim-uofa/AdelaiDet; with 3 levels as FCOS-RT has it."""
    peer, head = Peer(), "proposal_generator.fcos_head"
    add_detectron2_backbone(peer, levels, deformable)
    names = ["share_tower"] if shared else ["cls_tower", "bbox_tower"]
    add_towers(peer, {name: f"{head}.{name}" for name in names}, deformable=deformable)
    if batch_norm:
        for name in names:
            for i in range(4):
                position = f"{name}.{3 * i + 1}"
                for leaf in ("weight", "bias"):
                    del (
                        peer.theirs[f"{head}.{position}.{leaf}"],
                        peer.ours[f"head.{position}.{leaf}"],
                    )
                for level in range(levels):
                    there, here = f"{head}.{position}.{level}", f"head.{position}.{level}"
                    peer.norm(there, here, CHANNELS)
                    peer.add(
                        f"{there}.num_batches_tracked",
                        f"{here}.num_batches_tracked",
                        value=torch.tensor(9),
                    )
    add_outputs(peer, f"{head}.cls_logits", f"{head}.bbox_pred", f"{head}.ctrness")
    add_scales(peer, f"{head}.scales", levels)
    return peer


def detectron2(batch_norm: bool = False) -> Peer:
    """detectron2's LazyConfig FCOS; its levels share weight and bias of batch norms."""
    peer = Peer()
    add_detectron2_backbone(peer)
    add_towers(peer, {"cls_tower": "head.cls_subnet", "bbox_tower": "head.bbox_subnet"})
    if batch_norm:
        for ours, theirs in (("cls_tower", "cls_subnet"), ("bbox_tower", "bbox_subnet")):
            for i in range(4):
                there, here = f"head.{theirs}.{3 * i + 1}", f"head.{ours}.{3 * i + 1}"
                shared = {leaf: peer.ours.pop(f"{here}.{leaf}") for leaf in ("weight", "bias")}
                for level in range(LEVELS):
                    peer.norm(f"{there}.{level}", f"{here}.{level}", CHANNELS, counter=False)
                    for leaf, value in shared.items():
                        del peer.theirs[f"{there}.{level}.{leaf}"]
                        peer.ours[f"{here}.{level}.{leaf}"] = value
    add_outputs(peer, "head.cls_score", "head.bbox_pred", "head.ctrness")
    return peer


def cvpods() -> Peer:
    """Megvii-BaseDetection/cvpods."""
    peer = Peer()
    add_detectron2_backbone(peer)
    add_towers(peer, {"cls_tower": "head.cls_subnet", "bbox_tower": "head.bbox_subnet"})
    add_outputs(peer, "head.cls_score", "head.bbox_pred", "head.centerness")
    add_scales(peer, "head.scales")
    return peer


def torchvision(old: bool = False, classes: int = NUM_CLASSES) -> Peer:
    """torchvision.models.detection.fcos; ``old`` as 0.12 named the pyramid."""
    peer, conv = Peer(), "{}" if old else "{}.0"
    add_resnet(peer, "backbone.body", counter=not old)
    names = f"inner_blocks.{conv}", f"layer_blocks.{conv}", "extra_blocks.p{}"
    add_pyramid(peer, *(f"backbone.fpn.{name}" for name in names), shift=3)
    cls, reg = "head.classification_head", "head.regression_head"
    add_towers(peer, {"cls_tower": f"{cls}.conv", "bbox_tower": f"{reg}.conv"})
    add_outputs(peer, f"{cls}.cls_logits", f"{reg}.bbox_reg", f"{reg}.bbox_ctrness", classes)
    return peer


def mmdetection(
    bias: bool = True, deformable: bool = False, legacy: bool = False, batch_norm: bool = False
) -> Peer:
    """mmdetection: without ``bias`` as its base configs; ``legacy`` as 2.0 named the outputs."""
    peer = Peer()
    add_resnet(
        peer, "backbone", counter=True, deformable=(".conv_offset", "") if deformable else None
    )
    names = [f"neck.{name}_convs.{{}}.conv" for name in ("lateral", "fpn", "fpn")]
    add_pyramid(peer, *names, shift=3, top_shift=3)
    for ours, theirs in (("cls_tower", "cls_convs"), ("bbox_tower", "reg_convs")):
        for i in range(4):
            there, here = f"bbox_head.{theirs}.{i}", f"head.{ours}.{3 * i}"
            norm = f"head.{ours}.{3 * i + 1}"
            if deformable and i == 3:
                offset = f"{there}.conv.conv_offset", f"{here}.offset"
                peer.conv(*offset, CHANNELS, 27, 3, bias=True)
                here += ".conv"
            peer.conv(f"{there}.conv", here, CHANNELS, CHANNELS, 3, bias)
            if not bias:
                peer.ours[f"{here}.bias"] = torch.zeros(CHANNELS)
            if batch_norm:
                peer.norm(f"{there}.bn", norm, CHANNELS, counter=True)
                for leaf in ("weight", "bias", "running_mean", "running_var"):
                    value = peer.ours.pop(f"{norm}.{leaf}")
                    peer.ours |= {f"{norm}.{level}.{leaf}": value for level in range(LEVELS)}
            else:
                peer.affine(f"{there}.gn", norm, CHANNELS)
    outputs = [
        f"bbox_head.{'fcos' if legacy else 'conv'}_{n}" for n in ("cls", "reg", "centerness")
    ]
    add_outputs(peer, *outputs)
    add_scales(peer, "bbox_head.scales", shape=())
    return peer


def small_cfg(*options, levels: int = LEVELS, **fcos):
    """The config of a detector that these weights fit; as tiny_cfg, but with a ResNet-50."""
    names = ("p3", "p4", "p5", "p6", "p7")[:levels]
    towers = {"NUM_CLS_CONVS": 4, "NUM_BOX_CONVS": 4, "NUM_CLASSES": NUM_CLASSES}
    return tiny_cfg(
        *("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 50),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", STEM, "MODEL.RESNETS.RES2_OUT_CHANNELS", 4 * STEM),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", STEM, "MODEL.FPN.OUT_CHANNELS", CHANNELS),
        *options,
        levels=names,
        **(towers | fcos),
    )
