"""Second stages of equal weights, ours and torchvision's, and the small problems they are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import roialign_ext
from roialign_ext import detection

CLASSES = 4
KEYPOINTS = 3
CHANNELS = 6
IMAGE_SHAPES = ((64, 96), (80, 72))
OPTIONS: dict[str, Any] = dict(
    fg_iou_thresh=0.5,
    bg_iou_thresh=0.5,
    batch_size_per_image=16,
    positive_fraction=0.25,
    bbox_reg_weights=None,
    score_thresh=0.05,
    nms_thresh=0.5,
    detections_per_img=10,
)
BRANCHES = {"boxes": (), "masks": ("mask",), "keypoints": ("keypoint",), "all": ("mask", "keypoint")}


def second_stage(
    branches: Sequence[str] = ("mask", "keypoint"), *, box_predictor: Any = None, **options: Any
) -> detection.RoIHeads:
    """Ours, with heads small enough to run in milliseconds."""
    features, width = CHANNELS * 7 * 7, 16
    parts = [
        roialign_ext.MultiScaleRoIAlign(["0", "1"], 7, 2),
        detection.TwoMLPHead(features, width),
        box_predictor or detection.FastRCNNPredictor(width, CLASSES),
    ]
    extra: dict[str, Any] = {}
    if "mask" in branches:
        extra["mask_roi_pool"] = roialign_ext.MultiScaleRoIAlign(["0", "1"], 6, 2)
        extra["mask_head"] = detection.MaskRCNNHeads(CHANNELS, (8, 8), 1)
        extra["mask_predictor"] = detection.MaskRCNNPredictor(8, 8, CLASSES)
    if "keypoint" in branches:
        extra["keypoint_roi_pool"] = roialign_ext.MultiScaleRoIAlign(["0", "1"], 6, 2)
        extra["keypoint_head"] = detection.KeypointRCNNHeads(CHANNELS, (8, 8))
        extra["keypoint_predictor"] = detection.KeypointRCNNPredictor(8, KEYPOINTS)
    return detection.RoIHeads(*parts, **{**OPTIONS, **extra, **options})


def torchvision_twin(ours: detection.RoIHeads, **options: Any) -> Any:
    """torchvision's RoIHeads with the weights and options of ours, loaded with strict=True."""
    pytest.importorskip("torchvision")
    from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn, roi_heads
    from torchvision.ops import MultiScaleRoIAlign

    extra: dict[str, Any] = {}
    if ours.has_mask():
        extra["mask_roi_pool"] = MultiScaleRoIAlign(["0", "1"], 6, 2)
        extra["mask_head"] = mask_rcnn.MaskRCNNHeads(CHANNELS, (8, 8), 1)
        extra["mask_predictor"] = mask_rcnn.MaskRCNNPredictor(8, 8, CLASSES)
    if ours.has_keypoint():
        extra["keypoint_roi_pool"] = MultiScaleRoIAlign(["0", "1"], 6, 2)
        extra["keypoint_head"] = keypoint_rcnn.KeypointRCNNHeads(CHANNELS, (8, 8))
        extra["keypoint_predictor"] = keypoint_rcnn.KeypointRCNNPredictor(8, KEYPOINTS)
    theirs = roi_heads.RoIHeads(
        MultiScaleRoIAlign(["0", "1"], 7, 2),
        faster_rcnn.TwoMLPHead(CHANNELS * 7 * 7, 16),
        faster_rcnn.FastRCNNPredictor(16, CLASSES),
        **{**OPTIONS, **extra, **options},
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.train(ours.training)


def feature_maps(num_images: int = 2) -> dict[str, Tensor]:
    """Two levels, strides 4 and 8, over the images padded to 80 x 96."""
    return {
        name: torch.randn(num_images, CHANNELS, 80 // stride, 96 // stride, requires_grad=True)
        for name, stride in (("0", 4), ("1", 8))
    }


def boxes_in(count: int, shape: tuple[int, int]) -> Tensor:
    """Boxes with sides from 5 pixels to the whole image."""
    height, width = shape
    low = torch.rand(count, 2) * torch.tensor([width - 5.0, height - 5.0])
    high = low + 5 + torch.rand(count, 2) * (torch.tensor([float(width), float(height)]) - low - 5)
    return torch.cat([low, high], dim=1)


def ground_truth(count: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Objects with all annotations: ellipses as masks, some keypoints hidden or outside of the box."""
    height, width = shape
    boxes = boxes_in(count, shape)
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    masks = ((2 * columns - x1 - x2) / (x2 - x1)) ** 2 + ((2 * rows - y1 - y2) / (y2 - y1)) ** 2 < 1
    place = torch.rand(count, KEYPOINTS, 2) * 1.2 - 0.1
    points = boxes[:, None, :2] + place * (boxes[:, None, 2:] - boxes[:, None, :2])
    points[:, 0] = boxes[:, 2:]  # on the far corner
    seen = torch.randint(0, 3, (count, KEYPOINTS, 1)).float()
    return {
        "boxes": boxes,
        "labels": torch.randint(1, CLASSES, (count,)),
        "masks": masks.to(torch.uint8),
        "keypoints": torch.cat([points, seen], dim=2),
    }


def problem(num_proposals: Sequence[int], num_objects: Sequence[int]) -> tuple[dict, list, list, list]:
    """features, proposals, image_shapes and targets; half of the proposals lie close to ground truth."""
    shapes = [IMAGE_SHAPES[image % 2] for image in range(len(num_proposals))]
    targets = [ground_truth(count, shape) for count, shape in zip(num_objects, shapes)]
    proposals = []
    for count, shape, target in zip(num_proposals, shapes, targets):
        boxes = boxes_in(count, shape)
        if count and len(target["boxes"]):
            near = target["boxes"][torch.arange(count // 2) % len(target["boxes"])]
            boxes[: count // 2] = near + torch.randn_like(near).clamp(-2, 2)
        proposals.append(boxes)
    return feature_maps(len(shapes)), proposals, shapes, targets
