"""`accelerate`: the fused operator under the poolers of existing models. Knows other libraries by name alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from . import detection
from .modules import MultiScaleRoIAlign, RoIAlign
from .ops import Scale, multiscale_roi_align

_log = logging.getLogger("roialign_ext")


def accelerate(model: nn.Module) -> nn.Module:
    """Put the fused operator under every multi-level pooler of a model that is known, in place.

    Known are `MultiScaleRoIAlign`, `RoIAlign` and `RoIHeads` of torchvision, `ROIPooler` of detectron2 and
    `SingleRoIExtractor` of mmdet. Each such module stays the object that it is, with its submodules, attributes,
    hooks and mode, and changes its class. Outputs, losses and state_dict are those from before; where torchvision
    keeps the scales of its first batch, they are inferred on every call.

    A module is left as it is where its class would not tell what it computes: where somebody overrode or patched a
    method or a loss, where it pools by rotated boxes or by maxima. What was replaced and what was not is logged by the
    logger `roialign_ext` at level INFO. A second call changes nothing.

    Args:
        model: any module; one that is a pooler itself will do.

    Returns:
        `model`.

    Raises:
        ValueError: there is nothing in the model that is known and can be replaced.

    Example:
        >>> import torchvision
        >>> model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> type(accelerate(model).roi_heads.box_roi_pool)
        <class 'roialign_ext.modules.MultiScaleRoIAlign'>
    """
    found, left = 0, []
    for name, module in model.named_modules():
        if isinstance(module, _OURS):
            found += 1
        for known in type(module).__mro__:
            replacement = _REPLACEMENTS.get(_path(known))
            if replacement is None:
                continue
            label = f"{name or 'model'} ({_path(type(module))})"
            try:
                _check_unchanged(module, known)
                fused = replacement(module, known)
            except _LeftAlone as reason:
                left.append(f"{label} {reason}")
                _log.info("left alone: %s", left[-1])
            else:
                _turn_into(module, fused)
                found += 1
                _log.info("replaced: %s by %s", label, _path(type(fused)))
            break
    if not found:
        raise ValueError(
            f"accelerate: `model` must hold one of {', '.join(_REPLACEMENTS)}, got {type(model).__name__} with "
            + ("only some to be left alone: " + "; ".join(left) if left else "none")
        )
    return model


class _LeftAlone(Exception):
    """Why a known module is not replaced."""


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _turn_into(module: nn.Module, fused: nn.Module) -> None:
    """Give a module the class and options of another. All who hold it, as a submodule or elsewhere, go on to."""
    module.__class__ = type(fused)
    for name, value in vars(fused).items():
        if not name.startswith("_") and name != "training":
            setattr(module, name, value)


# Whether a module does what its class did when it left its library.

_HARMLESS = ("__init__", "__repr__", "extra_repr", "__annotate__", "__annotate_func__")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_unchanged(module: nn.Module, known: type) -> None:
    """Raise unless `module` runs the methods of `known`, as its library defines them."""
    patched = [name for name in vars(module) if callable(getattr(known, name, None))]
    if patched:
        raise _LeftAlone(f"has a {patched[0]} of its own")
    mro = type(module).__mro__
    for cls in mro[: mro.index(known)]:
        for name, value in vars(cls).items():
            if isinstance(value, (FunctionType, property, classmethod, staticmethod)) and name not in _HARMLESS:
                raise _LeftAlone(f"defines {name} in a subclass")
    for name, value in vars(known).items():
        if isinstance(value, FunctionType) and not _is_of_package(value, known):
            raise _LeftAlone(f"has its {name} patched by {value.__module__}")


def _is_of_package(function: Any, known: type) -> bool:
    return function.__module__.partition(".")[0] == known.__module__.partition(".")[0]


def _common_options(layers: Sequence[nn.Module], path: str, names: Sequence[str]) -> list[Any]:
    """The options that the single-level poolers under a multi-level one share."""
    for layer in layers:
        if _path(type(layer)) != path:
            raise _LeftAlone(f"pools by {_path(type(layer))}")
        _check_unchanged(layer, type(layer))
        if any(getattr(layer, hooks) for hooks in _HOOKS):
            raise _LeftAlone("has hooks on the poolers of its levels")
    options = [[getattr(layer, name) for name in names] for layer in layers]
    if not options or any(other != options[0] for other in options):
        raise _LeftAlone("has levels with different options")
    return options[0]


# torchvision


def _multi_scale_roi_align(module: Any, known: type) -> nn.Module:
    if len(module.output_size) != 2:
        raise _LeftAlone(f"has output_size {module.output_size}")
    return MultiScaleRoIAlign(
        module.featmap_names,
        module.output_size,
        module.sampling_ratio,
        canonical_scale=module.canonical_scale,
        canonical_level=module.canonical_level,
    )


def _roi_align(module: Any, known: type) -> nn.Module:
    return RoIAlign(module.output_size, module.spatial_scale, module.sampling_ratio, module.aligned)


def _roi_heads(module: Any, known: type) -> nn.Module:
    if _path(type(module)) != _path(known):
        raise _LeftAlone("is a subclass")
    # Losses are plugged in by patching these.
    for name in ("fastrcnn_loss", "maskrcnn_loss", "maskrcnn_inference", "keypointrcnn_loss", "keypointrcnn_inference"):
        function = getattr(sys.modules[known.__module__], name)
        if not _is_of_package(function, known):
            raise _LeftAlone(f"uses {name} patched by {function.__module__}")
    matcher, sampler, coder = module.proposal_matcher, module.fg_bg_sampler, module.box_coder
    for part, name in (matcher, "Matcher"), (sampler, "BalancedPositiveNegativeSampler"), (coder, "BoxCoder"):
        if _path(type(part)) != f"torchvision.models.detection._utils.{name}":
            raise _LeftAlone(f"has a {_path(type(part))} for a {name}")
    heads = detection.RoIHeads(
        module.box_roi_pool,
        module.box_head,
        module.box_predictor,
        matcher.high_threshold,
        matcher.low_threshold,
        sampler.batch_size_per_image,
        sampler.positive_fraction,
        coder.weights,
        module.score_thresh,
        module.nms_thresh,
        module.detections_per_img,
        module.mask_roi_pool,
        module.mask_head,
        module.mask_predictor,
        module.keypoint_roi_pool,
        module.keypoint_head,
        module.keypoint_predictor,
    )
    heads.proposal_matcher.allow_low_quality_matches = matcher.allow_low_quality_matches
    heads.box_coder.bbox_xform_clip = coder.bbox_xform_clip
    return heads


# detectron2 and mmdet

_D2_ROI_ALIGN = "detectron2.layers.roi_align.ROIAlign"
_MMCV_ROI_ALIGN = "mmcv.ops.roi_align.RoIAlign"


def _levels(
    boxes: Tensor, num_levels: int, finest: int, canonical_level: int, canonical_size: float, eps: float
) -> Tensor:
    """Levels `(K,)` of boxes `(K, 4)`, -1 for none.

    Both libraries add eps to the relative size, inside of the logarithm, where `assign_levels` adds it to the level:
    next to a boundary the two forms differ.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    size = ((x2 - x1) * (y2 - y1)).sqrt()
    level = (canonical_level + (size / canonical_size + eps).log2()).floor()
    return (level.clamp(finest, finest + num_levels - 1) - finest).nan_to_num(nan=-1).long()


class ROIPooler(nn.Module):
    """Takes the place of `detectron2.modeling.poolers.ROIPooler`.

    Args:
        output_size: bins `(P, Q)`, or one number for both.
        scales: map cells per image pixel of every level.
        sampling_ratio: samples per bin side; `<= 0` is adaptive.
        aligned: shift coordinates by half a cell, as the pooler type ROIAlignV2 does.
        min_level: level of the finest map.
        canonical_box_size: side in pixels of a box that belongs to `canonical_level`.
        canonical_level: the level of such a box.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[Scale],
        sampling_ratio: int,
        aligned: bool,
        min_level: int,
        canonical_box_size: float,
        canonical_level: int,
    ):
        super().__init__()
        self.output_size = output_size
        self.scales = scales
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.min_level = min_level
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """Pool boxes, a `(K_i, 4)` `.tensor` for every image, from maps `(N, C, H_l, W_l)`: `(K, C, P, Q)`.

        Raises:
            ValueError, TypeError: see `multiscale_roi_align`.
        """
        boxes = [box_list.tensor for box_list in box_lists]
        levels = None
        if len(x) > 1 and boxes:
            sizes = (self.canonical_level, self.canonical_box_size, 1e-8)
            levels = _levels(torch.cat(boxes), len(x), self.min_level, *sizes)
        # Levels are chosen in the boxes' precision, but the maps' precision is what is pooled in.
        boxes = [rows.to(x[0].dtype) for rows in boxes]
        return multiscale_roi_align(
            x, boxes, self.output_size, self.scales, self.sampling_ratio, self.aligned, levels=levels
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, sampling_ratio={self.sampling_ratio}, "
            f"aligned={self.aligned}"
        )


def _roi_pooler(module: Any, known: type) -> nn.Module:
    layers = list(module.level_poolers)
    output_size, sampling_ratio, aligned = _common_options(
        layers, _D2_ROI_ALIGN, ("output_size", "sampling_ratio", "aligned")
    )
    return ROIPooler(
        output_size,
        [layer.spatial_scale for layer in layers],
        sampling_ratio,
        aligned,
        module.min_level,
        module.canonical_box_size,
        module.canonical_level,
    )


class SingleRoIExtractor(nn.Module):
    """Takes the place of `mmdet.models.roi_heads.roi_extractors.SingleRoIExtractor`.

    Args:
        output_size: bins `(P, Q)`.
        out_channels: channels of the maps.
        featmap_strides: image pixels per map cell of every level.
        spatial_scales: map cells per image pixel of every level.
        sampling_ratio: samples per bin side; `<= 0` is adaptive.
        aligned: shift coordinates by half a cell.
        finest_scale: boxes with sides from twice this on leave the finest map.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        out_channels: int,
        featmap_strides: Sequence[int],
        spatial_scales: Sequence[Scale],
        sampling_ratio: int,
        aligned: bool,
        finest_scale: float = 56,
    ):
        super().__init__()
        self.output_size = output_size
        self.out_channels = out_channels
        self.featmap_strides = featmap_strides
        self.spatial_scales = spatial_scales
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.finest_scale = finest_scale

    @property
    def num_inputs(self) -> int:
        """Levels of the pyramid."""
        return len(self.featmap_strides)

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pool rows `[image, x1, y1, x2, y2]` from maps `(N, C, H_l, W_l)`: `(K, C, P, Q)`.

        The factor enlarges boxes around their centres after their levels are chosen. As in mmdet, boxes are rounded
        to the maps' dtype before that, and there is no factor where there is one map.

        Raises:
            ValueError, TypeError, IndexError: see `multiscale_roi_align`.
        """
        rois = rois.type_as(feats[0])
        levels = None
        if len(feats) > 1:
            levels = self.map_roi_levels(rois, len(feats))
            if roi_scale_factor is not None:
                rois = self.roi_rescale(rois, roi_scale_factor)
        scales = self.spatial_scales[: len(feats)]
        return multiscale_roi_align(
            feats, rois, self.output_size, scales, self.sampling_ratio, self.aligned, levels=levels
        )

    def map_roi_levels(self, rois: Tensor, num_levels: int) -> Tensor:
        """Index `(K,)` into the pyramid of every row `(K, 5)`, -1 for a box without a level."""
        return _levels(rois[:, 1:], num_levels, 0, 0, self.finest_scale, 1e-6)

    def roi_rescale(self, rois: Tensor, scale_factor: float) -> Tensor:
        """Rows `(K, 5)` with boxes enlarged around their centres."""
        low, high = rois[:, 1:3], rois[:, 3:]
        centre, half = (low + high) * 0.5, (high - low) * scale_factor * 0.5
        return torch.cat([rois[:, :1], centre - half, centre + half], dim=1)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, featmap_strides={self.featmap_strides}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, finest_scale={self.finest_scale}"
        )


def _single_roi_extractor(module: Any, known: type) -> nn.Module:
    if getattr(module, "fp16_enabled", False):
        raise _LeftAlone("is wrapped for float16 by mmcv")
    layers = list(module.roi_layers)
    output_size, sampling_ratio, aligned, mode = _common_options(
        layers, _MMCV_ROI_ALIGN, ("output_size", "sampling_ratio", "aligned", "pool_mode")
    )
    if mode != "avg":
        raise _LeftAlone(f"pools by {mode}")
    return SingleRoIExtractor(
        output_size,
        module.out_channels,
        module.featmap_strides,
        [layer.spatial_scale for layer in layers],
        sampling_ratio,
        aligned,
        module.finest_scale,
    )


# Class path -> what makes the replacement of a module, from the module and the class with that path.
_REPLACEMENTS: dict[str, Callable[[Any, type], nn.Module]] = {
    "torchvision.ops.poolers.MultiScaleRoIAlign": _multi_scale_roi_align,
    "torchvision.ops.roi_align.RoIAlign": _roi_align,
    "torchvision.models.detection.roi_heads.RoIHeads": _roi_heads,
    "detectron2.modeling.poolers.ROIPooler": _roi_pooler,
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor.SingleRoIExtractor": _single_roi_extractor,
}
_OURS = (MultiScaleRoIAlign, RoIAlign, detection.RoIHeads, ROIPooler, SingleRoIExtractor)
