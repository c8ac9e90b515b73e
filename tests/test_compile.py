"""The operation under torch.compile: no graph breaks, no recompilation for another number of boxes or size of image.

The oracle is the same call in eager mode, whose values the other files check, unless a test names another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from cases import CASE, VALUES, proposals
from detectors import CHANNELS, problem, second_stage
from torch import Tensor, nn
from torch.autograd import forward_ad

import roialign_ext
from roialign_ext import detection

SCALES = (0.25, 0.125)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graph of another test, an error for a second one, and graphs of values that only the device knows."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip(f"compiled without recompilation as of torch 2.11, this is {torch.__version__}")
    torch.compiler.reset()
    options = {
        "error_on_recompile": True,
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
    }
    with torch._dynamo.config.patch(**options):
        yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def maps_of(height: int, width: int, requires_grad: bool = True, channels: int = 3) -> list[Tensor]:
    shapes = [(2, channels, height >> level, width >> level) for level in (2, 3)]
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def rows_of(count: int, height: int, width: int) -> Tensor:
    return torch.tensor(proposals(count, height, width, images=2, seed=count, median=40.0))


# Counts of boxes and sizes of image. None of them is that of a channel or a bin: PyTorch takes equal sizes of the
# first call for one variable.
SIZES = ((20, 64, 96), (33, 96, 80), (11, 128, 128))


class TestOperators:
    """Oracle: torch.library.opcheck, with real inputs."""

    @pytest.mark.parametrize("count", [0, 1, 60])
    @pytest.mark.parametrize("grouped", [False, True])
    def test_nms(self, count, grouped):
        boxes = torch.tensor(proposals(count, 64, 96, median=30.0)).reshape(-1, 5)[:, 1:]
        groups = torch.arange(count) % 3 if grouped else None
        torch.library.opcheck(torch.ops.roialign_ext.nms.default, (boxes, torch.rand(count), groups, 0.5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_match(self, dtype):
        boxes = torch.tensor(proposals(40, 64, 96, median=30.0), dtype=dtype)[:, 1:]
        torch.library.opcheck(torch.ops.roialign_ext.match.default, (boxes[:7], boxes[7:]))

    @pytest.mark.slow
    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("name", ["levels-3", "padding", "levels-given", "no-boxes"])
    def test_pooling(self, name, channels_last):
        case, operators = CASE[name], torch.ops.roialign_ext
        layout = torch.channels_last if channels_last else torch.contiguous_format
        features = [x.contiguous(memory_format=layout) for x in case.features(torch.float32)]
        rows, levels, bins = case.rows(), case.level_tensor(), list(case.output_size)
        scales = [float(scale) for scale in case.scales for _ in "yx"]
        level, size = case.options.get("canonical_level", 4), float(case.options.get("canonical_scale", 224))
        pooling = (scales, case.sampling_ratio, case.aligned, level, size)
        grad = torch.randn(len(rows), case.channels, *bins).contiguous(memory_format=layout)
        maps = (case.images, [side for shape in case.maps for side in shape])
        _, argmax = operators.roi_max_forward(features, rows, levels, bins, *pooling)
        calls = {
            "roi_align_forward": (features, rows, levels, bins, *pooling),
            "roi_align_backward": (grad, rows, levels, *maps, *pooling, channels_last),
            "roi_align_backward_boxes": (grad, features, rows, levels, *pooling),
            "roi_align_tangent": (features, rows, torch.randn_like(rows), levels, bins, *pooling),
            "roi_max_forward": (features, rows, levels, bins, *pooling),
            "roi_max_gather": (features, argmax, rows, levels, *pooling),
            "roi_max_backward": (grad, argmax, rows, levels, *maps, *pooling, channels_last),
            "roi_max_backward_boxes": (grad, argmax, features, rows, levels, *pooling),
        }
        for operator, arguments in calls.items():
            torch.library.opcheck(getattr(operators, operator).default, arguments)

    def test_none_is_forgotten(self):
        """Oracle: the names of the operators that opcheck is given, here and in test_integration.py."""
        checked = {"nms", "match", "assign_levels"} | {
            f"roi_{kind}" for kind in ("align_forward", "align_backward", "align_backward_boxes", "align_tangent")
        }
        checked |= {f"roi_max_{kind}" for kind in ("forward", "gather", "backward", "backward_boxes")}
        registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "roialign_ext::" in name}
        assert registered == checked


class TestPooler:
    @pytest.mark.parametrize(
        ("mode", "moving_boxes"),
        [
            pytest.param("avg", False, id="avg"),
            pytest.param("avg", True, id="avg-boxes", marks=pytest.mark.slow),
            pytest.param("max", False, id="max", marks=pytest.mark.slow),
            pytest.param("max", True, id="max-boxes", marks=pytest.mark.slow),
        ],
    )
    def test_values_and_gradients(self, mode, moving_boxes):
        def call(rows, *features):
            return roialign_ext.multiscale_roi_align(
                features, rows * 1.0, (7, 5), SCALES, 2, True, mode=mode, canonical_scale=32, canonical_level=3
            )

        program = compiled(call)
        for count, height, width in SIZES:
            leaves = [rows_of(count, height, width).requires_grad_(moving_boxes), *maps_of(height, width)]
            cotangent = torch.randn(count, 3, 7, 5)
            of = leaves if moving_boxes else leaves[1:]
            output = program(*leaves)
            assert torch.equal(output, call(*leaves))
            found = torch.autograd.grad(output, of, cotangent)
            for one, other in zip(found, torch.autograd.grad(call(*leaves), of, cotangent)):
                assert torch.equal(one, other)

    @pytest.mark.parametrize("num_levels", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5))])
    def test_without_gradients_for_any_number_of_levels(self, num_levels):
        """torch.compile counts the inputs of an autograd Function whose inputs need no gradient."""
        scales = [0.5**level for level in range(num_levels)]
        rows = rows_of(9, 64, 96)
        features = [torch.randn(2, 3, 64 >> level, 96 >> level) for level in range(num_levels)]
        program = compiled(lambda rows, features: roialign_ext.multiscale_roi_align(features, rows, 3, scales, 2))
        assert torch.equal(program(rows, features), roialign_ext.multiscale_roi_align(features, rows, 3, scales, 2))

    def test_module_with_lists_of_boxes_and_inferred_scales(self):
        pooler = roialign_ext.MultiScaleRoIAlign(["0", "1"], (7, 5), 2, canonical_scale=32, canonical_level=3)

        def call(features, boxes, shapes):
            return pooler(dict(zip("01", features)), boxes, shapes)

        program = compiled(call)
        for count, height, width in SIZES:
            boxes = [rows_of(count, height, width)[:, 1:], rows_of(count + 5, height, width)[:, 1:]]
            inputs = (maps_of(height, width, requires_grad=False), boxes, [(height, width), (height - 3, width - 9)])
            assert torch.equal(program(*inputs), call(*inputs))


class TestTorchFunc:
    """Transforms of torch.func in a graph: right, or an error. Oracle: eager mode."""

    FEATURE, ROWS = torch.randn(2, 3, 16, 20), torch.tensor([[0, 1.2, 2, 9, 11], [1, 3, 3.1, 12, 8], [-1, 0, 0, 0, 0]])
    SETS = torch.stack([ROWS, ROWS.flip(0)])

    @staticmethod
    def pooled(feature: Tensor, rows: Tensor, mode: str = "avg") -> Tensor:
        return roialign_ext.roi_align(feature, rows, 3, 1.0, 2, mode=mode)

    @classmethod
    def loss(cls, *inputs: Any) -> Tensor:
        return cls.pooled(*inputs).square().sum()

    CAPTURED: ClassVar[dict[str, Callable]] = {
        "grad": lambda of: torch.func.grad(of.loss, (0, 1))(of.FEATURE, of.ROWS),
        "grad-max": lambda of: torch.func.grad(of.loss, (0, 1))(of.FEATURE, of.ROWS, "max"),
        "vjp": lambda of: torch.func.vjp(of.pooled, of.FEATURE, of.ROWS)[1](torch.ones(3, 3, 3, 3)),
        "jacrev": lambda of: torch.func.jacrev(lambda rows: of.pooled(of.FEATURE, rows).sum((1, 2, 3)))(of.ROWS),
        "vmap-boxes": lambda of: torch.vmap(of.pooled, (None, 0))(of.FEATURE, of.SETS),
        "vmap-max": lambda of: torch.vmap(lambda rows: of.pooled(of.FEATURE, rows, "max"))(of.SETS),
        "vmap-twice": lambda of: torch.vmap(torch.vmap(of.pooled, (0, None)), (None, 0))(
            torch.stack([of.FEATURE, of.FEATURE.flip(0)]), of.SETS
        ),
    }

    @pytest.mark.parametrize("name", CAPTURED)
    def test_in_one_graph(self, name):
        call = self.CAPTURED[name]
        for one, other in zip(compiled(call)(type(self)), call(type(self)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)

    def test_gradients_of_weights_before_the_pooler(self):
        convolution = nn.Conv2d(3, 3, 3, padding=1)

        def loss(weight):
            feature = torch.func.functional_call(convolution, {"weight": weight}, self.FEATURE)
            return self.loss(feature, self.ROWS)

        weight = convolution.weight.detach()
        found, expected = compiled(torch.func.grad(loss))(weight), torch.func.grad(loss)(weight)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_forward_mode_leaves_the_graph(self):
        def along(rows):
            return torch.func.jvp(lambda r: self.pooled(self.FEATURE, r), (rows,), (torch.ones_like(rows),))[1]

        assert torch.equal(torch.compile(along, backend="aot_eager")(self.ROWS), along(self.ROWS))
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_mode_derivatives_are_not_captured"):
            compiled(along)(self.ROWS)

    def test_dual_tensors_for_a_graph_without_are_an_error(self):
        program = compiled(lambda feature: self.pooled(feature, self.ROWS))
        program(self.FEATURE)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward AD with roialign_ext"):
            program(forward_ad.make_dual(self.FEATURE, self.FEATURE))

    REFUSED: ClassVar[dict[str, Callable]] = {
        "grad-of-grad": lambda of: torch.func.grad(
            lambda feature: torch.func.grad(of.loss)(feature, of.ROWS).square().sum()
        )(of.FEATURE),
        "grad-of-vmap": lambda of: torch.func.grad(
            lambda feature: torch.vmap(of.pooled, (None, 0))(feature, of.SETS).square().sum()
        )(of.FEATURE),
        "vmap-of-grad": lambda of: torch.vmap(torch.func.grad(of.loss), (None, 0))(of.FEATURE, of.SETS),
    }

    @pytest.mark.parametrize("fullgraph", [False, True])
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_is_not_captured_is_an_error(self, name, fullgraph):
        call = self.REFUSED[name]
        assert torch.is_tensor(call(type(self)))
        with pytest.raises(Exception, match="captures no gradient of a gradient|does not have vmap|not implemented"):
            torch.compile(call, backend="aot_eager", fullgraph=fullgraph)(type(self))


class PoolerAndHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = roialign_ext.MultiScaleRoIAlign(["0", "1"], (7, 5), 2, canonical_scale=32, canonical_level=3)
        self.head = nn.Sequential(detection.TwoMLPHead(3 * 35, 17), detection.FastRCNNPredictor(17, 4))

    def forward(self, features: list[Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> tuple:
        return self.head(self.pool(dict(zip("01", features)), boxes, shapes))


def training_step(heads: nn.Module, inputs: tuple) -> list[Tensor]:
    """Losses and the gradients of their sum, with one random state for all callers."""
    torch.manual_seed(5)
    _, losses = heads(*inputs)
    leaves = [*heads.parameters(), *inputs[0].values()]
    gradients = torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True)
    return [*losses.values(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))]


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_pooler_and_head(self, backend):
        model = PoolerAndHead()
        program = compiled(model, backend)
        for count, height, width in SIZES:
            boxes = [rows_of(count, height, width)[:, 1:], rows_of(count + 5, height, width)[:, 1:]]
            inputs = (maps_of(height, width), boxes, [(height, width)] * 2)
            leaves = [*model.parameters(), *inputs[0]]
            results = []
            for call in (program, model):
                outputs = call(*inputs)
                loss = sum(output.square().mean() for output in outputs)
                results.append((*outputs, *torch.autograd.grad(loss, leaves)))
            for one, other in zip(*results):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("branches", [(), ("mask",), ("keypoint",), ("mask", "keypoint")], ids=str)
    def test_roi_heads(self, branches, backend):
        heads = second_stage(branches).train()
        program = compiled(heads, backend)
        # The same random numbers as eager mode draws, for the sampler of proposals, and in its order.
        with torch._inductor.config.patch(fallback_random=True, reorder_for_peak_memory=False):
            for proposals_of_image, objects, grown in (
                ((40, 30), (8, 5), 0),
                ((50, 33), (6, 9), 16),
                ((31, 70), (2, 7), 32),
            ):
                features, boxes, shapes, targets = problem(proposals_of_image, objects)
                features = {
                    name: torch.randn(2, 6, (80 + grown) // stride, (96 + 2 * grown) // stride, requires_grad=True)
                    for name, stride in (("0", 4), ("1", 8))
                }
                shapes = [(height + grown, width + 2 * grown) for height, width in shapes]
                for target in targets:
                    target["masks"] = nn.functional.pad(target["masks"], (0, 2 * grown, 0, grown))
                inputs = (features, boxes, shapes, targets)
                for one, other in zip(training_step(program, inputs), training_step(heads, inputs)):
                    scale = float(other.abs().max())
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale + 1e-6)

    @pytest.mark.slow
    def test_rows_of_padding_never_reach_batch_statistics(self):
        """PyTorch's batch normalisation takes no rows of unknown number, so that its absence shows as an error."""
        heads = second_stage(("mask",)).train()
        heads.mask_head = detection.MaskRCNNHeads(CHANNELS, (8,), 1, norm_layer=nn.BatchNorm2d)
        inputs = problem((40, 30), (8, 5))
        with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
            compiled(heads)(*inputs)
        heads.mask_head.eval()  # the statistics are fixed: every row for itself
        for one, other in zip(training_step(compiled(heads), inputs), training_step(heads, inputs)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_losses_of_boxes_are_equal_bit_for_bit(self):
        heads = second_stage(()).train()
        inputs = problem((40, 30), (8, 5))
        for one, other in zip(training_step(compiled(heads), inputs), training_step(heads, inputs)):
            assert torch.equal(one, other)

    @pytest.mark.slow
    def test_degenerate_ground_truth_is_an_error_of_the_graph(self):
        heads = second_stage(()).train()
        program = compiled(heads)
        inputs = problem((40, 30), (8, 5))
        training_step(program, inputs)
        inputs[3][1]["boxes"][2, 2] = inputs[3][1]["boxes"][2, 0]
        with pytest.raises(RuntimeError, match="boxes of `targets` must be finite with x1 < x2"):
            program(*inputs)


class TestExportOfNms:
    def test_a_program_with_nms_takes_any_number_of_boxes(self):
        class Model(nn.Module):
            def forward(self, boxes, scores):
                return boxes[detection.nms(boxes, scores, 0.5)]

        boxes, scores = rows_of(30, 64, 96)[:, 1:], torch.rand(30)
        free = torch.export.Dim.AUTO
        program = torch.export.export(Model(), (boxes, scores), dynamic_shapes=({0: free}, {0: free})).module()
        for count in (30, 7):
            expected = Model()(boxes[:count], scores[:count])
            assert 0 < len(expected) <= count
            torch.testing.assert_close(
                program(boxes[:count], scores[:count]), expected, rtol=0, atol=VALUES[torch.float32].smallest
            )
