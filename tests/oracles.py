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


def pool(case: Case, features: list[Tensor]) -> Tensor:
    """The operation under test on a case."""
    device, levels = features[0].device, case.level_tensor()
    return roialign_ext.multiscale_roi_align(
        features,
        case.rows(coordinate_dtype(features[0].dtype)).to(device),
        case.output_size,
        case.scales,
        case.sampling_ratio,
        case.aligned,
        levels=None if levels is None else levels.to(device),
        **case.options,
    )


def pool_by_reference(case: Case, features: list[Tensor], coordinates: torch.dtype) -> Tensor:
    """The case in float64, with coordinates as the kernels round them."""
    levels = case.level_tensor()
    return reference.multiscale_roi_align(
        features,
        case.rows(coordinates),
        case.output_size,
        case.scales,
        case.sampling_ratio,
        case.aligned,
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
