"""Named workloads and the boxes they run on. Knows neither an implementation nor a clock.

Boxes decide what RoI Align costs: their sizes choose the level, the cells read and, with adaptive
sampling, the number of samples. Boxes from two random corners, the usual choice of benchmarks, put
19 / 28 / 39 / 14 % of themselves on P2..P5, like no real set. `proposals` follows real ones instead:
28,828 class-agnostic region proposals, computed with OpenCV's fast selective search (sides >= 8 px)
on 12 COCO photographs scaled to a short side of 800.

                              sqrt(area), quartiles    P2 / P3 / P4 / P5      samples per bin, adaptive
    measured proposals         46 /  85 / 170 px       61 / 23 / 13 / 4 %     9.1
    `proposals`, 800 x 1344    50 /  90 / 162 px       60 / 25 / 12 / 3 %     9.3
    COCO ground truth          45 / 108 / 243 px       51 / 21 / 17 / 11 %
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The fit to the measured proposals, in pixels of an image whose short side is 800.
LOG_SIZE = (4.50, 0.87)  # mean and deviation of ln sqrt(width * height)
LOG_ASPECT = (0.10, 0.85)  # mean and deviation of ln(width / height)


def proposals(num_boxes: int, image_size: tuple[int, int], *, seed: int) -> Tensor:
    """Random boxes with the sizes and shapes of real region proposals.

    Sizes and aspects are log-normal and do not scale with the image, which is meant to have a short
    side of about 800. Positions are uniform over those at which the box lies in the image, as a
    proposal does: to clip boxes with uniform centres would shrink the large ones and take a third
    of P5 away. Only a side longer than the image's is clipped.

    Args:
        num_boxes: K.
        image_size: (height, width) in pixels.
        seed: the same seed gives the same boxes on every device.

    Returns:
        (K, 4) float32 on the CPU, rows x1, y1, x2, y2.

    Example:
        >>> proposals(1000, (800, 1344), seed=0).shape
        torch.Size([1000, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, num_boxes, generator=generator, dtype=torch.float64)
    place = torch.rand(2, num_boxes, generator=generator, dtype=torch.float64)

    size = torch.exp(LOG_SIZE[0] + LOG_SIZE[1] * normal[0])
    stretch = torch.exp((LOG_ASPECT[0] + LOG_ASPECT[1] * normal[1]) / 2)
    height, width = image_size
    box_width = (size * stretch).clamp(max=width)
    box_height = (size / stretch).clamp(max=height)
    x1 = place[0] * (width - box_width)
    y1 = place[1] * (height - box_height)

    boxes = torch.stack([x1, y1, x1 + box_width, y1 + box_height], dim=1).float()
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    return torch.minimum(boxes, limit)  # the cast to float32 may round past the border


@dataclass(frozen=True)
class Workload:
    """One pooling problem; the defaults are Faster R-CNN's box head on one image."""

    what: str
    num_images: int = 1
    rois_per_image: int = 1000
    image_size: tuple[int, int] = (800, 1344)  # height, width
    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: int = 256
    output_size: int = 7
    sampling_ratio: int = 2
    aligned: bool = False
    box_side: float | None = None  # pixels, of square boxes with their centres in the image; None: proposals

    @property
    def map_names(self) -> list[str]:
        return [str(level) for level in range(len(self.strides))]

    @property
    def map_sizes(self) -> list[tuple[int, int]]:
        height, width = self.image_size
        return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in self.strides]

    @property
    def spatial_scales(self) -> list[float]:
        return [1 / stride for stride in self.strides]

    def boxes(self, *, seed: int = 0) -> list[Tensor]:
        """One (rois_per_image, 4) tensor of image pixels for each image."""
        return [self._boxes_of_image(seed + image) for image in range(self.num_images)]

    def _boxes_of_image(self, seed: int) -> Tensor:
        if self.box_side is None:
            return proposals(self.rois_per_image, self.image_size, seed=seed)
        height, width = self.image_size
        centres = torch.rand(self.rois_per_image, 2, generator=torch.Generator().manual_seed(seed))
        centres *= torch.tensor([width, height])
        return torch.cat([centres - self.box_side / 2, centres + self.box_side / 2], dim=1)

    def features(
        self,
        *,
        channels: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Normal noise, map name -> (num_images, channels, H, W), finest first."""
        generator = torch.Generator().manual_seed(seed)
        depth = self.channels if channels is None else channels
        return {
            name: torch.randn(self.num_images, depth, *size, generator=generator)
            .to(dtype)
            .contiguous(memory_format=memory_format)
            for name, size in zip(self.map_names, self.map_sizes)
        }


WORKLOADS = {
    "infer": Workload("box head at inference: torchvision's defaults, 1000 proposals"),
    "adaptive": Workload("detectron2's defaults: aligned, adaptive sampling", sampling_ratio=0, aligned=True),
    "mask": Workload("mask head: 14 x 14 bins for 256 boxes", rois_per_image=256, output_size=14),
    "train": Workload("box head in training: 2 images of 512 sampled boxes", num_images=2, rois_per_image=512),
    "many": Workload("10,000 proposals on one image", rois_per_image=10_000),
    "few": Workload("16 boxes: the maps outweigh the work", rois_per_image=16),
    "single": Workload("one box: the fixed cost of a call", rois_per_image=1),
    "mask_targets": Workload(
        "ground-truth masks cut to 28 x 28, as the mask loss does: one channel, full resolution",
        num_images=8,
        rois_per_image=16,
        strides=(1,),
        channels=1,
        output_size=28,
        sampling_ratio=0,
    ),
}

# One thing at a time against `infer`, or against `adaptive` where the name says so.
SWEEPS: dict[str, dict[str, Workload]] = {
    "rois": {f"rois={k}": Workload(f"{k} proposals", rois_per_image=k) for k in (1, 10, 100, 1000, 10_000)},
    "channels": {f"channels={c}": Workload(f"{c} channels", channels=c) for c in (1, 4, 16, 64, 256, 1024)},
    "map": {
        f"image={h}x{w}": Workload(f"a pyramid over {h} x {w} pixels", image_size=(h, w))
        for h, w in ((200, 336), (400, 672), (800, 1344), (1600, 2688))
    },
    "box": {
        f"box={side}": Workload(f"boxes of {side} x {side} pixels", box_side=side) for side in (16, 64, 256, 1024, 4096)
    },
    "adaptive_box": {
        f"adaptive_box={side}": Workload(f"the same, adaptive: {side} pixels", box_side=side, sampling_ratio=0)
        for side in (16, 64, 256, 1024, 4096)
    },
}
WORKLOADS |= {name: work for sweep in SWEEPS.values() for name, work in sweep.items()}
