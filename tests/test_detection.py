"""The second stage as a whole: losses, gradients, detections against torchvision's, and what it cannot do."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from detectors import BRANCHES, CLASSES, OPTIONS, problem, second_stage, torchvision_twin
from torch import Tensor, nn

import roialign_ext
from roialign_ext import detection
from roialign_ext.detection.matching import match_boxes

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

CLOSE = dict(rtol=1e-4, atol=1e-5)
BRANCH = pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES.keys())
PROBLEMS = {
    "both": ((40, 30), (3, 5)),
    "an_image_without_ground_truth": ((40, 30), (0, 4)),
    "an_image_without_proposals": ((0, 30), (3, 2)),
    "an_image_with_neither": ((30, 0), (4, 0)),
    "no_ground_truth_at_all": ((20, 20), (0, 0)),
    "no_proposals_at_all": ((0, 0), (6, 2)),
    "one_image": ((40,), (3,)),
    "more_objects_than_samples": ((60, 60), (30, 1)),
}
PROBLEM = pytest.mark.parametrize("counts", PROBLEMS.values(), ids=PROBLEMS.keys())


def losses_and_gradients(heads: nn.Module, inputs: tuple, seed: int) -> tuple[dict, dict]:
    """The losses, and the gradients of a random mixture of them by name of parameter and of feature map."""
    features, proposals, shapes, targets = inputs
    torch.manual_seed(seed)
    _, losses = heads(features, list(proposals), shapes, targets)
    weights = torch.rand(len(losses), generator=torch.Generator().manual_seed(seed))
    leaves = {**dict(heads.named_parameters()), **features}
    mixture = sum(weight * loss for weight, loss in zip(weights, losses.values()))
    gradients = torch.autograd.grad(mixture, list(leaves.values()), allow_unused=True)
    return losses, {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients)
    }


def sharpen(heads: detection.RoIHeads) -> detection.RoIHeads:
    """Make random weights give scores and boxes that differ, as trained ones do."""
    with torch.no_grad():
        heads.box_predictor.cls_score.weight *= 20
        heads.box_predictor.bbox_pred.weight *= 10
    return heads


class TestAgainstTorchvision:
    """Oracle: torchvision's RoIHeads with the same weights, inputs and random state."""

    @PROBLEM
    @BRANCH
    def test_losses_and_gradients(self, branches, counts):
        ours = second_stage(branches).train()
        theirs = torchvision_twin(ours)
        inputs = problem(*counts)
        losses, gradients = losses_and_gradients(ours, inputs, seed=5)
        expected_losses, expected_gradients = losses_and_gradients(theirs, inputs, seed=5)
        assert list(losses) == list(expected_losses)
        torch.testing.assert_close(losses, expected_losses, **CLOSE)
        torch.testing.assert_close(gradients, expected_gradients, **CLOSE)
        assert any(gradient.abs().sum() > 0 for gradient in gradients.values())

    @PROBLEM
    @BRANCH
    def test_detections(self, branches, counts):
        ours = sharpen(second_stage(branches)).eval()
        theirs = torchvision_twin(ours)
        features, proposals, shapes, _ = problem(*counts)
        result, losses = ours(features, proposals, shapes)
        expected, _ = theirs(features, proposals, shapes)
        assert losses == {}
        assert [list(detections) for detections in result] == [list(detections) for detections in expected]
        torch.testing.assert_close(result, expected, **CLOSE)
        assert sum(len(detections["boxes"]) for detections in result) > 0 or sum(counts[0]) == 0

    def test_the_sampler_takes_the_same_boxes(self):
        options = {"fg_iou_thresh": 0.6, "bg_iou_thresh": 0.2}  # those between are not sampled
        ours = second_stage((), **options).train()
        theirs = torchvision_twin(ours, **options)
        _, proposals, _, targets = problem((200, 90, 30), (6, 1, 0))
        samples = []
        for heads in (ours, theirs):
            torch.manual_seed(3)
            samples.append(heads.select_training_samples(list(proposals), targets))
            samples[-1] = [
                *map(list, samples[-1]),
                torch.rand(1),
            ]  # and leaves the generator in the same state
        torch.testing.assert_close(*samples, rtol=1e-5, atol=1e-6)

    def test_detections_at_the_limits(self):
        """Scores close to the threshold, boxes of a hundredth of a pixel or off the image, and many."""
        ours = second_stage((), detections_per_img=1000).eval()
        theirs = torchvision_twin(ours, detections_per_img=1000)
        logits = torch.zeros(60, CLASSES)
        logits[:, 0] = 6 * torch.rand(60)
        codes = torch.randn(60, 4 * CLASSES)
        codes[::3, 2::4] = -40 * torch.rand(20, CLASSES)  # widths down to a 3000th
        proposals = [(torch.rand(30, 4) * 40).cumsum(1)[:, [0, 1, 2, 3]] - 30 for _ in range(2)]
        shapes = [(64, 96), (80, 72)]
        result = ours.postprocess_detections(logits, codes, proposals, shapes)
        expected = theirs.postprocess_detections(logits, codes, proposals, shapes)
        torch.testing.assert_close(result, expected, **CLOSE)
        assert min(scores.min() for scores in result[1]) < 0.06
        assert min((boxes[:, 2] - boxes[:, 0]).min() for boxes in result[0]) < 0.5

    def test_equal_seeds_give_equal_initial_weights(self):
        pytest.importorskip("torchvision")
        from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn

        pairs = [
            (detection.TwoMLPHead, faster_rcnn.TwoMLPHead, (12, 5)),
            (detection.FastRCNNPredictor, faster_rcnn.FastRCNNPredictor, (12, 5)),
            (detection.MaskRCNNHeads, mask_rcnn.MaskRCNNHeads, (4, (5, 6), 1)),
            (detection.MaskRCNNHeads, mask_rcnn.MaskRCNNHeads, (4, (5, 6), 2, nn.BatchNorm2d)),
            (detection.MaskRCNNPredictor, mask_rcnn.MaskRCNNPredictor, (4, 5, 6)),
            (detection.KeypointRCNNHeads, keypoint_rcnn.KeypointRCNNHeads, (4, (5, 6))),
            (detection.KeypointRCNNPredictor, keypoint_rcnn.KeypointRCNNPredictor, (4, 5)),
        ]
        for *kinds, arguments in pairs:
            states = []
            for kind in kinds:
                torch.manual_seed(11)
                states.append(dict(kind(*arguments).state_dict()))
            torch.testing.assert_close(*states, rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
    def test_checkpoints_of_its_models_load(self, name):
        """strict=True: the same keys in the same order with the same shapes. On no device, being large."""
        models = pytest.importorskip("torchvision.models.detection")
        pools = [roialign_ext.MultiScaleRoIAlign(["0", "1", "2", "3"], size, 2) for size in (7, 14, 14)]
        with torch.device("meta"):
            theirs = getattr(models, f"{name}_resnet50_fpn")(weights=None, weights_backbone=None).roi_heads
            classes = theirs.box_predictor.cls_score.out_features
            parts = [
                pools[0],
                detection.TwoMLPHead(256 * 7 * 7, 1024),
                detection.FastRCNNPredictor(1024, classes),
            ]
            extra = {}
            if name == "maskrcnn":
                extra["mask_roi_pool"] = pools[1]
                extra["mask_head"] = detection.MaskRCNNHeads(256, (256,) * 4, 1)
                extra["mask_predictor"] = detection.MaskRCNNPredictor(256, 256, classes)
            if name == "keypointrcnn":
                extra["keypoint_roi_pool"] = pools[2]
                extra["keypoint_head"] = detection.KeypointRCNNHeads(256, (512,) * 8)
                extra["keypoint_predictor"] = detection.KeypointRCNNPredictor(512, 17)
            ours = detection.RoIHeads(*parts, **OPTIONS, **extra)
        shapes = [[(key, value.shape) for key, value in heads.state_dict().items()] for heads in (ours, theirs)]
        assert shapes[0] == shapes[1]
        ours.load_state_dict(theirs.state_dict(), strict=True)


class TestBeyondTorchvision:
    """What torchvision's RoIHeads cannot do."""

    def test_losses_in_eval_mode_are_those_of_training(self):
        """Oracle: torchvision in training mode for the losses, in evaluation mode for the detections."""
        ours = sharpen(second_stage(losses_in_eval=True)).eval()
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        theirs = torchvision_twin(ours)
        torch.manual_seed(2)
        result, losses = ours(features, proposals, shapes, targets)
        torch.manual_seed(2)
        _, expected_losses = theirs.train()(features, list(proposals), shapes, targets)
        expected, _ = theirs.eval()(features, proposals, shapes)
        torch.testing.assert_close(losses, expected_losses, **CLOSE)
        torch.testing.assert_close(result, expected, **CLOSE)

    def test_losses_in_eval_mode_only_where_asked_for(self):
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        assert second_stage().eval()(features, proposals, shapes, targets)[1] == {}
        assert second_stage(losses_in_eval=True).eval()(features, proposals, shapes)[1] == {}

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_a_class_agnostic_predictor_is_one_with_equal_columns(self, training):
        """Oracle: the same heads with 4 * classes columns that repeat the 4."""
        predictor = detection.FastRCNNPredictor(16, CLASSES, class_agnostic=True)
        repeated = detection.FastRCNNPredictor(16, CLASSES)
        assert predictor.bbox_pred.out_features == 4
        agnostic = second_stage((), box_predictor=predictor).train(training)
        with torch.no_grad():
            predictor.bbox_pred.weight *= 10
            repeated.cls_score = predictor.cls_score
            repeated.bbox_pred.weight.copy_(predictor.bbox_pred.weight.repeat(CLASSES, 1))
            repeated.bbox_pred.bias.copy_(predictor.bbox_pred.bias.repeat(CLASSES))
        by_class = copy.copy(agnostic)
        by_class._modules = {**agnostic._modules, "box_predictor": repeated}
        outputs = []
        inputs = problem((40, 30), (3, 5))
        for heads in (agnostic, by_class):
            torch.manual_seed(4)
            outputs.append(heads(*inputs))
        torch.testing.assert_close(*outputs, **CLOSE)

    def test_a_class_agnostic_predictor_trains(self):
        """Oracle: smooth L1 by hand, over the positives of one class."""
        codes = torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]], requires_grad=True)
        _, loss = detection.fastrcnn_loss(torch.zeros(2, CLASSES), codes, [torch.tensor([3, 0])], [torch.zeros(2, 4)])
        loss.backward()
        assert loss.item() == pytest.approx((1 - 1 / 18) / 2)
        assert codes.grad.tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 0]]

    def test_losses_are_arguments(self):
        """Oracle: the constants that the given losses return, and what they are called with."""
        calls = {}

        def recorded(name: str, *values: float):
            def loss(*arguments):
                calls[name] = arguments
                return torch.tensor(values[0]) if len(values) == 1 else tuple(map(torch.tensor, values))

            return loss

        heads = second_stage(
            box_loss=recorded("box", 1.0, 2.0),
            mask_loss=recorded("mask", 3.0),
            keypoint_loss=recorded("key", 4.0),
        ).train()
        _, losses = heads(*problem((40, 30), (3, 5)))
        assert {name: loss.item() for name, loss in losses.items()} == {
            "loss_classifier": 1.0,
            "loss_box_reg": 2.0,
            "loss_mask": 3.0,
            "loss_keypoint": 4.0,
        }
        assert [len(calls[name]) for name in ("box", "mask", "key")] == [4, 5, 4]
        assert calls["box"][0].shape == (sum(map(len, calls["box"][2])), CLASSES)
        assert calls["mask"][0].shape[1] == CLASSES  # all of them, where torchvision's loss would want one

    def test_bfloat16_targets(self):
        """Oracle: the same targets, rounded to bfloat16 and widened again."""
        heads = second_stage().train()
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        losses = []
        for widen in (False, True):
            rounded = [
                {k: v.bfloat16() if v.is_floating_point() else v for k, v in target.items()} for target in targets
            ]
            if widen:
                rounded = [
                    {k: v.float() if v.is_floating_point() else v for k, v in target.items()} for target in rounded
                ]
            torch.manual_seed(6)
            losses.append(heads(features, proposals, shapes, rounded)[1])
        torch.testing.assert_close(*losses, **CLOSE)

    @pytest.mark.parametrize(
        "box",
        [
            (5, 5, 5, 9),
            (5, 5, 9, 5),
            (9, 5, 5, 9),
            (5, 9, 9, 5),
            (5, 5, float("nan"), 9),
            (5, 5, float("inf"), 9),
        ],
        ids=["no_width", "no_height", "inverted_x", "inverted_y", "nan", "infinite"],
    )
    def test_degenerate_ground_truth_is_named(self, box):
        """Oracle: the place where it was put. torchvision's losses are NaN or infinite."""
        heads = second_stage().train()
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        targets[1]["boxes"][2] = torch.tensor(box)
        with pytest.raises(ValueError, match=r"`targets\[1\]\['boxes'\]\[2\]` must be finite with x1 < x2"):
            heads(features, proposals, shapes, targets)

    def test_a_batch_without_samples_has_losses_of_zero(self):
        """Oracle: nothing to learn from, so 0, with a gradient for every parameter. torchvision's are NaN."""
        heads = second_stage().train()
        _, losses = heads(*problem((0, 0), (0, 0)))
        assert [loss.item() for loss in losses.values()] == [0.0] * 4
        gradients = torch.autograd.grad(sum(losses.values()), list(heads.parameters()), allow_unused=True)
        assert all(gradient is not None and not gradient.any() for gradient in gradients)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_autocast_pools_half_features_as_they_are(self, dtype, monkeypatch):
        """Oracle: the dtypes that reach the operator; the losses without autocast of the rounded features."""
        seen = []
        operators = roialign_ext.autograd.operators

        class Recording:
            def __getattr__(self, name):
                return getattr(operators, name)

            def roi_align_forward(self, features, *arguments):
                seen.append({map.dtype for map in features})
                return operators.roi_align_forward(features, *arguments)

        monkeypatch.setattr("roialign_ext.autograd.operators", Recording())
        heads = second_stage().train()
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        features = {name: map.detach().to(dtype) for name, map in features.items()}
        losses = []
        for enabled in (True, False):
            torch.manual_seed(8)
            maps = features if enabled else {name: map.float() for name, map in features.items()}
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                losses.append(heads(maps, proposals, shapes, targets)[1])
        assert seen[0] == {dtype}  # of the boxes; masks of ground truth are float32
        torch.testing.assert_close(*losses, rtol=0.05, atol=0.01)
        with torch.autocast("cpu", dtype=dtype):
            result, _ = heads.eval()(features, proposals, shapes)
        assert result[0]["boxes"].dtype == torch.float32

    def test_proposals_are_matched_in_pieces(self, monkeypatch):
        """Oracle: the whole matrix at once."""
        monkeypatch.setattr("roialign_ext.detection.matching._MAX_PAIRS", 2**30)
        ours = second_stage(()).train()
        _, proposals, _, targets = problem((500, 30), (7, 2))
        boxes = [target["boxes"] for target in targets]
        labels = [target["labels"] for target in targets]
        whole = ours.assign_targets_to_proposals(proposals, boxes, labels)
        largest = []
        monkeypatch.setattr("roialign_ext.detection.matching._MAX_PAIRS", 64)

        def similarity(gt_boxes: Tensor, others: Tensor) -> Tensor:
            largest.append(len(gt_boxes) * len(others))
            return detection.box_iou(gt_boxes, others)

        ours.box_similarity = similarity
        assert_same = torch.testing.assert_close
        assert_same(ours.assign_targets_to_proposals(proposals, boxes, labels), whole, rtol=0, atol=0)
        assert max(largest) <= 64 and len(largest) > 50

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("low", [0.5, 0.3], ids=["one_threshold", "two_thresholds"])
    def test_the_matching_operator_is_the_matrix_of_overlaps(self, dtype, low):
        """Oracle: torchvision's box_iou and Matcher, to the bit, boxes without area, inverted and not finite too."""
        ops = pytest.importorskip("torchvision.ops")
        utils = pytest.importorskip("torchvision.models.detection._utils")
        truth = torch.cat([target["boxes"] for target in problem((1, 1), (7, 6))[3]]).to(dtype)
        boxes = torch.cat([truth.repeat(40, 1) + torch.randn(520, 4, dtype=dtype) * 4, truth])
        truth = torch.cat([truth, truth[:3]])  # ties
        for row, box in enumerate([(5, 5, 5, 5), (0, 0, 0, 9), (9, 9, 5, 5), (9, 0, 5, 9), (0, 0, 1e30, 1e30)]):
            boxes[row] = torch.tensor(box)
        for row, odd in enumerate([torch.nan, torch.inf, -torch.inf, torch.nan], start=5):
            boxes[row, row - 5] = odd
        for count in (len(truth), 1):
            overlaps = ops.box_iou(truth[:count], boxes)
            overlap, best = torch.ops.roialign_ext.match(truth[:count], boxes)
            expected = overlaps.max(dim=0)
            torch.testing.assert_close(overlap, expected.values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(best, expected.indices)
            matches = match_boxes(detection.Matcher(0.5, low), detection.box_iou, truth[:count], boxes)
            assert torch.equal(matches, utils.Matcher(0.5, low)(overlaps))


class TestErrors:
    """Oracle: the type torchvision raises, and a message that names what is wrong."""

    def wrong(self, change) -> tuple:
        features, proposals, shapes, targets = problem((8, 8), (2, 2))
        change(targets)
        return features, proposals, shapes, targets

    @pytest.mark.parametrize(
        "key, value, error",
        [
            ("boxes", torch.ones(2, 4, dtype=torch.int64), TypeError),
            ("labels", torch.ones(2), TypeError),
            ("labels", torch.ones(2, dtype=torch.int32), TypeError),
            ("keypoints", torch.ones(2, 3, 3, dtype=torch.int64), TypeError),
            ("boxes", None, KeyError),
            ("labels", None, KeyError),
            ("keypoints", None, KeyError),
            ("masks", None, ValueError),
        ],
    )
    def test_type_of_error(self, key, value, error):
        def change(targets):
            if value is None:
                del targets[1][key]
            else:
                targets[1][key] = value

        ours = second_stage().train()
        inputs = self.wrong(change)
        with pytest.raises(error, match=rf"targets\[1\].*{key}"):
            ours(*inputs)
        with pytest.raises(error):
            torchvision_twin(ours)(*inputs)

    def test_targets_are_needed_in_training(self):
        ours = second_stage().train()
        features, proposals, shapes, _ = problem((8, 8), (2, 2))
        for heads in (ours, torchvision_twin(ours)):
            with pytest.raises(ValueError, match="targets"):
                heads(features, proposals, shapes)

    def test_counts_that_do_not_fit(self):
        ours = second_stage(()).train()
        with pytest.raises(ValueError, match="one for each of 2 images, got 1"):
            ours(*self.wrong(lambda targets: targets.pop()))
        with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\]` must have shape \(2,\)"):
            ours(*self.wrong(lambda targets: targets[0].update(labels=torch.ones(3, dtype=torch.int64))))

    def test_thresholds_in_the_wrong_order(self):
        pytest.importorskip("torchvision")
        from torchvision.models.detection._utils import Matcher

        for kind in (detection.Matcher, Matcher):
            with pytest.raises(AssertionError):
                kind(0.3, 0.5)


def test_checkpoints_of_version_1_have_other_names_for_mask_convolutions():
    """Oracle: the same tensors under the names of torchvision before 0.13."""
    head = detection.MaskRCNNHeads(4, (5, 6), 1)
    old = {f"mask_fcn{int(key[0]) + 1}.{key.split('.')[-1]}": value for key, value in head.state_dict().items()}
    assert sorted(old) == ["mask_fcn1.bias", "mask_fcn1.weight", "mask_fcn2.bias", "mask_fcn2.weight"]
    other = detection.MaskRCNNHeads(4, (5, 6), 1)
    other.load_state_dict(old, strict=True)
    torch.testing.assert_close(dict(other.state_dict()), dict(head.state_dict()), rtol=0, atol=0)


def test_training_asks_for_numbers_three_times(monkeypatch):
    """Oracle: a count of what makes a host wait for a device, for masks and keypoints on two images.

    torchvision asks 24 times with nonzero() alone. Once for degenerate ground truth, once for the sampler,
    once for the positives among the samples.
    """
    asked = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "unique"):
        original = getattr(Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            asked.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    # As on a device: where the count of a mask is known, nobody asks nonzero() for it.
    for module in ("matching", "keypoint_head"):
        monkeypatch.setattr(f"roialign_ext.detection.{module}.host_waits_for", lambda device: True)
    heads = second_stage().train()
    heads(*problem((40, 30), (3, 5)))
    assert asked == ["__bool__", "tolist", "tolist"]


@BRANCH
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_it_waits_for_a_device_less_often_than_torchvision(training, branches):
    """Oracle: the same count of torchvision's RoIHeads, of calls that would wait for a device if there were one.

    In evaluation: how many scores are high enough, how many boxes stay; for keypoints the sizes of these, and which are
    resized together.
    """
    pytest.importorskip("torchvision")
    count = importlib.import_module("bench_second_stage").count_synchronisations
    ours = second_stage(branches).train(training)
    features, proposals, shapes, targets = problem((40, 30), (3, 5))
    counts = [
        count(lambda heads=heads: heads(features, list(proposals), shapes, targets), torch.device("cpu"))
        for heads in (ours, torchvision_twin(ours))
    ]
    assert 0 < sum(counts[0].values()) < sum(counts[1].values()) / 2, counts
    assert training or sum(counts[0].values()) == (4 if "keypoint" in branches else 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_it_waits_no_more_than_that_on_a_gpu(training):
    """Oracle: torch's own count of synchronising calls, fewer than in torchvision's RoIHeads."""
    counts = []
    ours = second_stage().train(training)
    for heads in (ours, torchvision_twin(ours)):
        heads.cuda()
        features, proposals, shapes, targets = problem((40, 30), (3, 5))
        features = {name: map.cuda() for name, map in features.items()}
        proposals = [boxes.cuda() for boxes in proposals]
        targets = [{key: value.cuda() for key, value in target.items()} for target in targets]
        heads(features, list(proposals), shapes, targets)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            heads(features, list(proposals), shapes, targets)
        torch.cuda.set_sync_debug_mode("default")
        counts.append(len(caught))
    assert counts[0] < counts[1] / 2
