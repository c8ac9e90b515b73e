"""Gradients by the features: the float64 reference, torchvision, differences; repeatability and layout."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import CASE, CASES, DTYPES, FORMS, GRADIENTS, LAYOUTS, VALUES, Case, Tolerance, proposals
from torch import Tensor

import roialign_ext
from roialign_ext import reference

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def leaves(case: Case, dtype: torch.dtype, layout: str, device: torch.device) -> list[Tensor]:
    features = LAYOUTS[layout]([feature.to(device) for feature in case.features(dtype)])
    return [feature.detach().requires_grad_() for feature in features]


class TestAgainstTheFloat64Reference:
    """Autograd through reference.py in float64, for a random cotangent."""

    @pytest.mark.parametrize("dtype, layout", FORMS, ids=["-".join(form) for form in FORMS])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_gradients(self, case: Case, dtype, layout, device):
        dtype = DTYPES[dtype]
        inputs = leaves(case, dtype, layout, device)
        output = oracles.pool(case, inputs)
        found = torch.autograd.grad(output, inputs, oracles.cotangent(case, dtype).to(device))
        for level, (actual, exact, magnitude) in enumerate(zip(found, *oracles.gradients(case, dtype))):
            assert actual.dtype == dtype, level
            oracles.assert_within(actual, exact, magnitude, GRADIENTS[dtype])

    @pytest.mark.parametrize("kind", ["channels_last", "sliced", "expanded", "transposed"])
    def test_cotangents_of_any_strides(self, kind, device):
        """Oracle: the float64 reference with the same cotangent as values."""
        case = CASE["levels-3"]
        weight = oracles.cotangent(case, torch.float32)
        if kind == "expanded":
            weight = weight[:, :1, :1, :1].expand(weight.shape)
            exact_leaves = [f.double().requires_grad_() for f in case.features(torch.float32)]
            output = reference.multiscale_roi_align(
                exact_leaves,
                case.rows(),
                case.output_size,
                case.scales,
                case.sampling_ratio,
                case.aligned,
                **case.options,
                coordinate_dtype=torch.float32,
            )
            exact = torch.autograd.grad(output, exact_leaves, weight.double(), retain_graph=True)
            magnitude = torch.autograd.grad(output, exact_leaves, weight.double().abs())
            weight = weight.to(device)
        else:
            exact, magnitude = oracles.gradients(case, torch.float32)
            (weight,) = LAYOUTS[kind]([weight.to(device)])
        inputs = leaves(case, torch.float32, "contiguous", device)
        found = torch.autograd.grad(oracles.pool(case, inputs), inputs, weight)
        for values in zip(found, exact, magnitude):
            oracles.assert_within(*values, GRADIENTS[torch.float32])

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @FLOATS
    def test_one_level_of_several_asks_for_a_gradient(self, dtype, layout, device):
        """Oracle: the float64 reference."""
        case = CASE["levels-3"]
        inputs = leaves(case, dtype, layout, device)
        inputs[0].requires_grad_(False)
        inputs[2].requires_grad_(False)
        output = oracles.pool(case, inputs)
        (found,) = torch.autograd.grad(output, inputs[1:2], oracles.cotangent(case, dtype).to(device))
        exact, magnitude = oracles.gradients(case, dtype)
        oracles.assert_within(found, exact[1], magnitude[1], GRADIENTS[dtype])
        assert inputs[0].grad is None and inputs[2].grad is None

    @FLOATS
    def test_gradients_accumulate_over_calls(self, dtype, device):
        """Oracle: the float64 reference; two calls on one map, one with a doubled cotangent, give three times it."""
        case = CASE["output-7x7"]
        inputs = leaves(case, dtype, "contiguous", device)
        weight = oracles.cotangent(case, dtype).to(device)
        oracles.pool(case, inputs).backward(weight)
        oracles.pool(case, inputs).backward(2 * weight)
        exact, magnitude = oracles.gradients(case, dtype)
        oracles.assert_within(inputs[0].grad, 3 * exact[0], 3 * magnitude[0], GRADIENTS[dtype])


class TestAgainstTorchvision:
    """Autograd through torchvision; both sides round, so the bound is twice ours."""

    @staticmethod
    def tolerance(dtype: torch.dtype) -> Tolerance:
        ours = GRADIENTS[dtype]
        return Tolerance(2 * ours.stored, 2 * ours.computed, 2 * ours.smallest)

    NAMES = (
        "ordinary-fixed-legacy",
        "ordinary-adaptive-aligned",
        "across-the-border-fixed-aligned",
        "across-the-border-adaptive-legacy",
        "outside-fixed-legacy",
        "samples-on-the-edge",
        "images-uneven",
        "many-boxes-on-one-map",
    )

    @FLOATS
    @pytest.mark.parametrize("name", NAMES)
    def test_roi_align(self, name, dtype, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        case = CASE[name]
        shared = (case.output_size, case.scales[0], case.sampling_ratio, case.aligned)
        (features,) = leaves(case, dtype, "contiguous", torch.device("cpu"))
        weight = oracles.cotangent(case, dtype)
        theirs = ops.roi_align(features, case.rows(dtype), *shared)
        (expected,) = torch.autograd.grad(theirs, features, weight, retain_graph=True)
        (magnitude,) = torch.autograd.grad(theirs, features, weight.abs())
        (ours,) = leaves(case, dtype, "contiguous", device)
        output = roialign_ext.roi_align(ours, case.rows(dtype).to(device), *shared)
        (found,) = torch.autograd.grad(output, ours, weight.to(device))
        oracles.assert_within(found, expected.double(), magnitude.double(), self.tolerance(dtype))

    @FLOATS
    def test_multiscale_module(self, dtype, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        height, width, images = 128, 160, 2
        rows = torch.tensor(proposals(80, height, width, images, seed=8, median=30.0), dtype=dtype)
        boxes = [rows[rows[:, 0] == image, 1:] for image in range(images)]
        maps = {str(k): torch.randn(images, 3, height >> k, width >> k, dtype=dtype) for k in range(4)}
        options = {"canonical_scale": 30, "canonical_level": 2}
        weight = torch.randn(80, 3, 7, 7, dtype=dtype)
        theirs = {name: value.clone().requires_grad_() for name, value in maps.items()}
        output = ops.MultiScaleRoIAlign(list(maps), 7, 2, **options)(theirs, boxes, [(height, width)] * images)
        expected = torch.autograd.grad(output, list(theirs.values()), weight, retain_graph=True)
        magnitude = torch.autograd.grad(output, list(theirs.values()), weight.abs())
        ours = {name: value.to(device).requires_grad_() for name, value in maps.items()}
        pooler = roialign_ext.MultiScaleRoIAlign(list(maps), 7, 2, **options)
        output = pooler(ours, [box.to(device) for box in boxes], [(height, width)] * images)
        found = torch.autograd.grad(output, list(ours.values()), weight.to(device))
        for actual, exact, bound in zip(found, expected, magnitude):
            oracles.assert_within(actual, exact.double(), bound.double(), self.tolerance(dtype))


class TestByDifferences:
    """Oracle: gradcheck and gradgradcheck in float64."""

    BOXES = torch.tensor(
        [[0, 1.3, 2.2, 9.1, 7.7], [1, -3.3, -4.2, 20.1, 18.7], [1, 3.3, 4.2, 3.4, 4.25], [-1, 0, 0, 5, 5]]
    ).double()

    def pooled(self, device, ratio, aligned):
        boxes = self.BOXES.to(device)

        def call(fine, coarse):
            return roialign_ext.multiscale_roi_align(
                [fine, coarse], boxes, (2, 3), [0.5, 0.25], ratio, aligned, canonical_scale=6, canonical_level=2
            )

        return call

    @staticmethod
    def maps(device, memory_format):
        shapes = ((2, 2, 6, 7), (2, 2, 3, 4))
        features = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        return [feature.contiguous(memory_format=memory_format).requires_grad_() for feature in features]

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("ratio", [2, -1], ids=["fixed", "adaptive"])
    @pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
    def test_first_derivative(self, ratio, aligned, memory_format, device):
        assert torch.autograd.gradcheck(self.pooled(device, ratio, aligned), self.maps(device, memory_format))

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("ratio", [2, -1], ids=["fixed", "adaptive"])
    def test_second_derivative(self, ratio, memory_format, device):
        assert torch.autograd.gradgradcheck(self.pooled(device, ratio, True), self.maps(device, memory_format))


class TestDoubleBackward:
    """The operation is linear: what the gradient passes back to its cotangent is the forward."""

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @DTYPE
    @pytest.mark.parametrize("name", ["levels-3", "padding", "not-finite-fixed-legacy", "images-uneven"])
    def test_equals_the_forward(self, name, dtype, layout, device):
        """Oracle: the float64 reference on the direction in place of the features."""
        case = CASE[name]
        inputs = leaves(case, dtype, layout, device)
        weight = oracles.cotangent(case, dtype).to(device).requires_grad_()
        found = torch.autograd.grad(oracles.pool(case, inputs), inputs, weight, create_graph=True)
        directions = LAYOUTS[layout]([feature.to(device) for feature in case.features(dtype)])
        (second,) = torch.autograd.grad(found, weight, directions)
        oracles.assert_within(second, *oracles.values(case, dtype), VALUES[dtype])

    def test_a_gradient_penalty_trains(self, device):
        """Oracle: the same penalty through the float64 reference."""
        case = CASE["ordinary-fixed-aligned"]
        shared = (case.rows(torch.float64), case.output_size, case.scales, case.sampling_ratio, case.aligned)
        weight = oracles.cotangent(case, torch.float64)
        results = []
        for pool, place in ((reference.multiscale_roi_align, "cpu"), (roialign_ext.multiscale_roi_align, device)):
            (feature,) = [f.to(place).requires_grad_() for f in case.features(torch.float64)]
            output = pool([feature], shared[0].to(place), *shared[1:])
            (first,) = torch.autograd.grad((output**2 * weight.to(place)).sum(), feature, create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), feature)
            results.append(second.cpu())
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


class TestEveryLevelGetsAGradient:
    """Data-parallel training waits for one from each parameter."""

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_also_a_level_on_which_no_box_falls(self, layout, device):
        """Oracle: by eye: one small box touches the finest level alone."""
        features = [torch.randn(2, 3, 32 >> k, 32 >> k, device=device) for k in range(4)]
        features = [feature.requires_grad_() for feature in LAYOUTS[layout](features)]
        boxes = torch.tensor([[1.0, 8, 8, 12, 12]], device=device)
        scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        output = roialign_ext.multiscale_roi_align(features, boxes, 2, scales, 2)
        output.backward(torch.rand(output.shape).to(device) + 1)
        for feature in features:
            assert feature.grad is not None and feature.grad.shape == feature.shape
        assert [bool(feature.grad.any()) for feature in features] == [True, False, False, False]
        assert not features[0].grad[0].any()

    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (0, 3, 8, 8), (2, 0, 8, 8)], ids=["maps", "images", "channels"])
    def test_also_where_there_is_nothing_to_pool(self, shape, device):
        """Oracle: by eye: zeros of the shape of each map."""
        features = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
        output = roialign_ext.multiscale_roi_align(features, torch.zeros(0, 5, device=device), 7, [0.25, 0.125])
        assert output.shape == (0, shape[1], 7, 7)
        output.backward(torch.randn(output.shape, device=device))
        for feature in features:
            assert feature.grad.shape == shape and not feature.grad.any()


class TestLayout:
    """Oracle: the layout of the map itself."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_gradients_lie_in_memory_as_the_maps_do(self, memory_format, dtype, device):
        case = CASE["levels-3"]
        features = [f.to(device).contiguous(memory_format=memory_format) for f in case.features(dtype)]
        features = [feature.requires_grad_() for feature in features]
        output = oracles.pool(case, features)
        for gradient in torch.autograd.grad(output, features, oracles.cotangent(case, dtype).to(device)):
            assert gradient.is_contiguous(memory_format=memory_format)


def run(case: Case, layout: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = leaves(case, dtype, layout, device)
    output = oracles.pool(case, inputs)
    weight = oracles.cotangent(case, dtype).to(device)
    return [output.detach(), *torch.autograd.grad(output, inputs, weight)]


class TestRepeatable:
    """Bit for bit; the values themselves are tested above."""

    MANY = ("many-boxes", "many-boxes-on-one-map", "channels-257", "images-uneven")

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @DTYPE
    @pytest.mark.parametrize("name", MANY)
    def test_from_run_to_run(self, name, dtype, layout, device):
        first, *others = (run(CASE[name], layout, dtype, device) for _ in range(4))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @DTYPE
    @pytest.mark.parametrize("name", MANY)
    def test_for_any_number_of_threads(self, name, dtype, layout, device_name, device, threads):
        if device_name != "cpu":
            pytest.skip("threads of the host take no part in the kernels of this device")
        results = []
        for count in (1, 2, 7):
            threads(count)
            results.append(run(CASE[name], layout, dtype, device))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_deterministic_algorithms_change_nothing_and_never_raise(self, layout, device, request):
        """Oracle: the bits without the switch."""
        case = CASE["many-boxes"]
        before = run(case, layout, torch.float32, device)
        request.getfixturevalue("deterministic_algorithms")
        after = run(case, layout, torch.float32, device)
        assert all(torch.equal(a, b) for a, b in zip(before, after))


class TestNoGradient:
    """Rows that pool nothing pass nothing back; oracle: by eye."""

    @pytest.mark.parametrize(
        "row",
        [
            (-1, 8, 8, 40, 36),
            (math.nan, 8, 8, 40, 36),
            (0, math.nan, 8, 40, 36),
            (0, 8, math.inf, 40, 36),
            (0, 100, 8, 140, 36),
        ],
        ids=["padding", "nan-image", "nan-corner", "infinite-corner", "outside"],
    )
    def test_rows_of_zeros(self, row, device):
        feature = torch.randn(1, 3, 16, 20, device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, torch.tensor([row], dtype=torch.float32, device=device), 3, 0.25, 2)
        assert not output.any()
        output.backward(torch.full(output.shape, math.nan, device=device))
        assert not feature.grad.any()

    def test_padding_levels(self, device):
        feature = torch.randn(1, 3, 16, 20, device=device, requires_grad=True)
        boxes = torch.tensor([[0.0, 8, 8, 40, 36]] * 2, device=device)
        levels = torch.tensor([-1, -1], device=device)
        output = roialign_ext.multiscale_roi_align([feature], boxes, 3, [0.25], 2, levels=levels)
        assert not output.any()
        output.backward(torch.full(output.shape, math.nan, device=device))
        assert not feature.grad.any()
