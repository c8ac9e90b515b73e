"""Train a small detector on photographs, from random weights, and draw what it finds.

    python examples/train.py                                                the sample, some three minutes
    python examples/train.py --images photos/ --annotations instances.json  your own, in COCO's format
    torchrun --nproc-per-node 2 examples/train.py                           one process per GPU, or on the CPU

A ResNet-18 with a feature pyramid and torchvision's region proposal network, then the second stage of
this package: `roialign_ext.detection.RoIHeads` on `roialign_ext.MultiScaleRoIAlign`.

What the AP of the sample says. Of the eight photographs no training crop shows one, the right view of a stereo pair
with its motorcycle and wheels, nor twelve of the 24 coins of another. The other objects exist once, so they are
looked for on crops of photographs that were trained on, at sizes that were not. So the number shows that the detector
learns, and finds again what it learned; it says nothing about other cats. Data sets given with --annotations have a
fifth of their images held out.

One training, however it is run. Every random number is drawn from (seed, step, image), there is no batch
normalisation, and losses are means over the samples of all processes, not means of means. So any number of
processes takes the steps that one takes on the joint batch, up to rounding, and a run resumed from its checkpoint
continues as if it had never stopped; on a CPU with the same number of threads, bit for bit. Only --seconds makes
a run depend on the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import photos
    import results
    import torch
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
    from torchvision.models.resnet import resnet18
except ImportError as error:
    sys.exit(f"train.py needs {error.name or error}. All that it needs: pip install 'roialign_ext[demo]'")
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from roialign_ext import MultiScaleRoIAlign
from roialign_ext.detection import BalancedPositiveNegativeSampler, FastRCNNPredictor, RoIHeads, TwoMLPHead

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of photographs, torchvision's
CHANNELS = 64  # of the pyramid
WARM_UP = 0.05  # share of the run in which the learning rate rises


class SeededSampler(BalancedPositiveNegativeSampler):
    """Draws from each image's own seed, and remembers how many samples it took."""

    seeds: Sequence[int] = ()
    taken = 0

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
        for seed, label in zip(self.seeds, labels, strict=True):
            torch.manual_seed(seed)
            for masks, mask in zip(drawn, super().__call__([label])):
                masks += mask
        self.taken = sum(int(mask.sum()) for masks in drawn for mask in masks)
        return drawn


class Detector(nn.Module):
    """Images to losses in training, to detections in evaluation."""

    def __init__(self, num_classes: int):
        super().__init__()
        # Statistics of a batch would make an image's loss depend on its neighbours, and be poor for a few images.
        body = resnet18(norm_layer=group_norm, zero_init_residual=True)
        stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
        self.backbone = BackboneWithFPN(body, stages, [64, 128, 256, 512], CHANNELS, norm_layer=group_norm)
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5),
            RPNHead(CHANNELS, 3),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=64,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 400, "testing": 200},
            post_nms_top_n={"training": 200, "testing": 100},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            # Half the usual scale: crops are a third of the size that 224 was chosen for.
            MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=112),
            TwoMLPHead(CHANNELS * 7 * 7, 256),
            FastRCNNPredictor(256, num_classes, class_agnostic=True),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=64,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=50,
        )
        for stage in (self.rpn, self.roi_heads):
            sampler = stage.fg_bg_sampler
            stage.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(
        self, images: Tensor, targets: list[photos.Target] | None = None, seeds: Sequence[int] = ()
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """`images` (N, 3, S, S) in 0..1; in training a target and a seed for each."""
        images = (images - self.mean) / self.std
        sizes = [images.shape[2:]] * len(images)
        self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = seeds
        features = self.backbone(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, losses = self.roi_heads(features, proposals, sizes, targets)
        if not self.training:
            return detections
        shares = share_of_samples([self.rpn.fg_bg_sampler.taken, self.roi_heads.fg_bg_sampler.taken], images.device)
        return {name: loss * share for part, share in zip((rpn_losses, losses), shares) for name, loss in part.items()}


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(16, channels)


def share_of_samples(taken: list[int], device: torch.device) -> list[float]:
    """How many samples this process took of each kind, over the mean of all processes: 1 where there is only one.

    DistributedDataParallel takes the mean over processes, and each loss is the mean over a process's samples.
    Weighted by this, their mean is that of all samples, also where an image had fewer to give.
    """
    if not distributed.is_initialized():
        return [1.0] * len(taken)
    total = torch.tensor(taken, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return [mine * distributed.get_world_size() / all_ for mine, all_ in zip(taken, total.clamp(min=1).tolist())]


Batch = tuple[Tensor, list[photos.Target], list[int]]  # images (N, 3, S, S), and for each a target and a seed


def make_batch(data: photos.Data, options: argparse.Namespace, step: int, samples: range) -> Batch:
    crops = [photos.training_crop(data, options.seed, step, sample, options.size) for sample in samples]
    seeds = [random.Random(f"sampler {options.seed} {step} {sample}").getrandbits(63) for sample in samples]
    return torch.stack([image for image, _ in crops]), [target for _, target in crops], seeds


def backward(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, float]:
    """Leave the gradients of the joint batch of all processes in the parameters; returns its losses."""
    images, targets, seeds = batch
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    losses = model(images.to(device), targets, seeds)
    sum(losses.values()).backward()
    values = torch.stack(list(losses.values())).detach()
    if distributed.is_initialized():
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return dict(zip(losses, values.tolist()))


def learning_rate(peak: float, done: float) -> float:
    """Up along a line while the run warms up, then down along a cosine to 0 at its end."""
    if done < WARM_UP:
        return peak * done / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def share_done(step: int, elapsed: float, options: argparse.Namespace, device: torch.device) -> float:
    """How much of the run lies behind it, by steps or by the first process's clock, whichever is more."""
    done = torch.tensor(step / options.steps, dtype=torch.float64, device=device)
    if options.seconds:
        done.clamp_(min=elapsed / options.seconds)
        if distributed.is_initialized():
            distributed.broadcast(done, 0)
    return done.item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: photos.Data,
    options: argparse.Namespace,
    state: dict[str, Any],
    pause: Callable[[], object],
) -> None:
    """Train to the end from `state`: the step, the seconds so far and the losses of every step; updated in place.

    Calls `pause` after every `options.every` steps but the last, in the first process only.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    began = time.perf_counter() - state["seconds"]
    model.train()
    while (done := share_done(state["step"], state["seconds"], options, device)) < 1:
        rate = learning_rate(options.lr, done + 0.5 / options.steps)
        batch = make_batch(data, options, state["step"], range(rank, options.batch, world))
        optimizer.zero_grad()
        losses = backward(model, batch, device)
        if not math.isfinite(sum(losses.values())):
            sys.exit(f"train.py: the loss is {losses} at step {state['step']}; try a smaller --lr")
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        state["step"] += 1
        state["seconds"] = time.perf_counter() - began
        state["losses"].append(losses)
        if rank == 0:
            pausing = state["step"] % options.every == 0 and state["step"] < options.steps
            show_progress(done, state, options, end="\n" if pausing else "")
            if pausing:
                pause()
                model.train()
    if rank == 0 and sys.stderr.isatty():
        print(file=sys.stderr)


def show_progress(done: float, state: dict[str, Any], options: argparse.Namespace, end: str) -> None:
    """A line that is rewritten on a terminal, a line now and then elsewhere."""
    terminal = sys.stderr.isatty()
    if not terminal and state["step"] % 50 != 0:
        return
    recent = [sum(losses.values()) for losses in state["losses"][-20:]]
    bar = "#" * round(30 * done)
    left = state["seconds"] * (1 - done) / max(done, 1e-9)
    line = (
        f"[{bar:<30}] step {state['step']}, loss {sum(recent) / len(recent):.3f}, "
        f"{state['step'] * options.batch / state['seconds']:.1f} images/s, {left:.0f} s left"
    )
    print(f"\r{line}  " if terminal else line, end=end if terminal else "\n", file=sys.stderr, flush=True)


@torch.no_grad()
def detect(
    detector: Detector, views: Sequence[photos.View], size: int
) -> tuple[list[photos.Target], list[dict[str, Tensor]]]:
    """What is to be found on each view, and what the detector finds."""
    detector.eval()
    device = detector.mean.device
    targets: list[photos.Target] = []
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(views), 8):  # so that only a few are in memory
        crops = [photos.crop(*view, size) for view in views[start : start + 8]]
        targets += [target for _, target in crops]
        found += detector(torch.stack([image for image, _ in crops]).to(device))
    return targets, [{key: value.cpu() for key, value in detections.items()} for detections in found]


CONTINUED = ("images", "annotations", "steps", "seconds", "batch", "size", "lr", "seed", "every")


def save(
    path: Path, detector: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace, state: dict
) -> None:
    """Random numbers, learning rate and order of the data follow from the step, so they need no saving."""
    kept = {key: getattr(options, key) for key in CONTINUED}
    whole = {"model": detector.state_dict(), "optimizer": optimizer.state_dict(), "state": state, "options": kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(whole, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)  # so that an interruption leaves the old one whole


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=os.path.abspath, help="folder of your photographs")
    parser.add_argument("--annotations", type=os.path.abspath, help="their boxes, in COCO's format")
    parser.add_argument("--steps", type=int, help="default 450, or as many as --seconds allow")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--batch", type=int, default=4, help="crops of a step, of all processes together")
    parser.add_argument("--size", type=int, default=256, help="pixels to a side of a crop")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=150, help="steps from one evaluation and checkpoint to the next")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("train_output"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its options")
    options = parser.parse_args(arguments)
    if (options.images is None) != (options.annotations is None):
        parser.error("--images and --annotations go together")
    if options.steps is None:
        options.steps = 10**9 if options.seconds else 450
    for name, least in (("steps", 1), ("batch", 1), ("size", 64), ("every", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    return options


def run(options: argparse.Namespace) -> None:
    rank, world, local = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device(options.device, local) if options.device == "cuda" else torch.device(options.device)
    checkpoint, saved = options.out / "checkpoint.pt", None
    if options.resume:
        if not checkpoint.exists():
            sys.exit(f"train.py: nothing to resume: {checkpoint} does not exist")
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        vars(options).update(saved["options"])
    if options.batch % max(world, 1) != 0:
        sys.exit(f"train.py: --batch must be a multiple of the {world} processes, got {options.batch}")
    data = photos.load(options.images, options.annotations, options.seed)
    views = photos.held_out_views(data)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(options.seed)
    detector = Detector(len(data.names)).to(device)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=options.lr, weight_decay=0.01)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "losses": [], "evaluations": []}
    if saved is not None:
        detector.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    if rank == 0:
        size = sum(p.numel() for p in detector.parameters()) / 1e6
        print(f"{len(data.train)} photographs to train on, {len(views)} held-out crops, {len(data.names) - 1} classes")
        if data.dropped:
            print(f"{data.dropped} annotations have no area on their image and are left out")
        print(f"{size:.1f} million parameters on {device}, {max(world, 1)} processes", flush=True)

    def pause() -> list[dict[str, Tensor]]:
        targets, detections = detect(detector, views, options.size)
        result = results.average_precision(targets, detections, data.names)
        state["evaluations"] = [e for e in state["evaluations"] if e["step"] != state["step"]]
        state["evaluations"].append({"step": state["step"], **result})
        save(checkpoint, detector, optimizer, options, state)
        print(f"step {state['step']}, {state['seconds']:.0f} s: {results.in_words(result)}", flush=True)
        return detections

    train(DistributedDataParallel(detector) if world > 1 else detector, optimizer, data, options, state, pause)
    if rank == 0:
        detections = pause()
        (options.out / "history.json").write_text(json.dumps(state, indent=1))
        crops = [(*photos.crop(*views[i], options.size), detections[i]) for i in results.shown(len(views))]
        results.draw(options.out / "detections.png", crops, data.names, state)
        print(f"AP50 by class: {results.by_name_in_words(state['evaluations'][-1])}")
        print(f"Picture: {(options.out / 'detections.png').resolve()}")
    if world > 1:
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except photos.DataError as error:
        sys.exit(f"train.py: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
