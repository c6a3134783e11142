"""The authors' improved FCOS with ResNet-50: Base-FCOS.yaml in full, every choice explicit."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from fcos_d2.modeling import FCOS, FCOSHead, FCOSLoss, PointGrid, PostProcessor

model = L(FCOS)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(
                depth=50,
                stride_in_1x1=True,
                norm="FrozenBN",
            ),
            out_features=["res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        # P6 and P7 from P5; from C5 with in_channels=2048, in_feature="res5".
        top_block=L(LastLevelP6P7)(
            in_channels="${..out_channels}",
            out_channels="${..out_channels}",
            in_feature="p5",
        ),
    ),
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    head=L(FCOSHead)(
        in_channels="${..backbone.out_channels}",
        num_classes=80,
        strides=[8, 16, 32, 64, 128],
        num_cls_convs=4,
        num_box_convs=4,
        num_share_convs=0,
        norm="GN",
        use_deformable=False,
        prior_prob=0.01,
        use_scale=True,
        use_relu=True,
        norm_reg_targets=True,
        quality_on_box_tower=True,
        yield_box_features=False,
    ),
    losses=L(FCOSLoss)(
        num_classes="${..head.num_classes}",
        strides="${..head.strides}",
        sizes_of_interest=[64, 128, 256, 512],
        range_inclusive=True,
        center_radius=1.5,
        pixel_extent=0,
        alpha=0.25,
        gamma=2.0,
        cls_weight=1.0,
        loc_loss_type="giou",
        box_quality="ctrness",
        iou_smooth=1.0,
        norm_reg_targets="${..head.norm_reg_targets}",
        weight_by_centerness=True,
        cls_normalizer="fg",
        box_normalizer="fg",
        moving_fg_start=100.0,
        sync_normalizer=True,
    ),
    postprocess=L(PostProcessor)(
        score_threshold=0.05,
        threshold_with_quality=False,
        topk=1000,
        rank_with_quality=True,
        score_rule="sqrt",
        clip=False,
        drop_empty=False,
        pixel_extent="${..losses.pixel_extent}",
        nms_threshold=0.6,
        nms_method="hard",
        nms_sigma=0.5,
        class_agnostic=False,
        max_detections=100,
    ),
    grid=L(PointGrid)(strides="${..head.strides}", offset=0.5, pitch="stride"),
    # MSRA's ResNets expect BGR, with the standard deviation folded into their first convolution.
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
