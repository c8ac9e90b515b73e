"""The keypoint branch: head, predictor, loss and the decoding of heat maps (He et al., 2017, Mask R-CNN)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .matching import host_waits_for

# Resized heat-map cells that are in memory at once (or those of one detection): 64 MiB of float32.
_MAX_CELLS = 2**24
_CUBIC = -0.75  # the constant of F.interpolate's bicubic kernel (Keys, 1981)


class KeypointRCNNHeads(nn.Sequential):
    """3 x 3 convolutions with ReLU over pooled features.

    Args:
        in_channels: channels of the features.
        layers: output channels of every convolution.

    Example:
        >>> KeypointRCNNHeads(256, (512, 512))(torch.rand(2, 256, 14, 14)).shape
        torch.Size([2, 512, 14, 14])
    """

    def __init__(self, in_channels: int, layers: Sequence[int]):
        modules: list[nn.Module] = []
        for channels in layers:
            modules += [nn.Conv2d(in_channels, channels, 3, stride=1, padding=1), nn.ReLU(inplace=True)]
            in_channels = channels
        super().__init__(*modules)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                _initialise(layer)


class KeypointRCNNPredictor(nn.Module):
    """A heat map of logits for every keypoint, at four times the resolution of the features.

    Args:
        in_channels: channels of the features.
        num_keypoints: keypoints of an object.

    Example:
        >>> KeypointRCNNPredictor(512, 17)(torch.rand(2, 512, 14, 14)).shape
        torch.Size([2, 17, 56, 56])
    """

    def __init__(self, in_channels: int, num_keypoints: int):
        super().__init__()
        self.kps_score_lowres = nn.ConvTranspose2d(in_channels, num_keypoints, 4, stride=2, padding=1)
        _initialise(self.kps_score_lowres)
        self.up_scale = 2
        self.out_channels = num_keypoints

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(K, num_keypoints, 4 P, 4 Q)` of features `(K, in_channels, P, Q)`."""
        x = self.kps_score_lowres(x)
        return F.interpolate(x, scale_factor=float(self.up_scale), mode="bilinear", align_corners=False)


def _initialise(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def keypointrcnn_loss(
    keypoint_logits: Tensor,
    proposals: Sequence[Tensor],
    gt_keypoints: Sequence[Tensor],
    keypoint_matched_idxs: Sequence[Tensor],
) -> Tensor:
    """Cross entropy over the cells of a heat map, the mean over keypoints visible and in their proposal.

    Args:
        keypoint_logits: `(K, keypoints, S, S)`.
        proposals: for every image `(K_i, 4)` boxes in pixels, K in all.
        gt_keypoints: for every image `(G_i, keypoints, 3)`, x and y in pixels and a visibility, 0 for none.
        keypoint_matched_idxs: for every image `(K_i,)`, the ground truth of every proposal.

    Returns:
        A scalar; 0 where no keypoint counts.

    Raises:
        ValueError: heat maps that are not square, or not as many as keypoints.

    Example:
        >>> proposal, keypoint = torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([[[3.0, 2.0, 1.0]]])
        >>> keypointrcnn_loss(torch.zeros(1, 1, 56, 56), [proposal], [keypoint], [torch.tensor([0])])
        tensor(8.0507)
    """
    height, width = keypoint_logits.shape[2:]
    if height != width:
        raise ValueError(f"keypointrcnn_loss: `keypoint_logits` must be square, got {height} x {width}")
    if any(keypoint.shape[1] != keypoint_logits.shape[1] for keypoint in gt_keypoints):
        shapes = [tuple(keypoint.shape) for keypoint in gt_keypoints]
        raise ValueError(
            f"keypointrcnn_loss: `gt_keypoints` must have {keypoint_logits.shape[1]} keypoints of each object, "
            f"got shapes {shapes}"
        )
    compiling = torch.compiler.is_compiling()  # a graph may not know whether there are any proposals
    if not compiling and keypoint_logits.numel() == 0:
        return keypoint_logits.sum() * 0
    keypoints = torch.cat([keypoint[matched] for keypoint, matched in zip(gt_keypoints, keypoint_matched_idxs)])
    cells, counts = _cells_of_keypoints(keypoints, torch.cat(list(proposals)), height)
    logits, target = keypoint_logits.flatten(2).flatten(0, 1), cells.masked_fill(~counts, -1).flatten()
    if not compiling and not host_waits_for(logits.device):
        index = (target >= 0).nonzero().squeeze(1)
        logits, target = logits.index_select(0, index), target[index]
    # Elsewhere targets tell apart those that do not count, so that nobody waits for the number of the others.
    loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    return loss / counts.sum().clamp(min=1)


def _cells_of_keypoints(keypoints: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell of a `size` x `size` map over its box in which each keypoint lies, and whether it counts.

    A keypoint on the right or lower side of the box belongs to the last cell.

    Args:
        keypoints: `(K, P, 3)`.
        boxes: `(K, 4)`.

    Returns:
        `(K, P)` int64 and bool; a cell that does not count may be any number.
    """
    corner, far_corner = boxes[:, None, :2], boxes[:, None, 2:]
    point = keypoints[..., :2]
    cell = ((point - corner) * (size / (far_corner - corner))).floor().long()
    cell = cell.masked_fill(point == far_corner, size - 1)
    counts = ((cell >= 0) & (cell < size)).all(dim=2) & (keypoints[..., 2] > 0)
    return cell[..., 1] * size + cell[..., 0], counts


def keypointrcnn_inference(x: Tensor, boxes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Where the keypoints of every detection are.

    A heat map is resized to its box in whole pixels, rounded up, by bicubic interpolation; the keypoint is
    the middle of its highest pixel. Detections of like sizes are resized together, in at most 2^24 cells (or
    one detection).

    Args:
        x: logits `(K, keypoints, S, S)`.
        boxes: for every image `(K_i, 4)` boxes in pixels, K in all.

    Returns:
        For every image `(K_i, keypoints, 3)` float32, x and y in pixels and a 1, and `(K_i, keypoints)`
        logits at these points.

    Example:
        >>> boxes = [torch.tensor([[0.0, 0.0, 9.0, 9.0], [4.0, 2.0, 90.0, 80.0]])]
        >>> keypoints, scores = keypointrcnn_inference(torch.rand(2, 17, 56, 56), boxes)
        >>> keypoints[0].shape, scores[0].shape
        (torch.Size([2, 17, 3]), torch.Size([2, 17]))
    """
    counts = [len(box) for box in boxes]
    points, scores = _decode(x, torch.cat(list(boxes)))
    return list(points.split(counts)), list(scores.split(counts))


def _decode(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil().long()
    cell = maps.new_empty(len(maps), maps.shape[1], 2, dtype=torch.int64)
    scores = maps.new_empty(maps.shape[:2], dtype=torch.float32)
    with torch.autocast(maps.device.type, enabled=False):
        batches = _batches(pixels.tolist(), maps.shape[1])
        # One copy to the device for all of them.
        order = torch.tensor([row for rows, _, _ in batches for row in rows], dtype=torch.int64, device=maps.device)
        indices = order.split([len(rows) for rows, _, _ in batches])
        for index, (_, width, height) in zip(indices, batches):
            cell[index], best = _highest(maps[index].float(), pixels[index], width, height)
            scores = scores.index_put((index,), best)
    points = (cell + 0.5) * (sizes / pixels)[:, None] + boxes[:, None, :2]
    return F.pad(points.float(), (0, 1), value=1.0), scores


def _batches(pixels: list[list[int]], num_keypoints: int) -> list[tuple[list[int], int, int]]:
    """Detections that are resized together, with the width and height that hold all of them.

    Within a batch widths, and heights, lie between two neighbouring powers of two, so that at most three
    quarters of what is computed is padding.
    """
    alike = defaultdict(list)
    for row, (width, height) in enumerate(pixels):
        alike[(width - 1).bit_length(), (height - 1).bit_length()].append(row)
    batches = []
    for rows in alike.values():
        width, height = (max(pixels[row][axis] for row in rows) for axis in (0, 1))
        piece = max(1, _MAX_CELLS // (num_keypoints * width * height))
        batches += [(rows[start : start + piece], width, height) for start in range(0, len(rows), piece)]
    return batches


def _highest(maps: Tensor, pixels: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """The highest pixel of maps `(K, P, S, T)` resized to `pixels` `(K, 2)`: x, y `(K, P, 2)` and value."""
    columns = _bicubic(pixels[:, 0], width, maps.shape[3])
    rows = _bicubic(pixels[:, 1], height, maps.shape[2])
    resized = rows[:, None] @ (maps @ columns[:, None].mT)
    best, position = resized.flatten(2).max(dim=2)
    # Pixels past the end repeat the last one.
    cell = torch.stack([position % width, position // width], dim=2)
    return torch.minimum(cell, pixels[:, None] - 1), best


def _bicubic(pixels: Tensor, length: int, size: int) -> Tensor:
    """Bicubic interpolation of `size` cells to `pixels` `(K,)`, at most `length`, as F.interpolate does it
    without aligned corners: weights `(K, length, size)`, of which rows past the end repeat the last one."""
    pixel = torch.minimum(torch.arange(length, device=pixels.device), pixels[:, None] - 1)
    centre = (pixel + 0.5) * (size / pixels[:, None].to(torch.float32)) - 0.5
    first = centre.floor()
    offset = torch.arange(-1, 3, device=pixels.device)
    distance = (centre - first)[..., None] - offset
    tap = (first.long()[..., None] + offset).clamp(0, size - 1)
    weight = _keys(distance.abs())
    return weight.new_zeros(len(pixels), length, size).scatter_add_(2, tap, weight)


def _keys(distance: Tensor) -> Tensor:
    """The cubic convolution kernel at distances from 0 to 2 (Keys, 1981)."""
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    return torch.where(distance <= 1, near, far)
