"""Values of the forward: answers by eye, the float64 reference, torchvision."""

from __future__ import annotations

import itertools
import math

import oracles
import pytest
import torch
from cases import CASE, CASES, DTYPES, FORMS, LAYOUTS, VALUES, Case, Tolerance, level_boundaries, proposals, ulps
from torch import Tensor

import roialign_ext
from roialign_ext import reference

ALIGNED = pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def ramp(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """10 * row + column: bilinear interpolation reads the coordinates themselves."""
    return (10.0 * torch.arange(height)[:, None] + torch.arange(width)).to(dtype)[None, None]


class TestByEye:
    """Answers that one can check by hand."""

    def test_a_bin_is_the_mean_of_its_samples(self, device):
        # Box of rows 1..5 and columns 2..6 in 2 x 2 bins: bin middles at rows 2, 4 and columns 3, 5.
        output = roialign_ext.roi_align(ramp(8, 8).to(device), torch.tensor([[0.0, 2, 1, 6, 5]]).to(device), 2, 1.0, 2)
        assert output.tolist() == [[[[23.0, 25.0], [43.0, 45.0]]]]

    def test_aligned_shifts_by_half_a_cell(self, device):
        box = torch.tensor([[0.0, 2, 1, 6, 5]]).to(device)
        output = roialign_ext.roi_align(ramp(8, 8).to(device), box, 2, 1.0, 2, True)
        assert output.tolist() == [[[[17.5, 19.5], [37.5, 39.5]]]]

    def test_scale_of_y_and_scale_of_x(self, device):
        box = torch.tensor([[0.0, 4, 10, 12, 50]]).to(device)  # rows 1..5, columns 2..6
        output = roialign_ext.multiscale_roi_align([ramp(8, 8).to(device)], box, (1, 1), [(0.1, 0.5)], 2)
        assert output.item() == pytest.approx(34.0, rel=1e-6)

    def test_sampling_ratio_places_the_samples(self, device):
        # One cell of the only row is 1, and the box covers columns 0..4 of it.
        features = torch.zeros(1, 1, 1, 8)
        features[..., 2] = 1.0
        box = torch.tensor([[0.0, 0, 0, 4, 1]])
        # Samples at 2; at 1 and 3; at 0.5, 1.5, 2.5 and 3.5, of which two read a half.
        answers = {1: 1.0, 2: 0.0, 4: 0.25}
        for ratio, answer in answers.items():
            output = roialign_ext.roi_align(features.to(device), box.to(device), 1, 1.0, ratio)
            assert output.item() == answer, ratio

    def test_adaptive_takes_one_sample_per_cell_rounded_up(self, device):
        features = torch.zeros(1, 1, 1, 8)
        features[..., 1] = 1.0
        # Three cells wide in one bin: ceil(3) = 3 samples at columns 0.5, 1.5, 2.5, which read 1/2, 1/2, 0.
        output = roialign_ext.roi_align(features.to(device), torch.tensor([[0.0, 0, 0, 3, 1]]).to(device), 1)
        assert output.item() == pytest.approx(1 / 3, rel=1e-6)

    def test_a_sample_at_minus_one_reads_the_border_and_one_beyond_reads_zero(self, device):
        features = torch.full((1, 1, 8, 8), 5.0)
        beyond = ulps(-1.0, -2)  # two, so that the middle of the box is exact
        boxes = [[0.0, 3, middle - 1, 5, middle + 1] for middle in (-1.0, beyond)]
        output = roialign_ext.roi_align(features.to(device), torch.tensor(boxes).to(device), 1, 1.0, 1)
        assert output.flatten().tolist() == [5.0, 0.0]

    def test_a_sample_at_height_reads_the_border_and_one_beyond_reads_zero(self, device):
        features = torch.full((1, 1, 8, 8), 5.0)
        boxes = [[0.0, 3, middle - 1, 5, middle + 1] for middle in (8.0, ulps(8.0, 2))]
        output = roialign_ext.roi_align(features.to(device), torch.tensor(boxes).to(device), 1, 1.0, 1)
        assert output.flatten().tolist() == [5.0, 0.0]

    def test_samples_outside_count_in_the_mean(self, device):
        # Rows -8..8 in one bin with four samples, at -6, -2, 2, 6: two of four are on the map.
        features = torch.full((1, 1, 8, 8), 5.0)
        output = roialign_ext.roi_align(features.to(device), torch.tensor([[0.0, 2, -8, 4, 8]]).to(device), 1, 1.0, 4)
        assert output.item() == 2.5

    def test_a_constant_map_gives_its_constant(self, device):
        features = [torch.full((1, 3, size, size), 7.0).to(device) for size in (64, 32, 16)]
        boxes = torch.tensor(proposals(50, 60, 60, seed=1, median=20.0)).to(device)
        output = roialign_ext.multiscale_roi_align(
            features, boxes, 7, [1.0, 0.5, 0.25], canonical_scale=20, canonical_level=1
        )
        assert (output - 7.0).abs().max() <= 7.0 * VALUES[torch.float32].computed

    def test_each_level_is_read_by_the_boxes_of_its_size(self, device):
        features = [
            torch.full((1, 1, 512 // stride, 512 // stride), float(stride)).to(device) for stride in (4, 8, 16, 32)
        ]
        boxes = torch.tensor([[0.0, 0, 0, side, side] for side in (20, 111, 112, 223, 224, 447, 448, 500)]).to(device)
        output = roialign_ext.multiscale_roi_align(features, boxes, 1, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 2)
        assert output.flatten().tolist() == [4, 4, 8, 8, 16, 16, 32, 32]

    def test_each_image_is_read_by_its_boxes(self, device):
        features = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 1, 8, 8).to(device)
        boxes = [torch.tensor([[1.0, 1, 5, 5]]).repeat(count, 1).to(device) for count in (2, 0, 1)]
        output = roialign_ext.roi_align(features, boxes, 1, 1.0, 2)
        assert output.flatten().tolist() == [1.0, 1.0, 3.0]

    def test_given_levels_override_the_rule(self, device):
        features = [torch.full((1, 1, 8, 8), float(level)).to(device) for level in range(3)]
        boxes = torch.tensor([[0.0, 1, 1, 5, 5]] * 4).to(device)
        output = roialign_ext.multiscale_roi_align(
            features, boxes, 1, [1.0, 1.0, 1.0], 2, levels=torch.tensor([2, 0, -1, 1]).to(device)
        )
        assert output.flatten().tolist() == [2.0, 0.0, 0.0, 1.0]


class TestAgainstTheFloat64Reference:
    """Every case of the table against reference.py in float64."""

    @pytest.mark.parametrize("dtype, layout", FORMS, ids=["-".join(form) for form in FORMS])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_values(self, case: Case, dtype, layout, device):
        dtype = DTYPES[dtype]
        features = LAYOUTS[layout]([feature.to(device) for feature in case.features(dtype)])
        output = oracles.pool(case, features)
        assert output.dtype == dtype
        oracles.assert_within(output, *oracles.values(case, dtype, layout), VALUES[dtype])

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["levels-3", "output-7x7", "channels-257"])
    def test_output_is_channels_last_exactly_when_the_first_level_is(self, name, layout, device):
        case = CASE[name]
        features = LAYOUTS[layout]([feature.to(device) for feature in case.features(torch.float32)])
        channels_last = features[0].is_contiguous(memory_format=torch.channels_last)
        output = oracles.pool(case, features)
        expected = torch.channels_last if channels_last else torch.contiguous_format
        assert channels_last == (layout in ("channels_last", "mixed"))
        assert output.is_contiguous(memory_format=expected)

    @pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @DTYPE
    def test_boxes_of_any_dtype_go_with_features_of_any_dtype(self, dtype, box_dtype, device):
        case = CASE["levels-3"]
        features, boxes = case.features(dtype), case.rows(box_dtype)
        wide = torch.float64 in (dtype, box_dtype)
        shared = (case.output_size, case.scales, case.sampling_ratio, case.aligned)
        exact, magnitude = (
            reference.multiscale_roi_align(
                [change(f.double()) for f in features],
                boxes,
                *shared,
                **case.options,
                coordinate_dtype=torch.float64 if wide else torch.float32,
            )
            for change in (Tensor.clone, Tensor.abs)
        )
        output = roialign_ext.multiscale_roi_align(
            [f.to(device) for f in features], boxes.to(device), *shared, **case.options
        )
        assert output.dtype == dtype
        oracles.assert_within(output, exact, magnitude, VALUES[dtype])

    @pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
    def test_boxes_of_any_strides(self, kind, device):
        """Oracle: the float64 reference of the boxes as values."""
        case = CASE["levels-3"]
        rows = case.rows().to(device)
        if kind == "transposed":
            rows = rows.T.contiguous().T
        elif kind == "sliced":
            wide = torch.full((2 * len(rows), 7), math.nan, device=device)
            wide[::2, 1:6] = rows
            rows = wide[::2, 1:6]
        else:
            rows = rows[:1].expand(len(rows), 5)
        shared = (case.output_size, case.scales, case.sampling_ratio, case.aligned)
        features = case.features(torch.float32)
        exact, magnitude = (
            reference.multiscale_roi_align(
                [change(f.double()) for f in features],
                rows.cpu().contiguous(),
                *shared,
                **case.options,
                coordinate_dtype=torch.float32,
            )
            for change in (Tensor.clone, Tensor.abs)
        )
        output = roialign_ext.multiscale_roi_align([f.to(device) for f in features], rows, *shared, **case.options)
        oracles.assert_within(output, exact, magnitude, VALUES[torch.float32])

    @pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.int16, torch.uint8])
    def test_given_levels_of_any_integer_dtype(self, kind, device):
        """Oracle: the float64 reference of the same case."""
        case = CASE["levels-given"]
        levels = torch.tensor([2, 1, 0, 1, 2, 0, 0, 0, 1, 1])
        shared = (case.output_size, case.scales, case.sampling_ratio, case.aligned)
        features = case.features(torch.float32)
        exact, magnitude = (
            reference.multiscale_roi_align(
                [change(f.double()) for f in features],
                case.rows(),
                *shared,
                levels=levels,
                coordinate_dtype=torch.float32,
            )
            for change in (Tensor.clone, Tensor.abs)
        )
        output = roialign_ext.multiscale_roi_align(
            [f.to(device) for f in features], case.rows().to(device), *shared, levels=levels.to(kind).to(device)
        )
        oracles.assert_within(output, exact, magnitude, VALUES[torch.float32])

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_no_cell_beyond_the_reach_of_a_box_is_read(self, layout, device):
        """Oracle: the float64 reference on the map without the poison."""
        case = CASE["ordinary-fixed-legacy"]
        box = torch.tensor([[0.0, 20, 20, 44, 40]])  # rows 5..10, columns 5..11
        clean = case.features(torch.float32)[0]
        poisoned = torch.full_like(clean, math.nan)
        poisoned[:, :, 5:11, 5:12] = clean[:, :, 5:11, 5:12]
        (poisoned,) = LAYOUTS[layout]([poisoned.to(device)])
        exact, magnitude = (
            reference.multiscale_roi_align([f], box, (3, 3), [0.25], 2, coordinate_dtype=torch.float32)
            for f in (clean.double(), clean.double().abs())
        )
        output = roialign_ext.roi_align(poisoned, box.to(device), (3, 3), 0.25, 2)
        oracles.assert_within(output, exact, magnitude, VALUES[torch.float32])

    def test_a_nan_that_a_sample_reads_shows(self, device):
        """Oracle: by eye."""
        features = ramp(8, 8)
        features[..., 3, 3] = math.nan
        output = roialign_ext.roi_align(features.to(device), torch.tensor([[0.0, 2, 2, 6, 6]]).to(device), 2, 1.0, 2)
        assert output.isnan().flatten().tolist() == [True, False, False, False]

    @pytest.mark.parametrize("device_name", ["cpu", "cuda"], indirect=True)
    @pytest.mark.parametrize("channels", [9, 130], ids=["few-channels", "many-channels"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_many_boxes(self, layout, channels, device, threads):
        """Oracle: the same boxes a hundred at a time, bit for bit, on any number of threads."""
        features = [torch.randn(2, channels, 64 >> level, 96 >> level, device=device) for level in range(2)]
        features = LAYOUTS[layout](features)
        rows = torch.tensor(proposals(2345, 64, 96, images=2), device=device)

        def pooled(rows):
            return roialign_ext.multiscale_roi_align(features, rows, 3, [1.0, 0.5], 2)

        expected = torch.cat([pooled(few) for few in rows.split(100)])
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(pooled(rows), expected)

    def test_list_of_boxes(self, device):
        """Oracle: the float64 reference of the boxes as rows."""
        case = CASE["images-uneven"]
        rows = case.rows()
        boxes = [rows[rows[:, 0] == image, 1:] for image in range(case.images)]
        order = torch.cat([(rows[:, 0] == image).nonzero()[:, 0] for image in range(case.images)])
        features = case.features(torch.float32)
        output = roialign_ext.multiscale_roi_align(
            [f.to(device) for f in features],
            [box.to(device) for box in boxes],
            case.output_size,
            case.scales,
            case.sampling_ratio,
        )
        exact, magnitude = oracles.values(case, torch.float32)
        oracles.assert_within(output, exact[order], magnitude[order], VALUES[torch.float32])

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(20))
    @DTYPE
    def test_sweep_of_random_shapes(self, seed, dtype, device):
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        height, width, num_levels, images = draw(1, 90), draw(1, 90), draw(1, 4), draw(1, 3)
        median = float(draw(2, 60))
        boxes = [
            (image, x1 - draw(0, 20), y1 - draw(0, 20), x2 + draw(0, 20), y2 + draw(-9, 20))
            for image, x1, y1, x2, y2 in proposals(draw(1, 40), height, width, images, seed, median)
        ]
        case = Case(
            f"sweep-{seed}",
            torch.tensor(boxes).tolist(),
            **{
                "maps": tuple((max(height >> level, 1), max(width >> level, 1)) for level in range(num_levels)),
                "scales": tuple(0.5**level for level in range(num_levels)),
                "options": {"canonical_scale": median, "canonical_level": num_levels // 2},
            },
            images=images,
            channels=draw(1, 40),
            output_size=(draw(1, 15), draw(1, 15)),
            sampling_ratio=draw(-1, 4),
            aligned=bool(draw(0, 1)),
        )
        for layout in ("contiguous", "channels_last"):
            features = LAYOUTS[layout]([feature.to(device) for feature in case.features(dtype)])
            oracles.assert_within(oracles.pool(case, features), *oracles.values(case, dtype), VALUES[dtype])


class TestLevelRule:
    """assign_levels and LevelMapper."""

    BOUNDARIES = torch.tensor(level_boundaries([56, 112, 224, 448, 896]))[:, 1:]

    def test_by_eye(self, device):
        boxes = torch.tensor([[0.0, 0, side, side] for side in (0, 20, 112, 223.9, 224, 448, 896, 9000)]).to(device)
        levels = roialign_ext.assign_levels(boxes, 4)
        assert levels.dtype == torch.int64
        assert levels.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]

    def test_no_number_no_level(self, device):
        """Oracle: SEMANTICS: a coordinate or an area that is no number."""
        nan, inf = math.nan, math.inf
        boxes = [
            [nan, 0, 9, 9],
            [0, 0, inf, 9],
            [-inf, 0, 9, 9],
            [9, 0, 0, 9],
            [0, 9, 9, 0],
            [9, 9, 0, 0],
            [3, 3, 3, 9],
        ]
        levels = roialign_ext.assign_levels(torch.tensor(boxes).to(device), 4)
        assert levels.tolist() == [-1, -1, -1, -1, -1, 0, 0]

    @pytest.mark.parametrize("form", ["rows", "list"])
    def test_rows_and_lists(self, form, device):
        """Oracle: by eye."""
        boxes = torch.tensor([[0.0, 0, 224, 224], [0, 0, 112, 112], [0, 0, 448, 448]]).to(device)
        shaped = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1) if form == "rows" else [boxes[:1], boxes[1:]]
        assert roialign_ext.assign_levels(shaped, 4).tolist() == [2, 1, 3]

    @FLOATS
    def test_equals_torchvision_within_ulps_of_each_boundary(self, dtype, device):
        poolers = pytest.importorskip("torchvision.ops.poolers", reason="torchvision is not installed")
        boxes = self.BOUNDARIES.to(dtype)
        expected = poolers.LevelMapper(2, 5)([boxes])
        assert roialign_ext.assign_levels(boxes.to(device), 4).cpu().tolist() == expected.tolist()
        assert roialign_ext.LevelMapper(2, 5)([boxes.to(device)]).cpu().tolist() == expected.tolist()

    @FLOATS
    def test_equals_torchvision_on_every_ulp_around_a_boundary(self, dtype, device):
        poolers = pytest.importorskip("torchvision.ops.poolers", reason="torchvision is not installed")
        sides = [ulps(112.0, step) for step in range(-200, 50)] + [ulps(448.0, step) for step in range(-200, 50)]
        boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides], dtype=dtype)
        expected = poolers.LevelMapper(2, 5)([boxes])
        assert roialign_ext.assign_levels(boxes.to(device), 4).cpu().tolist() == expected.tolist()

    @pytest.mark.parametrize("options", [(2, 5), (3, 7), (0, 7), (2, 5, 100, 3), (1, 3, 56, 2, 1e-8)], ids=str)
    def test_equals_torchvision_on_proposals(self, options, device):
        poolers = pytest.importorskip("torchvision.ops.poolers", reason="torchvision is not installed")
        boxes = torch.tensor(proposals(1500, 800, 1344))[:, 1:]
        expected = poolers.LevelMapper(*options)([boxes[:700], boxes[700:]])
        levels = roialign_ext.LevelMapper(*options)([boxes[:700].to(device), boxes[700:].to(device)])
        assert levels.dtype == torch.int64
        assert levels.cpu().tolist() == expected.tolist()

    @FLOATS
    def test_equals_the_reference(self, dtype, device):
        boxes = torch.cat([self.BOUNDARIES, torch.tensor(proposals(500, 800, 1344, seed=4))[:, 1:]]).to(dtype)
        expected = reference.assign_levels(boxes, 5, 1, canonical_scale=200, canonical_level=3)
        levels = roialign_ext.assign_levels(boxes.to(device), 5, 1, canonical_scale=200, canonical_level=3)
        assert levels.cpu().tolist() == expected.tolist()

    def test_the_op_reads_the_level_that_the_rule_names(self, device):
        """Oracle: maps that hold the number of their level."""
        boxes = torch.cat([torch.zeros(len(self.BOUNDARIES), 1), self.BOUNDARIES], 1).to(device)
        features = [torch.full((1, 1, 8, 8), float(level)).to(device) for level in range(4)]
        scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        # The sample of the first of 8 x 8 bins is on the map of every level.
        corner = roialign_ext.multiscale_roi_align(features, boxes, 8, scales, 1)[:, 0, 0, 0]
        assert corner.round().long().cpu().tolist() == roialign_ext.assign_levels(boxes, 4).cpu().tolist()


class TestAgainstTorchvision:
    """Functions and modules as drop-ins, in float32 and float64; both sides round, so the bound is twice ours."""

    @staticmethod
    def tolerance(dtype: torch.dtype) -> Tolerance:
        ours = VALUES[dtype]
        return Tolerance(2 * ours.stored, 2 * ours.computed, 2 * ours.smallest)

    # torchvision crashes on what is not finite, reads out of bounds on padding, and allocates by the size of the box.
    ORDINARY = [
        case
        for case in CASES
        if len(case.maps) == 1
        and isinstance(case.scales[0], float)
        and not case.name.startswith(("not-finite", "padding", "huge", "inverted-adaptive"))
    ]

    @FLOATS
    @pytest.mark.parametrize("case", ORDINARY, ids=lambda case: case.name)
    def test_roi_align(self, case: Case, dtype, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        (features,) = case.features(dtype)
        shared = (case.output_size, case.scales[0], case.sampling_ratio, case.aligned)
        expected = ops.roi_align(features, case.rows(dtype), *shared).double()
        magnitude = ops.roi_align(features.abs(), case.rows(dtype), *shared).double()
        output = roialign_ext.roi_align(features.to(device), case.rows(dtype).to(device), *shared)
        oracles.assert_within(output, expected, magnitude, self.tolerance(dtype))

    @ALIGNED
    @FLOATS
    def test_module_roi_align(self, dtype, aligned, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        case = CASE["images-interleaved"]
        (features,), rows = case.features(dtype), case.rows(dtype)
        for boxes in (rows, [rows[rows[:, 0] == image, 1:] for image in range(case.images)]):
            theirs = ops.RoIAlign((5, 3), 0.25, 2, aligned)
            ours = roialign_ext.RoIAlign((5, 3), 0.25, 2, aligned)
            on_device = boxes.to(device) if isinstance(boxes, Tensor) else [box.to(device) for box in boxes]
            output = ours(features.to(device), on_device)
            expected, magnitude = theirs(features, boxes).double(), theirs(features.abs(), boxes).double()
            oracles.assert_within(output, expected, magnitude, self.tolerance(dtype))

    @pytest.mark.parametrize("sampling_ratio", [2, 0, -1], ids=["two", "zero", "adaptive"])
    @pytest.mark.parametrize("num_levels", [1, 2, 4, 5])
    @FLOATS
    def test_module_multiscale(self, dtype, num_levels, sampling_ratio, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        images, height, width = 2, 128, 160
        rows = torch.tensor(proposals(60, height, width, images, seed=7, median=30.0), dtype=dtype)
        boxes = [rows[rows[:, 0] == image, 1:] for image in range(images)]
        names = [str(level) for level in range(num_levels)]
        maps = {name: torch.randn(images, 3, height >> int(name), width >> int(name), dtype=dtype) for name in names}
        maps["pool"] = torch.randn(images, 3, 2, 2, dtype=dtype)
        options = {"canonical_scale": 30, "canonical_level": 2}
        theirs = ops.MultiScaleRoIAlign(names, (4, 3), sampling_ratio, **options)
        ours = roialign_ext.MultiScaleRoIAlign(names, (4, 3), sampling_ratio, **options)
        shapes = [(height, width - 20), (height - 30, width)]
        expected = theirs(maps, boxes, shapes).double()
        magnitude = theirs({name: value.abs() for name, value in maps.items()}, boxes, shapes).double()
        output = ours(
            {name: value.to(device) for name, value in maps.items()}, [box.to(device) for box in boxes], shapes
        )
        oracles.assert_within(output, expected, magnitude, self.tolerance(dtype))

    def test_output_size_forms(self, device):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        features, box = ramp(8, 9), torch.tensor([[0.0, 1, 2, 5, 7]])
        for size in (2, (2, 2), [3, 2], (1, 4)):
            expected = ops.roi_align(features, box, size)
            output = roialign_ext.roi_align(features.to(device), box.to(device), size)
            assert output.shape == expected.shape
            oracles.assert_within(output, expected.double(), expected.double().abs(), self.tolerance(torch.float32))


class TestReference:
    """reference.py itself, against a loop over samples in Python floats and against torchvision."""

    @staticmethod
    def by_loop(feature: Tensor, row: list[float], bins: tuple[int, int], scale, ratio: int, aligned: bool) -> Tensor:
        """SEMANTICS as written: four taps per sample, no separation, no merging."""
        (height, width), (num_y, num_x), offset = feature.shape[2:], bins, 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (value * scale - offset for value in row[1:])
        size_y, size_x = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1.0), max(x2 - x1, 1.0))
        samples_y = ratio if ratio > 0 else math.ceil(size_y / num_y)
        samples_x = ratio if ratio > 0 else math.ceil(size_x / num_x)
        output = feature.new_zeros((feature.shape[1], num_y, num_x))
        if samples_y <= 0 or samples_x <= 0:
            return output
        for p, q, i, j in itertools.product(range(num_y), range(num_x), range(samples_y), range(samples_x)):
            y = y1 + p * size_y / num_y + (i + 0.5) * (size_y / num_y) / samples_y
            x = x1 + q * size_x / num_x + (j + 0.5) * (size_x / num_x) / samples_x
            if y < -1 or y > height or x < -1 or x > width:
                continue
            y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
            top, left = math.floor(y), math.floor(x)
            bottom, right, dy, dx = min(top + 1, height - 1), min(left + 1, width - 1), y - top, x - left
            corners = feature[int(row[0]), :, [top, top, bottom, bottom], [left, right, left, right]]
            weights = feature.new_tensor([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx])
            output[:, p, q] += corners @ weights / (samples_y * samples_x)
        return output

    @pytest.mark.parametrize("ratio", [-1, 0, 1, 3])
    @ALIGNED
    def test_equals_a_loop_over_samples(self, ratio, aligned):
        boxes = torch.rand(8, 4, dtype=torch.float64) * 40 - 15
        boxes[2:, 2:] = boxes[2:, :2] + 30 * torch.rand(6, 2, dtype=torch.float64)
        rows = torch.cat([torch.tensor([0.0, 1.0] * 4)[:, None].double(), boxes], 1)
        features = torch.randn(2, 2, 5, 7, dtype=torch.float64)
        expected = torch.stack([self.by_loop(features, row, (2, 3), 0.3, ratio, aligned) for row in rows.tolist()])
        magnitude = torch.stack(
            [self.by_loop(features.abs(), row, (2, 3), 0.3, ratio, aligned) for row in rows.tolist()]
        )
        output = reference.multiscale_roi_align([features], rows, (2, 3), [0.3], ratio, aligned)
        oracles.assert_within(output, expected, magnitude, VALUES[torch.float64])

    @FLOATS
    @pytest.mark.parametrize("case", TestAgainstTorchvision.ORDINARY, ids=lambda case: case.name)
    def test_equals_torchvision(self, case: Case, dtype):
        ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
        exact, magnitude = oracles.values(case, dtype)
        (features,) = case.features(dtype)
        output = ops.roi_align(
            features, case.rows(dtype), case.output_size, case.scales[0], case.sampling_ratio, case.aligned
        )
        oracles.assert_within(output, exact, magnitude, VALUES[dtype])

    @FLOATS
    def test_levels_equal_torchvision(self, dtype):
        poolers = pytest.importorskip("torchvision.ops.poolers", reason="torchvision is not installed")
        boxes = TestLevelRule.BOUNDARIES.to(dtype)
        assert reference.assign_levels(boxes, 4).tolist() == poolers.LevelMapper(2, 5)([boxes]).tolist()

    @pytest.mark.parametrize("ratio", [2, -1])
    @ALIGNED
    def test_derivatives_by_features_and_boxes_equal_differences(self, ratio, aligned):
        """Oracle: gradcheck."""
        features = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
        boxes = torch.tensor([[1.3, 2.2, 9.1, 11.7], [-3.3, -4.2, 30.1, 21.7], [3.3, 4.2, 3.4, 4.25]]).double()
        boxes.requires_grad_()

        def pooled(features, boxes):
            rows = torch.cat([boxes.new_zeros(3, 1), boxes], 1)
            return reference.multiscale_roi_align([features], rows, (2, 3), [0.5], ratio, aligned)

        assert torch.autograd.gradcheck(pooled, (features, boxes))
