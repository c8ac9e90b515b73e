"""Pool a thousand proposals of a photograph, check the result against torchvision, time it, draw it.

    python examples/demo.py                    a sample photograph of scikit-image
    python examples/demo.py holiday.jpg        your own

A ResNet-50-FPN with random weights (nothing is downloaded) turns the photograph into a pyramid, and
the fused op pools random boxes with the sizes of real proposals from it. The exit status is 0 only
if values and feature gradients agree with torchvision's pooler. Uses CUDA where there is one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import skimage.data
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import roialign_ext

# The folder, not the root: beside an installed package the source tree must not be imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from workloads import proposals  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.gridspec import SubplotSpec  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

LEVEL_NAMES = ["P2", "P3", "P4", "P5"]
LEVEL_COLOURS = ["#ffd60a", "#4cc9f0", "#7ae582", "#ff5ca8"]
ROIS_PER_LEVEL = 3  # shown in the picture
PICTURE_BINS = 14  # a mask head's: at 7 x 7 there is little to recognise
# Both sides sum float32 terms in an order of their own: some units in the last place of the largest.
TOLERANCE = 1e-5
CPU_ROUNDS, CUDA_ROUNDS = 7, 50

Pooler = Callable[[dict[str, Tensor], list[Tensor], list[tuple[int, int]]], Tensor]


def load_photo(path: Path | None) -> np.ndarray:
    """(H, W, 3) uint8."""
    if path is None:
        return skimage.data.rocket()
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def make_pyramid(photo: np.ndarray, device: torch.device) -> tuple[Tensor, dict[str, Tensor], tuple[int, int]]:
    """What a detector has before its pooler.

    Returns the resized photograph (H, W, 3) in 0..1, the maps "0".."3" of (1, 256, H / stride,
    W / stride) for strides 4, 8, 16, 32, and (H, W). The maps are those of the image padded to a
    multiple of 32, as in training.
    """
    torch.manual_seed(0)
    transform = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    # Random weights need the statistics of this image: without them activations grow from block to
    # block, and the borders' zero padding outshines the photograph.
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    backbone.train().to(device)
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1).to(device, torch.float32) / 255
    batch, _ = transform([image])
    with torch.no_grad():
        maps = backbone(batch.tensors)
    height, width = batch.image_sizes[0]
    resized = nn.functional.interpolate(image[None], (height, width), mode="bilinear")[0]
    return resized.permute(1, 2, 0).cpu(), {n: maps[n] for n in "0123"}, (height, width)


def disagreement(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the largest value, so that cells near zero do not count for more."""
    a, b = (torch.cat([part.detach().flatten() for part in parts]) for parts in (result, expected))
    return ((a - b).abs().max() / b.abs().max()).item()


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def compare(
    poolers: dict[str, Pooler],
    maps: dict[str, Tensor],
    boxes: Tensor,
    image_size: tuple[int, int],
) -> bool:
    """Check the first pooler against the second, then time both; prints, True if they agree."""
    device = boxes.device
    leaves = {name: fmap.clone().requires_grad_() for name, fmap in maps.items()}

    results = {name: pool(leaves, [boxes], [image_size]) for name, pool in poolers.items()}
    ours, theirs = results.values()
    cotangent = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).to(ours)

    def gradients(result: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, list(leaves.values()), cotangent, retain_graph=True)

    differences = {
        "values": disagreement([ours], [theirs]),
        "feature gradients": disagreement(gradients(ours), gradients(theirs)),
    }
    for what, difference in differences.items():
        verdict = "equal" if difference <= TOLERANCE else "DIFFERENT"
        print(f"  {what:<18} {verdict}, off by {difference:.1e} of the largest, allowed {TOLERANCE:.0e}")
    if not all(difference <= TOLERANCE for difference in differences.values()):  # so that NaN fails
        return False

    def forward(pool: Pooler) -> None:
        with torch.no_grad():
            pool(maps, [boxes], [image_size])

    runs = {(name, "forward"): partial(forward, pool) for name, pool in poolers.items()}
    runs |= {(name, "backward"): partial(gradients, result) for name, result in results.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    # A round times each once, so that a disturbance of the machine hits both sides.
    for round_ in range(1 + (CUDA_ROUNDS if device.type == "cuda" else CPU_ROUNDS)):
        for key, run in runs.items():
            taken = milliseconds(run, device)
            if round_ > 0:  # the first is the warm-up
                times[key].append(taken)

    first, second = poolers
    print(f"\n  median, ms   {first:>14} {second:>14}     ratio")
    for direction in ("forward", "backward"):
        a, b = (statistics.median(times[name, direction]) for name in (first, second))
        print(f"  {direction:<12} {a:14.2f} {b:14.2f} {b / a:8.1f}x")
    return True


def without_padding(maps: dict[str, Tensor], image_size: tuple[int, int]) -> list[Tensor]:
    height, width = image_size
    return [
        fmap[..., : height // (4 << level), : width // (4 << level)].cpu() for level, fmap in enumerate(maps.values())
    ]


def principal_axis(fmap: Tensor) -> Callable[[Tensor], Tensor]:
    """How to show features of one level: (1, C, H, W) -> a function (K, C, P, Q) -> (K, P, Q) in 0..1.

    The function projects on the axis along which the cells of the map differ most.
    """
    cells = fmap[0].flatten(1).double()  # [C, H * W]
    mean = cells.mean(1, keepdim=True)
    axis = torch.linalg.eigh((cells - mean) @ (cells - mean).T).eigenvectors[:, -1]
    component = axis @ (cells - mean)
    if component.pow(3).sum() < 0:  # its sign is arbitrary: let what is rare be bright
        axis, component = -axis, -component
    low, high = np.quantile(component.numpy(), [0.02, 0.99])

    def shade(features: Tensor) -> Tensor:
        projected = torch.einsum("kcpq,c->kpq", features.double() - mean[None, :, :, None], axis)
        return ((projected - low) / (high - low)).clamp(0, 1).pow(0.6)

    return shade


def worth_showing(boxes: Tensor, levels: Tensor, shades: Tensor) -> list[int]:
    """Indices of up to ROIS_PER_LEVEL boxes of each level: the most varied, few overlaps."""
    variety = shades.std((1, 2))
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    legible = ((width / height).log().abs() < 0.6) & (torch.minimum(width, height) > 56)
    overlap = torchvision.ops.box_iou(boxes, boxes)
    chosen: list[int] = []
    for level in range(len(LEVEL_NAMES)):
        ranked = [i for i in variety.argsort(descending=True).tolist() if levels[i] == level]
        of_level: list[int] = []
        # A level of few boxes takes what there is.
        for most_overlap, any_shape in ((0.02, False), (0.2, False), (0.5, False), (0.9, True)):
            for roi in ranked:
                apart = all(overlap[roi, other] <= most_overlap for other in of_level)
                if len(of_level) < ROIS_PER_LEVEL and apart and (any_shape or legible[roi]):
                    of_level.append(roi)
        chosen += of_level
    return chosen


def number_style(colour: str) -> dict[str, Any]:
    disc = {"boxstyle": "circle,pad=0.2", "fc": colour, "ec": "black", "lw": 1}
    return {"size": 10, "weight": "bold", "va": "center", "ha": "center", "bbox": disc}


def outline(axes: Axes, box: list[float], colour: str, line_width: float) -> None:
    x1, y1, x2, y2 = box
    for edge, width in (("black", 1.8 * line_width), (colour, line_width)):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=edge, lw=width))


def draw_photo(axes: Axes, photo: Tensor, boxes: Tensor, levels: Tensor, chosen: list[int]) -> None:
    """All boxes thin, small ones on top, and the chosen ones with their number."""
    axes.imshow(photo.numpy() * 0.85)
    axes.set_axis_off()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order = area.argsort(descending=True)
    corners = boxes[order][:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2)
    colours = [LEVEL_COLOURS[level] for level in levels[order].tolist()]
    axes.add_collection(PolyCollection(list(corners.numpy()), facecolors="none", edgecolors=colours, lw=0.6, alpha=0.3))
    for number, roi in sorted(enumerate(chosen, 1), key=lambda pair: -area[pair[1]]):
        colour, box = LEVEL_COLOURS[int(levels[roi])], boxes[roi].tolist()
        outline(axes, box, colour, 2.2)
        axes.text(box[0] + 16, box[1] + 16, str(number), **number_style(colour))
    counts = torch.bincount(levels, minlength=len(LEVEL_NAMES)).tolist()
    axes.legend(
        handles=[
            Line2D([], [], color=colour, lw=4, label=f"{name}, stride {4 << i}: {counts[i]}")
            for i, (name, colour) in enumerate(zip(LEVEL_NAMES, LEVEL_COLOURS))
        ],
        ncols=4,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        frameon=False,
        fontsize=13,
    )


def draw_level(
    figure: Figure,
    row: SubplotSpec,
    level: int,
    level_map: Tensor,
    crops: list[tuple[int, list[float], Tensor, Tensor]],
) -> None:
    """The map of a level, then crop and features of each (number, box, crop, features)."""
    colour, look = LEVEL_COLOURS[level], {"cmap": "magma", "vmin": 0, "vmax": 1}
    map_cell, *cells = row.subgridspec(1, 1 + ROIS_PER_LEVEL, width_ratios=[1.5] + [2.03] * ROIS_PER_LEVEL, wspace=0.07)
    axes = figure.add_subplot(map_cell)
    axes.imshow(level_map.numpy(), **look)
    axes.set_ylabel(LEVEL_NAMES[level], size=15, weight="bold", rotation=0, ha="right", va="center")
    axes.set(xticks=[], yticks=[])
    for (number, box, crop, features), cell in zip(crops, cells):
        # In map cells; a pixel of imshow is centred on its index.
        outline(axes, [x / (4 << level) - 0.5 for x in box], colour, 1.5)
        pair = cell.subgridspec(1, 2, wspace=0.03).subplots()
        # Both are stretched to the square that the op makes of every box.
        pair[0].imshow(crop.numpy(), aspect="auto", interpolation="bicubic")
        pair[0].text(0.09, 0.9, str(number), transform=pair[0].transAxes, **number_style(colour))
        pair[1].imshow(features.numpy(), aspect="auto", **look)
        for side in pair:
            side.set(xticks=[], yticks=[])
            side.spines[:].set(color=colour, linewidth=3)


def draw(photo: Tensor, maps: list[Tensor], boxes: Tensor, levels: Tensor, pooled: Tensor, path: Path) -> None:
    """Write the picture: the photograph with its boxes, then the maps and what is pooled from them.

    photo (H, W, 3), maps (1, C, H_l, W_l) without padding, boxes (K, 4), levels (K,),
    pooled (K, C, P, Q), all on the CPU.
    """
    shades = torch.zeros(len(boxes), *pooled.shape[2:], dtype=torch.float64)
    level_maps = []
    for level, fmap in enumerate(maps):
        shade = principal_axis(fmap)
        level_maps.append(shade(fmap)[0])
        shades[levels == level] = shade(pooled[levels == level])
    chosen = worth_showing(boxes, levels, shades)

    figure = plt.figure(figsize=(22, 7.9), facecolor="white")
    left, right = figure.add_gridspec(
        1, 2, width_ratios=[1, 1.28], wspace=0.08, left=0.008, right=0.995, top=0.93, bottom=0.1
    )
    draw_photo(figure.add_subplot(left), photo, boxes, levels, chosen)
    rows = right.subgridspec(len(maps), 1, hspace=0.1)
    for level, level_map in enumerate(level_maps):
        crops = []
        for number, roi in enumerate(chosen, 1):
            if levels[roi] == level:
                x1, y1 = boxes[roi, :2].floor().int().tolist()
                x2, y2 = boxes[roi, 2:].ceil().int().tolist()
                crops.append((number, boxes[roi].tolist(), photo[y1:y2, x1:x2], shades[roi]))
        draw_level(figure, rows[level], level, level_map, crops)

    def write(area: SubplotSpec, height: float, text: str, size: int) -> None:
        position = area.get_position(figure)
        middle = (position.x0 + position.x1) / 2
        figure.text(middle, height, text, size=size, ha="center", va="center")

    bins = " × ".join(map(str, pooled.shape[2:]))
    write(left, 0.965, f"{len(boxes)} proposals, coloured by the level they are pooled from", 16)
    write(right, 0.965, f"The pyramid's maps, and {bins} bins pooled from the numbered boxes", 16)
    write(
        right,
        0.045,
        f"Shown of the {pooled.shape[1]} channels: their first principal component over the map, "
        "dark to bright.\nThe network's weights are random: it answers to edges and texture and "
        "knows no objects.",
        13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", type=Path, help="a picture file (default: a sample)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rois", type=int, default=1000, help="number of proposals")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals")
    options = parser.parse_args()
    device = torch.device(options.device)

    photo, maps, image_size = make_pyramid(load_photo(options.photo), device)
    boxes = proposals(options.rois, image_size, seed=options.seed)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"roialign_ext {roialign_ext.__version__} against torchvision {torchvision.__version__}")
    print(f"  {where}; float32, {len(boxes)} boxes, 7 x 7 bins, 256 channels, maps", end=" ")
    print(", ".join("x".join(map(str, m.shape[2:])) for m in maps.values()))

    names = list(maps)
    poolers: dict[str, Pooler] = {
        "roialign_ext": roialign_ext.MultiScaleRoIAlign(names, 7, 2),
        "torchvision": torchvision.ops.MultiScaleRoIAlign(names, 7, 2),
    }
    if not compare(poolers, maps, boxes.to(device), image_size):
        return 1

    pool = roialign_ext.MultiScaleRoIAlign(names, PICTURE_BINS, 2)
    pooled = pool(maps, [boxes.to(device)], [image_size]).cpu()
    path = options.output / "roi_align.png"
    levels = roialign_ext.assign_levels(boxes, len(maps))
    draw(photo, without_padding(maps, image_size), boxes, levels, pooled, path)
    print(f"\nPicture: {path.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
