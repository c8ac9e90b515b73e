"""Non-maximum suppression: exact, by group, in bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from roialign_ext import detection

pytestmark = pytest.mark.usefixtures("device")


def kept(device: torch.device, boxes: Tensor, scores: Tensor, *others: Tensor | float) -> list[int]:
    """What `nms`, or with groups `batched_nms`, keeps on a device."""
    suppress = detection.nms if len(others) == 1 else detection.batched_nms
    return suppress(*(x.to(device) if isinstance(x, Tensor) else x for x in (boxes, scores, *others))).tolist()


def greedy(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """The definition: from the best score down, keep what no kept box of its group overlaps by more."""
    stay: list[int] = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        rivals = [j for j in stay if groups[j] == groups[i]]
        if not rivals or not (detection.box_iou(boxes[rivals], boxes[i : i + 1]).double() > threshold).any():
            stay.append(i)
    return stay


def crowd(count: int, objects: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Boxes around a few objects, as detectors give them, with scores."""
    low = torch.rand(objects, 2) * 300
    size = torch.rand(objects, 2) * 80 + 10
    which = torch.randint(objects, (count,))
    corners = torch.cat([low, low + size], dim=1)[which]
    return (corners + torch.randn(count, 4) * 0.1 * size[which].repeat(1, 2)).to(dtype), torch.rand(count, dtype=dtype)


def degenerate(count: int) -> tuple[Tensor, Tensor]:
    """Boxes without area, inverted, twice the same, not finite."""
    boxes, scores = crowd(count)
    boxes[::5, 2] = boxes[::5, 0]
    boxes[1::5] = boxes[1::5, [2, 3, 0, 1]]
    boxes[2::5] = boxes[2]
    boxes[3::20, 0] = math.nan
    boxes[8::20, 2] = math.inf
    boxes[13::20] = 0
    return boxes, scores


def tied(count: int) -> tuple[Tensor, Tensor]:
    """Three scores only."""
    boxes, scores = crowd(count)
    return boxes, (scores * 3).floor()


INPUTS = {
    "crowd": lambda: crowd(300),
    "float64": lambda: crowd(200, dtype=torch.float64),
    "sparse": lambda: crowd(200, objects=150),
    "many": lambda: crowd(700, objects=120),
    "tied": lambda: tied(300),
    "degenerate": lambda: degenerate(200),
    "one": lambda: crowd(1),
    "none": lambda: (torch.zeros(0, 4), torch.zeros(0)),
    "whole_pixels": lambda: tuple(x.round() for x in crowd(300, objects=4)),
}
INPUT = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())


@INPUT
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_nms_keeps_what_torchvision_keeps(make, threshold, device):
    """Oracle: torchvision.ops.nms on the CPU, index by index."""
    ops = pytest.importorskip("torchvision.ops")
    boxes, scores = make()
    assert kept(device, boxes, scores, threshold) == ops.nms(boxes, scores, threshold).tolist()


@INPUT
def test_groups_do_not_see_each_other(make, device):
    """Oracle: the greedy definition, box by box."""
    boxes, scores = make()
    groups = torch.randint(-2, 5, scores.shape)
    assert kept(device, boxes, scores, groups, 0.5) == greedy(boxes, scores, groups, 0.5)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65, 97])
def test_groups_of_any_size_lie_anywhere(size, device):
    """Oracle: the greedy definition. A warp of the CUDA kernel takes 32 rows, of one group or of many."""
    groups = torch.cat([torch.full((n,), i) for i, n in enumerate([size, 3, size, 31, 1, size])])
    boxes, scores = crowd(len(groups), objects=4)
    mixed = groups[torch.randperm(len(groups))]
    assert kept(device, boxes, scores, mixed, 0.4) == greedy(boxes, scores, mixed, 0.4)


@pytest.mark.parametrize("seed", ["1", "2", "3"])
@pytest.mark.parametrize("device_name", ["emulated"], indirect=True)
def test_blocks_may_come_in_any_order(seed, device, monkeypatch):
    """Oracle: the CPU kernel, which has no blocks."""
    boxes, scores = crowd(700, objects=40)
    groups = torch.randint(3, (700,))
    expected = torch.ops.roialign_ext.nms(boxes, scores, groups, 0.5)
    monkeypatch.setenv("ROIALIGN_EXT_EMULATION_SEED", seed)
    order, keep = expected
    assert kept(device, boxes, scores, groups, 0.5) == order[keep].tolist()


def test_batched_nms_keeps_what_torchvision_keeps(device):
    """Oracle: torchvision.ops.batched_nms, above a thousand boxes, where it goes class by class."""
    ops = pytest.importorskip("torchvision.ops")
    boxes, scores = crowd(3000, objects=200)
    groups = torch.randint(90, (3000,))
    found = kept(device, boxes, scores, groups, 0.5)
    assert found == ops.batched_nms(boxes, scores, groups, 0.5).tolist()
    assert 200 < len(found) < 3000


def test_groups_far_from_the_origin_are_not_rounded(device):
    """Oracle: by hand, an overlap of 0.5 exactly, which is not above 0.5.

    torchvision moves class 2000 by 2000 * 1001 pixels, where float32 rounds to an eighth.
    """
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.98], [0.0, 0.0, 1.0, 0.49], [0.0, 0.0, 1000.0, 1000.0]])
    assert detection.box_iou(boxes[:1], boxes[1:2]).item() == 0.5
    groups = torch.tensor([2000, 2000, 0])
    assert kept(device, boxes, torch.tensor([0.9, 0.8, 0.7]), groups, 0.5) == [0, 1, 2]


@pytest.mark.parametrize("tenths, stay", [(3, 1), (7, 2)], ids=["rounded_up", "rounded_down"])
def test_the_threshold_is_compared_in_double_precision(tenths, stay, device):
    """Oracle: float32(0.3) lies above 0.3 and float32(0.7) below 0.7; torchvision.ops.nms agrees."""
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, float(tenths), 1.0]])
    scores = torch.tensor([0.9, 0.8])
    assert len(kept(device, boxes, scores, tenths / 10)) == stay
    assert kept(device, boxes, scores, tenths / 10) == ops.nms(boxes, scores, tenths / 10).tolist()


def test_a_chain_drops_every_other_box(device):
    """Oracle: by hand. Each box overlaps its neighbours, so a dropped one spares the next: 100 steps deep."""
    x = torch.arange(100.0)
    boxes = torch.stack([x, torch.zeros(100), x + 3, torch.ones(100)], dim=1)  # neighbours overlap by half
    assert kept(device, boxes, -x, 0.45) == list(range(0, 100, 2))


def test_half_boxes_count_as_float32(device):
    """Oracle: the same boxes, widened."""
    boxes, scores = crowd(100)
    for dtype in (torch.float16, torch.bfloat16):
        half = boxes.to(dtype)
        assert kept(device, half, scores, 0.5) == kept(device, half.float(), scores, 0.5)


def test_not_a_number_is_the_best_score_and_overlaps_nothing(device):
    """Oracle: by hand. torch sorts NaN above all; a box with a NaN neither drops nor is dropped."""
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [0.0, math.nan, 9.0, 9.0], [0.0, 0.0, 9.0, 9.0]])
    assert kept(device, boxes, torch.tensor([0.9, math.nan, 0.5, 0.7]), 0.5) == [1, 2]


def test_memory_is_bounded(device):
    """Oracle: the largest tensor that any call makes, for 5,000 boxes, whose pairs are 25 million."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return output

    boxes, scores = (x.to(device) for x in crowd(5000, objects=100))
    groups = torch.arange(5000, device=device) % 3
    with Watch():
        stay = detection.batched_nms(boxes, scores, groups, 0.5)
    assert 100 <= len(stay) < 2500
    assert largest <= boxes.numel()


def test_shapes_are_checked():
    """Oracle: names and numbers in the message."""
    boxes, scores = crowd(4)
    with pytest.raises(ValueError, match=r"nms: `boxes` must have shape \(K, 4\), got \(4, 3\)"):
        detection.nms(boxes[:, :3], scores, 0.5)
    with pytest.raises(ValueError, match=r"nms: `scores` must have shape \(4,\), got \(3,\)"):
        detection.nms(boxes, scores[:3], 0.5)
    with pytest.raises(ValueError, match=r"batched_nms: `idxs` must have shape \(4,\), got \(5,\)"):
        detection.batched_nms(boxes, scores, torch.zeros(5, dtype=torch.int64), 0.5)
