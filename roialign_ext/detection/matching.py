"""Which proposals are compared with which ground truth, and which of them make up a training batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
        matches = best.masked_fill(quality < self.high_threshold, self.BETWEEN_THRESHOLDS)
        matches = matches.masked_fill(quality < self.low_threshold, self.BELOW_LOW_THRESHOLD)
        if self.allow_low_quality_matches:
            is_some_best = (match_quality_matrix == match_quality_matrix.amax(dim=1, keepdim=True)).any(dim=0)
            matches = torch.where(is_some_best, best, matches)
        return matches


def match_boxes(
    matcher: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor, Tensor], Tensor],
    gt_boxes: Tensor,
    boxes: Tensor,
) -> Tensor:
    """`matcher(similarity(gt_boxes, boxes))` without the whole matrix.

    A matcher that looks at one prediction at a time, as `Matcher` does without low-quality matches, gets the
    predictions in pieces of at most 2^20 pairs.

    Args:
        matcher: `(M, N)` -> `(N,)`, as `Matcher`.
        similarity: `(M, 4)`, `(N, 4)` -> `(M, N)`, as `box_iou`.
        gt_boxes: `(M, 4)`, at least one.
        boxes: `(N, 4)`, at least one.
    """
    piece = max(1, _MAX_PAIRS // len(gt_boxes))
    if len(boxes) <= piece or getattr(matcher, "allow_low_quality_matches", True):
        return matcher(similarity(gt_boxes, boxes))
    return torch.cat([matcher(similarity(gt_boxes, part)) for part in boxes.split(piece)])


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

    def __call__(self, matched_idxs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Sample every image.

        Args:
            matched_idxs: for every image `(K_i,)` integers: positive, 0 for negatives, -1 for the ignored.

        Returns:
            Masks `(K_i,)` uint8 of the sampled positives, and of the sampled negatives.
        """
        kinds = [(labels >= 1, labels == 0) for labels in matched_idxs]
        drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
        if not kinds:
            return drawn
        counts = torch.stack([torch.stack([kind.sum() for kind in pair]) for pair in kinds]).tolist()
        for (positive, negative), (num_positive, num_negative) in zip(kinds, counts):
            take_positive = min(num_positive, int(self.batch_size_per_image * self.positive_fraction))
            take_negative = min(num_negative, self.batch_size_per_image - take_positive)
            drawn[0].append(_draw(positive, num_positive, take_positive))
            drawn[1].append(_draw(negative, num_negative, take_negative))
        return drawn


def _draw(candidates: Tensor, count: int, take: int) -> Tensor:
    """A mask of `take` of the `count` candidates."""
    chosen = torch.randperm(count, device=candidates.device).narrow(0, 0, take)
    drawn = torch.zeros_like(candidates, dtype=torch.uint8)
    return drawn.index_fill_(0, positions(candidates, count).index_select(0, chosen), 1)


def host_waits_for(device: torch.device) -> bool:
    """Whether the host must wait for a number of the device's, such as how many positions nonzero() finds."""
    return device.type != "cpu"


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask of known `count` is true, ascending. Unlike nonzero() it needs nothing from the device."""
    if not host_waits_for(mask.device):
        return mask.nonzero().squeeze(1)
    found = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    slot = (mask.cumsum(0) - 1).masked_fill(~mask, count)
    found.scatter_(0, slot, torch.arange(len(mask), device=mask.device))
    return found[:count]
