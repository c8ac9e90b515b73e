"""The parts of the second stage by themselves: boxes, matching, sampling, masks, keypoints, examples."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from detectors import KEYPOINTS, boxes_in, ground_truth, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from roialign_ext import detection
from roialign_ext.detection import keypoint_head, mask_head

SHAPE = (64, 96)


def torchvision(module: str):
    return pytest.importorskip(f"torchvision.{module}")


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("name", sorted(m.name for m in pkgutil.iter_modules(detection.__path__)))
def test_examples_run(name):
    """Oracle: the outputs that stand in the docstrings."""
    module = importlib.import_module(f"roialign_ext.detection.{name}")
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0 and attempted > 0


class TestBoxes:
    """Oracle: torchvision's functions of the same names, or answers by hand."""

    @pytest.mark.parametrize(
        "dtype",
        [torch.float32, torch.float64, torch.float16, torch.int64, torch.int16],
        ids=lambda d: str(d)[6:],
    )
    def test_box_iou(self, dtype):
        one, other = boxes_in(7, SHAPE).to(dtype), boxes_in(5, SHAPE).to(dtype)
        expected = torchvision("ops").box_iou(one, other)
        # torchvision subtracts halves before it widens them.
        tolerance = 1e-3 if dtype == torch.float16 else 0
        torch.testing.assert_close(detection.box_iou(one, other), expected, rtol=tolerance, atol=tolerance)

    def test_box_iou_in_batches_and_its_gradient(self):
        one = torch.stack([boxes_in(3, SHAPE), boxes_in(3, SHAPE)]).requires_grad_()
        other = torch.stack([boxes_in(4, SHAPE), boxes_in(4, SHAPE)])
        weight = torch.rand(2, 3, 4)
        results = [
            (iou, *torch.autograd.grad((iou * weight).sum(), one))
            for iou in (detection.box_iou(one, other), torchvision("ops").box_iou(one, other))
        ]
        torch.testing.assert_close(*results)

    def test_clip_and_remove(self):
        ops = torchvision("ops")
        boxes = (torch.randn(2, 30, 4) * 60).requires_grad_()
        clipped = detection.clip_boxes_to_image(boxes, SHAPE)
        assert torch.equal(clipped, ops.clip_boxes_to_image(boxes, SHAPE))
        boxes = boxes_in(30, SHAPE)
        boxes[3, 2:] = boxes[3, :2] + torch.tensor([20.0, 30.0])  # a side of just the limit stays
        kept = detection.remove_small_boxes(boxes, 20.0)
        assert torch.equal(kept, ops.remove_small_boxes(boxes, 20.0)) and 0 < len(kept) < 30

    @pytest.mark.parametrize("weights", [(10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)])
    def test_box_coder(self, weights):
        theirs = torchvision("models.detection._utils").BoxCoder(weights)
        ours = detection.BoxCoder(weights)
        truth, proposals = [boxes_in(5, SHAPE), boxes_in(0, SHAPE)], [boxes_in(5, SHAPE), boxes_in(0, SHAPE)]
        for codes, expected in zip(ours.encode(truth, proposals), theirs.encode(truth, proposals)):
            torch.testing.assert_close(codes, expected, rtol=1e-6, atol=1e-6)
        codes = torch.randn(5, 12) * 4
        codes[0, 2] = 1000.0  # clamped
        expected = theirs.decode(codes, proposals)
        torch.testing.assert_close(ours.decode(codes, proposals), expected, rtol=1e-6, atol=1e-4)
        assert ours.decode(codes[:0], proposals[1:]).shape == theirs.decode(codes[:0], proposals[1:]).shape

    def test_decoding_undoes_encoding(self):
        coder = detection.BoxCoder((10.0, 10.0, 5.0, 5.0))
        truth, proposals = boxes_in(9, SHAPE), boxes_in(9, SHAPE)
        torch.testing.assert_close(coder.decode_single(coder.encode_single(truth, proposals), proposals), truth)

    def test_half_codes_are_decoded_in_float32(self):
        """At 1000 pixels neighbouring bfloat16 lie 8 apart."""
        box = torch.tensor([[1001.0, 1003.0, 1010.0, 1021.0]])
        decoded = detection.BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(torch.zeros(1, 4).bfloat16(), box)
        assert decoded.tolist() == box.tolist()


class TestMatching:
    """Oracle: torchvision's classes of the same names."""

    @pytest.mark.parametrize("low_quality", [False, True])
    def test_matcher(self, low_quality):
        kind = torchvision("models.detection._utils").Matcher
        quality = (torch.rand(6, 200) * 10).round() / 10  # with ties
        quality[2] *= 0.2
        arguments = (0.7, 0.4, low_quality)
        ours, expected = detection.Matcher(*arguments)(quality), kind(*arguments)(quality)
        assert torch.equal(ours, expected)
        assert {-1, -2} < set(ours.tolist())

    def test_matcher_needs_both_sides(self):
        kind = torchvision("models.detection._utils").Matcher
        for matcher in (detection.Matcher(0.5, 0.5), kind(0.5, 0.5)):
            with pytest.raises(ValueError, match="ground-truth"):
                matcher(torch.zeros(0, 3))
            with pytest.raises(ValueError, match="proposal"):
                matcher(torch.zeros(3, 0))

    @pytest.mark.parametrize("batch, fraction", [(8, 0.25), (64, 0.5), (7, 0.9), (1000, 0.25), (4, 0.0)])
    def test_sampler(self, batch, fraction):
        kind = torchvision("models.detection._utils").BalancedPositiveNegativeSampler
        labels = [
            torch.randint(-1, 4, (50,)),
            torch.zeros(30),
            torch.ones(9),
            torch.zeros(0),
            torch.full((5,), -1),
        ]
        drawn = []
        for sampler in (detection.BalancedPositiveNegativeSampler(batch, fraction), kind(batch, fraction)):
            torch.manual_seed(1)
            drawn.append([list(masks) for masks in sampler(labels)])
        torch.testing.assert_close(drawn[0], drawn[1], check_dtype=False)
        assert {mask.dtype for masks in drawn[0] for mask in masks} == {torch.uint8}


class TestMasks:
    """Oracle: torchvision's functions of the same names, or answers by hand."""

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float64], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("piece", [1, 2 * 64 * 96, 2**22], ids=["mask_by_mask", "in_pairs", "at_once"])
    def test_loss(self, dtype, piece, monkeypatch):
        monkeypatch.setattr(mask_head, "_MAX_PIXELS", piece)
        loss = torchvision("models.detection.roi_heads").maskrcnn_loss
        _, proposals, _, targets = problem((12, 9), (4, 3))
        masks = [target["masks"].to(dtype) for target in targets]
        matched = [torch.randint(4, (12,)), torch.randint(3, (9,))]
        logits = torch.randn(21, 4, 28, 28, requires_grad=True)
        results = []
        for function in (detection.maskrcnn_loss, loss):
            value = function(logits, proposals, masks, [target["labels"] for target in targets], matched)
            results.append((value, *torch.autograd.grad(value, logits)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)

    def test_masks_are_never_all_in_floating_point(self):
        """Oracle: the largest floating-point tensor, for 40 masks of 300 x 400, 4.8 million pixels in all."""
        masks = torch.zeros(40, 300, 400, dtype=torch.uint8)
        boxes = boxes_in(10, (300, 400))
        with Largest() as largest:
            mask_head._pooled_masks(masks, boxes, torch.randint(40, (10,)), 28)
        assert 300 * 400 <= largest.numel <= 2**22

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
    def test_inference(self, layout):
        logits = torch.randn(7, 4, 28, 28).contiguous(memory_format=layout)
        labels = [torch.tensor([1, 2, 3]), torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0, 1, 3])]
        expected = torchvision("models.detection.roi_heads").maskrcnn_inference(logits, labels)
        torch.testing.assert_close(detection.maskrcnn_inference(logits, labels), expected)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
    def test_the_predictor_of_one_class_selects(self, layout):
        """Oracle: the same predictor for all classes, and its gradients."""
        predictor = detection.MaskRCNNPredictor(6, 5, 4)
        x = torch.randn(8, 6, 3, 3).contiguous(memory_format=layout).requires_grad_()
        labels = torch.tensor([0, 3, 1, 1, 2, 3, 3, 0])
        weight = torch.rand(8, 1, 6, 6)
        results = []
        for masks in (predictor(x, labels), predictor(x)[torch.arange(8), labels][:, None]):
            results.append((masks, *torch.autograd.grad((masks * weight).sum(), [x, *predictor.parameters()])))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("padding", [0, 1, 3])
    def test_pasting(self, padding):
        masks = torch.rand(12, 1, 28, 28)
        boxes = boxes_in(12, SHAPE)
        boxes[0] = torch.tensor([-20.0, -7.5, 30.0, 40.0])  # over the border
        boxes[1] = torch.tensor([40.0, 30.0, 120.0, 90.0])
        boxes[2] = torch.tensor([10.0, 10.0, 10.2, 10.1])  # below a pixel
        expected = torchvision("models.detection.roi_heads").paste_masks_in_image(masks, boxes, SHAPE, padding)
        pasted = detection.paste_masks_in_image(masks, boxes, SHAPE, padding)
        torch.testing.assert_close(pasted, expected, rtol=1e-4, atol=1e-5)
        assert (pasted > 0).any(dim=3).any(dim=2).all()

    def test_pasting_nothing(self):
        assert detection.paste_masks_in_image(torch.rand(0, 1, 28, 28), torch.rand(0, 4), (5, 6)).shape == (
            0,
            1,
            5,
            6,
        )


class TestKeypoints:
    """Oracle: torchvision's functions of the same names, or answers by hand."""

    def test_loss(self):
        loss = torchvision("models.detection.roi_heads").keypointrcnn_loss
        _, proposals, _, targets = problem((12, 9), (4, 3))
        matched = [torch.arange(12) % 4, torch.arange(9) % 3]
        proposals[0][:4] = targets[0]["boxes"]  # keypoints on their far corner
        keypoints = [target["keypoints"] for target in targets]
        logits = torch.randn(21, KEYPOINTS, 56, 56, requires_grad=True)
        results = []
        for function in (detection.keypointrcnn_loss, loss):
            value = function(logits, proposals, keypoints, matched)
            results.append((value, *torch.autograd.grad(value, logits)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)

    def test_loss_of_the_unseen_is_zero(self):
        target = ground_truth(2, SHAPE)
        target["keypoints"][..., 2] = 0
        logits = torch.randn(2, KEYPOINTS, 8, 8, requires_grad=True)
        loss = detection.keypointrcnn_loss(logits, [target["boxes"]], [target["keypoints"]], [torch.arange(2)])
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()

    def test_loss_wants_square_maps(self):
        for function in (
            detection.keypointrcnn_loss,
            torchvision("models.detection.roi_heads").keypointrcnn_loss,
        ):
            with pytest.raises(ValueError, match="4"):
                function(
                    torch.zeros(1, 1, 4, 5),
                    [torch.zeros(1, 4)],
                    [torch.zeros(1, 1, 3)],
                    [torch.zeros(1).long()],
                )

    @pytest.mark.parametrize("cells", [2**24, 1], ids=["together", "one_by_one"])
    def test_inference(self, cells, monkeypatch):
        monkeypatch.setattr(keypoint_head, "_MAX_CELLS", cells)
        boxes = [boxes_in(11, (300, 200)), boxes_in(0, SHAPE), boxes_in(6, SHAPE)]
        boxes[2][0, 2:] = boxes[2][0, :2] + 0.3  # below a pixel
        boxes[2][1, 2:] = boxes[2][1, :2] + torch.tensor([64.0, 1.5])  # a power of two; narrow
        maps = torch.randn(17, KEYPOINTS, 56, 56)
        expected = torchvision("models.detection.roi_heads").keypointrcnn_inference(maps, boxes)
        torch.testing.assert_close(detection.keypointrcnn_inference(maps, boxes), expected, rtol=1e-4, atol=1e-4)

    def test_inference_resizes_together_and_within_bounds(self, monkeypatch):
        """Oracle: counts. Of 12 detections of each of 5 sizes only the largest take two turns, for 2^20."""
        monkeypatch.setattr(keypoint_head, "_MAX_CELLS", 2**20)
        boxes = torch.tensor([[0.0, 0.0, side, 2 * side] for side in (10, 20, 40, 70, 140)]).repeat(12, 1)
        assert len(keypoint_head._batches(boxes[:, 2:].long().tolist(), KEYPOINTS)) == 6
        with Largest() as largest:
            detection.keypointrcnn_inference(torch.randn(60, KEYPOINTS, 8, 8), [boxes])
        assert 2**19 < largest.numel <= 2**20

    def test_half_heat_maps_are_resized_in_float32(self):
        boxes, maps = [boxes_in(3, SHAPE)], torch.randn(3, KEYPOINTS, 16, 16).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            points, scores = detection.keypointrcnn_inference(maps, boxes)
        expected = detection.keypointrcnn_inference(maps.float(), boxes)
        torch.testing.assert_close((points, scores), expected)
