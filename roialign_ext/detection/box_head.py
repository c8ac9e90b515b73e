"""The box branch: its head, its predictor and its loss (Girshick, 2015, Fast R-CNN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TwoMLPHead(nn.Module):
    """Two fully connected layers over pooled features: the box head of models with a feature pyramid.

    Args:
        in_channels: channels times bins of a pooled box.
        representation_size: features of a box.

    Example:
        >>> TwoMLPHead(256 * 7 * 7, 1024)(torch.rand(5, 256, 7, 7)).shape
        torch.Size([5, 1024])
    """

    def __init__(self, in_channels: int, representation_size: int):
        super().__init__()
        self.fc6 = nn.Linear(in_channels, representation_size)
        self.fc7 = nn.Linear(representation_size, representation_size)

    def forward(self, x: Tensor) -> Tensor:
        """Features `(K, representation_size)` of pooled boxes `(K, C, P, Q)`."""
        return F.relu(self.fc7(F.relu(self.fc6(x.flatten(start_dim=1)))))


class FastRCNNPredictor(nn.Module):
    """Class scores and box codes of every box.

    Args:
        in_channels: features of a box.
        num_classes: classes, background included.
        class_agnostic: predict one box, 4 codes, for all classes together instead of one for each.

    Example:
        >>> scores, codes = FastRCNNPredictor(1024, 91)(torch.rand(5, 1024))
        >>> scores.shape, codes.shape
        (torch.Size([5, 91]), torch.Size([5, 364]))
    """

    def __init__(self, in_channels: int, num_classes: int, *, class_agnostic: bool = False):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 if class_agnostic else num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(K, num_classes)` and codes `(K, 4 * num_classes)`, class-agnostic `(K, 4)`, of features.

        Args:
            x: `(K, in_channels)` or `(K, in_channels, 1, 1)`.

        Raises:
            AssertionError: a map with more than one bin (torchvision's type of error).
        """
        if x.dim() == 4 and x.shape[2:] != (1, 1):
            raise AssertionError(f"FastRCNNPredictor: `x` must have 1 x 1 bins, got {tuple(x.shape[2:])}")
        x = x.flatten(start_dim=1)
        return self.cls_score(x), self.bbox_pred(x)


def fastrcnn_loss(
    class_logits: Tensor,
    box_regression: Tensor,
    labels: Sequence[Tensor],
    regression_targets: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The two losses of the box branch.

    Cross entropy, the mean over all samples; smooth L1 with beta 1/9, summed over the positives in the column
    of their class and divided by the number of samples. Both are 0 where there are no samples.

    Args:
        class_logits: `(K, classes)`, class 0 being background.
        box_regression: `(K, 4 * classes)` codes, or `(K, 4)` of a class-agnostic predictor.
        labels: for every image `(K_i,)` int64 classes, K in all.
        regression_targets: for every image `(K_i, 4)` codes; those of background are not looked at.

    Returns:
        The losses of classification and of the boxes, two scalars.

    Example:
        >>> labels, targets = [torch.tensor([1, 0])], [torch.ones(2, 4)]
        >>> loss = fastrcnn_loss(torch.zeros(2, 2), torch.zeros(2, 8), labels, targets)
        >>> [round(x.item(), 4) for x in loss]
        [0.6931, 1.8889]
    """
    label = torch.cat(list(labels))
    target = torch.cat(list(regression_targets))
    compiling = torch.compiler.is_compiling()  # a graph may not know whether there are any samples
    if not compiling and len(label) == 0:
        return class_logits.sum() * 0, box_regression.sum() * 0
    positive = (label > 0)[:, None]
    # Background takes part with a difference of zero, so that nobody has to wait for the number of positives.
    code = torch.where(positive, codes_of_class(box_regression, label), 0)
    box_loss = F.smooth_l1_loss(code, torch.where(positive, target, 0), beta=1 / 9, reduction="sum")
    if compiling:
        count = max(len(label), 1)
        return F.cross_entropy(class_logits, label, reduction="sum") / count, box_loss / count
    return F.cross_entropy(class_logits, label), box_loss / len(label)


def codes_of_class(box_regression: Tensor, labels: Tensor) -> Tensor:
    """The codes `(K, 4)` of one class per row, from `(K, 4 * classes)`, or from `(K, 4)` for all classes."""
    codes = box_regression.reshape(len(box_regression), box_regression.shape[1] // 4, 4)
    if codes.shape[1] == 1:
        return codes[:, 0]
    return codes.gather(1, labels[:, None, None].expand(-1, -1, 4)).squeeze(1)
