"""Multi-level RoI Align in plain PyTorch: slow, obvious, the specification of the kernels, of which it knows none.

Runs on any device; autograd differentiates it in the features and in the boxes.

Two precisions meet here. Coordinates (box to map, sample positions, which sample is outside) are computed as the
kernels compute them: float32, or float64 where features or boxes are float64, in torchvision's order of operations,
so that a sample within an ulp of the border falls on the same side. Weights and sums are float64 whatever the
features are, and the result is rounded once, to the features' dtype: what a kernel differs by is its own rounding.

Hence the oracle for float32 kernels is float64 features with `coordinate_dtype=torch.float32`: nothing is rounded
but the coordinates, and those as the kernel rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond this many samples per bin (a box over 1e10 cells) the map's share in the mean is below 1e-9 per cell,
# and a float32 coordinate is coarser than the map: the row is zero.
_MAX_SAMPLES = 2**31


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float | Sequence[float]],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    canonical_scale: float = 224,
    canonical_level: int = 4,
    levels: Tensor | None = None,
    coordinate_dtype: torch.dtype | None = None,
) -> Tensor:
    """Pool every box from its level of a feature pyramid, one box at a time.

    Args:
        features: `L` maps `(N, C, H_l, W_l)`, finest first.
        boxes: `(K, 5)` rows `[image, x1, y1, x2, y2]` in image pixels, or a list of `N` tensors `(K_i, 4)`.
        output_size: bins `(P, Q)`, or one number for both.
        spatial_scales: map cells per image pixel, one number or a pair `(scale_y, scale_x)` per level.
        sampling_ratio: samples per bin side; `<= 0` takes `ceil(roi_size / bins)`.
        aligned: shift by half a cell, and do not widen boxes to one cell.
        mode: "avg", the mean of a bin's samples, or "max", the greatest: a sample outside the map counts as 0, NaN is
            greater than any number, and of equals the first in y-then-x order is the one that gets the gradient.
        levels: `(K,)` level of each box instead of the FPN rule; -1 marks padding.
        coordinate_dtype: precision of the coordinates, where it is not to follow from features and boxes.

    Returns:
        `(K, C, P, Q)` in the features' dtype.

    Raises:
        ValueError, TypeError: wrong counts, shapes or dtypes.
        IndexError: on CPU, an image or level that does not exist. On other devices the row is NaN.

    >>> ramp = torch.arange(8.0).repeat(8, 1)[None, None]
    >>> multiscale_roi_align([ramp], torch.tensor([[0.0, 2.0, 2.0, 6.0, 6.0]]), (1, 2), [1.0], 2)
    tensor([[[[3., 5.]]]])
    """
    num_bins_y, num_bins_x = _pair(output_size)
    scales = [_pair(scale) for scale in spatial_scales]
    rows = _as_rows(boxes, features[0].shape[0])
    num_rois, num_images, channels = len(rows), features[0].shape[0], features[0].shape[1]
    if mode not in ("avg", "max"):
        raise ValueError(f'reference: mode must be "avg" or "max", got {mode!r}')
    for feature in features:
        if feature.shape[:2] != features[0].shape[:2] or feature.dtype != features[0].dtype:
            raise ValueError("reference: all levels must have one N, C and dtype")
        if num_rois > 0 and 0 in feature.shape[2:]:
            raise ValueError(f"reference: H and W must be positive, got {tuple(feature.shape)}")
    if len(scales) != len(features):
        raise ValueError(f"reference: expected {len(features)} scales, got {len(scales)}")
    if levels is None:
        levels = _levels_by_rule(rows, scales, canonical_scale, canonical_level)

    if coordinate_dtype is None:
        wide = torch.float64 in (features[0].dtype, rows.dtype)
        coordinate_dtype = torch.float64 if wide else torch.float32

    maps = [feature.double() for feature in features]
    pooled = []
    for roi in range(num_rois):
        row = maps[0].new_zeros((channels, num_bins_y, num_bins_x))
        image, level = rows[roi, 0].item(), int(levels[roi])
        image = math.trunc(image) if math.isfinite(image) else image
        if image == -1 or level == -1 or math.isnan(image):
            pooled.append(row)
            continue
        if not (0 <= image < num_images and 0 <= level < len(maps)):
            if rows.device.type == "cpu":
                raise IndexError(
                    f"reference: box {roi} must name one of {num_images} images and {len(maps)} levels, "
                    f"got image {image}, level {level}"
                )
            pooled.append(row + math.nan)
            continue
        box = rows[roi, 1:].to(coordinate_dtype)
        feature = maps[level][int(image)]  # [C, H, W]
        (scale_y, scale_x), (_, height, width) = scales[level], feature.shape
        y = _axis_samples(box[1], box[3], scale_y, sampling_ratio, aligned, num_bins_y, height)
        x = _axis_samples(box[0], box[2], scale_x, sampling_ratio, aligned, num_bins_x, width)
        if y is not None and x is not None and bool(box.isfinite().all()):
            row = _mean(feature, y, x) if mode == "avg" else _greatest(feature, y, x)
        pooled.append(row)

    output = torch.stack(pooled) if pooled else maps[0].new_zeros((0, channels, num_bins_y, num_bins_x))
    # An empty sum ties the output to every input, so that each gets a gradient even where no box fell on it.
    output = output + sum(feature[:0].sum() for feature in maps) + rows[:0].double().sum()
    return output.to(features[0].dtype)


def assign_levels(
    boxes: Tensor | Sequence[Tensor],
    num_levels: int,
    k_min: int = 2,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    eps: float = 1e-6,
) -> Tensor:
    """The FPN rule: the level of each box by its area, `(K,)` int64; -1 where a coordinate or the area is no number.

    `boxes` is `(K, 4)`, `(K, 5)` or a list of `(K_i, 4)`.
    Source: eq. 1 of arXiv 1612.03144, in the order of operations of torchvision's `LevelMapper` on CPU.

    >>> assign_levels(torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 32.0, 32.0]]), 4)
    tensor([2, 0])
    """
    if not isinstance(boxes, Tensor):
        boxes = torch.cat(list(boxes))
    _check_floating(boxes)
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes = boxes.float()
    x1, y1, x2, y2 = boxes.detach()[:, -4:].unbind(1)
    size = ((x2 - x1) * (y2 - y1)).sqrt()
    # Tensors, not numbers: PyTorch on CUDA turns a division by a number into a multiplication.
    relative = size / torch.full_like(size, canonical_scale)
    target = torch.floor(canonical_level + torch.log2(relative) + torch.full_like(size, eps))
    known = boxes[:, -4:].isfinite().all(1) & ~target.isnan()
    index = target.clamp(k_min, k_min + num_levels - 1).nan_to_num(k_min).long() - k_min
    return torch.where(known, index, -1)


def gradients_of_tangent(
    grad_output: Tensor,
    features: Sequence[Tensor],
    boxes: Tensor,
    box_tangents: Tensor,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float | Sequence[float]],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    levels: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `<grad_output, d pooled / d boxes * box_tangents>` in the boxes and in every level.

    Average pooling. Both are second derivatives of the pooling, by autograd through the reference; a few boxes at a
    time, so that memory beyond the results stays that of a few boxes and of the maps in float64. Rows that name an
    image or a level that is not there count as padding.
    """
    boxes_at_a_time = 16
    images = features[0].shape[0]
    if levels is None:
        scales = [_pair(scale) for scale in spatial_scales]
        levels = _levels_by_rule(boxes, scales, canonical_scale, canonical_level).to(boxes.device)
    image = boxes[:, 0].detach().trunc()
    present = (image >= 0) & (image < images) & (levels >= 0) & (levels < len(features))
    maps = [feature.detach().double().requires_grad_() for feature in features]
    sums = [torch.zeros_like(x) for x in maps]
    rows, levels = torch.where(present[:, None], boxes.detach(), -1), torch.where(present, levels, -1)
    grad_boxes = torch.zeros_like(boxes)
    narrow = torch.float64 not in (features[0].dtype, boxes.dtype)
    for first in range(0, len(boxes), boxes_at_a_time):
        chosen = slice(first, first + boxes_at_a_time)
        chunk = rows[chosen].double().requires_grad_()
        weight = grad_output[chosen].detach().double().requires_grad_()
        with torch.enable_grad():
            pooled = multiscale_roi_align(
                maps,
                chunk,
                output_size,
                spatial_scales,
                sampling_ratio,
                aligned,
                levels=levels[chosen],
                coordinate_dtype=torch.float32 if narrow else torch.float64,
            )
            (first_order,) = torch.autograd.grad(pooled, chunk, weight, create_graph=True)
            second = torch.autograd.grad(
                first_order, [chunk, *maps], box_tangents[chosen].detach().double(), allow_unused=True
            )
        if second[0] is not None:
            grad_boxes[chosen] = second[0].to(boxes.dtype)
        for total, part in zip(sums, second[1:]):
            if part is not None:
                total += part
    return grad_boxes, *(total.to(x.dtype) for total, x in zip(sums, features))


def _levels_by_rule(
    rows: Tensor, scales: Sequence[tuple[float, float]], canonical_scale: float, canonical_level: int
) -> Tensor:
    if len(scales) == 1:
        return torch.zeros(len(rows), dtype=torch.int64)
    exponents = [math.log2(scale) for scale, _ in scales]
    k_min = -exponents[0]
    consecutive = all(exponent == -k_min - level for level, exponent in enumerate(exponents))
    if not consecutive or k_min != int(k_min) or any(scale_y != scale_x for scale_y, scale_x in scales):
        raise ValueError(f"reference: the FPN rule needs consecutive powers of two or `levels=`, got {scales}")
    return assign_levels(
        rows, len(scales), int(k_min), canonical_scale=canonical_scale, canonical_level=canonical_level
    )


class _Samples(NamedTuple):
    """The samples of every bin along one axis that lie on the map, in order; `(num_bins, any)`."""

    position: Tensor  # in cells, as the coordinates' dtype
    is_on_map: Tensor  # which of `position` are samples of their bin, on the map
    skipped: Tensor  # (num_bins, 1), how many samples of the bin lie before the first in `position`
    num_samples: int  # of a bin in all
    num_bins: int
    cells: int  # of the map


def _axis_samples(
    begin: Tensor, end: Tensor, scale: float, sampling_ratio: int, aligned: bool, num_bins: int, cells: int
) -> _Samples | None:
    """The samples of a box along one axis; None where it takes none."""
    offset = 0.5 if aligned else 0.0
    start = begin * scale - offset
    size = (end * scale - offset) - start
    if not bool(size.isfinite()) or not bool(start.isfinite()):
        return None
    if not aligned:
        size = size.clamp(min=1)
    bin_size = size / torch.full_like(size, num_bins)
    num_samples = sampling_ratio if sampling_ratio > 0 else math.ceil(bin_size.item())
    if not 0 < num_samples <= _MAX_SAMPLES:
        return None
    divisor = torch.full_like(bin_size, num_samples)
    bins = torch.arange(num_bins, device=size.device)[:, None]

    def position(sample: Tensor) -> Tensor:  # [num_bins, any] -> [num_bins, any]
        return (start + bins * bin_size) + ((sample.to(size.dtype) + 0.5) * bin_size) / divisor

    first = torch.zeros_like(bins)
    if sampling_ratio > 0:
        sample = torch.arange(num_samples, device=size.device).expand(num_bins, -1)
    else:
        # Positions rise with the sample, so those on the map are found by bisection, however many there are in all.
        first = _bisect(lambda middle: position(middle) >= -1, num_samples, bins)
        last = _bisect(lambda middle: position(middle) > cells, num_samples, bins)
        longest = int((last - first).max()) if num_bins > 0 else 0
        sample = first + torch.arange(max(longest, 0), device=size.device)

    where = position(sample)
    inside = (where >= -1) & (where <= cells) & (sample < num_samples)
    return _Samples(where, inside, first, num_samples, num_bins, cells)


def _axis_weights(samples: _Samples) -> Tensor:
    """The weight of each cell along one axis in the mean of each bin, `(num_bins, cells)` in float64.

    The samples of a bin form a grid, and what is outside or clamped is decided per axis, so a bin is
    `weights_y @ map @ weights_x.T`. Samples outside the map have no weight, and still count in the mean.
    """
    bins = torch.arange(samples.num_bins, device=samples.position.device)[:, None]
    owner = bins.expand_as(samples.position)[samples.is_on_map]
    low, high, fraction = _taps(samples.position[samples.is_on_map], samples.cells)
    weights = fraction.new_zeros((samples.num_bins, samples.cells))
    weights = weights.index_put((owner, low), 1 - fraction, accumulate=True)
    weights = weights.index_put((owner, high), fraction, accumulate=True)
    return weights / samples.num_samples


def _taps(position: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cells on both sides of each position, and the share of the second in float64."""
    where = position.double().clamp(0, cells - 1)
    low = where.detach().floor().long()
    return low, (low + 1).clamp(max=cells - 1), where - low


def _mean(feature: Tensor, y: _Samples, x: _Samples) -> Tensor:
    """`(C, P, Q)`: the mean of the samples of each bin."""
    weights_y, weights_x = _axis_weights(y), _axis_weights(x)
    # Only the cells that the box reaches are multiplied: the same sum, and a map of any size stays cheap.
    reach_y, reach_x = _reach(weights_y), _reach(weights_x)
    return weights_y[:, reach_y] @ feature[:, reach_y, reach_x] @ weights_x[:, reach_x].T


def _greatest(feature: Tensor, y: _Samples, x: _Samples) -> Tensor:
    """`(C, P, Q)`: the greatest sample of each bin."""

    def at(samples: _Samples, axis: int, values: Tensor, position: Tensor) -> Tensor:
        # Cells of no weight are not read: a NaN or an infinity there is not this sample's.
        low, high, fraction = _taps(position, samples.cells)
        low, high = low - first[axis], high - first[axis]
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        left, right, fraction = values.index_select(axis, low), values.index_select(axis, high), fraction.view(shape)
        # A sum, not a choice, for the derivative: a sample on a grid line moves towards its right neighbour.
        blend = left * (1 - fraction) + right * fraction
        return torch.where(fraction == 0, left + fraction * (right - left).nan_to_num(0, 0, 0), blend)

    def in_order(samples: _Samples, bin: int, axis: int, values: Tensor) -> Tensor:
        # The bin's samples along the axis; those outside the map are 0, and one of a run of them stands for all.
        inside = samples.is_on_map[bin]
        found = at(samples, axis, values, samples.position[bin][inside])
        outside = values.new_zeros([1 if i == axis else size for i, size in enumerate(values.shape)])
        before = int(samples.skipped[bin]) + int((~inside).cumprod(0).sum())
        if len(inside) == 0 or not bool(inside.any()):
            return outside
        after = samples.num_samples - before - found.shape[axis]
        return torch.cat([outside] * (before > 0) + [found] + [outside] * (after > 0), axis)

    reach_y, reach_x = _reach(_axis_weights(y)), _reach(_axis_weights(x))
    first = {1: reach_y.start, 2: reach_x.start}
    feature = feature[:, reach_y, reach_x]
    rows = [in_order(y, p, 1, feature) for p in range(y.num_bins)]
    bins = [[in_order(x, q, 2, row).flatten(1) for q in range(x.num_bins)] for row in rows]
    # max() of a dimension gives the first of equals, and NaN where there is one.
    return torch.stack([torch.stack([values.max(1).values for values in row], 1) for row in bins], 1)


def _bisect(reached: Callable[[Tensor], Tensor], num_samples: int, bins: Tensor) -> Tensor:
    """The first sample of each bin for which `reached` holds, `num_samples` where there is none; `(num_bins, 1)`."""
    low, high = torch.zeros_like(bins), torch.full_like(bins, num_samples)
    with torch.no_grad():
        while bool((low < high).any()):
            middle = (low + high) // 2
            # Where low has met high, middle is the answer already, and may be num_samples itself.
            hit = reached(middle) | (low >= high)
            low, high = torch.where(hit, low, middle + 1), torch.where(hit, middle, high)
    return low


def _reach(weights: Tensor) -> slice:
    """The range of cells that have a weight in any bin, and one more: a sample on a grid line moves towards it."""
    cells = weights.detach().ne(0).any(0).nonzero()
    return slice(int(cells[0]), int(cells[-1]) + 2) if len(cells) > 0 else slice(0, 0)


def _as_rows(boxes: Tensor | Sequence[Tensor], num_images: int) -> Tensor:
    if not isinstance(boxes, Tensor):
        if len(boxes) != num_images:
            raise ValueError(f"reference: expected {num_images} box tensors, got {len(boxes)}")
        numbered = [torch.cat([torch.full_like(box[:, :1], image), box], 1) for image, box in enumerate(boxes)]
        boxes = torch.cat(numbered) if numbered else torch.zeros((0, 5))
    _check_floating(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"reference: boxes must have shape (K, 5), got {tuple(boxes.shape)}")
    return boxes.float() if boxes.dtype in (torch.float16, torch.bfloat16) else boxes


def _check_floating(boxes: Tensor) -> None:
    if not boxes.is_floating_point():
        raise TypeError(f"reference: boxes must be floating point, got {boxes.dtype}")


def _pair(value):
    """`(y, x)` of one number or of a pair."""
    return (value, value) if isinstance(value, (int, float)) else (value[0], value[1])
