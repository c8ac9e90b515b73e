"""The functional interface: brings arguments into the form that the operators take.

What is computed lives in the kernels (csrc) and, in plain PyTorch, in `reference.py`.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, transforms

Boxes = Tensor | Sequence[Tensor]
Scale = float | tuple[float, float]

_WHOLE = (int, torch.SymInt, numbers.Integral)  # the last are numpy's


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scales: Sequence[Scale],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
    canonical_scale: float = 224,
    canonical_level: int = 4,
    levels: Tensor | None = None,
) -> Tensor:
    """Pool every box from the level of a feature pyramid that suits its size, in one launch.

    The level rule is equation 1 of "Feature Pyramid Networks for Object Detection" (Lin et al., 2017), the pooling
    is RoI Align from "Mask R-CNN" (He et al., 2017); values are those of `torchvision.ops.MultiScaleRoIAlign`.

    Args:
        features: 1 to 8 maps `(N, C, H_l, W_l)`, finest first, of one float16, bfloat16, float32 or float64 dtype.
            NCHW and channels_last memory are read in place; any other memory layout is copied once.
        boxes: `(K, 5)` rows `[image, x1, y1, x2, y2]` in image pixels, image -1 marking a padding row; or a list of
            N tensors `(K_i, 4)`. Half boxes are read as float32.
        output_size: bins `(P, Q)`, or one number for both.
        spatial_scales: map cells per image pixel, for every level one number or a pair `(scale_y, scale_x)`.
        sampling_ratio: samples per bin side; `<= 0` takes `ceil(roi_size / bins)` along each axis.
        aligned: shift coordinates by half a cell, so that pixel centres lie on `0.5, 1.5, ...`.
        mode: `"avg"`, the mean of a bin's samples; or `"max"`, their greatest (mmcv's definition: a sample outside the
            map counts as 0, NaN is greater than any number, the first sample in y-then-x order wins a tie).
        canonical_scale: side in pixels of a box that belongs to `canonical_level`.
        canonical_level: the level k0 of such a box, `-log2` of its map's scale.
        levels: integers `(K,)` that replace the level rule; -1 marks a padding row.

    Returns:
        `(K, C, P, Q)` in the features' dtype, channels_last exactly when `features[0]` is. Rows of padding, of boxes
        with a NaN or infinite coordinate and, under the level rule, of boxes inverted along one axis are zero.
        Differentiable with respect to every level and to the boxes; gradients are bitwise repeatable. The number of
        samples and the level of a box count as constants, and so does a coordinate clamped to the border.
        Differentiable twice, but for the boxes in `"max"`. What is kept for the backward beside boxes and levels:
        the features, but only if the boxes require grad, and in `"max"` the winner of each bin, int32 `(K, C, P, Q)`.
        Second derivatives that involve the boxes are computed in plain PyTorch, box by box: right, and slow.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, counts or options that do not fit; without `levels`, scales
            that are not consecutive powers of two.
        IndexError: a row of `boxes` names an image, or of `levels` a level, that is not there. On CUDA, where
            looking would mean waiting for the device, that row is NaN instead.

    Example:
        >>> features = [torch.rand(2, 256, 200 // 2**i, 304 // 2**i) for i in range(4)]
        >>> boxes = [torch.tensor([[10.0, 20.0, 300.0, 400.0]]), torch.tensor([[50.0, 60.0, 90.0, 120.0]])]
        >>> multiscale_roi_align(features, boxes, 7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], sampling_ratio=2).shape
        torch.Size([2, 256, 7, 7])
    """
    if not isinstance(features, Sequence) or not all(isinstance(x, Tensor) for x in features):
        raise TypeError(f"multiscale_roi_align: `features` must be a sequence of tensors, got {_describe(features)}")
    name = "roi_align" if len(features) == 1 else "multiscale_roi_align"
    if mode not in ("avg", "max"):
        raise ValueError(f'{name}: `mode` must be "avg" or "max", got {mode!r}')
    if levels is not None and not isinstance(levels, Tensor):
        raise TypeError(f"{name}: `levels` must be a tensor, got {type(levels).__name__}")
    bins = _pair(name, "output_size", output_size)
    if not (isinstance(bins[0], _WHOLE) and isinstance(bins[1], _WHOLE) and isinstance(sampling_ratio, _WHOLE)):
        raise TypeError(
            f"{name}: `output_size` and `sampling_ratio` must be whole numbers, got {output_size!r}, {sampling_ratio!r}"
        )
    if aligned not in (True, False, None):
        raise TypeError(f"{name}: `aligned` must be True or False, got {aligned!r}")
    pooling = autograd.Pooling(
        _scales(name, spatial_scales),
        sampling_ratio,
        aligned,
        canonical_level,
        float(canonical_scale),
    )
    rois = _as_rois(name, boxes, features)
    if mode == "max":
        return transforms.apply(autograd.RoIMax, rois, levels, bins, pooling, *features)[0]
    return transforms.apply(autograd.RoIAlign, rois, levels, bins, pooling, *features)


def roi_align(
    input: Tensor,
    boxes: Boxes,
    output_size: int | tuple[int, int],
    spatial_scale: Scale = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    mode: str = "avg",
) -> Tensor:
    """Pool every box from one map: `multiscale_roi_align` with a single level, with torchvision's signature.

    Args:
        input: a map `(N, C, H, W)`.
        boxes, output_size, sampling_ratio, aligned, mode: see `multiscale_roi_align`.
        spatial_scale: map cells per image pixel, one number or a pair `(scale_y, scale_x)`.

    Returns:
        `(K, C, P, Q)`, see `multiscale_roi_align`. No level rule applies: a box inverted along one axis counts as one
        cell wide there (`aligned=False`) or is sampled mirrored (`aligned=True` with `sampling_ratio > 0`).

    Raises:
        ValueError, TypeError, IndexError: see `multiscale_roi_align`.

    Example:
        >>> roi_align(torch.rand(1, 3, 32, 32), [torch.tensor([[4.0, 4.0, 20.0, 28.0]])], (7, 7), 1.0, 2).shape
        torch.Size([1, 3, 7, 7])
    """
    return multiscale_roi_align([input], boxes, output_size, [spatial_scale], sampling_ratio, aligned, mode=mode)


def assign_levels(
    boxes: Boxes,
    num_levels: int,
    k_min: int = 2,
    *,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """The level of each box under the FPN rule, as `multiscale_roi_align` chooses it.

    `floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6)` in the boxes' precision, clamped to the
    pyramid (Lin et al., 2017, equation 1).

    Args:
        boxes: `(K, 4)` rows `[x1, y1, x2, y2]`, `(K, 5)` rows with an image index in front, or a list of `(K_i, 4)`.
        num_levels: levels of the pyramid.
        k_min: level of the finest map, `-log2` of its scale: 2 for stride 4.
        canonical_scale, canonical_level: see `multiscale_roi_align`.

    Returns:
        `(K,)` int64: 0 for the finest map; -1 for a box that belongs nowhere, with a coordinate that is not finite
        or inverted along one axis.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.

    Example:
        >>> assign_levels(torch.tensor([[0.0, 0.0, 111.0, 111.0], [0.0, 0.0, 224.0, 224.0]]), num_levels=4)
        tensor([0, 2])
    """
    return _assign_levels(boxes, num_levels, k_min, canonical_scale, canonical_level, eps=1e-6)


def _assign_levels(
    boxes: Boxes, num_levels: int, k_min: int, canonical_scale: float, canonical_level: int, eps: float
) -> Tensor:
    if isinstance(boxes, Tensor):
        rows = boxes[:, 1:] if boxes.dim() == 2 and boxes.shape[1] == 5 else boxes
    else:
        rows = _as_rois("assign_levels", boxes)[:, 1:]
    return autograd.operators.assign_levels(
        rows.detach(), num_levels, k_min, canonical_level, float(canonical_scale), float(eps)
    )


def _pair(name: str, argument: str, value):
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: `{argument}` must be one number or a pair, got {len(value)} numbers")
        return tuple(value)
    return value, value


def _scales(name: str, scales: Sequence[Scale]) -> list[float]:
    """Those of y and x of every level."""
    try:
        return [float(s) for scale in scales for s in _pair(name, "spatial_scales", scale)]
    except TypeError:
        raise TypeError(f"{name}: `spatial_scales` must be a number or a pair for each map, got {scales!r}") from None


def _describe(value: object) -> str:
    if isinstance(value, Sequence):
        return f"{type(value).__name__} of {', '.join(sorted({type(x).__name__ for x in value}))}"
    return type(value).__name__


def _as_rois(name: str, boxes: Boxes, features: Sequence[Tensor] | None = None) -> Tensor:
    """Boxes as rows `[image, x1, y1, x2, y2]`; a tensor is taken as it is and checked by the operator.

    A list must hold as many tensors as `features`, where they are given, have images.
    """
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, Sequence) or not all(isinstance(x, Tensor) for x in boxes):
        raise TypeError(f"{name}: `boxes` must be a tensor or a sequence of tensors, got {_describe(boxes)}")
    num_images = len(boxes) if features is None else features[0].shape[0] if features and features[0].dim() else 0
    if len(boxes) != num_images:
        raise ValueError(f"{name}: `boxes` must hold one tensor per image, {num_images}, got {len(boxes)}")
    for i, x in enumerate(boxes):
        if x.dim() != 2 or x.shape[1] != 4:
            raise ValueError(f"{name}: `boxes[{i}]` must have shape (K, 4), got {tuple(x.shape)}")
    if not boxes:
        return torch.zeros(0, 5, device=features[0].device if features else None)
    rows = torch.cat(list(boxes))
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # a half cannot count many images
    counts = [x.shape[0] for x in boxes]
    images = torch.cat([rows.new_full((count, 1), i) for i, count in enumerate(counts)])
    return torch.cat([images, rows], dim=1)
