"""Export to ONNX: the operators as standard ones, that any runtime with RoiAlign of opset 16 runs.

Needs onnx and onnxscript, which torch.onnx.export(dynamo=True) needs too. Every level is a RoiAlign of the rows that
belong to it, scattered into zeros. Rows that belong nowhere stay zero: padding, boxes with a coordinate that is not
finite, boxes without a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .autograd import operators

_EPS = 1e-6  # what the pooling operators add to a level, as csrc/ops.cpp has it


def export(model: torch.nn.Module, args: tuple = (), f: Any = None, **options: Any) -> Any:
    """`torch.onnx.export` with this package's operators: `dynamo=True` and `custom_translation_table()`.

    Args:
        model, args, f: see `torch.onnx.export`.
        options: further arguments of it but `dynamo`, such as `dynamic_shapes`; a `custom_translation_table` is
            added to ours.

    Returns:
        A `torch.onnx.ONNXProgram`.

    Raises:
        torch.onnx.errors.OnnxExporterError: the model has what ONNX cannot say, such as `mode="max"`, which means
            another thing there; the error that caused it names it.

    Example:
        >>> from roialign_ext import RoIAlign, onnx
        >>> boxes = torch.tensor([[0.0, 0.0, 0.0, 256.0, 128.0], [0.0, 9.0, 9.0, 64.0, 64.0]])
        >>> inputs = (torch.rand(1, 8, 32, 32), boxes)
        >>> program = onnx.export(RoIAlign(7, 1 / 16, 2), inputs, dynamic_shapes=({}, {0: "K"}), verbose=False)
        >>> "RoiAlign" in {node.op_type for node in program.model.graph}
        True
    """
    if not options.pop("dynamo", True):
        raise ValueError("roialign_ext.onnx.export: `dynamo` must be True, the older exporter knows no such operators")
    table = {**custom_translation_table(), **options.pop("custom_translation_table", {})}
    return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)


def custom_translation_table() -> dict[Callable, Callable]:
    """What `torch.onnx.export(dynamo=True)` takes under this name: our operators in terms of ONNX's.

    Raises:
        ImportError: onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("roialign_ext.onnx: export needs `pip install onnx onnxscript`") from error
    refused = {
        operators.roi_max_forward.default: 'roi_align: `mode` must be "avg" for ONNX, whose RoiAlign with mode="max" '
        'takes the greatest of weighted corners and not of samples, got "max"',
    }
    return {
        operators.roi_align_forward.default: _roi_align_forward,
        operators.assign_levels.default: _assign_levels,
        **{operator: _refusal(message) for operator, message in refused.items()},
    }


def _refusal(message: str) -> Callable:
    def refuse(features, boxes, levels, output_size, spatial_scales, *rest):
        raise ValueError(message)

    return refuse


def _roi_align_forward(
    features: Sequence[Any],
    boxes: Any,
    levels: Any,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_level: int,
    canonical_scale: float,
) -> Any:
    op, types = _opset(), _types()
    if any(not isinstance(size, int) for size in output_size):
        raise ValueError(f"roi_align: `output_size` must be known for ONNX, got {output_size}")
    stored = features[0].dtype
    wide = types.DOUBLE in (stored, boxes.dtype)
    computed = types.DOUBLE if wide else types.FLOAT  # of halves too, as in the kernels
    boxes = op.Cast(boxes, to=computed)
    image, corners = _columns(boxes)
    known = _finite(boxes, wide)
    known = op.And(known, op.Greater(image, op.CastLike(op.Constant(value_float=-1.0), image)))
    if levels is not None:
        level = op.Cast(levels, to=types.INT64)
    elif len(features) == 1:
        level = None
    else:
        k_min = round(-math.log2(spatial_scales[0]))
        level = _level(corners, wide, len(features), k_min, canonical_level, canonical_scale, _EPS)
    if aligned and sampling_ratio <= 0:
        known = op.And(known, _upright(corners))

    shape = op.Concat(
        op.Shape(boxes, start=0, end=1),
        op.Shape(features[0], start=1, end=2),
        op.Constant(value_ints=list(output_size)),
        axis=0,
    )
    output = op.CastLike(op.Expand(op.Constant(value_float=0.0), shape), boxes)
    for index, feature in enumerate(features):
        here = known
        if level is not None:
            here = op.And(known, op.Equal(level, op.Constant(value_int=index)))
        rows = op.Transpose(op.NonZero(here), perm=[1, 0])  # [K_l, 1]
        row = op.Squeeze(rows, op.Constant(value_ints=[1]))
        scale_y, scale_x = spatial_scales[2 * index : 2 * index + 2]
        rois = op.Gather(corners, row)
        if scale_y != scale_x:
            # RoiAlign knows one scale; it multiplies by it first, so the product can as well come from outside.
            rois = op.Mul(rois, op.CastLike(op.Constant(value_floats=[scale_x, scale_y] * 2), rois))
        pooled = op.RoiAlign(
            op.Cast(feature, to=computed),
            rois,
            op.Cast(op.Gather(image, row), to=types.INT64),
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            mode="avg",
            output_height=output_size[0],
            output_width=output_size[1],
            sampling_ratio=max(sampling_ratio, 0),
            spatial_scale=scale_y if scale_y == scale_x else 1.0,
        )
        output = op.ScatterND(output, rows, pooled)
    return op.Cast(output, to=stored)


def _assign_levels(
    boxes: Any, num_levels: int, k_min: int, canonical_level: int, canonical_scale: float, eps: float
) -> Any:
    op, types = _opset(), _types()
    wide = boxes.dtype == types.DOUBLE
    boxes = op.Cast(boxes, to=types.DOUBLE if wide else types.FLOAT)
    level = _level(boxes, wide, num_levels, k_min, canonical_level, canonical_scale, eps)
    return op.Where(_finite(boxes, wide), level, op.Constant(value_int=-1))


def _columns(boxes: Any) -> tuple[Any, Any]:
    """The image `[K]` and the corners `[K, 4]` of rows `[K, 5]`."""
    op = _opset()
    return tuple(
        op.Gather(boxes, op.Constant(**which), axis=1) for which in ({"value_int": 0}, {"value_ints": [1, 2, 3, 4]})
    )


def _finite(rows: Any, wide: bool) -> Any:
    """Whether all numbers of a row are finite."""
    op, types = _opset(), _types()
    largest = torch.finfo(torch.float64 if wide else torch.float32).max
    finite = op.LessOrEqual(op.Abs(rows), _number(largest, wide))  # false for NaN
    return op.Cast(
        op.ReduceMin(op.Cast(finite, to=types.INT32), op.Constant(value_ints=[1]), keepdims=0),
        to=types.BOOL,
    )


def _sides(corners: Any) -> tuple[Any, Any]:
    """Widths and heights `[K]`."""
    op = _opset()
    x1, y1, x2, y2 = (op.Gather(corners, op.Constant(value_int=column), axis=1) for column in range(4))
    return op.Sub(x2, x1), op.Sub(y2, y1)


def _upright(corners: Any) -> Any:
    op = _opset()
    zero = op.CastLike(op.Constant(value_float=0.0), corners)
    width, height = _sides(corners)
    return op.And(op.GreaterOrEqual(width, zero), op.GreaterOrEqual(height, zero))


def _level(
    corners: Any,
    wide: bool,
    num_levels: int,
    k_min: int,
    canonical_level: int,
    canonical_scale: float,
    eps: float,
) -> Any:
    """The FPN rule as comparisons with the areas where it changes; -1 for a negative area. `[K]` int64."""
    op, types = _opset(), _types()
    width, height = _sides(corners)
    area = op.Mul(width, height)
    negative = op.Less(area, op.CastLike(op.Constant(value_float=0.0), area))
    level = op.Neg(op.Cast(negative, to=types.INT64))
    for smallest in _areas_of_levels(wide, num_levels, k_min, canonical_level, canonical_scale, eps):
        if math.isfinite(smallest):
            level = op.Add(level, op.Cast(op.GreaterOrEqual(area, _number(smallest, wide)), to=types.INT64))
    return level


def _areas_of_levels(
    wide: bool, num_levels: int, k_min: int, canonical_level: int, canonical_scale: float, eps: float
) -> list[float]:
    """The smallest area of each level but the first, as the kernels round; infinite where a level has none.

    ONNX has no log2, and a logarithm with another base rounds differently just where boxes change levels.
    """
    floating, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    level = torch.arange(1, num_levels)
    # Floats that are not negative are ordered as their bits are.
    low = torch.zeros(num_levels - 1, dtype=integer)
    high = torch.full_like(low, int(torch.tensor(math.inf, dtype=floating).view(integer)))
    while bool((low < high).any()):
        middle = low + (high - low) // 2
        area = middle.view(floating)
        boxes = torch.stack([torch.zeros_like(area), torch.zeros_like(area), area, torch.ones_like(area)], 1)
        found = operators.assign_levels(boxes, num_levels, k_min, canonical_level, canonical_scale, eps)
        reached = found >= level
        low, high = torch.where(reached | (low >= high), low, middle + 1), torch.where(reached, middle, high)
    return low.view(floating).tolist()


def _number(value: float, wide: bool) -> Any:
    import onnxscript.ir

    data_type = _types()
    return _opset().Constant(value=onnxscript.ir.tensor(value, dtype=data_type.DOUBLE if wide else data_type.FLOAT))


def _opset() -> Any:
    """ONNX's operators as functions. Any: onnxscript's annotations speak of the values that flow later."""
    import onnxscript

    return onnxscript.opset18


def _types() -> Any:
    import onnxscript.ir

    return onnxscript.ir.DataType
