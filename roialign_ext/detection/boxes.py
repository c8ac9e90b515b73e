"""Boxes `[x1, y1, x2, y2]` in pixels: overlap, clipping, suppression, regression codes. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import autograd


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of two sets of boxes.

    Values are those of `torchvision.ops.box_iou`.

    Args:
        boxes1: `(..., N, 4)` boxes. Half boxes are read as float32, short integers as int32.
        boxes2: `(..., M, 4)` boxes.

    Returns:
        `(..., N, M)`; NaN for a pair without any area.

    Example:
        >>> others = torch.tensor([[0.0, 0.0, 2.0, 1.0], [3.0, 3.0, 4.0, 4.0]])
        >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), others)
        tensor([[0.5000, 0.0000]])
    """
    # Columns in memory of their own, for the boxes along rows: strided ones are read several times as slowly.
    other_x1, other_y1, other_x2, other_y2 = torch.stack(_widened(boxes2).unsqueeze(-3).unbind(-1)).unbind()
    x1, y1, x2, y2 = _widened(boxes1).unsqueeze(-2).unbind(-1)
    intersection = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
    intersection *= torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1)).clamp_(min=0)
    union = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1)
    return intersection / union.sub_(intersection)


def _widened(boxes: Tensor) -> Tensor:
    if boxes.dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        return boxes
    return boxes.float() if boxes.is_floating_point() else boxes.int()


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Move the corners that lie outside of an image to its border.

    Args:
        boxes: `(..., 4)` boxes.
        size: (height, width) of the image.

    Returns:
        `(..., 4)`, the clipped boxes.

    Example:
        >>> clip_boxes_to_image(torch.tensor([[-5.0, 2.0, 30.0, 9.0]]), (8, 16))
        tensor([[ 0.,  2., 16.,  8.]])
    """
    height, width = size
    return torch.stack(
        [boxes[..., axis].clamp(min=0, max=limit) for axis, limit in enumerate((width, height, width, height))],
        dim=-1,
    )


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Which boxes have no side shorter than `min_size`.

    Args:
        boxes: `(K, 4)` boxes.
        min_size: pixels.

    Returns:
        int64 indices of the boxes that stay, ascending.

    Example:
        >>> remove_small_boxes(torch.tensor([[0.0, 0.0, 9.0, 1.0], [0.0, 0.0, 9.0, 2.0]]), 2)
        tensor([1])
    """
    return (_shorter_side(boxes) >= min_size).nonzero().squeeze(1)


def _shorter_side(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).amin(dim=-1)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: from the best score down, a box that is kept drops all that overlap it.

    Keeps what `torchvision.ops.nms` keeps on the CPU, on every device. Equal scores count in their order.
    Pairs of boxes take no memory. On CUDA the host waits once, for the number of boxes that stay.

    Args:
        boxes: `(K, 4)` boxes.
        scores: `(K,)` scores.
        iou_threshold: a box is dropped if its intersection over union with a kept one is above this.

    Returns:
        int64 indices of the boxes that stay, best score first.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 20.0, 30.0, 30.0]])
        >>> nms(boxes, torch.tensor([0.6, 0.7, 0.8]), 0.5)
        tensor([2, 1])
    """
    order, keep = suppress("nms", boxes, scores, None, iou_threshold)
    return order[keep]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` among the boxes of each category by itself.

    Keeps exactly what `nms` keeps of every category. (torchvision's moves categories apart by adding to their
    coordinates, and so rounds them, where there are up to a thousand boxes.)

    Args:
        boxes, scores, iou_threshold: see `nms`.
        idxs: `(K,)` integers, the category of each box.

    Returns:
        int64 indices of the boxes that stay, best score first over all categories.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [0.0, 0.0, 9.0, 7.0]])
        >>> batched_nms(boxes, torch.tensor([0.6, 0.7, 0.8]), torch.tensor([1, 2, 2]), 0.5)
        tensor([2, 0])
    """
    order, keep = suppress("batched_nms", boxes, scores, idxs, iou_threshold)
    return order[keep]


def suppress(
    who: str, boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """The order `(K,)` of boxes, best score first, and along it `(K,)` whether they stay. Waits for no device."""
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{who}: `boxes` must have shape (K, 4), got {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("idxs", groups)):
        if values is not None and values.shape != boxes.shape[:1]:
            raise ValueError(f"{who}: `{name}` must have shape ({len(boxes)},), got {tuple(values.shape)}")
    order, keep = autograd.operators.nms(boxes.detach(), scores.detach(), groups, iou_threshold)
    return order, keep


@torch.library.register_fake("roialign_ext::nms")
def _(boxes, scores, groups, iou_threshold):
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64), boxes.new_empty(boxes.shape[0], dtype=torch.bool)


class BoxCoder:
    """Boxes as what a regressor predicts: offsets relative to a proposal.

    Girshick et al., 2014, "Rich feature hierarchies", appendix C: `dx = wx (gx - px) / pw`,
    `dw = ww log(gw / pw)`, likewise y and h, with the centres and sizes of target g and proposal p.

    Args:
        weights: `(wx, wy, ww, wh)`.
        bbox_xform_clip: upper limit of dw and dh before the exponential.

    Example:
        >>> coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        >>> proposal = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> codes = coder.encode_single(torch.tensor([[0.0, 0.0, 8.0, 4.0]]), proposal)
        >>> codes
        tensor([[5.0000, 0.0000, 3.4657, 0.0000]])
        >>> coder.decode(codes, [proposal])
        tensor([[[0., 0., 8., 4.]]])
    """

    def __init__(
        self, weights: tuple[float, float, float, float], bbox_xform_clip: float = math.log(1000.0 / 16)
    ) -> None:
        self.weights = weights
        self.bbox_xform_clip = bbox_xform_clip

    def encode(self, reference_boxes: Sequence[Tensor], proposals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`encode_single` over images: `(K_i, 4)` targets and proposals give codes `(K_i, 4)`."""
        counts = [len(boxes) for boxes in reference_boxes]
        return self.encode_single(torch.cat(list(reference_boxes)), torch.cat(list(proposals))).split(counts)

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The codes `(K, 4)` that make targets `(K, 4)` of proposals `(K, 4)`."""
        centres, sizes = _centres_and_sizes(proposals)
        target_centres, target_sizes = _centres_and_sizes(reference_boxes)
        shift_weights, stretch_weights = self._weights_like(reference_boxes)
        shift = shift_weights * (target_centres - centres) / sizes
        stretch = stretch_weights * (target_sizes / sizes).log()
        return torch.cat([shift, stretch], dim=1)

    def decode(self, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Boxes of every class.

        Args:
            rel_codes: `(K, 4 * classes)` codes.
            boxes: for every image `(K_i, 4)` proposals, K in all.

        Returns:
            `(K, classes, 4)` boxes, or `(0, 4 * classes)` where there are no proposals.

        Raises:
            AssertionError: `boxes` is no list or tuple, or `rel_codes` no tensor, as in torchvision.
        """
        if not isinstance(boxes, (list, tuple)):
            raise AssertionError(f"BoxCoder: `boxes` must be a list or tuple, got {type(boxes).__name__}")
        if not isinstance(rel_codes, Tensor):
            raise AssertionError(f"BoxCoder: `rel_codes` must be a tensor, got {type(rel_codes).__name__}")
        proposals = torch.cat(list(boxes))
        if len(proposals) == 0:
            return self.decode_single(rel_codes, proposals)
        return self.decode_single(rel_codes.reshape(len(proposals), -1), proposals).reshape(len(proposals), -1, 4)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes `(K, 4 * classes)` of codes `(K, 4 * classes)` and proposals `(K, 4)`.

        Half codes are decoded in float32: a half has no more than 11 bits for a coordinate.
        """
        rel_codes = _widened(rel_codes)
        centres, sizes = _centres_and_sizes(boxes.to(rel_codes.dtype))
        codes = rel_codes.reshape(len(boxes), rel_codes.shape[1] // 4, 2, 2)
        shift_weights, stretch_weights = self._weights_like(codes)
        centres = codes[:, :, 0] / shift_weights * sizes[:, None] + centres[:, None]
        half_sizes = (codes[:, :, 1] / stretch_weights).clamp(max=self.bbox_xform_clip).exp() * sizes[:, None] * 0.5
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=2).flatten(1)

    def _weights_like(self, boxes: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Weights of the centres and of the sizes: a number where x and y share it, else `(2,)` in the boxes' dtype."""

        def both(x: float, y: float) -> Tensor | float:
            # Filled there: a copy of a list to a device would make the host wait for it.
            return x if x == y else torch.cat([boxes.new_full((1,), weight) for weight in (x, y)])

        return both(*self.weights[:2]), both(*self.weights[2:])


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """`(K, 2)` centres and `(K, 2)` sizes, x before y."""
    low, high = boxes.split(2, dim=1)
    sizes = high - low
    return torch.add(low, sizes, alpha=0.5), sizes
