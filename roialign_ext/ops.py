"""The functional interface: shapes arguments, gives the raw operators their gradients and fake kernels.

What is computed lives in the kernels (csrc) and, in plain PyTorch, in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, reference, transforms  # noqa: F401  (the first loads the compiled operators)

_operators = torch.ops.roialign_ext

Boxes = Tensor | Sequence[Tensor]
Scale = float | tuple[float, float]


class _Pooling(NamedTuple):
    """What the operators are told beside tensors and sizes, in the order of their schemas."""

    spatial_scales: list[float]  # [y, x] of every level
    sampling_ratio: int
    aligned: bool
    canonical_level: int
    canonical_scale: float


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
    pooling = _Pooling(
        [float(s) for scale in spatial_scales for s in _pair(name, "spatial_scales", scale)],
        sampling_ratio,
        aligned,
        canonical_level,
        float(canonical_scale),
    )
    rois = _as_rois(name, boxes, features[0].shape[0] if features and features[0].dim() else 0)
    bins = _pair(name, "output_size", output_size)
    if mode == "max":
        return transforms.apply(_RoIMax, rois, levels, bins, pooling, *features)[0]
    return transforms.apply(_RoIAlign, rois, levels, bins, pooling, *features)


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
    return _operators.assign_levels(
        rows.detach(), num_levels, k_min, canonical_level, float(canonical_scale), float(eps)
    )


# The operation as autograd sees it. With P the pooling, linear in the features x, and b the boxes, the first
# derivatives are P^T and B, and theirs are these four again and a mixed term:
#
#   P(b, x)      pooled                     _RoIAlign            dx: P^T(g, b)     db: B(g, b, x)
#   P^T(g, b)    its adjoint                _RoIAlignBackward    dg: P(b, w)       db: B(g, b, w)
#   B(g, b, x)   gradient of the boxes      _BoxGradient         dg: T(b, w, x)    db, dx: mixed
#   T(b, w, x)   derivative of P along w    _RoIAlignTangent     dw: B(g, b, x)    db, dx: mixed
#
# Max pooling takes one sample in place of the mean of all; which one is a constant.


class _RoIAlign(transforms.Function):
    """boxes, features -> pooled. The features are kept only where the boxes' gradient will read them."""

    kinds = ("boxes", "rows", None, None)

    @staticmethod
    def forward(boxes, levels, output_size, pooling, *features):
        # As lists, because tuples take 2 µs more to convert.
        return _operators.roi_align_forward(list(features), boxes, levels, list(output_size), *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        boxes, levels, ctx.output_size, ctx.pooling, *features = inputs
        ctx.save_for_backward(boxes, levels, *(features if ctx.needs_input_grad[0] else ()))
        ctx.maps = _maps_of(features)

    @staticmethod
    def backward(ctx, grad_output):
        boxes, levels, *features = ctx.saved_tensors
        grad_boxes, grad_features = None, [None] * (len(ctx.needs_input_grad) - 4)
        if ctx.needs_input_grad[0]:
            grad_boxes = transforms.apply(_BoxGradient, grad_output, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(_RoIAlignBackward, grad_output, boxes, levels, ctx.pooling, *ctx.maps)
        return grad_boxes, None, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, boxes_tangent, _levels, _output_size, _pooling, *features_tangent):
        boxes, levels, output_size, pooling, *features = inputs
        moved, changed = None, None
        if boxes_tangent is not None:
            moved = transforms.apply(_RoIAlignTangent, boxes, boxes_tangent, levels, output_size, pooling, *features)
        if _any(features_tangent):
            directions = _filled(features_tangent, features)
            changed = transforms.apply(_RoIAlign, boxes, levels, output_size, pooling, *directions)
        return _sum_of(moved, changed)


class _RoIAlignBackward(transforms.Function):
    """grad of pooled, boxes -> grad of every level. Linear in the first, as the operation is in the features."""

    kinds = ("rows", "boxes", "rows", None, "images", None, None)
    returns_maps = True

    @staticmethod
    def forward(grad_output, boxes, levels, pooling, num_images, map_sizes, channels_last):
        return tuple(
            _operators.roi_align_backward(grad_output, boxes, levels, num_images, map_sizes, *pooling, channels_last)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, boxes, levels, ctx.pooling, *_ = inputs
        ctx.save_for_backward(boxes, levels, grad_output if ctx.needs_input_grad[1] else None)
        ctx.output_size = tuple(grad_output.shape[2:])

    @staticmethod
    def backward(ctx, *directions):
        boxes, levels, grad_output = ctx.saved_tensors
        grad_grad_output, grad_boxes = None, None
        if ctx.needs_input_grad[0]:
            grad_grad_output = transforms.apply(_RoIAlign, boxes, levels, ctx.output_size, ctx.pooling, *directions)
        if ctx.needs_input_grad[1]:
            grad_boxes = transforms.apply(_BoxGradient, grad_output, boxes, levels, ctx.pooling, *directions)
        return grad_grad_output, grad_boxes, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, grad_tangent, boxes_tangent, *_):
        grad_output, boxes, levels, pooling, *maps = inputs
        moved, changed = [None] * len(output), [None] * len(output)
        if grad_tangent is not None:
            changed = transforms.apply(_RoIAlignBackward, grad_tangent, boxes, levels, pooling, *maps)
        if boxes_tangent is not None:
            # The features do not matter: the operation is linear in them.
            _, *moved = transforms.apply(_MixedGradient, grad_output, boxes, boxes_tangent, levels, pooling, *output)
        return tuple(map(_sum_of, moved, changed))


class _BoxGradient(transforms.Function):
    """grad of pooled, boxes, features -> grad of the boxes, `(K, 5)` in their dtype, 0 for the image."""

    kinds = ("rows", "boxes", "rows", None)

    @staticmethod
    def forward(grad_output, boxes, levels, pooling, *features):
        return _operators.roi_align_backward_boxes(grad_output, features, boxes, levels, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, boxes, levels, ctx.pooling, *features = inputs
        ctx.save_for_backward(grad_output, boxes, levels, *features)

    @staticmethod
    def backward(ctx, directions):
        grad_output, boxes, levels, *features = ctx.saved_tensors
        grad_grad_output, grad_boxes, grad_features = None, None, [None] * len(features)
        if ctx.needs_input_grad[0]:
            size = tuple(grad_output.shape[2:])
            grad_grad_output = transforms.apply(
                _RoIAlignTangent, boxes, directions, levels, size, ctx.pooling, *features
            )
        if ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4:]):
            mixed = transforms.apply(_MixedGradient, grad_output, boxes, directions, levels, ctx.pooling, *features)
            grad_boxes, *grad_features = mixed
        return grad_grad_output, grad_boxes, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, grad_tangent, boxes_tangent, _levels, _pooling, *features_tangent):
        grad_output, boxes, levels, pooling, *features = inputs
        of_grad, of_boxes, of_features = None, None, None
        if grad_tangent is not None:
            of_grad = transforms.apply(_BoxGradient, grad_tangent, boxes, levels, pooling, *features)
        if boxes_tangent is not None:
            mixed = transforms.apply(_MixedGradient, grad_output, boxes, boxes_tangent, levels, pooling, *features)
            of_boxes = mixed[0]
        if _any(features_tangent):
            directions = _filled(features_tangent, features)
            of_features = transforms.apply(_BoxGradient, grad_output, boxes, levels, pooling, *directions)
        return _sum_of(of_grad, of_boxes, of_features)


class _RoIAlignTangent(transforms.Function):
    """boxes, their tangents, features -> the derivative of pooled along the tangents."""

    kinds = ("boxes", "rows", "rows", None, None)

    @staticmethod
    def forward(boxes, tangents, levels, output_size, pooling, *features):
        return _operators.roi_align_tangent(features, boxes, tangents, levels, output_size, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        boxes, tangents, levels, _, ctx.pooling, *features = inputs
        ctx.save_for_backward(boxes, tangents, levels, *features)

    @staticmethod
    def backward(ctx, grad_output):
        boxes, tangents, levels, *features = ctx.saved_tensors
        grad_boxes, grad_tangents, grad_features = None, None, [None] * len(features)
        if ctx.needs_input_grad[1]:
            grad_tangents = transforms.apply(_BoxGradient, grad_output, boxes, levels, ctx.pooling, *features)
            grad_tangents = grad_tangents.to(tangents.dtype)
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:]):
            mixed = transforms.apply(_MixedGradient, grad_output, boxes, tangents, levels, ctx.pooling, *features)
            grad_boxes, *grad_features = mixed
        return grad_boxes, grad_tangents, None, None, None, *grad_features


class _MixedGradient(transforms.Function):
    """The gradients of <grad of pooled, derivative of pooled along tangents>, in the boxes and in the features."""

    kinds = ("rows", "boxes", "rows", "rows", None)
    returns_maps = True

    @staticmethod
    def forward(grad_output, boxes, tangents, levels, pooling, *features):
        return reference.gradients_of_tangent(
            grad_output,
            features,
            boxes,
            tangents,
            tuple(grad_output.shape[2:]),
            list(zip(pooling.spatial_scales[::2], pooling.spatial_scales[1::2], strict=True)),
            pooling.sampling_ratio,
            pooling.aligned,
            canonical_scale=pooling.canonical_scale,
            canonical_level=pooling.canonical_level,
            levels=levels,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *directions):
        raise NotImplementedError("roi_align: third derivatives that involve the boxes are not supported")


class _RoIMax(transforms.Function):
    """boxes, features -> pooled and the winner of each bin, which is all that the features' gradient needs."""

    kinds = ("boxes", "rows", None, None)

    @staticmethod
    def forward(boxes, levels, output_size, pooling, *features):
        return _operators.roi_max_forward(features, boxes, levels, output_size, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        boxes, levels, _, ctx.pooling, *features = inputs
        _, argmax = output
        ctx.mark_non_differentiable(argmax)
        ctx.save_for_backward(boxes, levels, argmax, *(features if ctx.needs_input_grad[0] else ()))
        ctx.maps = _maps_of(features)

    @staticmethod
    def backward(ctx, grad_output, _):
        boxes, levels, argmax, *features = ctx.saved_tensors
        grad_boxes, grad_features = None, [None] * (len(ctx.needs_input_grad) - 4)
        if ctx.needs_input_grad[0]:
            grad_boxes = transforms.apply(_MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(
                _RoIMaxBackward, grad_output, argmax, boxes, levels, ctx.pooling, *ctx.maps
            )
        return grad_boxes, None, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, boxes_tangent, _levels, _output_size, _pooling, *features_tangent):
        boxes, levels, _, pooling, *features = inputs
        return _RoIMaxGather.tangent(
            (output[1], *inputs[:2], pooling, *features), None, None, boxes_tangent, None, None, *features_tangent
        ), None


class _RoIMaxGather(transforms.Function):
    """winners, boxes, features -> the features at the winners: max pooling, once it is known where the greatest are."""

    kinds = ("rows", "boxes", "rows", None)

    @staticmethod
    def forward(argmax, boxes, levels, pooling, *features):
        return _operators.roi_max_gather(features, argmax, boxes, levels, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        argmax, boxes, levels, ctx.pooling, *features = inputs
        ctx.save_for_backward(argmax, boxes, levels, *(features if ctx.needs_input_grad[1] else ()))
        ctx.maps = _maps_of(features)

    @staticmethod
    def backward(ctx, grad_output):
        argmax, boxes, levels, *features = ctx.saved_tensors
        grad_boxes, grad_features = None, [None] * (len(ctx.needs_input_grad) - 4)
        if ctx.needs_input_grad[1]:
            grad_boxes = transforms.apply(_MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(
                _RoIMaxBackward, grad_output, argmax, boxes, levels, ctx.pooling, *ctx.maps
            )
        return None, grad_boxes, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, _argmax, boxes_tangent, _levels, _pooling, *features_tangent):
        if boxes_tangent is not None:
            raise NotImplementedError('roi_align: with mode="max" boxes have no forward-mode derivative')
        argmax, boxes, levels, pooling, *features = inputs
        directions = _filled(features_tangent, features)
        return transforms.apply(_RoIMaxGather, argmax, boxes, levels, pooling, *directions)


class _RoIMaxBackward(transforms.Function):
    """grad of pooled, winners, boxes -> grad of every level: the adjoint of _RoIMaxGather."""

    kinds = ("rows", "rows", "boxes", "rows", None, "images", None, None)
    returns_maps = True

    @staticmethod
    def forward(grad_output, argmax, boxes, levels, pooling, num_images, map_sizes, channels_last):
        return tuple(
            _operators.roi_max_backward(
                grad_output, argmax, boxes, levels, num_images, map_sizes, *pooling, channels_last
            )
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, argmax, boxes, levels, ctx.pooling, *_ = inputs
        ctx.save_for_backward(argmax, boxes, levels, grad_output if ctx.needs_input_grad[2] else None)

    @staticmethod
    def backward(ctx, *directions):
        argmax, boxes, levels, grad_output = ctx.saved_tensors
        grad_grad_output, grad_boxes = None, None
        if ctx.needs_input_grad[0]:
            grad_grad_output = transforms.apply(_RoIMaxGather, argmax, boxes, levels, ctx.pooling, *directions)
        if ctx.needs_input_grad[2]:
            grad_boxes = transforms.apply(_MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *directions)
        return grad_grad_output, None, grad_boxes, None, None, None, None, None


class _MaxBoxGradient(transforms.Function):
    """grad of pooled, winners, boxes, features -> grad of the boxes."""

    kinds = ("rows", "rows", "boxes", "rows", None)

    @staticmethod
    def forward(grad_output, argmax, boxes, levels, pooling, *features):
        return _operators.roi_max_backward_boxes(grad_output, argmax, features, boxes, levels, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, directions):
        raise NotImplementedError('roi_align: with mode="max" the gradient of the boxes cannot be differentiated again')


def _roi_align_tangent(
    features: Sequence[Tensor],
    boxes: Tensor,
    box_tangents: Tensor,
    levels: Tensor | None,
    output_size: tuple[int, int],
    pooling: _Pooling,
) -> Tensor:
    """The derivative of average pooling as boxes `(K, 5)` move along `box_tangents` `(K, 5)`; `(K, C, P, Q)`.

    Differentiable itself. The tangent of the image index counts for nothing.
    """
    return transforms.apply(_RoIAlignTangent, boxes, box_tangents, levels, output_size, pooling, *features)


def _any(tangents: Sequence[Tensor | None]) -> bool:
    return any(tangent is not None for tangent in tangents)


def _filled(tangents: Sequence[Tensor | None], features: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if tangent is None else tangent for tangent, x in zip(tangents, features)]


def _sum_of(*parts: Tensor | None) -> Tensor | None:
    """Of those that are there."""
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


def _maps_of(features: Sequence[Tensor]) -> tuple[int, list[int], bool]:
    """What the backward must know of the maps: how many images, sizes of every level, layout."""
    num_images = features[0].shape[0] if len(features) > 0 else 0
    sizes = [size for x in features for size in x.shape[2:]]
    return num_images, sizes, len(features) > 0 and _is_channels_last(features[0])


# Fake kernels: shapes and layouts without data, for torch.compile, torch.export and meta tensors.


@torch.library.register_fake("roialign_ext::roi_align_forward")
def _(features, boxes, levels, output_size, *pooling):
    _check_one_device(features, boxes=boxes, levels=levels)
    return _fake_pooled(features, boxes, output_size)


@torch.library.register_fake("roialign_ext::roi_align_tangent")
def _(features, boxes, box_tangents, levels, output_size, *pooling):
    _check_one_device(features, boxes=boxes, box_tangents=box_tangents, levels=levels)
    return _fake_pooled(features, boxes, output_size)


@torch.library.register_fake("roialign_ext::roi_max_forward")
def _(features, boxes, levels, output_size, *pooling):
    _check_one_device(features, boxes=boxes, levels=levels)
    pooled = _fake_pooled(features, boxes, output_size)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


@torch.library.register_fake("roialign_ext::roi_max_gather")
def _(features, argmax, boxes, levels, *pooling):
    _check_one_device(features, argmax=argmax, boxes=boxes, levels=levels)
    return _fake_pooled(features, boxes, argmax.shape[2:])


@torch.library.register_fake("roialign_ext::roi_align_backward")
def _(grad_output, boxes, levels, num_images, map_sizes, *pooling_and_channels_last):
    return _fake_maps(grad_output, num_images, map_sizes, pooling_and_channels_last[-1])


@torch.library.register_fake("roialign_ext::roi_max_backward")
def _(grad_output, argmax, boxes, levels, num_images, map_sizes, *pooling_and_channels_last):
    return _fake_maps(grad_output, num_images, map_sizes, pooling_and_channels_last[-1])


@torch.library.register_fake("roialign_ext::roi_align_backward_boxes")
def _(grad_output, features, boxes, levels, *pooling):
    return boxes.new_empty(boxes.shape)


@torch.library.register_fake("roialign_ext::roi_max_backward_boxes")
def _(grad_output, argmax, features, boxes, levels, *pooling):
    return boxes.new_empty(boxes.shape)


@torch.library.register_fake("roialign_ext::assign_levels")
def _(boxes, *rule):
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64)


def _check_one_device(features: Sequence[Tensor], **others: Tensor | None) -> None:
    """The dispatcher sends a call to the fake kernel if any of its tensors has no data, whatever the others are."""
    name = "roi_align" if len(features) == 1 else "multiscale_roi_align"
    tensors = {f"features[{i}]": f for i, f in enumerate(features)} | others
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != features[0].device:
            raise ValueError(f"{name}: `{argument}` must be on {features[0].device}, got {tensor.device}")


def _fake_pooled(features: Sequence[Tensor], boxes: Tensor, output_size: Sequence[int]) -> Tensor:
    x = features[0]
    return _empty_in_layout(x, (boxes.shape[0], x.shape[1], *output_size), _is_channels_last(x))


def _fake_maps(like: Tensor, num_images: int, map_sizes: Sequence[int], channels_last: bool) -> list[Tensor]:
    return [
        _empty_in_layout(like, (num_images, like.shape[1], height, width), channels_last)
        for height, width in zip(map_sizes[::2], map_sizes[1::2], strict=True)
    ]


def _is_channels_last(x: Tensor) -> bool:
    """As is_channels_last() in csrc/ops.cpp reads the strides."""
    return x.dim() == 4 and x.stride(1) == 1 and x.stride(3) > 1


def _empty_in_layout(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _pair(name: str, argument: str, value):
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: `{argument}` must be one number or a pair, got {len(value)} numbers")
        return tuple(value)
    return value, value


def _describe(value: object) -> str:
    if isinstance(value, Sequence):
        return f"{type(value).__name__} of {', '.join(sorted({type(x).__name__ for x in value}))}"
    return type(value).__name__


def _as_rois(name: str, boxes: Boxes, num_images: int | None = None) -> Tensor:
    """Boxes as rows `[image, x1, y1, x2, y2]`; a tensor is taken as it is and checked by the operator.

    A list must hold as many tensors as there are images, where their number is given.
    """
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, Sequence) or not all(isinstance(x, Tensor) for x in boxes):
        raise TypeError(f"{name}: `boxes` must be a tensor or a sequence of tensors, got {_describe(boxes)}")
    if num_images is not None and len(boxes) != num_images:
        raise ValueError(f"{name}: `boxes` must hold one tensor per image, {num_images}, got {len(boxes)}")
    for i, x in enumerate(boxes):
        if x.dim() != 2 or x.shape[1] != 4:
            raise ValueError(f"{name}: `boxes[{i}]` must have shape (K, 4), got {tuple(x.shape)}")
    if not boxes:
        return torch.zeros(0, 5)
    rows = torch.cat(list(boxes))
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()  # a half cannot count many images
    counts = [x.shape[0] for x in boxes]
    images = torch.cat([rows.new_full((count, 1), i) for i, count in enumerate(counts)])
    return torch.cat([images, rows], dim=1)
