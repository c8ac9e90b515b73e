"""The second stage of Mask R-CNN R50-FPN, ours and torchvision's RoIHeads in turns, whole and in parts.

    python benchmarks/bench_second_stage.py
    python benchmarks/bench_second_stage.py --parts sampling pooling losses postprocessing --rounds 20 --out results
    python benchmarks/bench_second_stage.py --device cuda --rounds 30
    python benchmarks/bench_second_stage.py --parts synchronisations

Both have the same weights, features, proposals, targets and random state; losses, detections and the
gradients of the feature maps are compared before anything is timed. Reported are medians in milliseconds.

    training        proposals and targets -> losses -> gradients of weights and feature maps
    inference       proposals -> boxes and masks of detections
    sampling        proposals and targets -> matched, sampled boxes and their codes
    pooling         box and mask pooling of the samples, forward and backward
    heads           everything with weights, forward and backward: matrix products and convolutions
    losses          logits -> losses -> gradients of the logits; cuts ground-truth masks to the samples
    postprocessing  logits of a trained detector -> detections, and of their mask logits -> masks

And a count, `synchronisations`, of what makes the host wait for a device in training and post-processing. On CUDA it is
torch's own. On a CPU it is of the calls that would wait there, with our parts told to go the way of a device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_roi_align import describe_machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import faster_rcnn, mask_rcnn, roi_heads
from torchvision.ops import MultiScaleRoIAlign
from workloads import Workload, proposals

import roialign_ext
from roialign_ext import detection

CLASSES = 91
SECONDS = 1  # that a part takes turns for, at least
OBJECTS = 10  # of an image; COCO has 7.3 on average
PROPOSALS = {"training": 2000, "inference": 1000}  # that torchvision's RPN passes on
PARTS = ("training", "inference", "sampling", "pooling", "heads", "losses", "postprocessing")
COUNTED = ("training", "postprocessing")
SHARES = ("sampling", "pooling", "heads", "losses")  # what a step of training consists of
NOT_HEADS = ("sampling", "pooling", "losses")


def second_stage(library: Any) -> nn.Module:
    """RoIHeads with the defaults of maskrcnn_resnet50_fpn, all of one library."""
    names = ["0", "1", "2", "3"]
    return library.RoIHeads(
        library.MultiScaleRoIAlign(names, 7, 2),
        library.TwoMLPHead(256 * 7 * 7, 1024),
        library.FastRCNNPredictor(1024, CLASSES),
        *(0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100),
        library.MultiScaleRoIAlign(names, 14, 2),
        library.MaskRCNNHeads(256, (256, 256, 256, 256), 1),
        library.MaskRCNNPredictor(256, 256, CLASSES),
    )


class Ours:
    """What both libraries offer under the same names; fields are torchvision's."""

    MultiScaleRoIAlign = roialign_ext.MultiScaleRoIAlign
    RoIHeads = detection.RoIHeads
    TwoMLPHead, FastRCNNPredictor = detection.TwoMLPHead, detection.FastRCNNPredictor
    MaskRCNNHeads, MaskRCNNPredictor = detection.MaskRCNNHeads, detection.MaskRCNNPredictor
    box_loss, mask_loss = staticmethod(detection.fastrcnn_loss), staticmethod(detection.maskrcnn_loss)
    masks = staticmethod(detection.maskrcnn_inference)

    @staticmethod
    def mask_logits(heads: Any, pooled: Tensor, labels: Tensor) -> Tensor:
        return heads.mask_predictor(heads.mask_head(pooled), labels)


class Torchvision:
    MultiScaleRoIAlign = MultiScaleRoIAlign
    RoIHeads = roi_heads.RoIHeads
    TwoMLPHead, FastRCNNPredictor = faster_rcnn.TwoMLPHead, faster_rcnn.FastRCNNPredictor
    MaskRCNNHeads, MaskRCNNPredictor = mask_rcnn.MaskRCNNHeads, mask_rcnn.MaskRCNNPredictor
    box_loss, mask_loss = staticmethod(roi_heads.fastrcnn_loss), staticmethod(roi_heads.maskrcnn_loss)
    masks = staticmethod(roi_heads.maskrcnn_inference)

    @staticmethod
    def mask_logits(heads: Any, pooled: Tensor, labels: Tensor) -> Tensor:
        return heads.mask_predictor(heads.mask_head(pooled))


LIBRARIES = {"ours": Ours, "torchvision": Torchvision}


class Problem:
    """One batch: maps, objects, and proposals, a quarter of them around objects as of a trained RPN."""

    def __init__(self, num_images: int, device: torch.device):
        work = Workload("second stage", num_images=num_images)
        self.shapes = [work.image_size] * num_images
        self.features = {name: fmap.to(device).requires_grad_() for name, fmap in work.features(seed=1).items()}
        self.targets = [self._target(work.image_size, seed, device) for seed in range(num_images)]
        self.proposals = {
            mode: [self._proposals(count, work.image_size, target, seed) for seed, target in enumerate(self.targets)]
            for mode, count in PROPOSALS.items()
        }

    def _target(self, size: tuple[int, int], seed: int, device: torch.device) -> dict[str, Tensor]:
        """Objects of proposals' sizes, with the inscribed ellipses as masks."""
        boxes = proposals(OBJECTS, size, seed=100 + seed)
        rows, columns = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
        x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
        masks = ((2 * columns - x1 - x2) / (x2 - x1)) ** 2 + ((2 * rows - y1 - y2) / (y2 - y1)) ** 2 < 1
        labels = torch.randint(1, CLASSES, (OBJECTS,), generator=torch.Generator().manual_seed(seed))
        target = {"boxes": boxes, "labels": labels, "masks": masks.to(torch.uint8)}
        return {key: value.to(device) for key, value in target.items()}

    def _proposals(self, count: int, size: tuple[int, int], target: dict[str, Tensor], seed: int) -> Tensor:
        boxes = proposals(count, size, seed=200 + seed)
        near = target["boxes"].cpu().repeat(count // 4 // OBJECTS, 1)
        sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
        noise = torch.randn(near.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
        boxes[: len(near)] = near + noise * sides
        boxes = detection.clip_boxes_to_image(boxes, size)
        return boxes[detection.remove_small_boxes(boxes, 1)].to(target["boxes"].device)

    def logits(self) -> tuple[Tensor, Tensor]:
        """What a trained box head says of the proposals at inference: objects, some of two classes."""
        device = self.targets[0]["boxes"].device
        generator = torch.Generator().manual_seed(3)
        scores = []
        for boxes, target in zip(self.proposals["inference"], self.targets):
            logits = torch.randn(len(boxes), CLASSES, generator=generator)
            logits[:, 0] += 6
            overlap, match = detection.box_iou(target["boxes"].cpu(), boxes.cpu()).max(dim=0)
            label = target["labels"].cpu()[match]
            logits[torch.arange(len(boxes)), label] += 12 * overlap
            logits[torch.arange(len(boxes)), label % (CLASSES - 1) + 1] += 8 * overlap
            scores.append(logits)
        logits = torch.cat(scores).to(device)
        codes = torch.randn(len(logits), 4 * CLASSES, generator=generator).to(device)
        return logits, codes * 0.3


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def parts_of(library: Any, heads: Any, problem: Problem) -> dict[str, Callable[[], Any]]:
    """Every part as a function without arguments; each returns what can be compared."""
    features, shapes, targets = problem.features, problem.shapes, problem.targets
    maps = list(features.values())

    generator = torch.cuda.default_generators[maps[0].device.index or 0] if maps[0].is_cuda else torch.default_generator

    def sampled():
        # Of one device: torch.manual_seed() goes through all there might be in 90 us, a third of our sampling.
        generator.manual_seed(0)
        return heads.select_training_samples(list(problem.proposals["training"]), targets)

    samples, matched, labels, codes = sampled()
    positive = [label > 0 for label in labels]
    mask_samples = [boxes[index] for boxes, index in zip(samples, positive)]
    mask_matched = [idxs[index] for idxs, index in zip(matched, positive)]
    mask_labels = torch.cat(labels)[torch.cat(positive)]
    mask_arguments = (
        mask_samples,
        [t["masks"] for t in targets],
        [t["labels"] for t in targets],
        mask_matched,
    )

    def pool():
        return heads.box_roi_pool(features, samples, shapes), heads.mask_roi_pool(features, mask_samples, shapes)

    def predict(pooled: Tensor, mask_pooled: Tensor):
        return *heads.box_predictor(heads.box_head(pooled)), library.mask_logits(heads, mask_pooled, mask_labels)

    def learn():
        logits, regression, mask_logits = predicted
        losses = (
            *library.box_loss(logits, regression, labels, codes),
            library.mask_loss(mask_logits, *mask_arguments),
        )
        return losses, torch.autograd.grad(sum(losses), predicted)

    pooled = [leaf(x) for x in pool()]
    predicted = [leaf(x) for x in predict(*pooled)]
    pooled_gradients = [torch.ones_like(x) for x in pooled]
    predicted_gradients = learn()[1]
    weights = list(heads.parameters())
    trained = problem.logits()

    def training():
        heads.train()
        torch.manual_seed(0)
        _, losses = heads(features, list(problem.proposals["training"]), shapes, targets)
        return list(losses.values()), torch.autograd.grad(sum(losses.values()), maps + weights)[: len(maps)]

    @torch.no_grad()
    def inference():
        heads.eval()
        return heads(features, problem.proposals["inference"], shapes)[0]

    @torch.no_grad()
    def postprocessing():
        boxes, scores, labels = heads.postprocess_detections(*trained, problem.proposals["inference"], shapes)
        count = sum(map(len, boxes))
        mask_logits = predicted[2].new_ones(count, 1, 1, 1).expand(-1, *predicted[2].shape[1:])
        return boxes, scores, labels, list(library.masks(mask_logits, labels))

    return {
        "training": training,
        "inference": inference,
        "sampling": lambda: sampled()[0],
        "pooling": lambda: torch.autograd.grad(pool(), maps, pooled_gradients),
        "heads": lambda: torch.autograd.grad(predict(*pooled), pooled + weights, predicted_gradients)[:2],
        "losses": lambda: [x[:2] for x in learn()],
        "postprocessing": postprocessing,
    }


# Operators whose result, or its size, the host waits for; lift_fresh is a tensor of Python numbers, copied to a device.
WAITS = {
    *("nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"),
    *("_local_scalar_dense", "equal", "nms", "lift_fresh"),
}


class WaitingCalls(TorchDispatchMode):
    """Counts, on a CPU, the calls that would make the host wait for a device, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = function._schema.name.partition("::")
        if name in WAITS and library != "roialign_ext":  # none of ours waits
            self.counts[name] += 1
        elif name in ("index", "index_put", "index_put_"):
            # A mask as an index has its nonzero() taken, but for one number put under it, which is filled in.
            masks = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            self.counts["mask as index"] += 0 if name != "index" and args[2].numel() == 1 else masks
        elif name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def count_synchronisations(run: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """How often `run` makes the host wait for a device, by what does it, after a first call."""
    run()
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return {"calls": sum("synchronizing" in str(warning.message) for warning in caught)}
    with contextlib.ExitStack() as stack:
        for module in ("matching", "keypoint_head"):
            name = f"roialign_ext.detection.{module}.host_waits_for"
            stack.enter_context(mock.patch(name, lambda device: True))
        waiting = stack.enter_context(WaitingCalls())
        tolist = Tensor.tolist

        def counted(self: Tensor) -> Any:  # reads memory itself, through no operator
            waiting.counts["tolist"] += 1
            return tolist(self)

        stack.enter_context(mock.patch.object(Tensor, "tolist", counted))
        run()
    return dict(+waiting.counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "synchronisations"), default=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of a part, at least")
    parser.add_argument("--out", type=Path, help="folder for the JSON; without, it goes to standard output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    problem = Problem(options.images, device)
    torch.manual_seed(0)
    stages = {name: second_stage(library).to(device) for name, library in LIBRARIES.items()}
    stages["torchvision"].load_state_dict(stages["ours"].state_dict())
    parts = {name: parts_of(LIBRARIES[name], stages[name], problem) for name in LIBRARIES}

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    results = []
    for part in [part for part in options.parts if part != "synchronisations"]:
        print(part, file=sys.stderr)
        torch.testing.assert_close(parts["ours"][part](), parts["torchvision"][part](), rtol=1e-3, atol=1e-4)
        times: dict[str, list[float]] = {name: [] for name in LIBRARIES}
        until = time.perf_counter() + SECONDS
        while len(times["ours"]) < options.rounds or time.perf_counter() < until:
            for name in LIBRARIES:
                times[name].append(seconds(parts[name][part]))
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        results.append({"part": part, **medians, "times": times})

    report = {"machine": describe_machine(device), "images": options.images, "threads": options.threads}
    report["results"] = results
    if "synchronisations" in options.parts:
        report["synchronisations"] = {
            part: {name: count_synchronisations(parts[name][part], device) for name in LIBRARIES} for part in COUNTED
        }
    by_part = {result["part"]: result for result in results}
    if all(part in by_part for part in NOT_HEADS):
        total = {name: sum(by_part[part][name] for part in NOT_HEADS) for name in LIBRARIES}
        by_part["all but heads"] = report["all but heads"] = {"part": "all but heads", **total}
    for part, counts in report.get("synchronisations", {}).items():
        for name, calls in counts.items():
            print(f"{part}, {name}: the host waits {sum(calls.values())} times, {calls}")
    whole = {name: sum(by_part[part][name] for part in SHARES if part in by_part) for name in LIBRARIES}
    print(f"{'':16}{'ours, ms':>12}{'share':>7}{'torchvision, ms':>18}{'share':>7}{'ratio':>8}")
    for part, result in by_part.items():
        shares = [f"{result[name] / whole[name]:7.1%}" if part in SHARES else "" for name in LIBRARIES]
        ratio = result["torchvision"] / result["ours"]
        times = f"{result['ours']:12.2f}{shares[0]:>7}{result['torchvision']:18.2f}{shares[1]:>7}"
        print(f"{part:16}{times}{ratio:8.2f}")
    text = json.dumps(report, indent=1)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"second_stage-{device.type}-{report['machine']['date']}.json"
        path.write_text(text + "\n")
        print(f"Written: {path}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
