"""mode="max": answers by eye, the float64 reference in values and gradients, ties and NaN, second derivatives."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import CASE, CASES, DTYPES, GRADIENTS, LAYOUTS, VALUES, Case
from torch import Tensor

import roialign_ext
from roialign_ext import reference

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
NAN, INF = math.nan, math.inf

# The reference takes its time: once for the coordinates of float32, once more, slow, for those of float64.
FORMS = [
    pytest.param("float32", "contiguous", id="float32-contiguous"),
    pytest.param("float32", "channels_last", id="float32-channels_last"),
    pytest.param("float16", "channels_last", id="float16-channels_last"),
    pytest.param("float64", "contiguous", id="float64-contiguous", marks=pytest.mark.slow),
    pytest.param("float64", "channels_last", id="float64-channels_last", marks=pytest.mark.slow),
]
LONG = ("output-14x14", "output-3x33", "channels-257", "seventeen-samples", "levels-1", "levels-5", "levels-7")
SMALL = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in LONG))
    for case in CASES
    if len(case.boxes) < 100
]


def leaves(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    features = LAYOUTS[layout]([f.to(device) for f in oracles.distinct_features(case, dtype, "max")])
    return [feature.detach().requires_grad_() for feature in features]


def check(case: Case, dtype: torch.dtype, layout: str, device: torch.device, with_gradients: bool = True) -> None:
    features = leaves(case, dtype, layout, device)
    output = oracles.pool(case, features, mode="max")
    assert output.dtype == dtype
    oracles.assert_within(output, *oracles.max_values(case, dtype), VALUES[dtype])
    if not with_gradients:
        return
    found = torch.autograd.grad(output, features, oracles.cotangent(case, dtype).to(device))
    for actual, exact, magnitude in zip(found, *oracles.max_gradients(case, dtype), strict=True):
        oracles.assert_within(actual, exact, magnitude, GRADIENTS[dtype])


class TestAgainstTheFloat64Reference:
    """Values, and autograd through reference.py for a random cotangent."""

    @pytest.mark.parametrize("dtype, layout", FORMS)
    @pytest.mark.parametrize("case", SMALL)
    def test_table(self, case: Case, dtype, layout, device):
        # Samples of float16 maps tie now and then in exact arithmetic, and then rounding chooses the winner. The cases
        # of test_any_dtype_and_layout are free of it.
        check(case, DTYPES[dtype], layout, device, with_gradients=dtype != "float16")

    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
    @DTYPE
    @pytest.mark.parametrize("name", ["levels-3", "images-uneven", "channels-64"])
    def test_any_dtype_and_layout(self, name, dtype, layout, device):
        check(CASE[name], dtype, layout, device)

    @pytest.mark.slow
    @LAYOUT
    @pytest.mark.parametrize("name", ["many-boxes", "many-boxes-on-one-map"])
    def test_many_boxes(self, name, layout, device):
        check(CASE[name], torch.float32, layout, device)


def row_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


class TestByEye:
    def test_the_greatest_sample_of_a_bin(self, device):
        # Samples of the only bin at columns 1 and 3 of 0 5 0 7 0; the winner's cell alone gets the gradient.
        feature = row_of(0, 5, 0, 7, 0).to(device).requires_grad_()
        output = roialign_ext.roi_align(feature, torch.tensor([[0.0, 0, 0, 4, 1]]).to(device), 1, 1.0, 2, mode="max")
        assert output.item() == 7
        output.backward(torch.full_like(output, 3.0))
        assert feature.grad.flatten().tolist() == [0, 0, 0, 3, 0]

    def test_the_four_cells_of_the_winner_share_the_gradient(self, device):
        feature = torch.zeros(1, 1, 4, 4)
        feature[0, 0, 1:3, 1:3] = torch.tensor([[1.0, 2], [3, 4]])
        feature = feature.to(device).requires_grad_()
        # One sample at row 1.25, column 1.75.
        box = torch.tensor([[0.0, 0.75, 0.25, 2.75, 2.25]]).to(device)
        output = roialign_ext.roi_align(feature, box, 1, 1.0, 1, mode="max")
        assert output.item() == 0.75 * (0.25 * 1 + 0.75 * 2) + 0.25 * (0.25 * 3 + 0.75 * 4)
        output.backward(torch.full_like(output, 16.0))
        assert feature.grad[0, 0, 1:3, 1:3].tolist() == [[3, 9], [1, 3]]
        assert feature.grad.sum() == 16

    def test_ties_go_to_the_first_sample_row_by_row(self, device):
        # Samples at rows and columns 1 and 3, all of one value.
        feature = torch.full((1, 1, 5, 5), 2.0, device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, torch.tensor([[0.0, 0, 0, 4, 4]]).to(device), 1, 1.0, 2, mode="max")
        output.backward(torch.ones_like(output))
        assert feature.grad.nonzero()[:, 2:].tolist() == [[1, 1]]

    @pytest.mark.parametrize("values, expected", [((-5.0,) * 4, 0.0), ((5.0,) * 4, 5.0)])
    def test_samples_outside_count_as_zero(self, values, expected, device):
        # Columns -4 and 2 of the two samples: the first is outside and wins over what is negative, with no gradient.
        feature = row_of(*values).to(device).requires_grad_()
        output = roialign_ext.roi_align(feature, torch.tensor([[0.0, -7, 0, 5, 1]]).to(device), 1, 1.0, 2, mode="max")
        assert output.item() == expected
        output.backward(torch.ones_like(output))
        assert feature.grad.flatten().tolist() == [0, 0, float(expected > 0), 0]

    @pytest.mark.parametrize(
        "box", [(0, -1e6, 0, 1e6, 1), (0, -1e6, -1e6, 1e6, 1e6), (0, 0, 0, 1e6, 1), (0, -1e6, 0, 5, 1)]
    )
    def test_samples_far_outside_count_as_zero_too(self, box, device):
        feature = row_of(-5, -4, -3, -2, -1).to(device).requires_grad_()
        output = roialign_ext.roi_align(feature, torch.tensor([box]).to(device), 1, 1.0, -1, mode="max")
        assert output.item() == 0
        output.backward(torch.ones_like(output))
        assert not feature.grad.any()

    def test_bins_far_outside_are_zero(self, device):
        # Of the second bin no sample is near the map.
        feature = row_of(-5, -4, -3, -2, -1).to(device)
        boxes = torch.tensor([[0.0, 0, 0, 1e6, 1]]).to(device)
        assert roialign_ext.roi_align(feature, boxes, (1, 2), 1.0, -1, mode="max").flatten().tolist() == [0, 0]

    def test_all_samples_may_be_minus_infinity(self, device):
        feature = torch.full((1, 1, 5, 5), -INF, device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, torch.tensor([[0.0, 0, 0, 4, 4]]).to(device), 1, 1.0, 2, mode="max")
        assert output.item() == -INF
        output.backward(torch.ones_like(output))
        assert feature.grad.nonzero()[:, 2:].tolist() == [[1, 1]]

    def test_nan_wins_as_in_torch_max_and_stays_with_its_bins(self, device):
        # Bins read columns 1 and 3, 5 and 7.
        for values, winner in (((9, 0, 9, NAN, 9, 1, 9, 2, 9), 3), ((9, NAN, 9, NAN, 9, 1, 9, INF, 9), 1)):
            feature = row_of(*values).to(device).requires_grad_()
            box = torch.tensor([[0.0, 0, 0, 8, 1]]).to(device)
            output = roialign_ext.roi_align(feature, box, (1, 2), 1.0, 2, mode="max")
            assert output[0, 0, 0, 0].isnan() and output[0, 0, 0, 1] == values[7]
            output.backward(torch.ones_like(output))
            assert feature.grad.flatten().nonzero().flatten().tolist() == [winner, 7]

    def test_rows_of_padding_are_zero_and_pass_nothing_back(self, device):
        feature = torch.rand(1, 3, 16, 20, device=device, requires_grad=True)
        boxes = torch.tensor([[-1.0, 8, 8, 40, 36], [0, NAN, 8, 40, 36], [0, 8, 8, 40, INF]], device=device)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2, mode="max")
        assert not output.any()
        output.backward(torch.full_like(output, NAN))
        assert not feature.grad.any()

    def test_an_unknown_mode_raises(self, device):
        with pytest.raises(ValueError, match=r'roi_align: `mode` must be "avg" or "max", got \'median\''):
            roialign_ext.roi_align(torch.rand(1, 3, 8, 8), torch.zeros(1, 5), 3, mode="median")


class TestLayout:
    """Oracle: the layout of the map itself."""

    @LAYOUT
    def test_output_and_gradients_lie_in_memory_as_the_maps_do(self, layout, device):
        features = leaves(CASE["levels-3"], torch.float32, layout, device)
        output = oracles.pool(CASE["levels-3"], features, mode="max")
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        for tensor in (output, *torch.autograd.grad(output, features, torch.ones_like(output))):
            assert tensor.is_contiguous(memory_format=memory_format)

    def test_every_level_gets_a_gradient(self, device):
        features = leaves(CASE["levels-of-which-one-is-empty"], torch.float32, "contiguous", device)
        output = oracles.pool(CASE["levels-of-which-one-is-empty"], features, mode="max")
        found = torch.autograd.grad(output, features, torch.ones_like(output))
        assert {bool(gradient.any()) for gradient in found} == {True, False}
        empty = torch.zeros(0, 5, device=device)
        output = roialign_ext.multiscale_roi_align(features[:2], empty, 7, [0.25, 0.125], mode="max")
        assert all(not g.any() for g in torch.autograd.grad(output, features[:2], torch.ones_like(output)))


class TestSecondDerivatives:
    """Given the winners max pooling is linear."""

    @LAYOUT
    @DTYPE
    @pytest.mark.parametrize("name", ["levels-3", "images-uneven", "padding"])
    def test_double_backward_reads_the_direction_at_the_winners(self, name, dtype, layout, device):
        """Oracle: with the features themselves as the direction, the values."""
        case = CASE[name]
        features = leaves(case, dtype, layout, device)
        weight = oracles.cotangent(case, dtype).to(device).requires_grad_()
        output = oracles.pool(case, features, mode="max")
        found = torch.autograd.grad(output, features, weight, create_graph=True)
        (second,) = torch.autograd.grad(found, weight, [feature.detach() for feature in features])
        oracles.assert_within(second, *oracles.max_values(case, dtype), VALUES[dtype])

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("ratio", [2, -1], ids=["fixed", "adaptive"])
    def test_by_differences(self, ratio, memory_format, device):
        """Oracle: gradcheck and gradgradcheck in float64."""
        boxes = torch.tensor([[0, 1.3, 2.2, 9.1, 7.7], [1, -3.3, -4.2, 20.1, 18.7], [-1, 0, 0, 5, 5]]).double()

        def call(fine, coarse):
            return roialign_ext.multiscale_roi_align(
                [fine, coarse],
                boxes.to(device),
                (2, 3),
                [0.5, 0.25],
                ratio,
                mode="max",
                canonical_scale=6,
                canonical_level=2,
            )

        shapes = ((2, 2, 6, 7), (2, 2, 3, 4))
        maps = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        maps = [feature.contiguous(memory_format=memory_format).requires_grad_() for feature in maps]
        assert torch.autograd.gradcheck(call, maps, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, maps, fast_mode=True)


class TestRepeatable:
    """Bit for bit; the values themselves are tested above."""

    @staticmethod
    def run(name: str, layout: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        features = leaves(CASE[name], dtype, layout, device)
        output = oracles.pool(CASE[name], features, mode="max")
        weight = oracles.cotangent(CASE[name], dtype).to(device)
        return [output.detach(), *torch.autograd.grad(output, features, weight)]

    @LAYOUT
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("name", ["many-boxes", "channels-257", "images-uneven"])
    def test_from_run_to_run_and_for_any_number_of_threads(self, name, dtype, layout, device_name, device, threads):
        results = []
        for count in (1, 2, 7):
            if device_name == "cpu":
                threads(count)
            results.append(self.run(name, layout, dtype, device))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_max_is_never_below_the_average(device):
    """Oracle: the mean of numbers is at most the greatest; the two are other kernels."""
    case = CASE["levels-4"]
    features = [f.to(device) for f in case.features(torch.float64)]
    difference = oracles.pool(case, features, mode="max") - oracles.pool(case, features)
    assert difference.min() >= -1e-14 and difference.max() > 0.1


def test_the_reference_is_the_definition_spelled_out():
    """Oracle: mmcv's loop in Python: bilinear interpolation sample by sample, the first greatest kept."""
    feature = torch.randn(2, 6, 7, dtype=torch.float64)
    x1, y1, x2, y2 = -3.3, 0.4, 8.9, 7.2

    def at(plane: Tensor, y: float, x: float) -> float:
        if y < -1 or y > 6 or x < -1 or x > 7:
            return 0.0
        y, x = min(max(y, 0), 5), min(max(x, 0), 6)
        top, left = int(y), int(x)
        below, right, dy, dx = min(top + 1, 5), min(left + 1, 6), y - top, x - left
        upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
        lower = plane[below, left] * (1 - dx) + plane[below, right] * dx
        return float(upper * (1 - dy) + lower * dy)

    boxes = torch.tensor([[0, x1, y1, x2, y2]], dtype=torch.float64)
    found = reference.multiscale_roi_align([feature[None]], boxes, (2, 3), [1.0], 2, mode="max")
    for c in range(2):
        for p in range(2):
            for q in range(3):
                samples = [
                    at(feature[c], y1 + (y2 - y1) / 2 * (p + (i + 0.5) / 2), x1 + (x2 - x1) / 3 * (q + (j + 0.5) / 2))
                    for i in range(2)
                    for j in range(2)
                ]
                assert found[0, c, p, q].item() == pytest.approx(max(samples), abs=1e-13)
