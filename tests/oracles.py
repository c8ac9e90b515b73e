"""What a case must give: the float64 reference and its rounding bound, cached, and the one comparison."""

from __future__ import annotations

import functools

import torch
from cases import DTYPES, Case, Tolerance
from torch import Tensor

import roialign_ext
from roialign_ext import reference


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 features come with float64 boxes, the rest with float32 ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(case: Case, features: list[Tensor], boxes: Tensor | None = None, mode: str = "avg") -> Tensor:
    """The operation under test on a case."""
    device, levels = features[0].device, case.level_tensor()
    return roialign_ext.multiscale_roi_align(
        features,
        case.rows(coordinate_dtype(features[0].dtype)).to(device) if boxes is None else boxes,
        case.output_size,
        case.scales,
        case.sampling_ratio,
        case.aligned,
        mode=mode,
        levels=None if levels is None else levels.to(device),
        **case.options,
    )


def pool_by_reference(
    case: Case, features: list[Tensor], coordinates: torch.dtype, boxes: Tensor | None = None, mode: str = "avg"
) -> Tensor:
    """The case in float64, with coordinates as the kernels round them."""
    levels = case.level_tensor()
    return reference.multiscale_roi_align(
        features,
        case.rows(coordinates) if boxes is None else boxes,
        case.output_size,
        case.scales,
        case.sampling_ratio,
        case.aligned,
        mode=mode,
        levels=levels,
        coordinate_dtype=coordinates,
        **case.options,
    )


def cotangent(case: Case, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(case.boxes))
    shape = (len(case.boxes), case.channels, *case.output_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def values(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """The exact values of a case, and the same of the magnitudes: what rounding errors are relative to."""
    exact, magnitude = _values(case, coordinate_dtype(dtype))[dtype]
    if layout == "expanded":  # the first channel is all of them
        return exact[:, :1].expand(exact.shape), magnitude[:, :1].expand(exact.shape)
    return exact, magnitude


def gradients(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The exact gradients of every level for the case's cotangent, and their magnitudes."""
    return _gradients(case, coordinate_dtype(dtype))[dtype]


def box_gradients(case: Case, dtype: torch.dtype, mode: str = "avg") -> tuple[Tensor, Tensor]:
    """The exact gradient of the boxes for the case's cotangent, `(K, 5)`, and its magnitude."""
    return _box_gradients(case, coordinate_dtype(dtype), mode)[dtype]


def max_values(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The exact values of a case of max pooling, and the same of the magnitudes, their upper bound."""
    return _max_pooled(case, coordinate_dtype(dtype))[dtype][0]


def max_gradients(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The exact gradients of every level through max pooling for the case's cotangent, and their magnitudes."""
    return _max_pooled(case, coordinate_dtype(dtype))[dtype][1]


def _dtypes(coordinates: torch.dtype) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES.values() if coordinate_dtype(dtype) == coordinates]


@functools.cache
def _values(case: Case, coordinates: torch.dtype) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
    # One pass of the reference serves all dtypes that share coordinates: their maps lie side by side as channels.
    dtypes = _dtypes(coordinates)
    rounded = [[feature.double() for feature in case.features(dtype)] for dtype in dtypes]
    maps = [torch.cat(level + tuple(f.abs() for f in level), 1) for level in zip(*rounded)]
    pooled = pool_by_reference(case, maps, coordinates).split(case.channels, 1)
    return {dtype: (pooled[i], pooled[len(dtypes) + i]) for i, dtype in enumerate(dtypes)}


@functools.cache
def _gradients(case: Case, coordinates: torch.dtype) -> dict[torch.dtype, tuple[list[Tensor], list[Tensor]]]:
    leaves = [feature.requires_grad_() for feature in case.features(torch.float64)]
    pooled = pool_by_reference(case, leaves, coordinates)

    def passed_back(weight: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(pooled, leaves, weight, retain_graph=True))

    weights = {dtype: cotangent(case, dtype).double() for dtype in _dtypes(coordinates)}
    return {dtype: (passed_back(weight), passed_back(weight.abs())) for dtype, weight in weights.items()}


@functools.cache
def _max_pooled(case: Case, coordinates: torch.dtype) -> dict[torch.dtype, tuple]:
    # As for values: the maps of all dtypes lie side by side as channels, and their magnitudes beside them.
    dtypes = _dtypes(coordinates)
    rounded = [[f.double() for f in distinct_features(case, dtype, "max")] for dtype in dtypes]
    maps = [torch.cat(level + tuple(f.abs() for f in level), 1).requires_grad_() for level in zip(*rounded)]
    pooled = pool_by_reference(case, maps, coordinates, mode="max")
    values = pooled.detach().split(case.channels, 1)

    # Channels do not mix, so one pass back serves all dtypes.
    weights = torch.cat([cotangent(case, dtype).double() for dtype in dtypes], 1)
    output = pooled[:, : weights.shape[1]]
    gradients, bounds = (
        [grad.split(case.channels, 1) for grad in torch.autograd.grad(output, maps, weight, retain_graph=True)]
        for weight in (weights, weights.abs())
    )
    return {
        dtype: ((values[i], values[len(dtypes) + i]), ([g[i] for g in gradients], [g[i] for g in bounds]))
        for i, dtype in enumerate(dtypes)
    }


@functools.cache
def _box_gradients(case: Case, coordinates: torch.dtype, mode: str) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
    # As for values, the maps of all dtypes lie side by side as channels; a cotangent is zero but for its own.
    dtypes = _dtypes(coordinates)
    rounded = [[feature.double() for feature in distinct_features(case, dtype, mode)] for dtype in dtypes]
    maps = [torch.cat(level, 1) for level in zip(*rounded)]
    boxes = case.rows(coordinates).requires_grad_()
    pooled = pool_by_reference(case, maps, coordinates, boxes, mode)
    found = {}
    for i, dtype in enumerate(dtypes):
        weight = torch.zeros_like(pooled)
        own = weight.narrow(1, i * case.channels, case.channels).copy_(cotangent(case, dtype))
        (exact,) = torch.autograd.grad(pooled, boxes, weight, retain_graph=True)
        found[dtype] = exact.double(), _box_magnitude(case, coordinates, rounded[i], own.abs(), mode)
    return found


def _box_magnitude(case: Case, coordinates: torch.dtype, maps: list[Tensor], weight: Tensor, mode: str) -> Tensor:
    """What rounding errors of a box's gradient are relative to, `(K, 5)`: every cell that a sample steps between."""
    rows, scales = case.rows(coordinates), [s if isinstance(s, tuple) else (s, s) for s in case.scales]
    levels = case.level_tensor()
    if levels is None:
        options = {"canonical_scale": 224, "canonical_level": 4, **case.options}
        levels = reference._levels_by_rule(rows, scales, **options)
    magnitude = torch.zeros(len(rows), 5, dtype=torch.float64)
    for k, row in enumerate(rows):
        if levels[k] < 0 or not row.isfinite().all() or not 0 <= int(row[0]) < case.images:
            continue
        feature, scale = maps[levels[k]][int(row[0])].abs(), scales[levels[k]]
        axes = []
        for axis, size in enumerate(feature.shape[1:]):
            low, high = row[2 - axis], row[4 - axis]
            bins = case.output_size[axis]
            samples = reference._axis_samples(low, high, scale[axis], case.sampling_ratio, case.aligned, bins, size)
            axes.append(samples)
        if None in axes:
            continue
        steps, weights = [], []
        for samples in axes:
            left, right, _ = reference._taps(samples.position[samples.is_on_map], samples.cells)
            owner = torch.arange(samples.num_bins)[:, None].expand_as(samples.position)[samples.is_on_map]
            step = torch.zeros(samples.num_bins, samples.cells, dtype=torch.float64)
            for cells in (left, right):
                step.index_put_((owner, cells), torch.ones(len(owner), dtype=torch.float64), accumulate=True)
            # Of the mean every sample has its share; of the greatest one has it all.
            many = samples.num_samples if mode == "avg" else 1
            steps.append(step / many)
            weights.append(reference._axis_weights(samples) * (samples.num_samples / many))
        along_y = scale[0] * (weight[k] * (steps[0] @ feature @ weights[1].T)).sum()
        along_x = scale[1] * (weight[k] * (weights[0] @ feature @ steps[1].T)).sum()
        magnitude[k, 1:] = torch.stack([along_x, along_y, along_x, along_y])
    return magnitude


def distinct_features(case: Case, dtype: torch.dtype, mode: str) -> list[Tensor]:
    """The features of a case; in half and bfloat16 for "max" hardly two cells of a map are equal.

    Rounding decides between samples that interpolate cells of one value, and differs from kernel to kernel.
    """
    features = case.features(dtype)
    if mode == "avg" or dtype in (torch.float32, torch.float64):
        return features
    # Consecutive numbers of the dtype, from a quarter up, in the order of the features and with random signs.
    first = torch.tensor(0.25, dtype=dtype).view(torch.int16)
    maps = []
    for feature in case.features(torch.float64):
        order = feature.flatten(2).abs().argsort(2).argsort(2).to(torch.int16)
        values = (first + order % 4096).view(dtype).view(feature.shape)
        maps.append(torch.where(feature < 0, -values, values))
    return maps


def assert_within(actual: Tensor, exact: Tensor, magnitude: Tensor, tolerance: Tolerance) -> None:
    """Every element within the tolerance; where no cell has a weight, that is exactly zero."""
    assert actual.shape == exact.shape
    actual = actual.detach().cpu().double()
    allowed = tolerance.stored * exact.abs() + tolerance.computed * magnitude
    allowed = torch.where(magnitude == 0, 0.0, allowed + tolerance.smallest)
    error = (actual - exact).abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        excess = (error / allowed.clamp(min=tolerance.smallest)).nan_to_num(torch.inf, torch.inf)
        worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ, worst at {worst}: "
            f"expected {exact[worst].item()!r} within {allowed[worst].item():.3g}, got {actual[worst].item()!r}"
        )
