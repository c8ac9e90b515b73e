"""`accelerate`: models of other libraries compute the same before and after, and know what they cannot."""

from __future__ import annotations

import copy
import importlib
import io
import logging
from types import FunctionType, SimpleNamespace

import pytest
import torch
from detectors import problem, second_stage, torchvision_twin
from torch import nn

import roialign_ext
from roialign_ext import accelerate, detection

torchvision = pytest.importorskip("torchvision")
models = torchvision.models.detection
roi_align = torchvision.ops.roi_align
fused = importlib.import_module("roialign_ext.accelerate")  # the package has the function under this name

CLOSE = dict(rtol=1e-4, atol=1e-5)
SIZES = dict(min_size=64, max_size=96, rpn_post_nms_top_n_train=60, rpn_post_nms_top_n_test=40)
WITHOUT_POOLER = (
    "fcos_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
HEADS = dict(num_classes=3, box_detections_per_img=5, box_batch_size_per_image=16)


def detector(factory: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(models, factory)(weights=None, weights_backbone=None, **SIZES, **HEADS)
    if factory.endswith("_v2"):
        # Without trained statistics its normalised maps are a hundred times as large, and all is background.
        with torch.no_grad():
            for parameter in model.roi_heads.box_predictor.parameters():
                parameter *= 0.01
    return model


def photographs() -> tuple[list, list]:
    images = [torch.rand(3, 64, 90), torch.rand(3, 72, 64)]
    targets = []
    for _, height, width in (image.shape for image in images):
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, width - 3.0, height - 1.0]])
        points = torch.rand(2, 17, 2) * (boxes[:, None, 2:] - boxes[:, None, :2]) + boxes[:, None, :2]
        targets.append(
            dict(
                boxes=boxes,
                labels=torch.tensor([1, 2]),
                masks=(torch.rand(2, height, width) > 0.5).to(torch.uint8),
                keypoints=torch.cat([points, torch.ones(2, 17, 1)], dim=2),
            )
        )
    return images, targets


def gradients_of(losses: dict, module: nn.Module) -> dict:
    """The gradients of a mixture of losses by name of parameter."""
    leaves = dict(module.named_parameters())
    mixture = sum((1 + index) * loss for index, loss in enumerate(losses.values()))
    return dict(zip(leaves, torch.autograd.grad(mixture, list(leaves.values()))))


def assert_same_gradients(gradients: dict, expected: dict) -> None:
    """To rounding, which long sums leave in proportion to their largest gradient, also where the true one is zero."""
    for name, values in expected.items():
        atol = 1e-6 + 1e-4 * values.abs().max().item()
        torch.testing.assert_close(gradients[name], values, rtol=1e-4, atol=atol)


def losses_and_gradients(heads: nn.Module, inputs: tuple) -> tuple[dict, dict]:
    features, proposals, shapes, targets = inputs
    torch.manual_seed(5)
    _, losses = heads(features, list(proposals), shapes, targets)
    return losses, gradients_of(losses, heads)


class TestTorchvisionModels:
    """Oracle: the same model before."""

    @pytest.mark.parametrize(
        "factory",
        [
            "fasterrcnn_mobilenet_v3_large_fpn",
            "fasterrcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn",
            pytest.param("keypointrcnn_resnet50_fpn", marks=pytest.mark.slow),
            pytest.param("fasterrcnn_mobilenet_v3_large_320_fpn", marks=pytest.mark.slow),
            pytest.param("fasterrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
            pytest.param("maskrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
        ],
    )
    def test_outputs_and_losses_are_the_same(self, factory):
        before = detector(factory)
        model = copy.deepcopy(before)
        assert accelerate(model) is model
        assert type(model.roi_heads) is detection.RoIHeads
        assert list(model.state_dict()) == list(before.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]

        images, targets = photographs()
        if factory.endswith("_v2"):  # whose large maps magnify the roundings of float32
            images = [image.double() for image in images]
            model.double(), before.double()
        with torch.no_grad():
            result, expected = (x.eval()(images) for x in (model, before))
            assert all(len(detections["boxes"]) > 1 for detections in expected)
            assert all(
                len(values) == len(detections["boxes"]) for detections in result for values in detections.values()
            )
            torch.testing.assert_close(result, expected, **CLOSE)

        # In float64: in float32 a rounding moves some unit of a deep head across the bend of its ReLU.
        losses, gradients = [], []
        for x in (model, before):
            torch.manual_seed(1)
            losses.append(x.double().train()([image.double() for image in images], copy.deepcopy(targets)))
            gradients.append(gradients_of(losses[-1], x.roi_heads))
        assert list(losses[0]) == list(losses[1])
        torch.testing.assert_close(losses[0], losses[1], **CLOSE)
        assert_same_gradients(*gradients)

    def test_every_factory_function_is_one_of_these(self):
        """Oracle: torchvision's own list of detection models."""
        (mark,) = type(self).test_outputs_and_losses_are_the_same.pytestmark
        same = {getattr(factory, "values", (factory,))[0] for factory in mark.args[1]}
        assert same | set(WITHOUT_POOLER) == set(torchvision.models.list_models(models))

    @pytest.mark.parametrize("factory", WITHOUT_POOLER)
    def test_a_detector_without_a_pooler_is_an_error(self, factory):
        with torch.device("meta"):
            model = getattr(models, factory)(weights=None, weights_backbone=None)
        name = type(model).__name__
        with pytest.raises(
            ValueError, match=rf"accelerate: `model` must hold one of .*RoIHeads.*, got {name} with none"
        ):
            accelerate(model)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_all_options_of_the_second_stage_are_kept(self, training):
        options = dict(
            fg_iou_thresh=0.6,
            bg_iou_thresh=0.3,
            batch_size_per_image=12,
            positive_fraction=0.5,
            bbox_reg_weights=(4.0, 3.0, 2.0, 1.0),
            score_thresh=0.1,
            nms_thresh=0.4,
            detections_per_img=7,
        )
        before = torchvision_twin(second_stage(), **options).train(training)
        before.proposal_matcher.allow_low_quality_matches = True
        before.box_coder.bbox_xform_clip = 0.25
        before.box_roi_pool.canonical_scale = 60
        before.comment = "kept"
        heads = accelerate(copy.deepcopy(before))
        assert heads.training == training and heads.comment == "kept"
        inputs = problem((40, 30), (3, 5))
        if training:
            losses, gradients = zip(*(losses_and_gradients(x, inputs) for x in (heads, before)))
            torch.testing.assert_close(*losses, **CLOSE)
            assert_same_gradients(*gradients)
        else:
            result, expected = (x(*inputs[:3])[0] for x in (heads, before))
            assert sum(len(detections["boxes"]) for detections in expected) > 0
            torch.testing.assert_close(result, expected, **CLOSE)


def pyramid(strides=(4, 8, 16, 32), side=256, num_images=2, channels=3):
    return [torch.randn(num_images, channels, side // s, side // s, requires_grad=True) for s in strides]


def boxes_of_all_sizes(canonical: float, side: float = 256.0) -> torch.Tensor:
    """Squares next to every boundary between levels, and boxes without area or inverted along one axis."""
    boundary = canonical * 2.0 ** torch.arange(-4, 2)
    near = boundary.view(torch.int32)[:, None] + torch.arange(-10, 5, dtype=torch.int32)
    squares = near.view(torch.float32).flatten()[:, None].expand(-1, 2)
    low = torch.rand(60, 2) * side * 0.6
    boxes = torch.cat([low, low + torch.rand(60, 2) * side * 0.8], dim=1)
    odd = torch.tensor([[30.0, 30.0, 30.0, 30.0], [30.0, 30.0, 30.0, 90.0], [30.0, 50.0, 90.0, 20.0]])
    return torch.cat([torch.cat([torch.zeros_like(squares), squares], dim=1), boxes, odd])


def assert_same_pooling(pool, expected_pool, maps, *args):
    pooled, expected = pool(maps, *args), expected_pool(maps, *args)
    torch.testing.assert_close(pooled, expected)
    cotangent = torch.randn_like(expected)
    values, expected_values = (torch.autograd.grad(x, maps, cotangent, allow_unused=True) for x in (pooled, expected))
    for index, (x, gradient) in enumerate(zip(maps, expected_values)):
        gradient = torch.zeros_like(x) if gradient is None else gradient
        assert_same_gradients({index: values[index]}, {index: gradient})


def from_library(module: str):
    """A class with the path it has in a library that is not installed."""

    def rename(cls):
        cls.__module__ = module
        for value in vars(cls).values():
            if isinstance(value, FunctionType):
                value.__module__ = module
        return cls

    return rename


# detectron2: interface of its 0.6.


class SingleLevel(nn.Module):
    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=True):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input, rois):
        rois = rois.to(input.dtype)
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


@from_library("detectron2.layers.roi_align")
class ROIAlign(SingleLevel):
    def forward(self, input, rois):
        return super().forward(input, rois)


@from_library("detectron2.layers.roi_align_rotated")
class ROIAlignRotated(SingleLevel):
    pass


@from_library("detectron2.modeling.poolers")
class ROIPooler(nn.Module):
    def __init__(self, output_size, scales, sampling_ratio, pooler_type, canonical_box_size=224, canonical_level=4):
        super().__init__()
        self.output_size = (output_size, output_size)
        layer = ROIAlignRotated if pooler_type == "ROIAlignRotated" else ROIAlign
        aligned = pooler_type == "ROIAlignV2"
        self.level_poolers = nn.ModuleList(layer(self.output_size, s, sampling_ratio, aligned) for s in scales)
        self.min_level = int(-torch.tensor(scales[0]).log2())
        self.max_level = int(-torch.tensor(scales[-1]).log2())
        self.canonical_level = canonical_level
        self.canonical_box_size = canonical_box_size

    def forward(self, x, box_lists):
        images = [torch.full((len(boxes.tensor), 1), float(i)) for i, boxes in enumerate(box_lists)]
        boxes = torch.cat([boxes.tensor for boxes in box_lists])
        rois = torch.cat([torch.cat(images), boxes], dim=1)
        if len(self.level_poolers) == 1:
            return self.level_poolers[0](x[0], rois)
        size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        level = torch.floor(self.canonical_level + torch.log2(size / self.canonical_box_size + 1e-8))
        level = level.clamp(self.min_level, self.max_level)
        pooled = torch.zeros(len(rois), x[0].shape[1], *self.output_size, dtype=x[0].dtype)
        for index, pool in enumerate(self.level_poolers):
            rows = torch.where(level == self.min_level + index)[0]
            pooled = pooled.index_put((rows,), pool(x[index], rois[rows]))
        return pooled


def box_lists(*tensors):
    return [SimpleNamespace(tensor=tensor) for tensor in tensors]


class TestDetectron2:
    """Oracle: stand-ins that pool level by level with torchvision's roi_align."""

    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    @pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
    @pytest.mark.parametrize("strides", [(4, 8, 16, 32), (1, 2, 4, 8), (16,)], ids=str)
    def test_pooler_has_the_same_values(self, strides, pooler_type, sampling_ratio):
        before = ROIPooler(4, [1 / stride for stride in strides], sampling_ratio, pooler_type)
        model = nn.Sequential(copy.deepcopy(before))
        accelerate(model)
        assert type(model[0]) is fused.ROIPooler
        boxes = boxes_of_all_sizes(224)
        if len(strides) == 1 and pooler_type == "ROIAlignV2" and sampling_ratio == 0:
            boxes = boxes[:-1]  # torchvision raises an error for an inverted box
        assert_same_pooling(model[0], before, pyramid(strides), box_lists(boxes, boxes[40:]))

    def test_canonical_box_is_kept(self):
        before = ROIPooler(3, [1 / 2, 1 / 4, 1 / 8], 0, "ROIAlignV2", canonical_box_size=100, canonical_level=2)
        boxes = boxes_of_all_sizes(100)
        assert_same_pooling(accelerate(copy.deepcopy(before)), before, pyramid((2, 4, 8)), box_lists(boxes, boxes[:0]))

    def test_maps_in_half_precision(self):
        before = ROIPooler(3, [1 / 4, 1 / 8], 2, "ROIAlignV2")
        maps = [x.detach().bfloat16() for x in pyramid((4, 8))]
        boxes = boxes_of_all_sizes(224)[90:150]
        pooled = accelerate(copy.deepcopy(before))(maps, box_lists(boxes, boxes))
        assert pooled.dtype == torch.bfloat16
        # In float32, from what the half maps and boxes hold: levels come from the boxes as they are.
        rounded = box_lists(boxes.bfloat16().float(), boxes.bfloat16().float())
        exact = before([x.float() for x in maps], rounded)
        levels = [fused._levels(b, 2, 2, 4, 224, 1e-8) for b in (boxes, rounded[0].tensor)]
        same = (levels[0] == levels[1]).repeat(2)
        torch.testing.assert_close(pooled[same].float(), exact[same], rtol=1e-2, atol=1e-3)

    def test_images_and_boxes_may_be_none(self):
        pool = accelerate(ROIPooler(3, [1 / 4, 1 / 8], 2, "ROIAlignV2"))
        assert pool(pyramid((4, 8)), box_lists(torch.zeros(0, 4), torch.zeros(0, 4))).shape == (0, 3, 3, 3)
        assert pool(pyramid((4, 8), num_images=0), []).shape == (0, 3, 3, 3)

    def test_attributes_that_others_read_are_kept(self):
        before = ROIPooler(5, [1 / 4, 1 / 8], 2, "ROIAlign")
        pool = accelerate(copy.deepcopy(before))
        for name in ("output_size", "min_level", "max_level", "canonical_level", "canonical_box_size"):
            assert getattr(pool, name) == getattr(before, name)
        assert [layer.spatial_scale for layer in pool.level_poolers] == [1 / 4, 1 / 8]

    def test_rotated_boxes_are_left_alone(self):
        pool = ROIPooler(5, [1 / 4, 1 / 8], 2, "ROIAlignRotated")
        with pytest.raises(ValueError, match="left alone.*pools by .*ROIAlignRotated"):
            accelerate(pool)
        assert type(pool) is ROIPooler


# mmdet: interface of its 3.x, and of the layers in mmcv.


@from_library("mmcv.ops.roi_align")
class RoIAlign(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode="avg", aligned=True):
        super().__init__()
        self.output_size = (output_size, output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = False

    def forward(self, input, rois):
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class BaseRoIExtractor(nn.Module):
    def __init__(self, roi_layer, out_channels, featmap_strides):
        super().__init__()
        self.roi_layers = nn.ModuleList(RoIAlign(spatial_scale=1 / s, **roi_layer) for s in featmap_strides)
        self.out_channels = out_channels
        self.featmap_strides = featmap_strides

    @property
    def num_inputs(self):
        return len(self.featmap_strides)

    def roi_rescale(self, rois, scale_factor):
        image, x1, y1, x2, y2 = rois.unbind(1)
        centre_x, centre_y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        dx, dy = width * scale_factor / 2, height * scale_factor / 2
        return torch.stack([image, centre_x - dx, centre_y - dy, centre_x + dx, centre_y + dy], dim=1)


@from_library("mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor")
class SingleRoIExtractor(BaseRoIExtractor):
    def __init__(self, roi_layer, out_channels, featmap_strides, finest_scale=56):
        super().__init__(roi_layer, out_channels, featmap_strides)
        self.finest_scale = finest_scale

    def map_roi_levels(self, rois, num_levels):
        size = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        return torch.floor(torch.log2(size / self.finest_scale + 1e-6)).clamp(0, num_levels - 1).long()

    def forward(self, feats, rois, roi_scale_factor=None):
        rois = rois.type_as(feats[0])
        if len(feats) == 1:
            return self.roi_layers[0](feats[0], rois)
        level = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = feats[0].new_zeros(len(rois), self.out_channels, *self.roi_layers[0].output_size)
        for index, x in enumerate(feats):
            rows = torch.where(level == index)[0]
            pooled = pooled.index_put((rows,), self.roi_layers[index](x, rois[rows]))
        return pooled


def extractor(strides=(4, 8, 16, 32), finest_scale=56, cls=SingleRoIExtractor, **layer):
    return cls(dict(output_size=4, **layer), 3, list(strides), finest_scale)


def rows(boxes):
    return torch.cat([(torch.arange(len(boxes)) % 2).float()[:, None], boxes], dim=1)


def real(module: str, name: str):
    """A class of a library that is installed, or a skip that says why not."""
    return getattr(pytest.importorskip(module, reason=f"{module} does not import", exc_type=ImportError), name)


class TestRealDetectron2:
    """Oracle: detectron2's own ROIPooler, where it is installed."""

    @pytest.fixture
    def pooler(self):
        return real("detectron2.modeling.poolers", "ROIPooler")

    @staticmethod
    def boxes(*tensors):
        return [real("detectron2.structures", "Boxes")(tensor) for tensor in tensors]

    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    @pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
    @pytest.mark.parametrize("strides", [(4, 8, 16, 32), (16,)], ids=str)
    def test_pooler_has_the_same_values(self, pooler, strides, pooler_type, sampling_ratio):
        before = pooler(4, [1 / stride for stride in strides], sampling_ratio, pooler_type)
        model = accelerate(nn.Sequential(copy.deepcopy(before)))
        assert type(model[0]) is fused.ROIPooler
        boxes = boxes_of_all_sizes(224)[:-1]  # torchvision's error for an inverted box is one of detectron2's too
        assert_same_pooling(model[0], before, pyramid(strides), self.boxes(boxes, boxes[40:]))

    def test_images_and_boxes_may_be_none(self, pooler):
        before = pooler(3, [1 / 4, 1 / 8], 2, "ROIAlignV2")
        model = accelerate(copy.deepcopy(before))
        some, none = torch.tensor([[9.0, 9.0, 90.0, 70.0]]), torch.zeros(0, 4)
        for rows in ((some, none), (none, none)):
            assert_same_pooling(model, before, pyramid((4, 8)), self.boxes(*rows))
        assert model(pyramid((4, 8), num_images=0), []).shape == before(pyramid((4, 8), num_images=0), []).shape

    @pytest.mark.parametrize("kind", ["ROIAlignRotated", "ROIPool"])
    def test_others_are_left_alone(self, pooler, kind):
        with pytest.raises(ValueError, match="left alone.*pools by "):
            accelerate(pooler(5, [1 / 4, 1 / 8], 2, kind))


class TestRealMmdet:
    """Oracle: mmdet's own SingleRoIExtractor on mmcv's RoIAlign, where both are installed."""

    @staticmethod
    def extractor(**layer):
        cls = real("mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor", "SingleRoIExtractor")
        return cls(dict(type="RoIAlign", output_size=4, **layer), 3, [4, 8, 16, 32])

    @pytest.mark.parametrize("options", [{}, {"aligned": False}, {"use_torchvision": True}], ids=str)
    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    @pytest.mark.parametrize("factor", [None, 1.7])
    def test_extractor_has_the_same_values(self, factor, sampling_ratio, options):
        before = self.extractor(sampling_ratio=sampling_ratio, **options)
        model = accelerate(nn.ModuleDict({"extractor": copy.deepcopy(before)}))
        assert type(model["extractor"]) is fused.SingleRoIExtractor
        rois = rows(boxes_of_all_sizes(56)[:-1])
        assert_same_pooling(model["extractor"], before, tuple(pyramid()), rois, factor)

    def test_no_boxes(self):
        before = self.extractor()
        assert_same_pooling(accelerate(copy.deepcopy(before)), before, tuple(pyramid()), torch.zeros(0, 5))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("factor", [None, 1.7])
    def test_half_maps_are_pooled_at_boxes_of_their_precision(self, dtype, factor):
        """In float32, from what half maps and boxes hold; mmcv on a CPU knows no half itself."""
        before = self.extractor(sampling_ratio=2)
        maps, rois = [x.detach().to(dtype) for x in pyramid()], rows(boxes_of_all_sizes(56)[90:150])
        pooled = accelerate(copy.deepcopy(before))(tuple(maps), rois, factor)
        assert pooled.dtype == dtype
        rounded = rois.to(dtype)
        levels = before.map_roi_levels(rounded, 4)
        if factor is not None:
            rounded = before.roi_rescale(rounded, factor)
        exact = torch.stack(
            [before.roi_layers[level](maps[level].float(), row[None].float())[0] for level, row in zip(levels, rounded)]
        )
        torch.testing.assert_close(pooled.float(), exact, rtol=1e-2, atol=5e-3)

    def test_maxima_are_left_alone(self):
        with pytest.raises(ValueError, match="left alone.*pools by max"):
            accelerate(self.extractor(pool_mode="max"))


class TestMmdet:
    """Oracle: stand-ins that pool level by level with torchvision's roi_align."""

    @pytest.mark.parametrize("aligned", [False, True])
    @pytest.mark.parametrize("sampling_ratio", [0, 2])
    @pytest.mark.parametrize("factor", [None, 1.7])
    @pytest.mark.parametrize("finest_scale", [56, 30])
    def test_extractor_has_the_same_values(self, finest_scale, factor, sampling_ratio, aligned):
        before = extractor(finest_scale=finest_scale, sampling_ratio=sampling_ratio, aligned=aligned)
        model = nn.ModuleDict({"extractor": copy.deepcopy(before)})
        accelerate(model)
        rois = rows(boxes_of_all_sizes(finest_scale))
        untouched = rois.clone()
        assert_same_pooling(model["extractor"], before, tuple(pyramid()), rois, factor)
        assert torch.equal(rois, untouched)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_fewer_maps_than_layers(self, count):
        before = extractor(sampling_ratio=2)
        maps = tuple(pyramid()[:count])
        assert_same_pooling(accelerate(copy.deepcopy(before)), before, maps, rows(boxes_of_all_sizes(56)), 1.5)

    def test_attributes_that_others_read_are_kept(self):
        before = extractor()
        pool = accelerate(copy.deepcopy(before))
        for name in ("out_channels", "featmap_strides", "num_inputs", "finest_scale"):
            assert getattr(pool, name) == getattr(before, name)
        assert pool.roi_layers[0].output_size == (4, 4)
        rois = rows(boxes_of_all_sizes(56)[:-1])
        assert torch.equal(pool.map_roi_levels(rois, 4), before.map_roi_levels(rois, 4))
        assert torch.equal(pool.roi_rescale(rois, 1.3), before.roi_rescale(rois, 1.3))

    def test_no_boxes(self):
        assert accelerate(extractor())(tuple(pyramid()), torch.zeros(0, 5)).shape == (0, 3, 4, 4)

    def test_maxima_are_left_alone(self):
        with pytest.raises(ValueError, match="left alone.*pools by max"):
            accelerate(extractor(pool_mode="max"))

    def test_wrapped_for_float16_is_left_alone(self):
        before = extractor()
        before.fp16_enabled = True  # as the decorators of mmdet before 3.0 want it, which cast arguments to float32
        with pytest.raises(ValueError, match="left alone.*wrapped for float16"):
            accelerate(before)
        before.fp16_enabled = False
        assert type(accelerate(before)) is fused.SingleRoIExtractor

    def test_subclass_with_levels_of_its_own_is_left_alone(self):
        class ByHeight(SingleRoIExtractor):
            def map_roi_levels(self, rois, num_levels):
                return (rois[:, 4] - rois[:, 2] > 50).long()

        with pytest.raises(ValueError, match="defines map_roi_levels in a subclass"):
            accelerate(extractor(cls=ByHeight))


class TestWalk:
    def pool(self, cls=torchvision.ops.MultiScaleRoIAlign):
        return cls(["0", "1"], 3, 2)

    def inputs(self):
        maps = pyramid((4, 8))
        return dict(zip("01", maps)), [torch.rand(5, 4) * 60 + torch.tensor([0, 0, 100, 90.0])] * 2, [(256, 256)] * 2

    def test_says_what_it_replaced(self, caplog):
        caplog.set_level(logging.INFO, logger="roialign_ext")
        accelerate(nn.ModuleDict({"a": self.pool(), "b": nn.Linear(1, 1)}))
        (message,) = caplog.messages
        assert message == (
            "replaced: a (torchvision.ops.poolers.MultiScaleRoIAlign) by roialign_ext.modules.MultiScaleRoIAlign"
        )

    def test_says_what_it_left_alone(self, caplog):
        caplog.set_level(logging.INFO, logger="roialign_ext")
        accelerate(nn.ModuleList([self.pool(), extractor(pool_mode="max")]))
        assert [message.partition(":")[0] for message in caplog.messages] == ["replaced", "left alone"]

    def test_model_without_a_pooler_is_an_error_that_names_what_was_looked_for(self):
        with pytest.raises(ValueError) as error:
            accelerate(nn.Linear(2, 2))
        for name in ("MultiScaleRoIAlign", "RoIAlign", "RoIHeads", "ROIPooler", "SingleRoIExtractor", "Linear"):
            assert name in str(error.value)

    def test_second_call_changes_nothing(self, caplog):
        model = accelerate(nn.Sequential(self.pool()))
        caplog.set_level(logging.INFO, logger="roialign_ext")
        assert accelerate(model) is model
        assert not caplog.messages

    def test_module_stays_the_same_object_wherever_it_is_held(self):
        pool = self.pool()
        model = nn.ModuleList([pool, nn.Sequential(pool)])
        model.unregistered = [pool]
        accelerate(model)
        assert model[0] is model[1][0] is model.unregistered[0] is pool
        assert type(pool) is roialign_ext.MultiScaleRoIAlign

    def test_hooks_and_mode_are_kept(self):
        pool, seen = self.pool().eval(), []
        handle = pool.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        accelerate(pool)(*self.inputs())
        assert seen == [(10, 3, 3, 3)] and not pool.training
        handle.remove()
        pool(*self.inputs())
        assert len(seen) == 1

    def test_single_level(self):
        before = torchvision.ops.RoIAlign((3, 4), 0.25, 2, aligned=True)
        x, boxes = pyramid((4,))[0], rows(torch.rand(9, 4) * 60 + torch.tensor([0, 0, 100, 90.0]))
        pool = accelerate(copy.deepcopy(before))
        assert type(pool) is roialign_ext.RoIAlign
        torch.testing.assert_close(pool(x, boxes), before(x, boxes))

    def test_replacements_can_be_copied_and_pickled(self):
        model = accelerate(nn.ModuleList([self.pool(), torchvision_twin(second_stage())]))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert [type(x) for x in again.modules()] == [type(x) for x in copy.deepcopy(model).modules()]
        inputs = self.inputs()
        assert torch.equal(model[0](*inputs), again[0](*inputs))

    def test_subclass_is_replaced_if_it_only_constructs(self):
        class Mine(torchvision.ops.MultiScaleRoIAlign):
            def __init__(self, *args):
                super().__init__(*args)

        class Doubled(Mine):
            def forward(self, *args):
                return 2 * super().forward(*args)

        mine, doubled = self.pool(Mine), self.pool(Doubled)
        accelerate(nn.ModuleList([mine, doubled]))
        assert type(mine) is roialign_ext.MultiScaleRoIAlign
        assert type(doubled) is Doubled

    def test_forward_of_the_instance_is_left_alone(self):
        pool = self.pool()
        pool.forward = lambda *args: 0
        with pytest.raises(ValueError, match="has a forward of its own"):
            accelerate(pool)

    def test_patched_class_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(torchvision.ops.MultiScaleRoIAlign, "forward", lambda *args: 0)
        with pytest.raises(ValueError, match="has its forward patched by test_accelerate"):
            accelerate(self.pool())

    def test_only_the_poolers_of_a_changed_second_stage_are_replaced(self, monkeypatch):
        class Heads(models.roi_heads.RoIHeads):
            pass

        class Sampler(models._utils.BalancedPositiveNegativeSampler):
            pass

        subclass, sampler, loss = (torchvision_twin(second_stage()) for _ in range(3))
        subclass.__class__ = Heads
        sampler.fg_bg_sampler.__class__ = Sampler
        accelerate(nn.ModuleList([subclass, sampler]))
        monkeypatch.setattr(models.roi_heads, "fastrcnn_loss", lambda *args: 0)
        accelerate(loss)
        for heads in (subclass, sampler, loss):
            assert isinstance(heads, models.roi_heads.RoIHeads)
            for pool in (heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool):
                assert type(pool) is roialign_ext.MultiScaleRoIAlign
