"""Every instruction set that the CPU kernels are built for and this machine has, over the whole table of cases."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import CASE, CASES, DTYPES, GRADIENTS, LAYOUTS, VALUES, Case

from roialign_ext import _library

CAPABILITIES = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """The CPU kernels run with that instruction set."""
    best = _library.build_info()["cpu_capability"]
    if not _library.set_cpu_capability(request.param):
        _library.set_cpu_capability(best)
        pytest.skip(f"this machine or build has {best} at best")
    yield request.param
    _library.set_cpu_capability(best)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_values_and_gradients_are_the_references(capability, dtype, layout):
    assert _library.build_info()["cpu_capability"] == capability
    for case in CASES:
        features = [feature.requires_grad_() for feature in LAYOUTS[layout](case.features(dtype))]
        output = oracles.pool(case, features)
        oracles.assert_within(output, *oracles.values(case, dtype), VALUES[dtype])
        gradients = torch.autograd.grad(output, features, oracles.cotangent(case, dtype))
        for actual, exact, magnitude in zip(gradients, *oracles.gradients(case, dtype)):
            oracles.assert_within(actual, exact, magnitude, GRADIENTS[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_box_gradients_and_max_pooling_are_the_references(capability, dtype, layout):
    for name in ("levels-3", "output-3x5", "channels-64", "across-the-border-adaptive-aligned", "padding"):
        case = CASE[name]
        features = LAYOUTS[layout](oracles.distinct_features(case, dtype, "max"))
        features = [feature.detach().requires_grad_() for feature in features]
        output = oracles.pool(case, features, mode="max")
        oracles.assert_within(output, *oracles.max_values(case, dtype), VALUES[dtype])
        found = torch.autograd.grad(output, features, oracles.cotangent(case, dtype))
        for actual, exact, magnitude in zip(found, *oracles.max_gradients(case, dtype), strict=True):
            oracles.assert_within(actual, exact, magnitude, GRADIENTS[dtype])
        boxes = case.rows(oracles.coordinate_dtype(dtype)).requires_grad_()
        output = oracles.pool(case, LAYOUTS[layout](case.features(dtype)), boxes)
        (found,) = torch.autograd.grad(output, boxes, oracles.cotangent(case, dtype))
        oracles.assert_within(found, *oracles.box_gradients(case, dtype), GRADIENTS[found.dtype])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [1, 2, 5, 15, 16, 17, 31, 33, 47, 64, 65, 90])
def test_boxes_of_every_width_on_the_last_rows_of_the_last_map(capability, width, layout):
    # Vectors that reach over the end of a box must not reach over the end of the tensor, whatever they step back by.
    boxes = [(0, left, 12, left + width, 16) for left in (0, 3, 95 - width if width < 95 else 0)]
    for bins in (1, 7, 8, 14, 16, 17, 33):
        case = Case(f"width-{width}-{bins}", boxes, ((16, 96),), (1.0,), channels=9, output_size=(3, bins))
        features = [feature.requires_grad_() for feature in LAYOUTS[layout](case.features(torch.float32))]
        output = oracles.pool(case, features)
        oracles.assert_within(output, *oracles.values(case, torch.float32), VALUES[torch.float32])
        (gradient,) = torch.autograd.grad(output, features, oracles.cotangent(case, torch.float32))
        exact, magnitude = oracles.gradients(case, torch.float32)
        oracles.assert_within(gradient, exact[0], magnitude[0], GRADIENTS[torch.float32])


def test_a_nan_gradient_stays_in_the_cells_its_bin_reads(capability):
    # Answer by eye: the samples lie on columns 3 and 4. Cells beside them share their vectors and must stay zero.
    features = torch.zeros(1, 1, 8, 64, requires_grad=True)
    box = torch.tensor([[0.0, 2.5, 3.0, 4.5, 4.0]])
    case = Case("nan", [tuple(box[0].tolist())], ((8, 64),), (1.0,), channels=1, output_size=(1, 2), sampling_ratio=1)
    output = oracles.pool(case, [features])
    (gradient,) = torch.autograd.grad(output, [features], torch.full_like(output, torch.nan))
    assert gradient.isnan().nonzero()[:, 3].unique().tolist() == [3, 4]
    assert gradient[~gradient.isnan()].abs().max() == 0
