"""Gradients by the boxes: the float64 reference, differences, descent; second derivatives; what is kept for them."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import CASE, CASES, DTYPES, GRADIENTS, LAYOUTS, VALUES, Case, proposals
from torch import Tensor

import roialign_ext
from roialign_ext import autograd, reference

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
MODE = pytest.mark.parametrize("mode", ["avg", "max"])
# Here one sample lies an ulp above the last row and another is clamped to it: rounding chooses between two slopes.
TIED = ("map-wide", "map-tall", "levels-8")
# The reference takes seconds for these.
LONG = ("many-boxes", "many-boxes-on-one-map", "output-14x14", "output-3x33", "channels-257", "seventeen-samples")
FEW = ("levels-3", "images-uneven", "output-3x5", "channels-257", "across-the-border-adaptive-aligned", "padding")


def marked(cases: list[Case]) -> list:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name in LONG)) for c in cases]


def box_gradient(case: Case, dtype: torch.dtype, layout: str, device: torch.device, mode: str = "avg") -> Tensor:
    features = LAYOUTS[layout]([f.to(device) for f in oracles.distinct_features(case, dtype, mode)])
    boxes = case.rows(oracles.coordinate_dtype(dtype)).to(device).requires_grad_()
    output = oracles.pool(case, features, boxes, mode)
    return torch.autograd.grad(output, boxes, oracles.cotangent(case, dtype).to(device))[0]


class TestAgainstTheFloat64Reference:
    """Autograd through reference.py in float64, for a random cotangent."""

    @staticmethod
    def check(case: Case, dtype: torch.dtype, layout: str, device: torch.device, mode: str) -> None:
        found = box_gradient(case, dtype, layout, device, mode)
        assert found.dtype == oracles.coordinate_dtype(dtype) and not found[:, 0].any()
        # The sums and the result are as precise as the boxes, whatever the features are.
        oracles.assert_within(found, *oracles.box_gradients(case, dtype, mode), GRADIENTS[found.dtype])

    @pytest.mark.parametrize(
        "dtype, layout",
        [
            ("float32", "contiguous"),
            ("float32", "channels_last"),
            pytest.param("float64", "contiguous", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("case", marked(CASES))
    def test_average(self, case: Case, dtype, layout, device):
        self.check(case, DTYPES[dtype], layout, device, "avg")

    @LAYOUT
    @pytest.mark.parametrize("case", marked([case for case in CASES if case.name not in TIED]))
    def test_max(self, case: Case, layout, device):
        self.check(case, torch.float64, layout, device, "max")

    @pytest.mark.parametrize("layout", LAYOUTS)
    @DTYPE
    @pytest.mark.parametrize("name", FEW[:3])
    def test_any_dtype_and_layout(self, name, dtype, layout, device):
        if layout != "expanded":  # one channel seen as many is another input
            self.check(CASE[name], dtype, layout, device, "avg")
            self.check(CASE[name], dtype, layout, device, "max")


class TestByEye:
    def test_on_a_ramp_the_gradient_is_its_slope(self, device):
        # Columns count 0, 1, 2 ...: one bin, one sample, in the middle of the box; either edge moves it by a half,
        # times a quarter of a cell for each pixel, and the cotangent is 8.
        ramp = torch.arange(16.0).expand(1, 1, 16, 16).to(device)
        boxes = torch.tensor([[0.0, 8, 8, 24, 24]]).to(device).requires_grad_()
        output = roialign_ext.roi_align(ramp, boxes, 1, 0.25, 1)
        (found,) = torch.autograd.grad(output, boxes, torch.full_like(output, 8.0))
        assert found.tolist() == [[0, 1, 0, 1, 0]]

    def test_a_box_smaller_than_a_cell_moves_with_its_corner(self, device):
        ramp = torch.arange(16.0).expand(1, 1, 16, 16).to(device)
        boxes = torch.tensor([[0.0, 8.5, 8.5, 9.5, 9.5]]).to(device).requires_grad_()
        output = roialign_ext.roi_align(ramp, boxes, 1, 0.25, 1)
        (found,) = torch.autograd.grad(output, boxes, torch.full_like(output, 8.0))
        assert found.tolist() == [[0, 2, 0, 0, 0]]

    def test_clamped_samples_and_samples_outside_have_no_derivative(self, device):
        ramp = torch.arange(16.0).expand(1, 1, 16, 16).to(device)
        # Middles at -0.5 (clamped to column 0), 15.5 (to column 15), -1.5 and 17 (outside).
        boxes = torch.tensor([[0.0, x - 1, 4, x + 1, 6] for x in (-0.5, 15.5, -1.5, 17.0)]).to(device)
        boxes.requires_grad_()
        output = roialign_ext.roi_align(ramp, boxes, 1, 1.0, 1)
        assert output.flatten().tolist() == [0, 15, 0, 0]
        (found,) = torch.autograd.grad(output, boxes, torch.ones_like(output))
        assert not found.any()

    @MODE
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
    def test_rows_of_zeros_get_no_gradient(self, row, mode, device):
        feature = torch.randn(1, 3, 16, 20, device=device)
        boxes = torch.tensor([row, (0, 8, 8, 40, 36)], dtype=torch.float32, device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2, mode=mode)
        weight = torch.ones_like(output)
        weight[0] = math.nan
        (found,) = torch.autograd.grad(output, boxes, weight)
        assert not found[0].any() and found[1, 1:].all()

    @pytest.mark.parametrize("ratio", [2, 9], ids=["few-samples", "many-samples"])
    def test_nan_times_the_slope_of_a_clamped_sample_is_nan(self, ratio, device):
        # Samples of the first box are clamped to the corner of the map, so that their slopes are 0.
        feature = torch.randn(1, 17, 8, 9, device=device)
        boxes = torch.tensor([[0, -0.4, -0.4, 0.4, 0.4], [0, 1, 1, 5, 5]], device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, boxes, 2, 1.0, ratio, aligned=True, mode="max")
        weight = torch.ones_like(output)
        weight[0, 3, 1, 1] = math.nan
        (found,) = torch.autograd.grad(output, boxes, weight)
        assert found[0, 1:].isnan().all() and not found[1].isnan().any()

    @pytest.mark.parametrize("device_name", ["emulated", "cuda"], indirect=True)
    @MODE
    def test_rows_that_name_no_image_get_no_gradient(self, mode, device):
        feature = torch.randn(2, 3, 16, 20, device=device)
        boxes = torch.tensor([[2.0, 8, 8, 40, 36], [-3, 8, 8, 40, 36]], device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2, mode=mode)
        assert output.isnan().all()
        (found,) = torch.autograd.grad(output, boxes, torch.ones_like(output))
        assert not found.any()


class TestThroughEveryDoor:
    """Oracle: the gradient of the rows `(K, 5)`, which is tested above."""

    @staticmethod
    def rows(device) -> Tensor:
        rows = torch.tensor(proposals(12, 128, 160, images=2, seed=4, median=40.0), dtype=torch.float32)
        return rows[rows[:, 0].argsort(stable=True)].to(device)

    @staticmethod
    def maps(device) -> dict[str, Tensor]:
        return {str(k): torch.randn(2, 4, 32 >> k, 40 >> k).to(device) for k in range(3)}

    def check(self, device, pool, expected) -> None:
        rows, maps = self.rows(device), self.maps(device)
        boxes = [rows[rows[:, 0] == image, 1:].clone().requires_grad_() for image in range(2)]
        rows.requires_grad_()
        weight = torch.randn(len(rows), 4, 3, 3).to(device)
        found = torch.autograd.grad(pool(maps, boxes), boxes, weight)
        (exact,) = torch.autograd.grad(expected(maps, rows), rows, weight)
        assert exact.any() and torch.equal(torch.cat(found), exact[:, 1:])

    def test_lists_of_boxes(self, device):
        scales = [1 / 4, 1 / 8, 1 / 16]

        def pool(maps, boxes):
            return roialign_ext.multiscale_roi_align(list(maps.values()), boxes, 3, scales)

        self.check(device, pool, pool)

    def test_roi_align_and_its_module(self, device):
        self.check(
            device,
            lambda maps, boxes: roialign_ext.RoIAlign(3, 0.25, 2, aligned=True)(maps["0"], boxes),
            lambda maps, rows: roialign_ext.roi_align(maps["0"], rows, 3, 0.25, 2, True),
        )

    def test_the_multiscale_module(self, device):
        self.check(
            device,
            lambda maps, boxes: roialign_ext.MultiScaleRoIAlign(list("012"), 3, 2)(maps, boxes, [(128, 160)] * 2),
            lambda maps, rows: roialign_ext.multiscale_roi_align(
                list(maps.values()), rows, 3, [1 / 4, 1 / 8, 1 / 16], 2
            ),
        )

    @MODE
    @pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_the_gradient_has_the_dtype_of_the_boxes(self, box_dtype, mode, device):
        """Oracle: the gradient of the same boxes as float64."""
        feature = torch.randn(1, 3, 16, 20, device=device)
        rows = torch.tensor([[0.0, 8, 8.25, 40, 36]], dtype=torch.float64, device=device)
        found = []
        for dtype in (box_dtype, torch.float64):
            boxes = rows.to(dtype).requires_grad_()
            output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2, mode=mode)
            found += torch.autograd.grad(output, boxes, torch.ones_like(output))
        assert found[0].dtype == box_dtype
        torch.testing.assert_close(
            found[0].double(), found[1], rtol=2.0**-7 if box_dtype.itemsize == 2 else 1e-4, atol=1e-3
        )

    def test_boxes_alone_and_features_alone(self, device):
        """Oracle: the gradients when both are asked for."""
        case = CASE["levels-3"]
        weight = oracles.cotangent(case, torch.float32).to(device)

        def gradients(of_boxes: bool, of_features: bool) -> list[Tensor]:
            features = [f.to(device).requires_grad_(of_features) for f in case.features(torch.float32)]
            boxes = case.rows().to(device).requires_grad_(of_boxes)
            inputs = [boxes] * of_boxes + features * of_features
            return list(torch.autograd.grad(oracles.pool(case, features, boxes), inputs, weight))

        both = gradients(True, True)
        for found, expected in ((gradients(True, False), both[:1]), (gradients(False, True), both[1:])):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestByDifferences:
    """Oracle: gradcheck and gradgradcheck in float64, away from grid lines."""

    # In map 0 and in map 1, across the border, smaller than a cell, padding.
    BOXES = torch.tensor(
        [[0, 1.3, 2.2, 9.1, 7.7], [1, -3.3, -4.2, 20.1, 18.7], [1, 3.3, 4.2, 3.4, 4.25], [-1, 0, 0, 5, 5]]
    ).double()

    def inputs(self, device, memory_format) -> list[Tensor]:
        shapes = ((2, 2, 6, 7), (2, 2, 3, 4))
        maps = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        maps = [feature.contiguous(memory_format=memory_format).requires_grad_() for feature in maps]
        return [self.BOXES[:, 1:].clone().to(device).requires_grad_(), *maps]

    def pooled(self, device, ratio, aligned, mode="avg"):
        images = self.BOXES[:, :1].to(device)

        def call(corners, fine, coarse):
            return roialign_ext.multiscale_roi_align(
                [fine, coarse],
                torch.cat([images, corners], 1),
                (2, 3),
                [0.5, 0.25],
                ratio,
                aligned,
                mode=mode,
                canonical_scale=6,
                canonical_level=2,
            )

        return call

    @MODE
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("ratio", [2, -1], ids=["fixed", "adaptive"])
    @pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
    def test_first_derivative(self, ratio, aligned, memory_format, mode, device):
        assert torch.autograd.gradcheck(
            self.pooled(device, ratio, aligned, mode), self.inputs(device, memory_format), fast_mode=True
        )

    @pytest.mark.parametrize("ratio, aligned", [(2, False), (-1, True)], ids=["fixed-legacy", "adaptive-aligned"])
    def test_second_derivative(self, ratio, aligned, device):
        """Features twice, boxes twice and mixed."""
        inputs = self.inputs(device, torch.contiguous_format)
        assert torch.autograd.gradgradcheck(self.pooled(device, ratio, aligned), inputs, fast_mode=True)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_derivative_along_tangents(self, memory_format, device):
        corners, *maps = (x.detach() for x in self.inputs(device, memory_format))
        step = 1e-6 * torch.randn(corners.shape, dtype=torch.float64).to(device)
        for ratio, aligned in ((2, False), (-1, True)):
            call = self.pooled(device, ratio, aligned)
            images = self.BOXES[:, :1].to(device)
            pooling = autograd.Pooling([0.5, 0.5, 0.25, 0.25], ratio, aligned, 2, 6.0)
            found = autograd.roi_align_tangent(
                maps, torch.cat([images, corners], 1), torch.cat([images, step], 1), None, (2, 3), pooling
            )
            difference = (call(corners + step, *maps) - call(corners - step, *maps)) / 2
            torch.testing.assert_close(found / 1e-6, difference / 1e-6, rtol=1e-6, atol=1e-7)


class TestSecondDerivatives:
    """Oracle: the same through the float64 reference."""

    @LAYOUT
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_mixed(self, dtype, layout, device):
        case = CASE["levels-3"]
        weight, results = oracles.cotangent(case, dtype), []
        for pool, place, wide in ((oracles.pool_by_reference, "cpu", torch.float64), (oracles.pool, device, dtype)):
            features = LAYOUTS[layout]([f.to(place, wide) for f in case.features(dtype)])
            features = [f.detach().requires_grad_() for f in features]
            boxes = case.rows(oracles.coordinate_dtype(dtype)).to(place).requires_grad_()
            coordinates = [boxes.dtype] if pool is oracles.pool_by_reference else []
            output = pool(case, features, *coordinates, boxes)
            first = torch.autograd.grad(output, [boxes, *features], weight.to(place, wide), create_graph=True)
            penalty = sum((gradient.double() ** 2).sum() for gradient in first)
            results.append(torch.autograd.grad(penalty, [boxes, *features]))
        rtol = 1e-10 if dtype == torch.float64 else 1e-3
        for exact, found in zip(*results):
            scale = exact.abs().max().item()
            torch.testing.assert_close(found.cpu().double(), exact.double(), rtol=rtol, atol=rtol * scale)

    def test_third_derivatives_of_boxes_raise(self, device):
        feature = torch.randn(1, 2, 16, 20, device=device, dtype=torch.float64, requires_grad=True)
        boxes = torch.tensor([[0.0, 8.3, 8.4, 40.1, 36.7]], device=device, dtype=torch.float64, requires_grad=True)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2)
        (first,) = torch.autograd.grad((output**2).sum(), boxes, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), feature, create_graph=True)
        with pytest.raises(NotImplementedError, match="third derivatives"):
            second.sum().backward()

    def test_second_derivatives_of_boxes_raise_for_max(self, device):
        feature = torch.randn(1, 2, 16, 20, device=device, requires_grad=True)
        boxes = torch.tensor([[0.0, 8.3, 8.4, 40.1, 36.7]], device=device, requires_grad=True)
        output = roialign_ext.roi_align(feature, boxes, 3, 0.25, 2, mode="max")
        (first,) = torch.autograd.grad(output.sum(), boxes, create_graph=True)
        with pytest.raises(NotImplementedError, match='mode="max"'):
            (first**2).sum().backward()


class TestRepeatable:
    """Bit for bit; the values themselves are tested above."""

    MANY = ("many-boxes", "channels-257", "images-uneven")

    @MODE
    @LAYOUT
    @pytest.mark.parametrize("name", MANY)
    def test_from_run_to_run(self, name, layout, mode, device):
        first, *others = (box_gradient(CASE[name], torch.float32, layout, device, mode) for _ in range(3))
        assert all(torch.equal(first, other) for other in others)

    @MODE
    @LAYOUT
    @pytest.mark.parametrize("name", MANY)
    @pytest.mark.parametrize("device_name", ["cpu"], indirect=True)
    def test_for_any_number_of_threads(self, name, layout, mode, device, threads):
        results = []
        for count in (1, 2, 7):
            threads(count)
            results.append(box_gradient(CASE[name], torch.float32, layout, device, mode))
        assert all(torch.equal(results[0], other) for other in results[1:])


class TestWhatIsKept:
    """Oracle: the tensors that autograd is handed to keep."""

    @staticmethod
    def kept(features: list[Tensor], boxes: Tensor, mode: str) -> list[Tensor]:
        saved: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            roialign_ext.multiscale_roi_align(features, boxes, 7, [0.25, 0.125], 2, mode=mode)
        return saved

    @MODE
    def test_features_only_if_the_boxes_require_grad(self, mode, device):
        features = [torch.randn(1, 3, 16 >> k, 20 >> k, device=device, requires_grad=True) for k in range(2)]
        boxes = torch.tensor([[0.0, 8, 8, 40, 36]], device=device)
        maps = {feature.data_ptr() for feature in features}
        without = self.kept(features, boxes, mode)
        assert not maps & {tensor.data_ptr() for tensor in without}
        assert [tensor.dtype for tensor in without if tensor.dim() == 4] == [torch.int32] * (mode == "max")
        assert maps <= {tensor.data_ptr() for tensor in self.kept(features, boxes.requires_grad_(), mode)}


@MODE
def test_a_box_moves_onto_a_target(mode, device):
    """Oracle: by eye: a bump in the middle of rows 20..36 and columns 28..52 is what the box is to cover."""
    y, x = torch.arange(64.0)[:, None], torch.arange(80.0)[None]
    bump = torch.stack([(y - 28) / 8 + 0 * x, (x - 40) / 12 + 0 * y])[None].to(device)
    # In the target the maps read -1 .. 1 from edge to edge: that is what the corners of the pooled bins are to be.
    target = roialign_ext.roi_align(bump, torch.tensor([[0.0, 28, 20, 52, 36]]).to(device), 4, 1.0, 2, mode=mode)
    corners = torch.tensor([[10.0, 8, 30, 60]], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([corners], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (roialign_ext.roi_align(bump, [corners], 4, 1.0, 2, mode=mode) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert (corners.detach().cpu() - torch.tensor([[28.0, 20, 52, 36]])).abs().max() < 0.5


def test_reference_tangents_are_not_needed_for_first_derivatives(device, monkeypatch):
    """The slow plain-PyTorch formulation runs for second derivatives alone."""
    monkeypatch.setattr(reference, "gradients_of_tangent", None)
    case = CASE["levels-3"]
    features = [f.to(device).requires_grad_() for f in case.features(torch.float32)]
    boxes = case.rows().to(device).requires_grad_()
    output = oracles.pool(case, features, boxes)
    weight = oracles.cotangent(case, torch.float32).to(device).requires_grad_()
    first = torch.autograd.grad(output, [boxes, *features], weight, create_graph=True)
    (second,) = torch.autograd.grad(first[1:], weight, case.features(torch.float32), retain_graph=True)
    oracles.assert_within(second, *oracles.values(case, torch.float32), VALUES[torch.float32])
