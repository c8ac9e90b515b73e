"""The raw operators' derivatives and fake kernels: what autograd, torch.compile and meta tensors know of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _library, reference, transforms  # noqa: F401  (the first loads the compiled operators)

operators = torch.ops.roialign_ext


class Pooling(NamedTuple):
    """What the operators are told beside tensors and sizes, in the order of their schemas."""

    spatial_scales: list[float]  # [y, x] of every level
    sampling_ratio: int
    aligned: bool
    canonical_level: int
    canonical_scale: float


# The operation as autograd sees it. With P the pooling, linear in the features x, and b the boxes, the first
# derivatives are P^T and B, and theirs are these four again and a mixed term:
#
#   P(b, x)      pooled                     RoIAlign           dx: P^T(g, b)     db: B(g, b, x)
#   P^T(g, b)    its adjoint                RoIAlignBackward   dg: P(b, w)       db: B(g, b, w)
#   B(g, b, x)   gradient of the boxes      BoxGradient        dg: T(b, w, x)    db, dx: mixed
#   T(b, w, x)   derivative of P along w    RoIAlignTangent    dw: B(g, b, x)    db, dx: mixed
#
# Max pooling takes one sample in place of the mean of all; which one is a constant.


class RoIAlign(transforms.Function):
    """boxes, features -> pooled. The features are kept only where the boxes' gradient will read them."""

    kinds = ("boxes", "rows", None, None)

    @staticmethod
    def forward(boxes, levels, output_size, pooling, *features):
        # As lists, because tuples take 2 µs more to convert.
        return operators.roi_align_forward(list(features), boxes, levels, list(output_size), *pooling)

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
            grad_boxes = transforms.apply(BoxGradient, grad_output, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(RoIAlignBackward, grad_output, boxes, levels, ctx.pooling, *ctx.maps)
        return grad_boxes, None, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, boxes_tangent, _levels, _output_size, _pooling, *features_tangent):
        boxes, levels, output_size, pooling, *features = inputs
        moved, changed = None, None
        if boxes_tangent is not None:
            moved = transforms.apply(RoIAlignTangent, boxes, boxes_tangent, levels, output_size, pooling, *features)
        if _any(features_tangent):
            directions = _filled(features_tangent, features)
            changed = transforms.apply(RoIAlign, boxes, levels, output_size, pooling, *directions)
        return _sum_of(moved, changed)


class RoIAlignBackward(transforms.Function):
    """grad of pooled, boxes -> grad of every level. Linear in the first, as the operation is in the features."""

    kinds = ("rows", "boxes", "rows", None, "images", None, None)
    returns_maps = True

    @staticmethod
    def forward(grad_output, boxes, levels, pooling, num_images, map_sizes, channels_last):
        return tuple(
            operators.roi_align_backward(grad_output, boxes, levels, num_images, map_sizes, *pooling, channels_last)
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
            grad_grad_output = transforms.apply(RoIAlign, boxes, levels, ctx.output_size, ctx.pooling, *directions)
        if ctx.needs_input_grad[1]:
            grad_boxes = transforms.apply(BoxGradient, grad_output, boxes, levels, ctx.pooling, *directions)
        return grad_grad_output, grad_boxes, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, grad_tangent, boxes_tangent, *_):
        grad_output, boxes, levels, pooling, *maps = inputs
        moved, changed = [None] * len(output), [None] * len(output)
        if grad_tangent is not None:
            changed = transforms.apply(RoIAlignBackward, grad_tangent, boxes, levels, pooling, *maps)
        if boxes_tangent is not None:
            # The features do not matter: the operation is linear in them.
            _, *moved = transforms.apply(MixedGradient, grad_output, boxes, boxes_tangent, levels, pooling, *output)
        return tuple(map(_sum_of, moved, changed))


class BoxGradient(transforms.Function):
    """grad of pooled, boxes, features -> grad of the boxes, `(K, 5)` in their dtype, 0 for the image."""

    kinds = ("rows", "boxes", "rows", None)

    @staticmethod
    def forward(grad_output, boxes, levels, pooling, *features):
        return operators.roi_align_backward_boxes(grad_output, features, boxes, levels, *pooling)

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
                RoIAlignTangent, boxes, directions, levels, size, ctx.pooling, *features
            )
        if ctx.needs_input_grad[1] or any(ctx.needs_input_grad[4:]):
            mixed = transforms.apply(MixedGradient, grad_output, boxes, directions, levels, ctx.pooling, *features)
            grad_boxes, *grad_features = mixed
        return grad_grad_output, grad_boxes, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, grad_tangent, boxes_tangent, _levels, _pooling, *features_tangent):
        grad_output, boxes, levels, pooling, *features = inputs
        of_grad, of_boxes, of_features = None, None, None
        if grad_tangent is not None:
            of_grad = transforms.apply(BoxGradient, grad_tangent, boxes, levels, pooling, *features)
        if boxes_tangent is not None:
            mixed = transforms.apply(MixedGradient, grad_output, boxes, boxes_tangent, levels, pooling, *features)
            of_boxes = mixed[0]
        if _any(features_tangent):
            directions = _filled(features_tangent, features)
            of_features = transforms.apply(BoxGradient, grad_output, boxes, levels, pooling, *directions)
        return _sum_of(of_grad, of_boxes, of_features)


class RoIAlignTangent(transforms.Function):
    """boxes, their tangents, features -> the derivative of pooled along the tangents."""

    kinds = ("boxes", "rows", "rows", None, None)

    @staticmethod
    def forward(boxes, tangents, levels, output_size, pooling, *features):
        return operators.roi_align_tangent(features, boxes, tangents, levels, output_size, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        boxes, tangents, levels, _, ctx.pooling, *features = inputs
        ctx.save_for_backward(boxes, tangents, levels, *features)

    @staticmethod
    def backward(ctx, grad_output):
        boxes, tangents, levels, *features = ctx.saved_tensors
        grad_boxes, grad_tangents, grad_features = None, None, [None] * len(features)
        if ctx.needs_input_grad[1]:
            grad_tangents = transforms.apply(BoxGradient, grad_output, boxes, levels, ctx.pooling, *features)
            grad_tangents = grad_tangents.to(tangents.dtype)
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5:]):
            mixed = transforms.apply(MixedGradient, grad_output, boxes, tangents, levels, ctx.pooling, *features)
            grad_boxes, *grad_features = mixed
        return grad_boxes, grad_tangents, None, None, None, *grad_features


class MixedGradient(transforms.Function):
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


class RoIMax(transforms.Function):
    """boxes, features -> pooled and the winner of each bin, which is all that the features' gradient needs."""

    kinds = ("boxes", "rows", None, None)

    @staticmethod
    def forward(boxes, levels, output_size, pooling, *features):
        return operators.roi_max_forward(features, boxes, levels, output_size, *pooling)

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
            grad_boxes = transforms.apply(MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(RoIMaxBackward, grad_output, argmax, boxes, levels, ctx.pooling, *ctx.maps)
        return grad_boxes, None, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, boxes_tangent, _levels, _output_size, _pooling, *features_tangent):
        boxes, levels, _, pooling, *features = inputs
        return RoIMaxGather.tangent(
            (output[1], *inputs[:2], pooling, *features), None, None, boxes_tangent, None, None, *features_tangent
        ), None


class RoIMaxGather(transforms.Function):
    """winners, boxes, features -> the features at the winners: max pooling, once it is known where the greatest are."""

    kinds = ("rows", "boxes", "rows", None)

    @staticmethod
    def forward(argmax, boxes, levels, pooling, *features):
        return operators.roi_max_gather(features, argmax, boxes, levels, *pooling)

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
            grad_boxes = transforms.apply(MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *features)
        if any(ctx.needs_input_grad[4:]):
            grad_features = transforms.apply(RoIMaxBackward, grad_output, argmax, boxes, levels, ctx.pooling, *ctx.maps)
        return None, grad_boxes, None, None, *grad_features

    @staticmethod
    def tangent(inputs, output, _argmax, boxes_tangent, _levels, _pooling, *features_tangent):
        if boxes_tangent is not None:
            raise NotImplementedError('roi_align: with mode="max" boxes have no forward-mode derivative')
        argmax, boxes, levels, pooling, *features = inputs
        directions = _filled(features_tangent, features)
        return transforms.apply(RoIMaxGather, argmax, boxes, levels, pooling, *directions)


class RoIMaxBackward(transforms.Function):
    """grad of pooled, winners, boxes -> grad of every level: the adjoint of RoIMaxGather."""

    kinds = ("rows", "rows", "boxes", "rows", None, "images", None, None)
    returns_maps = True

    @staticmethod
    def forward(grad_output, argmax, boxes, levels, pooling, num_images, map_sizes, channels_last):
        return tuple(
            operators.roi_max_backward(
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
            grad_grad_output = transforms.apply(RoIMaxGather, argmax, boxes, levels, ctx.pooling, *directions)
        if ctx.needs_input_grad[2]:
            grad_boxes = transforms.apply(MaxBoxGradient, grad_output, argmax, boxes, levels, ctx.pooling, *directions)
        return grad_grad_output, None, grad_boxes, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, grad_tangent, _argmax, boxes_tangent, *_):
        if boxes_tangent is not None:
            raise NotImplementedError('roi_align: with mode="max" boxes have no forward-mode derivative')
        _, *others = inputs
        return tuple(transforms.apply(RoIMaxBackward, grad_tangent, *others))


class MaxBoxGradient(transforms.Function):
    """grad of pooled, winners, boxes, features -> grad of the boxes."""

    kinds = ("rows", "rows", "boxes", "rows", None)

    @staticmethod
    def forward(grad_output, argmax, boxes, levels, pooling, *features):
        return operators.roi_max_backward_boxes(grad_output, argmax, features, boxes, levels, *pooling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, directions):
        raise NotImplementedError('roi_align: with mode="max" the gradient of the boxes cannot be differentiated again')


def roi_align_tangent(
    features: Sequence[Tensor],
    boxes: Tensor,
    box_tangents: Tensor,
    levels: Tensor | None,
    output_size: tuple[int, int],
    pooling: Pooling,
) -> Tensor:
    """The derivative of average pooling as boxes `(K, 5)` move along `box_tangents` `(K, 5)`; `(K, C, P, Q)`.

    Differentiable itself. The tangent of the image index counts for nothing.
    """
    return transforms.apply(RoIAlignTangent, boxes, box_tangents, levels, output_size, pooling, *features)


# How torch.compile batches the operators: what their first inputs are; see transforms.Function.
for _name, _kinds in {
    "roi_align_forward": ("maps", "boxes", "rows"),
    "roi_align_backward": ("rows", "boxes", "rows", "images"),
    "roi_align_backward_boxes": ("rows", "maps", "boxes", "rows"),
    "roi_align_tangent": ("maps", "boxes", "rows", "rows"),
    "roi_max_forward": ("maps", "boxes", "rows"),
    "roi_max_gather": ("maps", "rows", "boxes", "rows"),
    "roi_max_backward": ("rows", "rows", "boxes", "rows", "images"),
    "roi_max_backward_boxes": ("rows", "rows", "maps", "boxes", "rows"),
}.items():
    transforms.register_vmap(f"roialign_ext::{_name}", _kinds, getattr(operators, _name))


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
    _check_fake(features, boxes, levels=levels)
    return _fake_pooled(features, boxes, output_size)


@torch.library.register_fake("roialign_ext::roi_align_tangent")
def _(features, boxes, box_tangents, levels, output_size, *pooling):
    _check_fake(features, boxes, box_tangents=box_tangents, levels=levels)
    return _fake_pooled(features, boxes, output_size)


@torch.library.register_fake("roialign_ext::roi_max_forward")
def _(features, boxes, levels, output_size, *pooling):
    _check_fake(features, boxes, levels=levels)
    pooled = _fake_pooled(features, boxes, output_size)
    return pooled, torch.empty_like(pooled, dtype=torch.int32)


@torch.library.register_fake("roialign_ext::roi_max_gather")
def _(features, argmax, boxes, levels, *pooling):
    _check_fake(features, boxes, argmax=argmax, levels=levels)
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


def _check_fake(features: Sequence[Tensor], boxes: Tensor, **others: Tensor | None) -> None:
    """The mistakes made most; and devices, as the dispatcher sends a call here if any of its tensors has no data."""
    name = "roi_align" if len(features) == 1 else "multiscale_roi_align"
    tensors = {f"features[{i}]": f for i, f in enumerate(features)} | {"boxes": boxes} | others
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != features[0].device:
            raise ValueError(f"{name}: `{argument}` must be on {features[0].device}, got {tensor.device}")
    for i, x in enumerate(features):
        if x.dim() != 4:
            raise ValueError(f"{name}: `features[{i}]` must have shape (N, C, H, W), got {tuple(x.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"{name}: `boxes` must have shape (K, 5), got {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise TypeError(f"{name}: `boxes` must be floating point, got {boxes.dtype}")


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
