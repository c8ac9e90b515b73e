"""RoIHeads: proposals to losses or detections, over all images at once. Knows no kernel and no backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .box_head import codes_of_class, fastrcnn_loss
from .boxes import BoxCoder, _shorter_side, box_iou, suppress
from .keypoint_head import keypointrcnn_inference, keypointrcnn_loss
from .mask_head import MaskRCNNPredictor, maskrcnn_inference, maskrcnn_loss
from .matching import BalancedPositiveNegativeSampler, Matcher, match_boxes, positions

Target = Mapping[str, Tensor]

_SHORTEST_SIDE = 1e-2  # pixels; narrower detections are dropped


class RoIHeads(nn.Module):
    """The second stage of Faster, Mask and Keypoint R-CNN. Takes the place of torchvision's class of this
    name.

    Constructor order, attributes, state_dict keys, results and losses are torchvision's. Masks and keypoints
    are predicted where all three of their modules are given.

    Args:
        box_roi_pool: `(features, proposals, image_shapes)` -> `(K, C, P, Q)`, such as `MultiScaleRoIAlign`.
        box_head: pooled boxes -> what `box_predictor` takes.
        box_predictor: -> logits `(K, classes)` and codes `(K, 4 * classes)`, or `(K, 4)` for all classes
            together.
        fg_iou_thresh: overlap with a ground truth from which a proposal has its class.
        bg_iou_thresh: overlap below which a proposal is background; between the two it is ignored.
        batch_size_per_image, positive_fraction: see `BalancedPositiveNegativeSampler`.
        bbox_reg_weights: see `BoxCoder`; None means (10, 10, 5, 5).
        score_thresh: a detection scores above this.
        nms_thresh: largest overlap of two detections of a class.
        detections_per_img: the best that are returned.
        mask_roi_pool, mask_head, mask_predictor: the mask branch, logits `(K, classes, M, M)`.
        keypoint_roi_pool, keypoint_head, keypoint_predictor: the keypoint branch, logits
            `(K, keypoints, S, S)`.
        box_loss, mask_loss, keypoint_loss: called as `fastrcnn_loss`, `maskrcnn_loss` and
            `keypointrcnn_loss`.
        losses_in_eval: with targets, return losses beside detections in evaluation mode too, as in training
            from sampled proposals. Without this, targets are not used there.

    Example:
        >>> from roialign_ext import MultiScaleRoIAlign
        >>> from roialign_ext.detection import FastRCNNPredictor, RoIHeads, TwoMLPHead
        >>> pool = MultiScaleRoIAlign(["0"], 7, 2)
        >>> heads = RoIHeads(pool, TwoMLPHead(8 * 7 * 7, 64), FastRCNNPredictor(64, 3),
        ...                  0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100).eval()
        >>> features = {"0": torch.rand(1, 8, 16, 16)}
        >>> detections, losses = heads(features, [torch.tensor([[4.0, 4.0, 40.0, 60.0]])], [(64, 64)])
        >>> list(detections[0]), losses
        (['boxes', 'labels', 'scores'], {})
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        box_head: nn.Module,
        box_predictor: nn.Module,
        fg_iou_thresh: float,
        bg_iou_thresh: float,
        batch_size_per_image: int,
        positive_fraction: float,
        bbox_reg_weights: tuple[float, float, float, float] | None,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
        keypoint_roi_pool: nn.Module | None = None,
        keypoint_head: nn.Module | None = None,
        keypoint_predictor: nn.Module | None = None,
        *,
        box_loss: Callable[..., tuple[Tensor, Tensor]] = fastrcnn_loss,
        mask_loss: Callable[..., Tensor] = maskrcnn_loss,
        keypoint_loss: Callable[..., Tensor] = keypointrcnn_loss,
        losses_in_eval: bool = False,
    ):
        super().__init__()
        self.box_similarity = box_iou
        self.proposal_matcher = Matcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=False)
        self.fg_bg_sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)
        self.box_coder = BoxCoder(bbox_reg_weights or (10.0, 10.0, 5.0, 5.0))

        self.box_roi_pool = box_roi_pool
        self.box_head = box_head
        self.box_predictor = box_predictor

        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img

        self.mask_roi_pool = mask_roi_pool
        self.mask_head = mask_head
        self.mask_predictor = mask_predictor

        self.keypoint_roi_pool = keypoint_roi_pool
        self.keypoint_head = keypoint_head
        self.keypoint_predictor = keypoint_predictor

        self.box_loss = box_loss
        self.mask_loss = mask_loss
        self.keypoint_loss = keypoint_loss
        self.losses_in_eval = losses_in_eval

    def has_mask(self) -> bool:
        """Whether all modules of the mask branch are there."""
        return None not in (self.mask_roi_pool, self.mask_head, self.mask_predictor)

    def has_keypoint(self) -> bool:
        """Whether all modules of the keypoint branch are there."""
        return None not in (self.keypoint_roi_pool, self.keypoint_head, self.keypoint_predictor)

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        Args:
            features: maps `(N, C, H_l, W_l)` by name.
            proposals: for every image `(K_i, 4)` boxes in pixels.
            image_shapes: `(height, width)` of every image, before padding.
            targets: for every image a dict of `boxes` `(G_i, 4)`, any floating point; `labels` `(G_i,)`
                int64; for masks `masks` `(G_i, H, W)`; for keypoints `keypoints` `(G_i, keypoints, 3)`, any
                floating point.

        Returns:
            For every image, in evaluation, a dict of `boxes` `(D_i, 4)`, `labels`, `scores`, best score
            first, then `masks` `(D_i, 1, M, M)` probabilities, then `keypoints` `(D_i, keypoints, 3)` and
            `keypoints_scores` `(D_i, keypoints)`; in training an empty list. And a dict of `loss_classifier`
            and `loss_box_reg`, then `loss_mask`, then `loss_keypoint`; without losses an empty dict.

        Raises:
            ValueError: targets are missing in training or do not fit; a ground-truth box is degenerate,
                without width or height or not finite.
            KeyError, TypeError: a target lacks boxes, labels or keypoints, or has them in a wrong dtype.
        """
        if targets is not None:
            self._check_dtypes(targets)
        result: list[dict[str, Tensor]] = []
        losses: dict[str, Tensor] = {}
        if self.training or (self.losses_in_eval and targets is not None):
            losses = self._losses(features, proposals, image_shapes, targets)
        if not self.training:
            result = self._detections(features, proposals, image_shapes)
        return result, losses

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        samples, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        class_logits, box_regression = self._box_branch(features, samples, image_shapes)
        losses = dict(
            zip(
                ("loss_classifier", "loss_box_reg"),
                self.box_loss(class_logits, box_regression, labels, regression_targets),
            )
        )
        if self.has_mask() or self.has_keypoint():
            # Only positives have masks and keypoints.
            positive = positions([label > 0 for label in labels])
            samples, matched, labels = (_selected(rows, positive) for rows in (samples, matched, labels))
        if self.has_mask():
            # A loss of the user's may want the masks of all classes.
            of_class = labels if self.mask_loss is maskrcnn_loss else None
            logits = self._mask_branch(features, samples, image_shapes, of_class)
            masks, gt_labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
            losses["loss_mask"] = self.mask_loss(logits, samples, masks, gt_labels, matched)
        if self.has_keypoint():
            logits = self._keypoint_branch(features, samples, image_shapes)
            keypoints = [t["keypoints"] for t in targets]
            losses["loss_keypoint"] = self.keypoint_loss(logits, samples, keypoints, matched)
        return losses

    def _detections(self, features, proposals, image_shapes) -> list[dict[str, Tensor]]:
        class_logits, box_regression = self._box_branch(features, proposals, image_shapes)
        found = self.postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        boxes, _, labels = found
        result = [dict(boxes=b, labels=label, scores=s) for b, s, label in zip(*found)]
        if self.has_mask():
            logits = self._mask_branch(features, boxes, image_shapes, labels)
            for detections, masks in zip(result, maskrcnn_inference(logits, labels)):
                detections["masks"] = masks
        if self.has_keypoint():
            logits = self._keypoint_branch(features, boxes, image_shapes)
            for detections, keypoints, scores in zip(result, *keypointrcnn_inference(logits, boxes)):
                detections["keypoints"] = keypoints
                detections["keypoints_scores"] = scores
        return result

    def _box_branch(self, features, boxes, image_shapes) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def _mask_branch(self, features, boxes, image_shapes, labels) -> Tensor:
        """Mask logits of all classes, or, where the predictor can choose, of the classes `labels`."""
        pool, head, predictor = self.mask_roi_pool, self.mask_head, self.mask_predictor
        assert pool is not None and head is not None and predictor is not None
        rows = [pool(features, boxes, image_shapes)]
        if labels is not None and isinstance(predictor, MaskRCNNPredictor):
            rows.append(torch.cat(labels))
        return self._logits(head, predictor, rows, len(boxes))

    def _keypoint_branch(self, features, boxes, image_shapes) -> Tensor:
        pool, head, predictor = self.keypoint_roi_pool, self.keypoint_head, self.keypoint_predictor
        assert pool is not None and head is not None and predictor is not None
        return self._logits(head, predictor, [pool(features, boxes, image_shapes)], len(boxes))

    def _logits(self, head: nn.Module, predictor: nn.Module, rows: list[Tensor], num_images: int) -> Tensor:
        """Head and predictor over pooled rows, and over what else the predictor takes for each.

        In a compiled training step zeros follow them, up to as many rows as the sampler may draw. Inductor fails
        on convolutions of rows whose number only the device knows: it takes their results for contiguous where
        oneDNN makes them channels_last (torch 2.11, 2.13).
        """
        x, *others = rows
        # No padding where nothing bounds the number, and none into the statistics of a batch.
        is_sampled = type(self) is RoIHeads and type(self.fg_bg_sampler) is BalancedPositiveNegativeSampler
        has_statistics = (isinstance(m, _BatchNorm) and m.training for m in (*head.modules(), *predictor.modules()))
        if not (torch.compiler.is_compiling() and self.training and is_sampled) or any(has_statistics):
            return predictor(head(x), *others)
        count, most = len(x), num_images * self.fg_bg_sampler.max_positive
        torch._check(count <= most)
        x, *others = (torch.cat([of, of.new_zeros(most - count, *of.shape[1:])]) for of in rows)
        return predictor(head(x), *others)[:count]

    # From proposals to samples

    def select_training_samples(
        self, proposals: Sequence[Tensor], targets: Sequence[Target] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Add the ground truth to the proposals, match, and sample.

        Args:
            proposals: for every image `(K_i, 4)` boxes.
            targets: for every image the ground truth, see `forward`.

        Returns:
            For every image the sampled boxes `(S_i, 4)`; their ground truths' indices `(S_i,)`, 0 for
            background; their classes `(S_i,)`, 0 for background; and their codes `(S_i, 4)`, of no meaning
            for background.

        Raises:
            ValueError: targets are missing or do not fit, or a ground-truth box is degenerate.
        """
        self.check_targets(targets)
        assert targets is not None
        _check_counts(proposals, targets)
        gt_boxes = [target["boxes"].to(proposals[0].dtype).reshape(-1, 4) for target in targets]
        _check_ground_truth(gt_boxes)
        candidates = self.add_gt_proposals(proposals, gt_boxes)
        matched, labels = self.assign_targets_to_proposals(candidates, gt_boxes, [t["labels"] for t in targets])
        sampled = self.subsample(labels)

        candidates, matched, labels = (_selected(rows, sampled) for rows in (candidates, matched, labels))
        # An image without ground truth gets one box of zeros, so that index 0 is there.
        gt_boxes = [boxes if len(boxes) else boxes.new_zeros(1, 4) for boxes in gt_boxes]
        matched_boxes = _selected(gt_boxes, matched)
        return candidates, matched, labels, list(self.box_coder.encode(matched_boxes, candidates))

    def check_targets(self, targets: Sequence[Target] | None) -> None:
        """Raise ValueError unless every target has what training needs."""
        if targets is None:
            raise ValueError("RoIHeads: `targets` must be given for losses, got None")
        for key in ("boxes", "labels", "masks") if self.has_mask() else ("boxes", "labels"):
            for image, target in enumerate(targets):
                if key not in target:
                    raise ValueError(f"RoIHeads: `targets[{image}]` must have the key {key!r}, got {list(target)}")

    def _check_dtypes(self, targets: Sequence[Target]) -> None:
        keys = ("boxes", "labels", "keypoints") if self.has_keypoint() else ("boxes", "labels")
        for image, target in enumerate(targets):
            for key in keys:
                if key not in target:  # torchvision's type of error
                    raise KeyError(f"RoIHeads: `targets[{image}]` must have the key {key!r}, got {list(target)}")
                dtype = target[key].dtype
                if not (dtype == torch.int64 if key == "labels" else dtype.is_floating_point):
                    expected = "int64" if key == "labels" else "floating point"
                    raise TypeError(f"RoIHeads: `targets[{image}][{key!r}]` must be {expected}, got {dtype}")

    def add_gt_proposals(self, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor]) -> list[Tensor]:
        """For every image the proposals, then the ground-truth boxes."""
        return [torch.cat(pair) for pair in zip(proposals, gt_boxes)]

    def assign_targets_to_proposals(
        self, proposals: Sequence[Tensor], gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The ground truth and the class of every proposal.

        Args:
            proposals: for every image `(K_i, 4)` boxes.
            gt_boxes, gt_labels: for every image `(G_i, 4)` boxes and `(G_i,)` classes.

        Returns:
            For every image indices `(K_i,)`, 0 where there is none, and classes `(K_i,)` int64, 0 for
            background and -1 for those to ignore.
        """
        matched, labels = [], []
        # What is between the thresholds, match -2, background, -1, and objects, from 0 on, by match + 2.
        without_truth = torch.arange(-1, 1, device=proposals[0].device)
        for boxes, truth, classes in zip(proposals, gt_boxes, gt_labels):
            if len(truth) == 0:
                match = torch.full((len(boxes),), Matcher.BELOW_LOW_THRESHOLD, device=boxes.device)
            else:
                match = match_boxes(self.proposal_matcher, self.box_similarity, truth, boxes)
            matched.append(match.clamp(min=0))
            labels.append(torch.cat([without_truth, classes.long()]).index_select(0, match + 2))
        return matched, labels

    def subsample(self, labels: Sequence[Tensor]) -> list[Tensor]:
        """For every image the ascending indices that the sampler draws from classes `(K_i,)`."""
        sampler = self.fg_bg_sampler
        if type(sampler) is BalancedPositiveNegativeSampler:
            return sampler.indices(labels)
        return positions([(positive | negative).bool() for positive, negative in zip(*sampler(labels))])

    # From predictions to detections

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The best boxes of every image.

        Scores above `score_thresh`, boxes clipped to the image, no side below 0.01 pixels, suppressed by
        class; the first `detections_per_img`. Only codes of boxes with such a score are decoded.

        Args:
            class_logits: `(K, classes)`.
            box_regression: `(K, 4 * classes)` codes, or `(K, 4)`.
            proposals: for every image `(K_i, 4)` boxes, K in all.
            image_shapes: `(height, width)` of every image.

        Returns:
            For every image boxes `(D_i, 4)`, scores `(D_i,)` and classes `(D_i,)` int64, best score first.
        """
        scores = F.softmax(class_logits, -1)
        row, label = (scores[:, 1:] > self.score_thresh).nonzero(as_tuple=True)
        label = label + 1
        scores = scores[row, label]
        boxes = self.box_coder.decode_single(
            codes_of_class(box_regression[row], label), torch.cat(list(proposals))[row]
        )
        image = torch.cat([label.new_full((len(of),), i) for i, of in enumerate(proposals)])[row]
        boxes = torch.minimum(boxes.clamp(min=0), _far_corners(image_shapes, boxes)[image])

        # Boxes that are too narrow stay until the end, where the host asks for all numbers at once. Each is a group
        # of its own, so that it drops no other.
        wide = _shorter_side(boxes) >= _SHORTEST_SIDE
        group = torch.where(wide, image * class_logits.shape[1] + label, -1 - torch.arange(len(row), device=row.device))
        order, keep = suppress("RoIHeads", boxes, scores, group, self.nms_thresh)
        keep, image = keep & wide[order], image[order]
        of_image = positions([keep & (image == i) for i in range(len(proposals))])
        of_image = [order[index[: self.detections_per_img]] for index in of_image]
        return [boxes[i] for i in of_image], [scores[i] for i in of_image], [label[i] for i in of_image]


def _selected(rows: Sequence[Tensor], index: Sequence[Tensor]) -> list[Tensor]:
    """Of every image's rows those of its index."""
    return [row.index_select(0, i) for row, i in zip(rows, index)]


def _far_corners(image_shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """`(N, 4)` limits of boxes `[x1, y1, x2, y2]` in images of (height, width), in the dtype and device of a tensor."""
    # Filled there: a copy of a list to a device would make the host wait for it.
    sides = [like.new_full((1,), side) for height, width in image_shapes for side in (width, height)]
    return torch.cat(sides).view(-1, 2).repeat(1, 2)


def _check_counts(proposals: Sequence[Tensor], targets: Sequence[Any]) -> None:
    if len(targets) != len(proposals) or len(proposals) == 0:
        raise ValueError(
            f"RoIHeads: `targets` must be one for each of {max(len(proposals), 1)} images, got {len(targets)}"
        )
    for image, target in enumerate(targets):
        shape, count = tuple(target["boxes"].shape), len(target["labels"])
        if shape[1:] != (4,) and target["boxes"].numel() > 0:
            raise ValueError(f"RoIHeads: `targets[{image}]['boxes']` must have shape (G, 4), got {shape}")
        if count != shape[0]:
            raise ValueError(
                f"RoIHeads: `targets[{image}]['labels']` must have shape ({shape[0]},), one for each box, got {count}"
            )


def _check_ground_truth(gt_boxes: Sequence[Tensor]) -> None:
    """A box without width or height has no code: its loss would be infinite or NaN."""
    boxes = torch.cat(list(gt_boxes))
    sizes = boxes[:, 2:] - boxes[:, :2]
    # Finite where both ends are; every comparison with NaN is false.
    right = (sizes > 0) & (sizes < torch.inf)
    if torch.compiler.is_compiling():
        # A graph cannot branch on values; this becomes a RuntimeError when it runs, without image and box.
        assert right.all(), "RoIHeads: boxes of `targets` must be finite with x1 < x2 and y1 < y2"
    elif not right.all():
        wrong = ~right.all(dim=1)
        row = int(wrong.nonzero()[0])
        image = 0
        while row >= len(gt_boxes[image]):
            row -= len(gt_boxes[image])
            image += 1
        raise ValueError(
            f"RoIHeads: `targets[{image}]['boxes'][{row}]` must be finite with x1 < x2 and y1 < y2, "
            f"got {gt_boxes[image][row].tolist()}"
        )
