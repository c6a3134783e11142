"""Tests the checks of values of detectron2's config keys."""

from functools import reduce

import pytest
from detectron2.config import get_cfg

from fcos_d2.config_file import read_cfg
from fcos_d2.config_values import AT_LEAST, CHOICES, REGISTRIES
from fcos_d2.errors import InputError

from .tiny_training import ROOT


@pytest.mark.parametrize("key", [*CHOICES, *REGISTRIES])
def test_error_for_an_unknown_choice_lists_the_choices(key):
    value = 77 if key.endswith("DEPTH") else "build_resnet_backbon"
    with pytest.raises(InputError, match=f"^{key} must be one of '?.+, got {value!r}; ") as caught:
        read_cfg("", [key, value])
    if key == "MODEL.BACKBONE.NAME":
        assert "; did you mean build_resnet_backbone or" in str(caught.value)


@pytest.mark.parametrize("key", AT_LEAST)
def test_error_for_a_value_below_the_minimum_has_the_minimum(key):
    default, low = reduce(getattr, key.split("."), get_cfg()), AT_LEAST[key]
    value = type(default)([low - 1]) if isinstance(default, tuple) else type(default)(low - 1)
    with pytest.raises(InputError, match=f"^{key} must be at least {low}, got"):
        read_cfg("", [key, value])


@pytest.mark.parametrize(
    "opts, message",
    [
        (("SOLVER.STEPS", "(50, 20)"), "SOLVER.STEPS must increase, got"),
        (("MODEL.PIXEL_STD", "[1.0]"), "MODEL.PIXEL_STD must be .* each of the 3 channels"),
        (("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"), "MODEL.PIXEL_STD must be a positive number"),
        (("MODEL.DEVICE", "gpu"), "MODEL.DEVICE must be a torch device, got 'gpu'; set it to"),
    ],
)
def test_invalid_values_are_refused(opts, message):
    with pytest.raises(InputError, match=message):
        read_cfg("", opts)


def test_values_of_lazy_configs_are_checked():
    with pytest.raises(InputError, match="MODEL.DEVICE must be a torch device"):
        read_cfg(str(ROOT / "configs/lazy/fcos_R_50_FPN_1x.py"), ["train.device=gpu"])
