"""The operation inside PyTorch and torchvision: opcheck, torch.compile, autocast, modules, a detector."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import oracles
import pytest
import torch
from cases import CASE, GRADIENTS, VALUES, proposals
from torch import Tensor

import roialign_ext
from roialign_ext import autograd, reference


@pytest.fixture(params=["cpu", "cuda"])
def device_name(request) -> str:
    """PyTorch's machinery does not care which kernels run, and the emulated operators are not registered with it."""
    from conftest import require

    require(request.param)
    return request.param


@pytest.fixture
def device(device_name) -> torch.device:
    return torch.device(device_name)


def pyramid(device, channels=4, dtype=torch.float32, names="0123") -> OrderedDict[str, Tensor]:
    """Maps of an image of 128 x 160 pixels at strides 4 to 32."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, channels, 128 >> (level + 2), 160 >> (level + 2)) for level in range(len(names))]
    maps = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes)
    return OrderedDict(zip(names, maps))


def box_lists(device, dtype=torch.float32, count=40) -> list[Tensor]:
    rows = torch.tensor(proposals(count, 128, 160, images=2, seed=9, median=40.0), dtype=dtype)
    return [rows[rows[:, 0] == image, 1:].to(device) for image in range(2)]


class TestOperators:
    """Oracle: torch.library.opcheck, with real inputs."""

    NAMES = ("levels-3", "padding", "images-uneven", "levels-given", "no-boxes", "channels-257")

    @staticmethod
    def options(case):
        scales = [float(s) for scale in case.scales for s in (scale if isinstance(scale, tuple) else (scale, scale))]
        level, size = case.options.get("canonical_level", 4), float(case.options.get("canonical_scale", 224))
        return scales, case.sampling_ratio, case.aligned, level, size

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("name", NAMES)
    def test_forward(self, name, dtype, memory_format, device):
        case = CASE[name]
        features = [f.to(device).contiguous(memory_format=memory_format) for f in case.features(dtype)]
        levels = case.level_tensor()
        levels = None if levels is None else levels.to(device)
        arguments = (features, case.rows().to(device), levels, list(case.output_size), *self.options(case))
        torch.library.opcheck(torch.ops.roialign_ext.roi_align_forward.default, arguments)

    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("name", NAMES)
    def test_backward(self, name, dtype, channels_last, device):
        case = CASE[name]
        levels = case.level_tensor()
        levels = None if levels is None else levels.to(device)
        sizes = [size for shape in case.maps for size in shape]
        weight = oracles.cotangent(case, dtype).to(device)
        arguments = (weight, case.rows().to(device), levels, case.images, sizes, *self.options(case), channels_last)
        torch.library.opcheck(torch.ops.roialign_ext.roi_align_backward.default, arguments)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("name", NAMES[:-1])
    def test_boxes_and_max(self, name, dtype, memory_format, device):
        case, raw = CASE[name], torch.ops.roialign_ext
        features = [f.to(device).contiguous(memory_format=memory_format) for f in case.features(dtype)]
        levels = case.level_tensor()
        boxes, levels = case.rows().to(device), None if levels is None else levels.to(device)
        size, options = list(case.output_size), self.options(case)
        sizes, last = [n for shape in case.maps for n in shape], memory_format == torch.channels_last
        weight = oracles.cotangent(case, dtype).to(device)
        _, argmax = raw.roi_max_forward(features, boxes, levels, size, *options)
        for operator, arguments in (
            (raw.roi_align_backward_boxes, (weight, features, boxes, levels)),
            (raw.roi_align_tangent, (features, boxes, boxes, levels, size)),
            (raw.roi_max_forward, (features, boxes, levels, size)),
            (raw.roi_max_gather, (features, argmax, boxes, levels)),
            (raw.roi_max_backward_boxes, (weight, argmax, features, boxes, levels)),
        ):
            torch.library.opcheck(operator.default, (*arguments, *options))
        arguments = (weight, argmax, boxes, levels, case.images, sizes, *options, last)
        torch.library.opcheck(raw.roi_max_backward.default, arguments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
    def test_assign_levels(self, dtype, device):
        boxes = torch.tensor(proposals(20, 128, 160), dtype=dtype)[:, 1:].to(device)
        torch.library.opcheck(torch.ops.roialign_ext.assign_levels.default, (boxes, 4, 2, 4, 224.0, 1e-6))

    def test_public_functions_call_these_operators(self):
        assert autograd.operators is torch.ops.roialign_ext


class TestCompile:
    """torch.compile without graph breaks; oracle: the float64 reference."""

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_forward_and_backward(self, memory_format, device):
        case = CASE["levels-3"]
        rows = case.rows().to(device)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def call(features, rows):
            halves = [feature * 0.5 for feature in features]
            return 2 * roialign_ext.multiscale_roi_align(
                halves, rows, case.output_size, case.scales, case.sampling_ratio, case.aligned, **case.options
            )

        features = [f.to(device).contiguous(memory_format=memory_format) for f in case.features(torch.float32)]
        features = [feature.requires_grad_() for feature in features]
        output = call(features, rows)
        assert output.is_contiguous(memory_format=memory_format)
        oracles.assert_within(output, *oracles.values(case, torch.float32), VALUES[torch.float32])
        found = torch.autograd.grad(output, features, oracles.cotangent(case, torch.float32).to(device))
        for values in zip(found, *oracles.gradients(case, torch.float32)):
            oracles.assert_within(*values, GRADIENTS[torch.float32])

    def test_any_number_of_boxes_without_recompiling(self, device):
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        (feature,) = (f.to(device) for f in CASE["output-7x7"].features(torch.float32))
        rows = CASE["many-boxes-on-one-map"].rows()
        call = torch.compile(
            lambda x, boxes: roialign_ext.roi_align(x, boxes, 7, 0.25, 2), fullgraph=True, backend=backend, dynamic=True
        )
        for count in (11, 30, 100):  # no size of the map: PyTorch takes equal sizes for one variable
            exact, magnitude = (
                reference.multiscale_roi_align([f], rows[:count], 7, [0.25], 2, coordinate_dtype=torch.float32)
                for f in (feature.cpu().double(), feature.cpu().double().abs())
            )
            output = call(feature, rows[:count].to(device))
            oracles.assert_within(output, exact, magnitude, VALUES[torch.float32])
        assert len(compiled) == 1

    def test_modules_and_levels(self, device):
        maps, boxes = pyramid(device), box_lists(device)
        pooler = roialign_ext.MultiScaleRoIAlign(list(maps), 7, 2)
        compiled = torch.compile(pooler, fullgraph=True, backend="aot_eager")
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]).cpu()
        scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        exact, magnitude = (
            reference.multiscale_roi_align(
                [change(m.cpu().double()) for m in maps.values()], rows, 7, scales, 2, coordinate_dtype=torch.float32
            )
            for change in (Tensor.clone, Tensor.abs)
        )
        output = compiled(maps, boxes, [(128, 160)] * 2)
        oracles.assert_within(output, exact, magnitude, VALUES[torch.float32])
        levels = torch.compile(lambda b: roialign_ext.assign_levels(b, 4), fullgraph=True, backend="aot_eager")
        assert levels(rows[:, 1:].to(device)).tolist() == reference.assign_levels(rows[:, 1:], 4).tolist()

    def test_export(self, device):
        """Oracle: the float64 reference."""
        case = CASE["output-7x7"]

        class Model(torch.nn.Module):
            def forward(self, feature, rows):
                return roialign_ext.roi_align(feature, rows, 7, 0.25, 2)

        (feature,) = case.features(torch.float32)
        arguments = (feature.to(device), case.rows().to(device))
        output = torch.export.export(Model(), arguments).module()(*arguments)
        oracles.assert_within(output, *oracles.values(case, torch.float32), VALUES[torch.float32])


class TestAutocast:
    """Half features beside float32 boxes; oracle: the float64 reference of the halves."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_features_of_a_convolution(self, dtype, device):
        convolution = torch.nn.Conv2d(3, 4, 3, padding=1).to(device)
        image = torch.randn(1, 3, 32, 40, device=device)
        rows = torch.tensor([[0.0, 2, 2, 30, 25], [0, 10, 5, 18, 31]], device=device)
        with torch.autocast(device.type, dtype=dtype):
            feature = convolution(image)
            output = roialign_ext.roi_align(feature, rows, 5, 1.0, 2, True)
            output.float().backward(torch.randn(output.shape, device=device))
        assert feature.dtype == output.dtype == dtype
        assert convolution.weight.grad.dtype == torch.float32 and convolution.weight.grad.isfinite().all()
        exact, magnitude = (
            reference.multiscale_roi_align([f], rows.cpu(), 5, [1.0], 2, True, coordinate_dtype=torch.float32)
            for f in (feature.detach().cpu().double(), feature.detach().cpu().double().abs())
        )
        oracles.assert_within(output, exact, magnitude, VALUES[dtype])


class TestModules:
    """Modules hold options and no state."""

    MODULES = {
        "RoIAlign": lambda: roialign_ext.RoIAlign((7, 5), 0.25, 2, True),
        "MultiScaleRoIAlign": lambda: roialign_ext.MultiScaleRoIAlign(
            ["0", "1", "2", "3"], (7, 5), 2, canonical_scale=40, canonical_level=3
        ),
    }

    @staticmethod
    def call(module):
        maps, boxes = pyramid("cpu"), box_lists("cpu")
        if isinstance(module, roialign_ext.RoIAlign):
            return module(maps["0"], boxes)
        return module(maps, boxes, [(128, 160), (120, 130)])

    @pytest.mark.parametrize("name", MODULES)
    def test_copies_give_the_same_values(self, name):
        """Oracle: the module that was copied, whose values are tested in test_values.py."""
        module = self.MODULES[name]()
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        expected = self.call(module)
        for twin in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(saved, weights_only=False),
        ):
            assert torch.equal(self.call(twin), expected)

    @pytest.mark.parametrize("name", MODULES)
    def test_state_dict_is_empty(self, name):
        module = self.MODULES[name]()
        assert module.state_dict() == OrderedDict()
        assert list(module.parameters()) == []
        module.load_state_dict({}, strict=True)

    def test_repr_names_the_options(self):
        assert repr(self.MODULES["RoIAlign"]()) == (
            "RoIAlign(output_size=(7, 5), spatial_scale=0.25, sampling_ratio=2, aligned=True)"
        )
        pooler = roialign_ext.MultiScaleRoIAlign(["0", "1"], (7, 5), 2, canonical_level=3, spatial_scales=[0.5, 0.25])
        assert repr(pooler) == (
            "MultiScaleRoIAlign(featmap_names=['0', '1'], output_size=(7, 5), sampling_ratio=2, canonical_scale=224, "
            "canonical_level=3, aligned=False, spatial_scales=[0.5, 0.25])"
        )

    def test_level_mapper_pickles(self):
        """Oracle: torchvision's LevelMapper."""
        poolers = pytest.importorskip("torchvision.ops.poolers", reason="torchvision is not installed")
        boxes = box_lists("cpu")
        twin = pickle.loads(pickle.dumps(roialign_ext.LevelMapper(2, 5, 50, 3, 1e-8)))
        assert twin(boxes).tolist() == poolers.LevelMapper(2, 5, 50, 3, 1e-8)(boxes).tolist()


class TestMultiScaleRoIAlign:
    """What torchvision's module gets wrong or cannot do; oracle: the float64 reference with the scales spelled out."""

    SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)

    def expected(self, maps, boxes, scales=SCALES, **options):
        rows = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)]).cpu()
        return tuple(
            reference.multiscale_roi_align(
                [change(m.cpu().double()) for m in maps], rows, 7, scales, 2, coordinate_dtype=torch.float32, **options
            )
            for change in (Tensor.clone, Tensor.abs)
        )

    def test_maps_are_taken_by_name_whatever_the_order_of_the_dict(self, device):
        maps, boxes = pyramid(device), box_lists(device)
        shuffled = {"other": torch.zeros(1, device=device), **{name: maps[name] for name in "2031"}}
        output = roialign_ext.MultiScaleRoIAlign(list("0123"), 7, 2)(shuffled, boxes, [(128, 160)] * 2)
        oracles.assert_within(output, *self.expected(maps.values(), boxes), VALUES[torch.float32])

    def test_scales_of_one_call_do_not_stay_for_the_next(self, device):
        pooler = roialign_ext.MultiScaleRoIAlign(list("0123"), 7, 2)
        small = {name: torch.randn(1, 4, 16 >> int(name), 16 >> int(name), device=device) for name in "0123"}
        # An image of 33 x 33 pixels, padded to 64: the ratio of map to image is 0.48, which no power of two explains.
        pooler(small, [torch.tensor([[2.0, 2, 30, 30]], device=device)], [(33, 33)])
        maps, boxes = pyramid(device), box_lists(device)
        output = pooler(maps, boxes, [(128, 160)] * 2)
        oracles.assert_within(output, *self.expected(maps.values(), boxes), VALUES[torch.float32])

    def test_scales_are_inferred_from_both_axes(self, device):
        # Padded from 70 to 128 rows, so rows alone say 1/2; columns say 1/4.
        maps, boxes = pyramid(device), box_lists(device)
        output = roialign_ext.MultiScaleRoIAlign(list("0123"), 7, 2)(maps, boxes, [(45, 160), (40, 150)])
        oracles.assert_within(output, *self.expected(maps.values(), boxes), VALUES[torch.float32])

    def test_scales_can_be_given(self, device):
        maps, boxes = pyramid(device), box_lists(device)
        pooler = roialign_ext.MultiScaleRoIAlign(list("0123"), 7, 2, spatial_scales=self.SCALES, aligned=True)
        exact = self.expected(maps.values(), boxes, aligned=True)
        for shapes in ([(33, 33)] * 2, [(128, 160)] * 2, []):
            oracles.assert_within(pooler(maps, boxes, shapes), *exact, VALUES[torch.float32])

    def test_no_map_of_the_names(self, device):
        with pytest.raises((ValueError, KeyError), match="^.*MultiScaleRoIAlign: .* must .*, got "):
            roialign_ext.MultiScaleRoIAlign(["a"], 7, 2)(pyramid(device), box_lists(device), [(128, 160)] * 2)

    def test_no_image_shapes(self, device):
        with pytest.raises(ValueError, match="^MultiScaleRoIAlign: "):
            roialign_ext.MultiScaleRoIAlign(list("0123"), 7, 2)(pyramid(device), box_lists(device), [])


class TestDetector:
    """torchvision's Faster R-CNN with our pooler in the place of its own; oracle: the same model before."""

    @pytest.fixture
    def model(self, device):
        detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
        torch.manual_seed(0)
        return detection.fasterrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=5,
            min_size=128,
            max_size=160,
            box_score_thresh=0.0,
            rpn_post_nms_top_n_test=100,
            rpn_post_nms_top_n_train=100,
        ).to(device)

    @staticmethod
    def replace_pooler(model):
        theirs = model.roi_heads.box_roi_pool
        model.roi_heads.box_roi_pool = roialign_ext.MultiScaleRoIAlign(
            theirs.featmap_names, theirs.output_size, theirs.sampling_ratio
        )

    def test_pooled_features_and_detections_are_equal(self, model, device):
        images = [torch.rand(3, 120, 150, device=device), torch.rand(3, 128, 140, device=device)]
        model.eval()
        pooled = []
        model.roi_heads.box_roi_pool.register_forward_hook(lambda module, args, output: pooled.append(output))
        with torch.no_grad():
            before = model(images)
        self.replace_pooler(model)
        model.roi_heads.box_roi_pool.register_forward_hook(lambda module, args, output: pooled.append(output))
        with torch.no_grad():
            after = model(images)
        scale = pooled[0].abs().max()
        assert (pooled[0] - pooled[1]).abs().max() <= 4 * VALUES[torch.float32].computed * scale
        for old, new in zip(before, after):
            assert old["labels"].tolist() == new["labels"].tolist()
            torch.testing.assert_close(new["boxes"], old["boxes"], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(new["scores"], old["scores"], rtol=1e-4, atol=1e-5)

    def test_losses_and_gradients_are_equal(self, model, device):
        images = [torch.rand(3, 128, 160, device=device)]
        boxes = torch.tensor([[10.0, 10, 60, 70], [50, 40, 150, 120]], device=device)
        targets = [{"boxes": boxes, "labels": torch.tensor([1, 3], device=device)}]
        weight = model.roi_heads.box_head.fc6.weight
        body = model.backbone.fpn.inner_blocks[0][0].weight
        results = []
        for replaced in (False, True):
            if replaced:
                self.replace_pooler(model)
            model.train()
            torch.manual_seed(1)  # the sampler of proposals
            losses = model(images, targets)
            gradients = torch.autograd.grad(losses["loss_classifier"] + losses["loss_box_reg"], [weight, body])
            results.append((losses, gradients))
        (before, old), (after, new) = results
        assert before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
        for one, other in zip(new, old):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
