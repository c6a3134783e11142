"""PostProcessor: predictions -> detections of a whole batch (1904.01355 section 3.1)."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from torch import Tensor

from ..config import fcos_settings
from ..ops import Candidates, Detections, Levels, batched_nms_padded, select_candidates
from ..ops.batched_nms import NMS_METHODS
from ..ops.select_candidates import SCORE_RULES
from .structures import Predictions, check_choice, check_number


class PostProcessor:
    """Selects candidates and suppresses duplicates, in fixed shapes, without host synchronization.

    Args:
        score_threshold: minimum class probability, or with ``threshold_with_quality`` its product
            with the box quality; exclusive, in [0, 1].
        threshold_with_quality: see ``score_threshold``.
        topk: candidates kept per level and image.
        rank_with_quality: rank candidates by the product instead of the class probability.
        score_rule: final score, "sqrt" of the product, "product" or "cls".
        clip: clip boxes to the image before NMS.
        drop_empty: drop boxes without area before NMS.
        pixel_extent: 1 if x2 and y2 are the last pixels of a box, else 0.
        nms_threshold: IoU above which the lower-scored box is suppressed.
        nms_method: "hard", "linear" or "gaussian".
        nms_sigma: parameter of "gaussian".
        class_agnostic: boxes of different classes suppress each other.
        max_detections: D.

    Raises:
        ValueError: a choice is unknown, or a number is out of range.
    """

    @configurable
    def __init__(
        self,
        *,
        score_threshold: float = 0.05,
        threshold_with_quality: bool = False,
        topk: int = 1000,
        rank_with_quality: bool = True,
        score_rule: str = "sqrt",
        clip: bool = False,
        drop_empty: bool = False,
        pixel_extent: int = 0,
        nms_threshold: float = 0.6,
        nms_method: str = "hard",
        nms_sigma: float = 0.5,
        class_agnostic: bool = False,
        max_detections: int = 100,
    ):
        # Checked here rather than at the first evaluation, after hours of training.
        check_choice("SCORE_RULE", score_rule, SCORE_RULES)
        check_choice("NMS_METHOD", nms_method, NMS_METHODS)
        check_choice("PIXEL_EXTENT", pixel_extent, (0, 1))
        check_number("INFERENCE_TH_*", score_threshold, 0, 1)
        check_number("NMS_TH", nms_threshold, 0, 1)
        check_number("PRE_NMS_TOPK_*", topk, 1)
        check_number("POST_NMS_TOPK_*", max_detections, 1)
        self.selection = {
            "score_threshold": score_threshold,
            "topk": topk,
            "threshold_with_quality": threshold_with_quality,
            "rank_with_quality": rank_with_quality,
            "score_rule": score_rule,
            "clip": clip,
            "pixel_extent": pixel_extent,
            "drop_empty": drop_empty,
        }
        self.suppression = {
            "iou_threshold": nms_threshold,
            "max_detections": max_detections,
            "class_agnostic": class_agnostic,
            "method": nms_method,
            "sigma": nms_sigma,
            "pixel_extent": pixel_extent,
        }

    @classmethod
    def from_config(cls, cfg, *, split: str = "TEST"):
        """Returns the arguments from ``cfg``, for testing or (``split`` "TRAIN") for proposals."""
        fcos = fcos_settings(cfg)
        return {
            "score_threshold": fcos[f"INFERENCE_TH_{split}"],
            "threshold_with_quality": fcos.THRESH_WITH_CTR,
            "topk": fcos[f"PRE_NMS_TOPK_{split}"],
            "rank_with_quality": fcos.RANK_WITH_CTR,
            "score_rule": fcos.SCORE_RULE,
            "clip": fcos.CLIP_BEFORE_NMS,
            "drop_empty": fcos.DROP_EMPTY,
            "pixel_extent": fcos.PIXEL_EXTENT,
            "nms_threshold": fcos.NMS_TH,
            "nms_method": fcos.NMS_METHOD,
            "nms_sigma": fcos.NMS_SIGMA,
            "class_agnostic": fcos.NMS_CLASS_AGNOSTIC,
            "max_detections": fcos[f"POST_NMS_TOPK_{split}"],
        }

    def __call__(self, predictions: Predictions, levels: Levels, image_sizes: Tensor) -> Detections:
        """Returns detections; ``image_sizes``: int64 Tensor[B, 2], (height, width) unpadded."""
        return self.suppress(self.select(predictions, levels, image_sizes))

    @torch.no_grad()
    def select(self, predictions: Predictions, levels: Levels, image_sizes: Tensor) -> Candidates:
        """Returns the candidates for NMS; arguments as above."""
        logits, ltrb, quality, _ = predictions
        return select_candidates(logits, ltrb, quality, levels, image_sizes, **self.selection)

    @torch.no_grad()
    def suppress(self, candidates: Candidates) -> Detections:
        """Performs NMS."""
        return batched_nms_padded(*candidates, **self.suppression)
