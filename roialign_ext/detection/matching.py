"""Which proposals are compared with which ground truth, and which of them make up a training batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the compiled operators)
from .boxes import box_iou

# Pairs of ground truth and proposals that are compared at once, 4 MiB for each temporary.
_MAX_PAIRS = 2**20


class Matcher:
    """Gives every prediction the ground truth that fits it best, or none.

    Args:
        high_threshold: a quality from here on is a match.
        low_threshold: a quality below this is none; between the two a prediction is neither.
        allow_low_quality_matches: also match, to its own best ground truth, every prediction that is some
            ground truth's best, ties included.

    Raises:
        AssertionError: `low_threshold > high_threshold` (torchvision's type of error).

    Example:
        >>> quality = torch.tensor([[0.1, 0.8, 0.4], [0.6, 0.7, 0.0]])  # 2 ground truths, 3 predictions
        >>> Matcher(0.5, 0.3)(quality)
        tensor([ 1,  0, -2])
    """

    BELOW_LOW_THRESHOLD = -1
    BETWEEN_THRESHOLDS = -2

    def __init__(self, high_threshold: float, low_threshold: float, allow_low_quality_matches: bool = False) -> None:
        if low_threshold > high_threshold:
            raise AssertionError(
                f"Matcher: `low_threshold` must be at most `high_threshold`, {high_threshold}, got {low_threshold}"
            )
        self.high_threshold = high_threshold
        self.low_threshold = low_threshold
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Match by quality.

        Args:
            match_quality_matrix: `(M, N)`, the quality of every pair of M ground truths and N predictions.

        Returns:
            `(N,)` int64: an index of a ground truth, `BELOW_LOW_THRESHOLD` or `BETWEEN_THRESHOLDS`.

        Raises:
            ValueError: there are no ground truths or no predictions.
        """
        if match_quality_matrix.numel() == 0:
            missing = "ground-truth" if match_quality_matrix.shape[0] == 0 else "proposal"
            raise ValueError(f"No {missing} boxes available for one of the images during training")
        quality, best = match_quality_matrix.max(dim=0)
        matches = self.of_best(quality, best)
        if self.allow_low_quality_matches:
            is_some_best = (match_quality_matrix == match_quality_matrix.amax(dim=1, keepdim=True)).any(dim=0)
            matches = torch.where(is_some_best, best, matches)
        return matches

    def of_best(self, quality: Tensor, best: Tensor) -> Tensor:
        """Matches `(N,)` by the best quality `(N,)` of every prediction and the ground truth `(N,)` it is with."""
        matches = best
        if self.low_threshold < self.high_threshold:
            matches = matches.masked_fill(quality < self.high_threshold, self.BETWEEN_THRESHOLDS)
        return matches.masked_fill(quality < self.low_threshold, self.BELOW_LOW_THRESHOLD)


def match_boxes(
    matcher: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor, Tensor], Tensor],
    gt_boxes: Tensor,
    boxes: Tensor,
) -> Tensor:
    """`matcher(similarity(gt_boxes, boxes))` without the whole matrix.

    On a CPU `Matcher` and `box_iou` are one operator that keeps no overlap but the largest. Elsewhere a matcher
    that looks at one prediction at a time, as `Matcher` does without low-quality matches, gets the predictions in
    pieces of at most 2^20 pairs.

    Args:
        matcher: `(M, N)` -> `(N,)`, as `Matcher`.
        similarity: `(M, 4)`, `(N, 4)` -> `(M, N)`, as `box_iou`.
        gt_boxes: `(M, 4)`, at least one.
        boxes: `(N, 4)`, at least one.
    """
    if _can_fuse(matcher, similarity, gt_boxes, boxes):
        return matcher.of_best(*torch.ops.roialign_ext.match(gt_boxes.detach(), boxes.detach()))
    piece = max(1, _MAX_PAIRS // len(gt_boxes))
    if len(boxes) <= piece or getattr(matcher, "allow_low_quality_matches", True):
        return matcher(similarity(gt_boxes, boxes))
    return torch.cat([matcher(similarity(gt_boxes, part)) for part in boxes.split(piece)])


@torch.library.register_fake("roialign_ext::match")
def _(ground_truth, boxes):
    overlap = boxes.new_empty(boxes.shape[0], dtype=torch.promote_types(boxes.dtype, torch.float32))
    return overlap, overlap.new_empty(boxes.shape[0], dtype=torch.int64)


def _can_fuse(matcher: object, similarity: object, gt_boxes: Tensor, boxes: Tensor) -> TypeGuard[Matcher]:
    return (
        type(matcher) is Matcher
        and not matcher.allow_low_quality_matches
        and similarity is box_iou
        and boxes.device.type == "cpu"
        and boxes.dtype == gt_boxes.dtype
        and boxes.dtype in (torch.float32, torch.float64)
    )


class BalancedPositiveNegativeSampler:
    """Draws a batch of fixed size from every image, with a limited share of positives.

    Takes `min(int(batch_size_per_image * positive_fraction), positives)` positives and fills up with
    negatives. Draws what torchvision's sampler draws from the same random state.

    Args:
        batch_size_per_image: samples of an image; fewer where there are not enough.
        positive_fraction: largest share of positives.

    Example:
        >>> sampler = BalancedPositiveNegativeSampler(4, 0.5)
        >>> positive, negative = sampler([torch.tensor([0, 0, 7, 0, -1])])
        >>> positive, negative
        ([tensor([0, 0, 1, 0, 0], dtype=torch.uint8)], [tensor([1, 1, 0, 1, 0], dtype=torch.uint8)])
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        # Once: torch.compile makes a variable of a fraction that it meets, and Inductor loses it in what it checks.
        self.max_positive = int(batch_size_per_image * positive_fraction)

    def __call__(self, matched_idxs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Sample every image.

        Args:
            matched_idxs: for every image `(K_i,)` integers: positive, 0 for negatives, -1 for the ignored.

        Returns:
            Masks `(K_i,)` uint8 of the sampled positives, and of the sampled negatives.
        """
        drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, chosen in zip(matched_idxs, self._draw(matched_idxs)):
            for masks, index in zip(drawn, chosen):
                masks.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, index, 1))
        return drawn

    def indices(self, matched_idxs: Sequence[Tensor]) -> list[Tensor]:
        """For every image the ascending indices of the samples that a call would mark, positive or negative."""
        sampled = []
        for labels, (positive, negative) in zip(matched_idxs, self._draw(matched_idxs)):
            mask = torch.zeros_like(labels, dtype=torch.bool)
            mask.index_fill_(0, positive, True).index_fill_(0, negative, True)
            sampled.append(_positions(mask, len(positive) + len(negative)))
        return sampled

    def _draw(self, matched_idxs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For every image the indices of its positive and of its negative samples, in the order of the draw."""
        kinds = positions([labels >= 1 for labels in matched_idxs] + [labels == 0 for labels in matched_idxs])
        drawn = []
        for positive, negative in zip(kinds, kinds[len(matched_idxs) :]):
            positive = _choice(positive, self.max_positive)
            drawn.append((positive, _choice(negative, self.batch_size_per_image - len(positive))))
        return drawn


def _choice(candidates: Tensor, most: int) -> Tensor:
    """`most` of the candidates, or all of them, in random order."""
    count = len(candidates)
    return candidates.index_select(0, torch.randperm(count, device=candidates.device).narrow(0, 0, min(count, most)))


def host_waits_for(device: torch.device) -> bool:
    """Whether the host must wait for a number of the device's, such as how many positions nonzero() finds."""
    return device.type != "cpu"


def positions(masks: Sequence[Tensor]) -> list[Tensor]:
    """For every mask `(K_i,)` the ascending indices where it is true, with one question to the device for all."""
    if not masks or not host_waits_for(masks[0].device):
        return [_positions(mask, 0) for mask in masks]
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [_positions(mask, count) for mask, count in zip(masks, counts)]


def _positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask is true. On a device it must be so `count` times: unlike nonzero() this asks it for nothing."""
    if not host_waits_for(mask.device):
        return mask.nonzero().squeeze(1)
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    slot = (mask.cumsum(0) - 1).masked_fill(~mask, count)
    found.scatter_(0, slot, torch.arange(len(mask), device=mask.device))
    return found[:count]
