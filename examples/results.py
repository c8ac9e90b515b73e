"""How good detections are, by pycocotools, and a picture of them. Knows no model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import photos
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

SHOWN_SCORE = 0.6  # detections in the picture
COLOURS = plt.get_cmap("tab20").colors


def average_precision(
    targets: Sequence[photos.Target], detections: Sequence[dict[str, Tensor]], names: Sequence[str]
) -> dict[str, Any]:
    """AP50, AP (IoU 0.50 to 0.95) and AP50 by name, of pycocotools; None for what is nowhere asked for."""

    def coco(objects: Sequence[dict[str, Tensor]]) -> COCO:
        rows = []
        for image, found in enumerate(objects):
            extra = found["scores"] if "scores" in found else found["crowd"]
            for (x1, y1, x2, y2), label, value in zip(
                found["boxes"].tolist(), found["labels"].tolist(), extra.tolist()
            ):
                row = {"id": len(rows) + 1, "image_id": image, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                row |= {"area": (x2 - x1) * (y2 - y1)}
                row |= {"score": value, "iscrowd": 0} if "scores" in found else {"iscrowd": int(value)}
                rows.append(row)
        result = COCO()
        result.dataset = {
            "images": [{"id": image} for image in range(len(objects))],
            "categories": [{"id": label, "name": name} for label, name in enumerate(names) if label],
            "annotations": rows,
        }
        result.createIndex()
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco(targets), coco(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # [IoU, recall, category], all sizes, 100 detections

    def mean(values: np.ndarray) -> float | None:
        return float(values[values > -1].mean()) if (values > -1).any() else None

    by_name = {name: mean(precision[0, :, i]) for i, name in enumerate(names[1:])}
    return {"AP50": mean(precision[0]), "AP": mean(precision), "by name": by_name}


def draw(path: Path, crops: list, detections: list, data: photos.Data, state: dict[str, Any]) -> None:
    """Losses and AP on the left, held-out crops with what was found on the right."""
    figure = plt.figure(figsize=(20, 9.1), facecolor="white")
    left, right = figure.add_gridspec(
        1, 2, width_ratios=[1, 2.55], wspace=0.03, left=0.04, right=0.995, top=0.94, bottom=0.03
    )
    upper, lower = left.subgridspec(2, 1, hspace=0.25).subplots()
    draw_losses(upper, state)
    draw_by_name(lower, state["evaluations"][-1])
    for cell, index in zip(right.subgridspec(3, 5, wspace=0.03, hspace=0.03).subplots().flat, shown(len(crops), 15)):
        draw_crop(cell, *crops[index], detections[index], data.names)
    figure.text(
        0.65,
        0.965,
        f"Held-out crops: what was found with a score above {SHOWN_SCORE}, ground truth dashed",
        size=16,
        ha="center",
        va="center",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def shown(count: int, wanted: int) -> list[int]:
    """Indices spread over all crops."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))]


def draw_losses(axes: Axes, state: dict[str, Any]) -> None:
    total = np.array([sum(losses.values()) for losses in state["losses"]])
    window = max(1, len(total) // 40)
    axes.plot(total, color="#b8c4d6", lw=0.7)
    smooth = np.convolve(total, np.ones(window) / window, "valid")
    axes.plot(np.arange(len(smooth)) + window / 2, smooth, color="#1f4e8c", lw=2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.05 * np.quantile(total, 0.995)), xlim=(0, len(total)))
    other = axes.twinx()
    points = [(e["step"], e["AP50"] or 0) for e in state["evaluations"]]
    other.plot(*zip(*points), "o-", color="#d1495b", lw=2)
    other.set(ylim=(0, 1.05))
    other.set_ylabel("AP50 on held-out crops", color="#d1495b")


def draw_by_name(axes: Axes, evaluation: dict[str, Any]) -> None:
    bars = {name: value for name, value in evaluation["by name"].items() if value is not None}
    axes.barh(list(bars), list(bars.values()), color=[COLOURS[i % 20] for i in range(len(bars))])
    axes.set(xlim=(0, 1), xlabel="AP50 by class")


def draw_crop(axes: Axes, image: Tensor, target: photos.Target, found: dict[str, Tensor], names: list[str]) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
    axes.set_axis_off()
    for box in target["boxes"][~target["crowd"]].tolist():
        axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, ec="white", lw=1, ls="--"))
    for box, label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist()):
        if score > SHOWN_SCORE:
            colour = COLOURS[(label - 1) % 20]
            axes.add_patch(Rectangle(box[:2], box[2] - box[0], box[3] - box[1], fill=False, ec=colour, lw=2))
            axes.text(
                box[0],
                box[1],
                f"{names[label]} {score:.2f}",
                size=8,
                va="top",
                bbox={"fc": colour, "ec": "none", "pad": 1},
            )
