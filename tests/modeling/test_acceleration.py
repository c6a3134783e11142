"""Accelerated detectors return the same detections as the original ones."""

import copy
import platform
import resource

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from fcos_d2 import InputError
from fcos_d2.inference import accelerated
from fcos_d2.modeling import acceleration
from fcos_d2.modeling.acceleration import (
    accelerate,
    fastest_dtype,
    fold_frozen_norms,
    keep_freed_memory,
)

from .tiny import tiny_cfg, tiny_fcos

RESNET = ("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18)
RESNET += ("MODEL.RESNETS.RES2_OUT_CHANNELS", 64)


def batch():
    return [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)} for _ in range(2)]


def dense(model, images):
    with torch.no_grad():
        logits, ltrb, quality, _ = model.dense_predictions(images)[2]
    return [*logits, *ltrb, *quality]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_folding_norms_only_changes_rounding(norm):
    norms = ("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", norm)
    cfg = tiny_cfg(*RESNET, *norms, "MODEL.BACKBONE.FREEZE_AT", 0)
    model = build_model(cfg).eval()
    for layer in model.modules():
        if hasattr(layer, "running_mean"):
            nn.init.normal_(layer.running_mean, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2) if norm != "FrozenBN" else None
    images = batch()
    expected = dense(model, images)
    fast = accelerate(copy.deepcopy(model))
    assert not any(isinstance(layer, acceleration.NORMS) for layer in fast.backbone.modules())
    for ours, theirs in zip(dense(fast, images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_folding_frozen_norms_only_changes_rounding_of_outputs_and_gradients(has_bias):
    norm = FrozenBatchNorm2d(6)
    for name, low, high in (("weight", 0.5, 2), ("running_var", 0.5, 2), ("bias", -1, 1)):
        nn.init.uniform_(getattr(norm, name), low, high)
    nn.init.normal_(norm.running_mean)
    arguments = {"stride": 2, "padding": 1, "groups": 2, "bias": has_bias}
    plain = Conv2d(4, 6, 3, **arguments, norm=norm, activation=torch.relu)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    assert folded.state_dict().keys() == plain.state_dict().keys()
    outputs, gradients = [], []
    image = torch.randn(2, 4, 9, 8)
    for conv in (plain, folded):
        x = image.clone().requires_grad_()
        outputs.append(conv(x))
        outputs[-1].square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in conv.parameters())])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    with torch.no_grad():
        accelerate(folded)
        torch.testing.assert_close(folded(image), plain(image))


def test_fcos_does_not_call_the_frozen_norms_of_its_backbone():
    model = build_model(tiny_cfg(*RESNET))
    norms = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNorm2d)]
    for norm in norms:
        norm.forward = None  # fails if called
    assert norms and dense(model.eval(), batch())


@pytest.mark.parametrize("settings", [{"NORM": "GN"}, {"NORM": "BN"}, {"USE_SCALE": False}])
def test_lower_precision_changes_predictions_little_and_keeps_boxes_in_float32(settings):
    model, images = tiny_fcos(INFERENCE_TH_TEST=0.005, **settings).eval(), batch()
    expected = dense(model, images)
    fast = accelerate(copy.deepcopy(model), torch.bfloat16)
    got = dense(fast, images)
    levels = len(got) // 3
    assert {x.dtype for x in got[:levels]} == {torch.bfloat16}
    assert {x.dtype for x in got[levels:]} == {torch.float32}
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=0.05, rtol=0.02)
    found = fast(images)[0]["instances"]
    assert len(found) and found.pred_boxes.tensor.dtype == found.scores.dtype == torch.float32


def test_channels_last_changes_only_rounding():
    plain = tiny_fcos()
    last = build_model(tiny_cfg())
    last.load_state_dict(plain.state_dict())
    seen = []
    acceleration.use_channels_last(last).backbone.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    images = batch()
    for ours, theirs in zip(dense(last, images), dense(plain, images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("features", [{"avx512_bf16": True}, {"amx_bf16": True}, {}])
def test_auto_selects_bfloat16_where_the_processor_supports_it(features, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    dtype = torch.bfloat16 if features else torch.float32
    assert fastest_dtype(torch.device("cpu")) == dtype
    cfg = tiny_cfg("MODEL.INFERENCE.DTYPE", "auto")
    model = accelerated(cfg, build_model(cfg).eval())
    assert next(model.backbone.parameters()).dtype == dtype


@pytest.mark.parametrize(
    "options, message",
    [
        (("MODEL.INFERENCE.DTYPE", "int8"), "one of auto, float32, bfloat16, float16, got 'int8'"),
        (("MODEL.INFERENCE.DTYPE", "float16"), "float16 needs a GPU; set it to bfloat16 or auto"),
    ],
)
def test_unavailable_precision_is_an_error(options, message):
    cfg = tiny_cfg(*options)
    with pytest.raises(InputError, match=message):
        accelerated(cfg, build_model(cfg))


def test_other_detectors_stay_in_float32():
    cfg = tiny_cfg(
        "MODEL.INFERENCE.DTYPE", "bfloat16", "MODEL.META_ARCHITECTURE", "ProposalNetwork"
    )
    with pytest.raises(InputError, match="needs MODEL.META_ARCHITECTURE FCOS, got ProposalNetwork"):
        accelerated(cfg, nn.Identity())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused_without_page_faults():
    def count_page_faults(pages):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"1" * (pages * resource.getpagesize())
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    count_page_faults(20_000)
    assert count_page_faults(10_000) < 1_000
