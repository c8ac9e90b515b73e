"""The mask branch: head, predictor, loss, and masks in image size (He et al., 2017, Mask R-CNN)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import roi_align

# Pixels of ground-truth masks that are in floating point at once: 16 MiB of float32.
_MAX_PIXELS = 2**22


class MaskRCNNHeads(nn.Sequential):
    """3 x 3 convolutions with ReLU over pooled features.

    Args:
        in_channels: channels of the features.
        layers: output channels of every convolution.
        dilation: of every convolution.
        norm_layer: makes a normalisation from a number of channels; its convolutions have no bias.

    Example:
        >>> MaskRCNNHeads(256, (256, 256), 1)(torch.rand(3, 256, 14, 14)).shape
        torch.Size([3, 256, 14, 14])
    """

    _version = 2

    def __init__(
        self,
        in_channels: int,
        layers: Sequence[int],
        dilation: int,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        blocks = []
        for channels in layers:
            convolution = nn.Conv2d(
                in_channels, channels, 3, padding=dilation, dilation=dilation, bias=norm_layer is None
            )
            norm = [] if norm_layer is None else [norm_layer(channels)]
            blocks.append(nn.Sequential(convolution, *norm, nn.ReLU(inplace=True)))
            in_channels = channels
        super().__init__(*blocks)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # Version 1 named the convolutions mask_fcn1, mask_fcn2, ... and had no Sequential around each.
        if (local_metadata.get("version") or 1) < 2:
            for block in range(len(self)):
                for kind in ("weight", "bias"):
                    old = f"{prefix}mask_fcn{block + 1}.{kind}"
                    if old in state_dict:
                        state_dict[f"{prefix}{block}.0.{kind}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class MaskRCNNPredictor(nn.Sequential):
    """A mask of logits for every class, at twice the resolution of the features.

    Args:
        in_channels: channels of the features.
        dim_reduced: channels between the transposed convolution and the classes.
        num_classes: classes, background included.

    Example:
        >>> MaskRCNNPredictor(256, 256, 91)(torch.rand(3, 256, 14, 14)).shape
        torch.Size([3, 91, 28, 28])
    """

    def __init__(self, in_channels: int, dim_reduced: int, num_classes: int):
        super().__init__(
            OrderedDict(
                conv5_mask=nn.ConvTranspose2d(in_channels, dim_reduced, 2, 2, 0),
                relu=nn.ReLU(inplace=True),
                mask_fcn_logits=nn.Conv2d(dim_reduced, num_classes, 1, 1, 0),
            )
        )
        for name, parameter in self.named_parameters():
            if "weight" in name:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits `(K, num_classes, 2 P, 2 Q)` of features `(K, in_channels, P, Q)`.

        With `labels` `(K,)` only the mask of each row's class, `(K, 1, 2 P, 2 Q)`: the others, of 91 classes
        some 70 MB for a batch, and as much of gradient, would be thrown away.
        """
        classes = self.mask_fcn_logits
        if labels is None or type(classes) is not nn.Conv2d:
            return super().forward(x)
        assert classes.bias is not None
        for layer in list(self)[:-1]:
            x = layer(x)
        weight = classes.weight.flatten(1).index_select(0, labels)
        mask = torch.einsum("kcpq,kc->kpq", x, weight) + classes.bias.index_select(0, labels)[:, None, None]
        return mask[:, None]


def maskrcnn_loss(
    mask_logits: Tensor,
    proposals: Sequence[Tensor],
    gt_masks: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    mask_matched_idxs: Sequence[Tensor],
) -> Tensor:
    """Binary cross entropy between masks of the proposals' classes and ground truth cut to the proposals.

    Ground truth is pooled by `roi_align` at scale 1, adaptive, not aligned. No more than 2^22 of its pixels
    (or one mask) are in floating point at a time.

    Args:
        mask_logits: `(K, classes, M, M)`, or `(K, 1, M, M)` of each row's class or for all classes together.
        proposals: for every image `(K_i, 4)` boxes in pixels, K in all.
        gt_masks: for every image `(G_i, H, W)` masks, uint8, bool or floating point.
        gt_labels: for every image `(G_i,)` int64 classes.
        mask_matched_idxs: for every image `(K_i,)`, the ground truth of every proposal.

    Returns:
        A scalar; 0 where there are no proposals.

    Example:
        >>> proposal, mask = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.ones(1, 16, 16, dtype=torch.uint8)
        >>> logits = torch.zeros(1, 2, 28, 28)
        >>> maskrcnn_loss(logits, [proposal], [mask], [torch.tensor([1])], [torch.tensor([0])])
        tensor(0.6931)
    """
    compiling = torch.compiler.is_compiling()  # a graph may not know whether there are any proposals
    if not compiling and mask_logits.numel() == 0:
        return mask_logits.sum() * 0
    labels = torch.cat([label[matched] for label, matched in zip(gt_labels, mask_matched_idxs)])
    size = mask_logits.shape[-1]
    targets = [_pooled_masks(*image, size) for image in zip(gt_masks, proposals, mask_matched_idxs)]
    logits, target = _of_class(mask_logits, labels), torch.cat(targets)
    if compiling:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / max(logits.numel(), 1)
    return F.binary_cross_entropy_with_logits(logits, target)


def _pooled_masks(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """Masks `(G, H, W)` cut to boxes `(K, 4)` of the masks `matched` `(K,)`: `(K, size, size)`."""
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    pooled = torch.zeros(len(boxes), size, size, dtype=dtype, device=boxes.device)
    if torch.compiler.is_compiling():
        piece = len(masks)  # a graph with a loop would be one for every number of masks
    elif len(boxes) == 0:
        return pooled
    else:
        pixels = masks.shape[1] * masks.shape[2]
        piece = len(masks) if masks.dtype == dtype else max(1, _MAX_PIXELS // max(pixels, 1))
    for start, part in enumerate(masks.split(piece)):
        # Rows of other pieces are padding, image -1, which pools to zeros.
        image = matched - start * piece
        image = image.masked_fill((image < 0) | (image >= len(part)), -1)
        rows = torch.cat([image[:, None].to(dtype), boxes.to(dtype)], dim=1)
        pooled += roi_align(part[:, None].to(dtype), rows, size)[:, 0]
    return pooled


def _of_class(masks: Tensor, labels: Tensor) -> Tensor:
    """Masks `(K, M, M)` of the rows' classes, from `(K, classes, M, M)` or, if chosen, `(K, 1, M, M)`."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    index = labels[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, index).squeeze(1)


def maskrcnn_inference(x: Tensor, labels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Mask probabilities of every detection's class.

    Args:
        x: logits `(K, classes, M, M)`, or `(K, 1, M, M)` of each row's class or for all classes together.
        labels: for every image `(K_i,)` int64 classes, K in all.

    Returns:
        For every image `(K_i, 1, M, M)` probabilities.

    Example:
        >>> masks = maskrcnn_inference(torch.zeros(3, 91, 28, 28), [torch.tensor([1, 7]), torch.tensor([90])])
        >>> [mask.shape for mask in masks]
        [torch.Size([2, 1, 28, 28]), torch.Size([1, 1, 28, 28])]
    """
    masks = _of_class(x, torch.cat(list(labels))).sigmoid()
    return masks[:, None].split([len(label) for label in labels])


def paste_masks_in_image(masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1) -> Tensor:
    """Masks of detections, drawn into the whole image.

    A mask is padded by zeros, resized bilinearly to its box, grown likewise and rounded down to whole pixels,
    and cut at the image's border. Values are those of torchvision's function of this name.

    Args:
        masks: `(K, 1, M, M)` probabilities.
        boxes: `(K, 4)` boxes in pixels.
        img_shape: (height, width) of the image.
        padding: cells of zeros around a mask.

    Returns:
        `(K, 1, height, width)`.

    Example:
        >>> box = torch.tensor([[2.0, 1.0, 6.0, 3.0]])
        >>> image = paste_masks_in_image(torch.ones(1, 1, 28, 28), box, (6, 9))
        >>> (image[0, 0] > 0.5).int()
        tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0],
                [0, 1, 1, 1, 1, 1, 1, 0, 0],
                [0, 1, 1, 1, 1, 1, 1, 0, 0],
                [0, 1, 1, 1, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    size = masks.shape[-1]
    centres = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    halves = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (float(size + 2 * padding) / size)
    corners = torch.cat([centres - halves, centres + halves], dim=1).long()
    padded = F.pad(masks, (padding,) * 4)
    height, width = img_shape
    rows = _resizing(corners[:, 1], corners[:, 3], height, size + 2 * padding, masks.dtype)
    columns = _resizing(corners[:, 0], corners[:, 2], width, size + 2 * padding, masks.dtype)
    return rows[:, None] @ (padded @ columns[:, None].mT)


def _resizing(first: Tensor, last: Tensor, length: int, size: int, dtype: torch.dtype) -> Tensor:
    """Bilinear interpolation of `size` cells to the pixels `first` to `last`: weights `(K, length, size)`."""
    pixel = torch.arange(length, device=first.device)
    pixels = (last - first + 1).clamp(min=1)[:, None]
    cell = ((pixel - first[:, None]) + 0.5) * (size / pixels.to(torch.float32)) - 0.5
    cell = cell.clamp(min=0, max=size - 1)
    inside = (pixel >= first[:, None]) & (pixel <= last[:, None])
    weights = (1 - (cell[..., None] - torch.arange(size, device=first.device)).abs()).clamp(min=0)
    return (weights * inside[..., None]).to(dtype)
