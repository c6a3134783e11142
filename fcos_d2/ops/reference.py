"""All ops in plain PyTorch: the specification that every kernel must match.

Written to be read beside the papers (arXiv 1904.01355 = [1], 2006.09214 = [2]), not to be fast.
Used wherever no compiled kernel is registered. No function waits for the device (no ``item``, no
``nonzero``), except ``batched_nms``, whose result has a data-dependent length.

Shapes: B images, L levels, P points of all levels (level-major, row-major inside a level), M
ground-truth boxes of the whole batch, K classes, N candidates per image, D detections per image.
Boxes are xyxy in pixels of the network input; ltrb are the distances from a point to the four sides
of a box, in strides of the point's level. Background label = K, ignored label = -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import Levels, point_coordinates, spread_over_points

BOXES_PER_CHUNK = 64  # bounds the memory of assign_targets: O(P), whatever M is
EPS = 1e-7  # keeps denominators of the IoU family away from zero
MIN_IOU = 1e-6  # below it the unsmoothed -log(IoU) is flat: disjoint boxes have a finite loss


# ---- assign_targets ([1] section 3.1 and 3.2, [2] section 3.2) ----


def assign_targets(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_offsets: Tensor,
    shapes: list[int],
    strides: list[int],
    pitches: list[int],
    offset: float,
    size_ranges: list[float],
    num_classes: int,
    center_radius: float,
    inclusive: bool,
    pixel_extent: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.assign_targets``; the lists of pairs come flattened."""
    _check_ground_truth(gt_boxes, gt_classes, gt_offsets, num_classes)
    levels = Levels(_pairs(shapes), tuple(strides), _pairs(pitches), offset)
    device, num_boxes = gt_boxes.device, gt_boxes.shape[0]
    num_images, num_points = gt_offsets.shape[0] - 1, levels.num_points
    points = point_coordinates(levels, device)
    stride = spread_over_points(levels.strides, levels, device)
    low = spread_over_points(size_ranges[0::2], levels, device)
    high = spread_over_points(size_ranges[1::2], levels, device)
    image_of_box = torch.searchsorted(
        gt_offsets[1:].contiguous(), torch.arange(num_boxes, device=device), right=True
    )

    best_area = torch.full((num_images, num_points), math.inf, device=device)
    matched = torch.full((num_images, num_points), num_boxes, device=device)
    num_candidates = torch.zeros(num_images, num_points, dtype=torch.int64, device=device)
    in_ignored = torch.zeros(num_images, num_points, dtype=torch.bool, device=device)
    for first in range(0, num_boxes, BOXES_PER_CHUNK):
        chunk = slice(first, first + BOXES_PER_CHUNK)
        boxes, ignored = gt_boxes[chunk, None, :], gt_classes[chunk, None] == -1
        image = image_of_box[chunk, None].expand(-1, num_points)
        area = _area(gt_boxes[chunk], pixel_extent)[:, None]
        side = _sides(points, boxes)  # [m, P, 4] in pixels
        inside = side.amin(dim=-1) > 0
        longest = side.amax(dim=-1)
        if inclusive:
            inside_range = (longest >= low) & (longest <= high)
        else:
            inside_range = (longest > low) & (longest < high)
        candidate = inside & inside_range & ~ignored & area.isfinite()
        if center_radius > 0:
            center = (boxes[..., :2] + boxes[..., 2:]) / 2
            candidate &= (points - center).abs().amax(dim=-1) < center_radius * stride

        # Smallest area wins, then lowest index: two order-free minima, so deterministic.
        area = torch.where(candidate, area, math.inf)
        chunk_area = torch.full_like(best_area, math.inf).scatter_reduce(0, image, area, "amin")
        is_smallest = candidate & (area == chunk_area.gather(0, image))
        index = torch.arange(first, first + boxes.shape[0], device=device)[:, None]
        index = torch.where(is_smallest, index, num_boxes)
        chunk_matched = torch.full_like(matched, num_boxes).scatter_reduce(0, image, index, "amin")
        better = chunk_area < best_area  # on a tie the earlier chunk has the lower index
        matched = torch.where(better, chunk_matched, matched)
        best_area = torch.where(better, chunk_area, best_area)
        num_candidates.scatter_add_(0, image, candidate.long())
        in_ignored |= torch.zeros_like(matched).scatter_add(0, image, (inside & ignored).long()) > 0

    positive = matched < num_boxes
    boxes = torch.cat((gt_boxes, gt_boxes.new_zeros(1, 4)))[matched]  # row M stands for "none"
    ltrb = torch.where(positive[..., None], _sides(points, boxes) / stride[:, None], 0.0)
    background = torch.where(in_ignored, -1, num_classes)
    classes = torch.cat((gt_classes, gt_classes.new_zeros(1)))[matched]
    labels = torch.where(positive, classes, background)
    counts = torch.stack((positive, num_candidates > 1), dim=-1).split(levels.points_per_level, 1)
    counts = torch.stack([level.sum(dim=1) for level in counts], dim=1)
    return (
        labels.int(),
        torch.where(positive, matched, -1).int(),
        ltrb,
        torch.where(positive, centerness(ltrb), 0.0),
        counts.int(),
    )


def centerness(ltrb: Tensor) -> Tensor:
    """``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``, [1] equation 3.

    Args:
        ltrb: Tensor[..., 4] of positive distances.

    Returns:
        Tensor[...] in (0, 1]: 1 at the middle of the box, towards 0 at its sides.
    """
    left, top, right, bottom = ltrb.unbind(dim=-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    # Through float64, so that it is rounded as IEEE 754 says, which torch's root of float32 is not.
    return (horizontal * vertical).double().sqrt().to(ltrb.dtype)


def _check_ground_truth(boxes: Tensor, classes: Tensor, offsets: Tensor, num_classes: int) -> None:
    known = ((classes >= -1) & (classes < num_classes)).all()
    torch._assert_async(
        known,
        f"assign_targets: gt_classes must lie in [-1, {num_classes}); "
        "-1 is an ignored region, other values need a larger num_classes",
    )
    ordered = (offsets[1:] >= offsets[:-1]).all() & (offsets[0] == 0)
    torch._assert_async(
        ordered & (offsets[-1] == boxes.shape[0]),
        f"assign_targets: gt_offsets must rise from 0 to the number of boxes, {boxes.shape[0]}",
    )


def _pairs(flat: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(flat[0::2], flat[1::2], strict=True))


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances [..., 4] from points [..., 2] to the left, top, right and bottom sides of boxes."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)


def _area(boxes: Tensor, pixel_extent: int) -> Tensor:
    width, height = (boxes[..., 2:] + pixel_extent - boxes[..., :2]).unbind(dim=-1)
    return width * height


# ---- sigmoid_focal_loss (arXiv 1708.02002 equation 5, with its gradient in closed form) ----


def sigmoid_focal_loss(logits: list[Tensor], labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """See ``fcos_d2.ops.sigmoid_focal_loss``."""
    _check_labels(labels, logits[0].shape[1])
    total = logits[0].new_zeros((), dtype=_accumulate_dtype(logits[0]))
    for level, label in zip(logits, _labels_like_maps(labels, logits), strict=True):
        z, _, weight = _focal_terms(level, label, alpha)
        total = total + (weight * torch.sigmoid(z).pow(gamma) * F.softplus(z)).sum()
    return total


def sigmoid_focal_loss_backward(
    grad: Tensor, logits: list[Tensor], labels: Tensor, alpha: float, gamma: float
) -> list[Tensor]:
    """``d loss / dz = w p^gamma (gamma (1 - p) softplus(z) + p)``, finite for finite logits."""
    grads = []
    for level, label in zip(logits, _labels_like_maps(labels, logits), strict=True):
        z, sign, weight = _focal_terms(level, label, alpha)
        p = torch.sigmoid(z)
        slope = gamma * torch.sigmoid(-z) * F.softplus(z) + p
        slope = grad * sign * weight * p.pow(gamma) * slope
        grads.append(torch.empty_like(level).copy_(slope))  # in the memory layout of the level
    return grads


def sigmoid_focal_loss_with_gradient(
    logits: list[Tensor], labels: Tensor, scale: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and ``scale`` times its gradient."""
    gradient = sigmoid_focal_loss_backward(scale, logits, labels, alpha, gamma)
    return sigmoid_focal_loss(logits, labels, alpha, gamma), gradient


def sigmoid_focal_loss_correct_gradient(
    gradient: list[Tensor],
    factor: Tensor,
    logits: list[Tensor],
    labels: Tensor,
    scale: Tensor,
    alpha: float,
    gamma: float,
) -> None:
    """Makes of ``scale`` times the gradient ``factor * scale`` times the gradient, in place.

    Multiplying would round half precision twice. Kernels do nothing where ``factor`` is 1.
    """
    exact = sigmoid_focal_loss_backward(factor * scale, logits, labels, alpha, gamma)
    for level, values in zip(gradient, exact, strict=True):
        level.copy_(values)


def _focal_terms(logits: Tensor, labels: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of being wrong z = -x for the true class and x for others, dz/dx, and the weight.

    Seen so, both halves of the loss are one formula: ``weight * sigmoid(z)^gamma * softplus(z)``.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    is_true_class, is_ignored = labels[:, None] == classes, labels[:, None] == -1
    sign = torch.where(is_true_class, -1.0, 1.0).to(_accumulate_dtype(logits))
    weight = torch.ones_like(sign)
    if alpha >= 0:
        weight = torch.where(is_true_class, alpha, 1 - alpha).to(sign.dtype)
    # The logit may be NaN.
    return (sign * logits).masked_fill(is_ignored, 0), sign, weight.masked_fill(is_ignored, 0)


def _labels_like_maps(labels: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """[B, P] -> one [B, H, W] per level."""
    sizes = [level.shape[2:] for level in maps]
    parts = labels.split([height * width for height, width in sizes], dim=1)
    return [part.unflatten(1, tuple(size)) for part, size in zip(parts, sizes, strict=True)]


def _check_labels(labels: Tensor, num_classes: int) -> None:
    torch._assert_async(
        ((labels >= -1) & (labels <= num_classes)).all(),
        f"sigmoid_focal_loss: labels must lie in [-1, {num_classes}]: -1 is ignored, "
        f"{num_classes} is background",
    )


def _accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ---- box_loss ([1] equation 2; arXiv 1608.01471, 1902.09630, 1911.08287) ----


def box_loss(
    ltrb: list[Tensor],
    quality: list[Tensor],
    matched: Tensor,
    target_ltrb: Tensor,
    target_centerness: Tensor,
    loss_type: str,
    quality_type: str,
    weight_by_centerness: bool,
    smoothing: list[float],
) -> tuple[Tensor, Tensor]:
    """See ``fcos_d2.ops.box_loss``."""
    positive, weight, loss, _, logit, target = _box_terms(
        ltrb, quality, matched, target_ltrb, target_centerness,
        loss_type, quality_type, weight_by_centerness, smoothing,
    )  # fmt: skip
    quality_loss = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return (
        torch.where(positive, weight * loss, 0.0).sum(),
        torch.where(positive, quality_loss, 0.0).sum(),
    )


def box_loss_backward(
    grad_box: Tensor,
    grad_quality: Tensor,
    ltrb: list[Tensor],
    quality: list[Tensor],
    matched: Tensor,
    target_ltrb: Tensor,
    target_centerness: Tensor,
    loss_type: str,
    quality_type: str,
    weight_by_centerness: bool,
    smoothing: list[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of ``box_loss``; zero away from positive points."""
    positive, weight, _, slope, logit, target = _box_terms(
        ltrb, quality, matched, target_ltrb, target_centerness,
        loss_type, quality_type, weight_by_centerness, smoothing,
    )  # fmt: skip
    box_slope = torch.where(positive[..., None], grad_box * weight[..., None] * slope, 0.0)
    quality_slope = torch.where(positive, grad_quality * (torch.sigmoid(logit) - target), 0.0)
    return _points_to_maps(box_slope, ltrb), _points_to_maps(quality_slope[..., None], quality)


def iou_loss(
    pred: Tensor, target: Tensor, loss_type: str, smoothing: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """IoU of two boxes that share a reference point, a loss made of it, and the loss's gradient.

    Args:
        pred: Tensor[..., 4], ltrb of the predicted box.
        target: Tensor[..., 4], ltrb of the true box, all positive.
        loss_type: "iou" (-log IoU), "linear_iou" (1 - IoU), "giou", "diou" or "ciou".
        smoothing: added to intersection and union, in squared units of ltrb (the authors use 1).
            Where it is 0, "iou" is flat below an IoU of 1e-6.

    Returns:
        loss Tensor[...], IoU Tensor[...], d loss / d pred Tensor[..., 4].
    """
    overlap_w, d_overlap_w = _extent(pred[..., 0::2], target[..., 0::2], torch.minimum)
    overlap_h, d_overlap_h = _extent(pred[..., 1::2], target[..., 1::2], torch.minimum)
    overlaps = (overlap_w > 0) & (overlap_h > 0)
    inter = torch.where(overlaps, overlap_w * overlap_h, 0.0)
    d_inter = _interleave(d_overlap_w * overlap_h[..., None], d_overlap_h * overlap_w[..., None])
    d_inter = torch.where(overlaps[..., None], d_inter, 0.0)
    pred_w, pred_h = pred[..., 0] + pred[..., 2], pred[..., 1] + pred[..., 3]
    target_w, target_h = target[..., 0] + target[..., 2], target[..., 1] + target[..., 3]
    # What is not in both boxes, by the extents beyond the overlap: no difference of areas, which
    # would lose all digits of the loss where the boxes are nearly the same.
    more, less = (pred - target).clamp(min=0), (target - pred).clamp(min=0)
    more_w, more_h = (more[..., :2] + more[..., 2:]).unbind(dim=-1)
    less_w, less_h = (less[..., :2] + less[..., 2:]).unbind(dim=-1)
    different = overlap_w * (more_h + less_h) + overlap_h * (more_w + less_w)
    different = different + more_w * more_h + less_w * less_h
    different = torch.where(overlaps, different, pred_w * pred_h + target_w * target_h)
    union = inter + different
    d_union = torch.stack((pred_h, pred_w, pred_h, pred_w), dim=-1) - d_inter
    denominator = union + smoothing + EPS
    iou = (inter + smoothing) / denominator
    d_iou = (d_inter - iou[..., None] * d_union) / denominator[..., None]
    if loss_type == "iou":
        flat = (iou <= MIN_IOU) & (smoothing == 0)
        loss = ((different + EPS) / (inter + smoothing)).log1p()  # -log(iou)
        loss = torch.where(flat, -math.log(MIN_IOU), loss)
        return loss, iou, torch.where(flat[..., None], 0.0, -d_iou / iou[..., None])
    distinct = (different + EPS) / denominator  # 1 - iou
    loss, d_loss = distinct, -d_iou
    if loss_type == "linear_iou":
        return loss, iou, d_loss

    cover_w, d_cover_w = _extent(pred[..., 0::2], target[..., 0::2], torch.maximum)
    cover_h, d_cover_h = _extent(pred[..., 1::2], target[..., 1::2], torch.maximum)
    if loss_type == "giou":
        cover = cover_w * cover_h
        d_cover = _interleave(d_cover_w * cover_h[..., None], d_cover_h * cover_w[..., None])
        uncovered = torch.where(overlaps, more_w * less_h + less_w * more_h, cover - union)
        empty = uncovered / (cover + EPS)  # share of the enclosing box that neither covers
        d_empty = (d_cover - d_union - empty[..., None] * d_cover) / (cover + EPS)[..., None]
        return loss + empty, iou, d_loss + d_empty

    diagonal = cover_w**2 + cover_h**2 + EPS
    d_diagonal = _interleave(2 * cover_w[..., None] * d_cover_w, 2 * cover_h[..., None] * d_cover_h)
    difference = pred - target
    shift = (difference[..., 2:] - difference[..., :2]) / 2  # between the centres, (x, y)
    distance = (shift**2).sum(dim=-1) / diagonal
    d_distance = torch.cat((-shift, shift), dim=-1) - distance[..., None] * d_diagonal
    loss, d_loss = loss + distance, d_loss + d_distance / diagonal[..., None]
    if loss_type == "diou":
        return loss, iou, d_loss

    angle = torch.atan2(pred_w, pred_h) - torch.atan2(target_w, target_h)
    aspect = 4 / math.pi**2 * angle**2
    trade_off = aspect / (distinct + aspect + EPS)  # a constant to the gradient (1911.08287)
    d_angle = torch.stack((pred_h, -pred_w, pred_h, -pred_w), dim=-1)
    d_angle = d_angle / (pred_w**2 + pred_h**2 + EPS)[..., None]
    d_aspect = 8 / math.pi**2 * angle[..., None] * d_angle
    return loss + trade_off * aspect, iou, d_loss + trade_off[..., None] * d_aspect


def _box_terms(
    ltrb: list[Tensor],
    quality: list[Tensor],
    matched: Tensor,
    target_ltrb: Tensor,
    target_centerness: Tensor,
    loss_type: str,
    quality_type: str,
    weight_by_centerness: bool,
    smoothing: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything box_loss and its gradient need, for all B x P points, positive or not."""
    dtype = _accumulate_dtype(ltrb[0])
    pred, logit = _maps_to_points(ltrb).to(dtype), _maps_to_points(quality).to(dtype)[..., 0]
    positive = matched >= 0
    # A background point compares its prediction with itself: finite numbers that are masked later.
    target = torch.where(positive[..., None], target_ltrb.to(dtype), pred.abs() + 1)
    smooth = [level.shape[2] * level.shape[3] for level in ltrb]
    smooth = torch.cat([pred.new_full((n,), s) for n, s in zip(smooth, smoothing, strict=True)])
    loss, iou, slope = iou_loss(pred, target, loss_type, smooth)
    weight = target_centerness.to(dtype) if weight_by_centerness else torch.ones_like(loss)
    quality_target = target_centerness.to(dtype) if quality_type == "centerness" else iou
    return positive, weight, loss, slope, logit, quality_target


def _extent(pred: Tensor, target: Tensor, bound) -> tuple[Tensor, Tensor]:
    """Length [...] of what two intervals share (bound = minimum) or span (maximum), and its slope.

    The intervals contain one point and are given as distances [..., 2] from it to their ends; the
    slope [..., 2] is d length / d pred.
    """
    ends = bound(pred, target)
    return ends.sum(dim=-1), ((ends == pred) & (pred != target)).to(pred.dtype)


def _interleave(horizontal: Tensor, vertical: Tensor) -> Tensor:
    """(left, right) and (top, bottom) -> (left, top, right, bottom)."""
    return torch.stack((horizontal, vertical), dim=-1).flatten(-2)


def _maps_to_points(maps: list[Tensor]) -> Tensor:
    """One [B, C, H, W] per level -> [B, P, C]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def _points_to_maps(points: Tensor, like: list[Tensor]) -> list[Tensor]:
    """[B, P, C] -> one [B, C, H, W] per level, in the dtype and memory layout of ``like``."""
    parts = points.split([level.shape[2] * level.shape[3] for level in like], dim=1)
    return [
        torch.empty_like(level).copy_(part.transpose(1, 2).reshape(level.shape))
        for part, level in zip(parts, like, strict=True)
    ]


# ---- select_candidates ([1] section 3.1 "inference") ----


def select_candidates(
    logits: list[Tensor],
    ltrb: list[Tensor],
    quality: list[Tensor],
    image_sizes: Tensor,
    strides: list[int],
    pitches: list[int],
    offset: float,
    score_threshold: float,
    topk: int,
    threshold_with_quality: bool,
    rank_with_quality: bool,
    score_rule: str,
    clip: bool,
    pixel_extent: int = 0,
    drop_empty: bool = False,
    top: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.select_candidates``; ``top`` replaces ``top_lowest_index_first``."""
    top = top or top_lowest_index_first
    shapes = tuple(tuple(level.shape[2:]) for level in logits)
    levels = Levels(shapes, tuple(strides), _pairs(pitches), offset)
    points = point_coordinates(levels, logits[0].device).split(levels.points_per_level)
    parts = []
    for level, stride in enumerate(strides):
        cls = torch.sigmoid(_maps_to_points([logits[level]]).float())  # [B, HW, K]
        product = cls * torch.sigmoid(_maps_to_points([quality[level]]).float())
        passes = (product if threshold_with_quality else cls) > score_threshold
        passes &= ~product.isnan()
        rank = torch.where(passes, product if rank_with_quality else cls, -1.0).flatten(1)
        rank, index = top(rank, topk)
        score = {"cls": cls, "product": product, "sqrt": product.sqrt()}[score_rule]
        point = index // cls.shape[2]
        distances = _maps_to_points([ltrb[level]]).float() * stride
        distances = distances.gather(1, point[..., None].expand(-1, -1, 4))
        center = points[level][point]
        boxes = torch.cat((center - distances[..., :2], center + distances[..., 2:]), dim=-1)
        found = (rank >= 0) & boxes.isfinite().all(dim=-1)
        parts.append((boxes, score.flatten(1).gather(1, index), index % cls.shape[2], found))
    boxes, scores, classes, found = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    if clip:
        limit = (image_sizes.flip(1).repeat(1, 2)[:, None] - pixel_extent).to(boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limit)  # (w, h, w, h)
    if drop_empty:
        found = found & (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
    return (
        torch.where(found[..., None], boxes, 0.0),
        torch.where(found, scores, 0.0),
        torch.where(found, classes, -1),
    )


def top_lowest_index_first(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like torch.topk on [B, n] of values >= 0 or == -1, but ties always go to the lower index.

    The bits of a non-negative float order like the float, so (bits, -index) packed into one
    integer makes every key unique: any correct selection returns the same result.
    """
    n = values.shape[1]
    bits = torch.where(values >= 0, values, 0.0).contiguous().view(torch.int32).long() + 1
    bits = torch.where(values >= 0, bits, 0)
    key = (bits << 32) | (n - 1 - torch.arange(n, device=values.device))
    index = n - 1 - (key.topk(torch.sym_min(k, n), dim=1).values & 0xFFFFFFFF)
    return values.gather(1, index), index


# ---- batched_nms ----


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    max_detections: int,
    class_agnostic: bool,
    method: str,
    sigma: float,
    min_score: float,
    pixel_extent: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``fcos_d2.ops.batched_nms_padded``."""
    # One empty slot more, so that there is one to point at.
    boxes, scores = F.pad(boxes, (0, 0, 0, 1)), F.pad(scores, (0, 1))
    classes = F.pad(classes, (0, 1), value=-1)
    alive, kept = nms_start(scores, classes), []
    for _ in range(min(max_detections, scores.shape[1])):
        *best, alive = nms_step(
            alive, boxes, classes,
            iou_threshold, class_agnostic, method, sigma, min_score, pixel_extent,
        )  # fmt: skip
        kept.append(best)
    best, index = (torch.cat(column, dim=1) for column in zip(*kept, strict=True))
    missing = (0, max_detections - len(kept))
    return nms_result(boxes, classes, F.pad(best, missing, value=-math.inf), F.pad(index, missing))


def nms_start(scores: Tensor, classes: Tensor) -> Tensor:
    """Scores [B, N] of the boxes that can be kept; -inf for the others."""
    return torch.where((classes >= 0) & ~scores.isnan(), scores.float(), -math.inf)


def nms_step(
    alive: Tensor,
    boxes: Tensor,
    classes: Tensor,
    iou_threshold: float,
    class_agnostic: bool,
    method: str,
    sigma: float,
    min_score: float,
    pixel_extent: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score and index [B, 1] of the best box, and the scores [B, N] that it leaves alive."""
    position = torch.arange(alive.shape[1], device=alive.device)
    best = alive.amax(dim=1, keepdim=True)
    index = torch.where(alive == best, position, alive.shape[1]).amin(dim=1, keepdim=True)
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
    rival = best > -math.inf
    if not class_agnostic:
        rival = rival & (classes.gather(1, index) == classes)
    alive = torch.where(position == index, -math.inf, alive)
    inter, union = _overlap(box, boxes.float(), pixel_extent)
    alive = _lower_scores(alive, inter, union, rival, iou_threshold, method, sigma)
    if method != "hard":
        alive = torch.where(alive > min_score, alive, -math.inf)
    return best, index, alive


def nms_result(
    boxes: Tensor, classes: Tensor, best: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, classes and counts of the slots [B, D]; a score of -inf makes one empty."""
    valid = best > -math.inf
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4)).float()
    return (
        torch.where(valid[..., None], box, 0.0),
        torch.where(valid, best, 0.0),
        torch.where(valid, classes.gather(1, index), -1),
        valid.sum(dim=1).int(),
    )


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """See ``fcos_d2.ops.batched_nms``."""
    order = torch.sort(scores, descending=True, stable=True).indices
    boxes, idxs = boxes[order].float(), idxs[order]
    alive = torch.ones_like(order, dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            rest = slice(i + 1, None)
            inter, union = _overlap(boxes[i], boxes[rest], 0)
            alive[rest] &= ~((idxs[rest] == idxs[i]) & (inter > iou_threshold * union))
    return order[alive]


def _lower_scores(
    scores: Tensor,
    inter: Tensor,
    union: Tensor,
    rival: Tensor,
    iou_threshold: float,
    method: str,
    sigma: float,
) -> Tensor:
    """Scores [B, N] after another box was kept; only ``rival`` boxes lose (1704.04503)."""
    overlaps = rival & (inter > iou_threshold * union)
    if method == "hard":
        return torch.where(overlaps, -math.inf, scores)
    iou = torch.where(union > 0, inter / union, 0.0)
    if method == "linear":
        return torch.where(overlaps, scores * (1 - iou), scores)
    return torch.where(rival, scores * torch.exp(-(iou**2) / sigma), scores)


def _overlap(box: Tensor, boxes: Tensor, pixel_extent: int) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union; a NaN coordinate gives NaN, which overlaps nothing."""
    top_left = torch.maximum(box[..., :2], boxes[..., :2])
    bottom_right = torch.minimum(box[..., 2:], boxes[..., 2:]) + pixel_extent
    width, height = (bottom_right - top_left).clamp(min=0).unbind(dim=-1)
    inter = width * height
    return inter, _area(box, pixel_extent) + _area(boxes, pixel_extent) - inter
