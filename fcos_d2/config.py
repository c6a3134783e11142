"""Every configuration key of FCOS: its meaning, its default, and its symbol in the papers.

Key names are AdelaiDet's where AdelaiDet has the key, so that its users' YAML files merge. A key
whose default is None takes its value from ``MODEL.FCOS.CONVENTION``, which names one of the
published implementations; a value given explicitly always wins.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from .errors import InputError

_ADELAIDET = {
    "NUM_CLASSES": 80,  # COCO's, in all implementations
    "LOCATION_OFFSET": 0.5,
    "LOCATION_PITCH": "stride",
    "RANGE_INCLUSIVE": True,
    "CENTER_SAMPLE": True,
    "USE_SCALE": True,
    "USE_RELU": True,
    "NORM_REG_TARGETS": True,
    "CENTERNESS_ON_REG": True,
    "LOC_LOSS_TYPE": "giou",
    "IOU_SMOOTH": 1.0,
    "CTR_WEIGHTED_LOC": True,
    "LOSS_NORMALIZER_CLS": "fg",
    "LOSS_NORMALIZER_BOX": "fg",
    "SYNC_NORMALIZER": True,
    "MOVING_FG_START": 100.0,
    "SCORE_RULE": "sqrt",
    "INFERENCE_TH_TEST": 0.05,
    "THRESH_WITH_CTR": False,
    "RANK_WITH_CTR": True,
    "CLIP_BEFORE_NMS": False,
    "DROP_EMPTY": False,
    "PIXEL_EXTENT": 0,
    "NMS_TH": 0.6,
}
_ORIGINAL_IMPRV = {**_ADELAIDET, "CLIP_BEFORE_NMS": True, "PIXEL_EXTENT": 1}
_ORIGINAL = {
    **_ORIGINAL_IMPRV,
    "CENTER_SAMPLE": False,
    "USE_RELU": False,
    "NORM_REG_TARGETS": False,
    "CENTERNESS_ON_REG": False,
    "LOC_LOSS_TYPE": "iou",
}
_TORCHVISION = {
    **_ADELAIDET,
    "LOCATION_OFFSET": 0.0,
    "LOCATION_PITCH": "floor",
    "RANGE_INCLUSIVE": False,
    "USE_SCALE": False,
    "IOU_SMOOTH": 0.0,
    "CTR_WEIGHTED_LOC": False,
    "SYNC_NORMALIZER": False,
    "INFERENCE_TH_TEST": 0.04,  # they compare sqrt(cls * ctr) with 0.2
    "THRESH_WITH_CTR": True,
    "CLIP_BEFORE_NMS": True,
}
_DETECTRON2 = {
    **_TORCHVISION,
    "LOCATION_OFFSET": 0.5,
    "LOCATION_PITCH": "stride",
    "LOSS_NORMALIZER_CLS": "moving_fg",
    "LOSS_NORMALIZER_BOX": "cls",
    "MOVING_FG_START": 300.0,
    "CLIP_BEFORE_NMS": False,
}
_CVPODS = {
    **_ADELAIDET,
    "LOCATION_OFFSET": 0.0,
    "IOU_SMOOTH": 0.0,
    "RANK_WITH_CTR": False,
}
_MMDET_TRICKS = {
    **_ADELAIDET,
    "IOU_SMOOTH": 0.0,
    "SCORE_RULE": "product",
    "RANK_WITH_CTR": False,
    "CLIP_BEFORE_NMS": True,
    "DROP_EMPTY": True,
}
_MMDET_BASE = {
    **_MMDET_TRICKS,
    "CENTER_SAMPLE": False,
    "USE_RELU": False,
    "NORM_REG_TARGETS": False,
    "CENTERNESS_ON_REG": False,
    "LOC_LOSS_TYPE": "iou",
    "NMS_TH": 0.5,
}

_ROSINALITY = {
    **_ORIGINAL,
    "CENTER_SAMPLE": True,
    "LOC_LOSS_TYPE": "giou",
    "LOSS_NORMALIZER_CLS": "fg_and_images",
    "SYNC_NORMALIZER": False,
}

CONVENTIONS: dict[str, dict[str, object]] = {
    "adelaidet": _ADELAIDET,  # the authors' improved FCOS, aim-uofa/AdelaiDet
    "original": _ORIGINAL,  # tianzhi0549/FCOS, paper 1904.01355 v1
    "original_imprv": _ORIGINAL_IMPRV,  # tianzhi0549/FCOS, the FCOS_imprv_* configs
    "rosinality": _ROSINALITY,  # rosinality/fcos-pytorch; with TOP_LEVELS_FROM "res5"
    "detectron2": _DETECTRON2,  # detectron2.modeling.meta_arch.fcos
    "torchvision": _TORCHVISION,  # torchvision.models.detection.fcos
    "cvpods": _CVPODS,  # Megvii-BaseDetection/cvpods; its top-k is min(1000, H * W) per level
    "mmdet_base": _MMDET_BASE,  # mmdetection 3.x, fcos_*_gn-head configs
    "mmdet_tricks": _MMDET_TRICKS,  # mmdetection 3.x, center-normbbox-centeronreg-giou configs
}


def add_fcos_config(cfg: CN) -> None:
    """Adds the keys of FCOS to a detectron2 config.

    They are ``MODEL.FCOS``, ``MODEL.TIMM``, ``MODEL.COMPILE``, ``MODEL.COMPILE_MODE``,
    ``MODEL.CHANNELS_LAST``, ``MODEL.INFERENCE``, ``MODEL.LAZY_CONFIG``, ``MODEL_EMA``,
    ``DATASETS.REGISTER``, and in ``SOLVER`` OPTIMIZER, GRADIENT_ACCUMULATION, MAX_SKIPPED_ITERS and
    AMP.PRECISION.

    Raises:
        InputError: the config already has ``MODEL.FCOS``.
    """
    if "FCOS" in cfg.MODEL:
        raise InputError(
            "add_fcos_config: expected a config without MODEL.FCOS, got one that has it; call "
            "add_fcos_config(get_cfg()) once, and in a process that has not imported AdelaiDet "
            "(adet), which puts its own MODEL.FCOS into detectron2's defaults"
        )
    cfg.MODEL.FCOS = fcos = CN()
    _add_head(fcos)
    _add_targets(fcos)
    _add_losses(fcos)
    _add_inference(fcos)
    cfg.MODEL.TIMM = CN()
    _add_timm(cfg.MODEL.TIMM)
    # Custom datasets by name: {json: COCO file, images: folder}, with part: [0, 0.8] for a fraction
    # of the images; or Pascal VOC {voc: folder, split: train}. See docs/custom_data.md.
    cfg.DATASETS.REGISTER = CN(new_allowed=True)
    _add_training(cfg)


def _add_training(cfg: CN) -> None:
    # "SGD" (with SOLVER.MOMENTUM, SOLVER.NESTEROV) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Number of batches into which the IMS_PER_BATCH images of an iteration are split, which are
    # processed in sequence to save memory. Normalizers and BN statistics are per batch.
    cfg.SOLVER.GRADIENT_ACCUMULATION = 1
    # With SOLVER.AMP.ENABLED: "float16" (GPUs, loss scaling), "bfloat16" (GPUs and CPUs), or "auto"
    # for what the device computes fastest, which may be float32.
    cfg.SOLVER.AMP.PRECISION = "float16"
    # Iterations that may be skipped because a loss or a gradient is not finite; one more stops
    # training.
    cfg.SOLVER.MAX_SKIPPED_ITERS = 0
    # torch.compile for backbone and head, and its mode: "reduce-overhead" captures CUDA graphs for
    # each input shape.
    cfg.MODEL.COMPILE = False
    cfg.MODEL.COMPILE_MODE = "default"
    # Feature maps in channels_last memory format while training: faster on CPUs, and on GPUs in
    # lower precision. Inference always uses it.
    cfg.MODEL.CHANNELS_LAST = False
    # Precision of inference by --eval-only, fcos-d2 and Predictor: "float32", "bfloat16", "float16"
    # (GPUs), or "auto" for what the device computes fastest.
    cfg.MODEL.INFERENCE = CN()
    cfg.MODEL.INFERENCE.DTYPE = "float32"
    # The LazyConfig that defines the model, and its overrides; set when one is read.
    cfg.MODEL.LAZY_CONFIG = []
    # Exponential moving average of the weights, which is evaluated, and saved with every checkpoint
    # and as model_final_ema.pth.
    cfg.MODEL_EMA = CN()
    cfg.MODEL_EMA.ENABLED = False
    cfg.MODEL_EMA.DECAY = 0.999


def _add_head(fcos: CN) -> None:
    # Which implementation to follow where they differ: a key of CONVENTIONS. Sets every key below
    # whose default is None.
    fcos.CONVENTION = "adelaidet"
    # Number of classes K, without background. None: that of the first training dataset.
    fcos.NUM_CLASSES = None
    # Feature maps of the backbone that the head reads, by ascending stride, and their strides s.
    fcos.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    fcos.FPN_STRIDES = [8, 16, 32, 64, 128]
    # How many levels to add on top of the FPN (0, 1: P6, 2: P6 and P7), and the feature map that
    # the first of them is computed from: "p5" or "res5" (C5).
    fcos.TOP_LEVELS = 2
    fcos.TOP_LEVELS_FROM = "p5"
    # Number of convolutions in the classification tower, the box tower, and the shared tower.
    fcos.NUM_CLS_CONVS = 4
    fcos.NUM_BOX_CONVS = 4
    fcos.NUM_SHARE_CONVS = 0
    # Normalization in the towers: "GN" (32 groups), "BN" or "SyncBN" (separate statistics and
    # weights per level), "none".
    fcos.NORM = "GN"
    # Deformable convolution (DCNv2) as the last convolution of the classification and box towers.
    fcos.USE_DEFORMABLE = False
    # Initial foreground probability, pi in 1708.02002.
    fcos.PRIOR_PROB = 0.01
    # A learnable scale of the box prediction per level, s_i in section 3.2 of 1904.01355.
    fcos.USE_SCALE = None
    # Distances are relu(x) (True) or exp(x) (False), in strides or (NORM_REG_TARGETS False) pixels.
    fcos.USE_RELU = None
    fcos.NORM_REG_TARGETS = None
    # Predict the box quality from the box tower (True) or from the classification tower (False).
    fcos.CENTERNESS_ON_REG = None
    # "ctrness" (equation 3 of 1904.01355) or "iou" (2006.09214).
    fcos.BOX_QUALITY = "ctrness"
    # Also return the box tower's features with the predictions, for heads built on top of FCOS.
    fcos.YIELD_BOX_FEATURES = False


def _add_targets(fcos: CN) -> None:
    # Bounds in pixels between the levels' size ranges, m_2 ... m_{L} of 1904.01355 section 3.2: one
    # fewer than levels.
    fcos.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # Whether a largest distance equal to a bound belongs to the range.
    fcos.RANGE_INCLUSIVE = None
    # Only points within POS_RADIUS strides of a box's center are positive (2006.09214 section 3.2).
    fcos.CENTER_SAMPLE = None
    fcos.POS_RADIUS = 1.5
    # Position of a level's first point, as a fraction of its stride, and the spacing of its points:
    # the "stride", or "floor" of padded image size / feature size.
    fcos.LOCATION_OFFSET = None
    fcos.LOCATION_PITCH = None
    # Ignore points inside crowd regions (COCO iscrowd=1) instead of learning them as background.
    # Not for two-stage detectors, whose heads would take the regions' class -1 for a class.
    fcos.IGNORE_CROWD = False
    # 1 if x2 and y2 are the last pixels of a box, 0 if they are its edges: added to width and
    # height when the smallest box of a point is chosen and when NMS computes overlaps, subtracted
    # from the image size when boxes are clipped.
    fcos.PIXEL_EXTENT = None


def _add_losses(fcos: CN) -> None:
    # Focal loss alpha and gamma (1708.02002), and its weight in the total loss.
    fcos.LOSS_ALPHA = 0.25
    fcos.LOSS_GAMMA = 2.0
    fcos.LOSS_WEIGHT_CLS = 1.0
    # "iou", "linear_iou", "giou", "diou" or "ciou".
    fcos.LOC_LOSS_TYPE = None
    # Added to intersection and union of the box loss, in squared units of the regression targets.
    # With 0, the "iou" loss is flat below an IoU of 1e-6.
    fcos.IOU_SMOOTH = None
    # Weight the box loss by the centerness target and divide by the sum of the weights. Applies to
    # BOX_QUALITY "ctrness"; with "iou" all positive points weigh the same.
    fcos.CTR_WEIGHTED_LOC = None
    # The classification loss is divided by the number of foreground points ("fg"), this plus the
    # number of images ("fg_and_images"), its moving average ("moving_fg", saved with the weights;
    # starts at MOVING_FG_START) or the number of points ("all"); the unweighted box and the quality
    # loss by "fg", or by the same number as the classification loss ("cls").
    fcos.LOSS_NORMALIZER_CLS = None
    fcos.LOSS_NORMALIZER_BOX = None
    fcos.MOVING_FG_START = None
    # Average the normalizers over all processes.
    fcos.SYNC_NORMALIZER = None


def _add_inference(fcos: CN) -> None:
    # Candidates are (point, class) pairs with a probability above the threshold; THRESH_WITH_CTR
    # compares the probability times the box quality instead.
    fcos.INFERENCE_TH_TEST = None
    fcos.THRESH_WITH_CTR = None
    # Most candidates per level and image; ranked by probability times quality, or by probability.
    fcos.PRE_NMS_TOPK_TEST = 1000
    fcos.RANK_WITH_CTR = None
    # Final score: "sqrt" of the product, "product", or "cls" (quality unused).
    fcos.SCORE_RULE = None
    # Clip boxes to their image before NMS, and then drop those without area.
    fcos.CLIP_BEFORE_NMS = None
    fcos.DROP_EMPTY = None
    # IoU above which a detection is suppressed; "hard", "linear" or "gaussian" (soft-NMS,
    # 1704.04503, with its sigma); whether boxes of different classes suppress each other.
    fcos.NMS_TH = None
    fcos.NMS_METHOD = "hard"
    fcos.NMS_SIGMA = 0.5
    fcos.NMS_CLASS_AGNOSTIC = False
    # Most detections per image.
    fcos.POST_NMS_TOPK_TEST = 100
    # FCOS as a proposal generator (MODEL.PROPOSAL_GENERATOR.NAME "FCOSProposals"): whether training
    # yields proposals, their score threshold, and their largest numbers.
    fcos.YIELD_PROPOSAL = False
    fcos.INFERENCE_TH_TRAIN = 0.05
    fcos.PRE_NMS_TOPK_TRAIN = 1000
    fcos.POST_NMS_TOPK_TRAIN = 100


def _add_timm(timm: CN) -> None:
    # The model of MODEL.BACKBONE.NAME build_fcos_timm_fpn_backbone: one of timm.list_models(). Its
    # feature maps are named res2 to res5 by stride, like those of MODEL.RESNETS;
    # MODEL.BACKBONE.FREEZE_AT 2 freezes everything that res2 is computed from, and so on. Weights
    # are downloaded only if MODEL.WEIGHTS names them ("timm://convnext_tiny.fb_in1k").
    timm.NAME = ""
    # Batch norms of the model: "" keeps them, "FrozenBN" or "SyncBN" replaces them.
    timm.NORM = ""
    # More arguments of timm.create_model, like ["drop_path_rate=0.2", "strict_img_size=False"].
    timm.OPTIONS = []


def resolve_convention(cfg: CN) -> CN:
    """Fills the keys of ``cfg.MODEL.FCOS`` that are None from its CONVENTION, in place.

    Returns:
        cfg, for chaining. Calling it again has no effect.

    Raises:
        InputError: the convention is unknown, or an explicit value has the wrong type.
    """
    fcos = cfg.MODEL.FCOS
    for key, value in _convention(fcos).items():
        if fcos[key] is None:
            fcos[key] = value
    return cfg


def fcos_settings(cfg: CN) -> CN:
    """Returns ``cfg.MODEL.FCOS`` with every key filled in; does not change ``cfg``.

    Raises:
        InputError: as for ``resolve_convention``; or NUM_CLASSES is None, and the first dataset is
            not registered with class names.
    """
    fcos = cfg.MODEL.FCOS
    if all(fcos[key] is not None for key in _convention(fcos)):
        return fcos
    cfg = cfg.clone()
    cfg.defrost()
    if fcos.NUM_CLASSES is None:
        cfg.MODEL.FCOS.NUM_CLASSES = _count_registered_classes(cfg)
    return resolve_convention(cfg).MODEL.FCOS


def _convention(fcos: CN) -> dict[str, object]:
    if fcos.CONVENTION not in CONVENTIONS:
        raise InputError(
            f"MODEL.FCOS.CONVENTION must be one of {', '.join(CONVENTIONS)}, "
            f"got {fcos.CONVENTION!r}"
        )
    convention = CONVENTIONS[fcos.CONVENTION]
    for key, default in convention.items():
        # yacs accepts anything for a key whose default is None, and the string "false" is truthy.
        types = (float, int) if isinstance(default, float) else (type(default),)
        if fcos[key] is not None and type(fcos[key]) not in types:
            raise InputError(
                f"MODEL.FCOS.{key} must be {types[0].__name__}, got {fcos[key]!r}; "
                f"write it like {default!r}"
            )
    return convention


def _count_registered_classes(cfg: CN) -> int | None:
    """Counts the first dataset's classes without reading a file; None if there is no dataset."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = next(iter((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)), None)
    if name is None:
        return None
    classes = MetadataCatalog.get(name).get("thing_classes") if name in DatasetCatalog else None
    if not classes:
        raise InputError(
            f"MODEL.FCOS.NUM_CLASSES is null, and {name!r} is not registered with thing_classes; "
            "set MODEL.FCOS.NUM_CLASSES, or read the config with fcos_d2.config_file.read_cfg"
        )
    return len(classes)
