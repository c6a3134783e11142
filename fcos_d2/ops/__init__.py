"""The five ops of FCOS that are not convolutions; they need only torch.

Each op validates its arguments, documents shapes, dtypes and units, traces under ``torch.compile``
and does not synchronize with the device. Where a compiled kernel is registered, it runs; otherwise
the plain PyTorch in ``reference`` does.
"""

from ._library import backend, build_info
from .assign_targets import Targets, assign_targets
from .batched_nms import Detections, batched_nms, batched_nms_padded
from .box_loss import box_loss
from .levels import Levels, make_levels, point_coordinates
from .select_candidates import Candidates, select_candidates
from .sigmoid_focal_loss import sigmoid_focal_loss

__all__ = [
    "Candidates",
    "Detections",
    "Levels",
    "Targets",
    "assign_targets",
    "backend",
    "batched_nms",
    "batched_nms_padded",
    "box_loss",
    "build_info",
    "make_levels",
    "point_coordinates",
    "select_candidates",
    "sigmoid_focal_loss",
]
