"""The second stage of a detector on the fused pooling: the public names of roialign_ext.detection."""

from .box_head import FastRCNNPredictor, TwoMLPHead, fastrcnn_loss
from .boxes import BoxCoder, batched_nms, box_iou, clip_boxes_to_image, nms, remove_small_boxes
from .keypoint_head import KeypointRCNNHeads, KeypointRCNNPredictor, keypointrcnn_inference, keypointrcnn_loss
from .mask_head import (
    MaskRCNNHeads,
    MaskRCNNPredictor,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from .matching import BalancedPositiveNegativeSampler, Matcher
from .roi_heads import RoIHeads

__all__ = [
    "BalancedPositiveNegativeSampler",
    "BoxCoder",
    "FastRCNNPredictor",
    "KeypointRCNNHeads",
    "KeypointRCNNPredictor",
    "MaskRCNNHeads",
    "MaskRCNNPredictor",
    "Matcher",
    "RoIHeads",
    "TwoMLPHead",
    "batched_nms",
    "box_iou",
    "clip_boxes_to_image",
    "fastrcnn_loss",
    "keypointrcnn_inference",
    "keypointrcnn_loss",
    "maskrcnn_inference",
    "maskrcnn_loss",
    "nms",
    "paste_masks_in_image",
    "remove_small_boxes",
]
