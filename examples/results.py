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

ROWS, COLUMNS = 3, 5  # of crops in the picture


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


def in_words(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {in_digits(result[name])}" for name in ("AP50", "AP"))


def by_name_in_words(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {in_digits(value)}" for name, value in result["by name"].items())


def in_digits(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def shown(count: int) -> list[int]:
    """Which of `count` crops the picture has: as many as it has places, spread over all."""
    pictures = min(count, ROWS * COLUMNS)
    return [i * count // pictures for i in range(pictures)]


Crop = tuple[Tensor, photos.Target, dict[str, Tensor]]  # image (3, S, S), what is to be found, what is found


def shown_score(crops: Sequence[Crop]) -> float:
    """The score down to which as many boxes are found as there are to find: a detector shows what it knows, however
    little it has learned."""
    to_find = sum(int((~target["crowd"]).sum()) for _, target, _ in crops)
    scores = sorted((score for *_, found in crops for score in found["scores"].tolist()), reverse=True)[:to_find]
    return scores[-1] if scores else 1.0


def draw(path: Path, crops: Sequence[Crop], names: Sequence[str], state: dict[str, Any]) -> None:
    """Losses and AP on the left, held-out crops with what was found on the right."""
    figure = plt.figure(figsize=(20, 9.1), facecolor="white")
    left, right = (
        figure.add_gridspec(1, 1, left=x1, right=x2, top=0.94, bottom=y1)[0]
        for x1, x2, y1 in ((0.05, 0.255, 0.065), (0.295, 0.995, 0.012))
    )
    upper, lower = left.subgridspec(2, 1, hspace=0.2).subplots()
    draw_losses(upper, state)
    draw_by_name(lower, state["evaluations"][-1], names)
    cells = right.subgridspec(ROWS, COLUMNS, wspace=0.03, hspace=0.03).subplots().ravel()
    for cell in cells:
        cell.set_axis_off()
    score = shown_score(crops)
    for cell, crop in zip(cells, crops):
        draw_crop(cell, *crop, names, score)
    title = f"Held-out crops: what is found with a score of {score:.2f} or more; dashed, what was to be found"
    figure.text(0.645, 0.97, title, size=16, ha="center", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_losses(axes: Axes, state: dict[str, Any]) -> None:
    total = np.array([sum(losses.values()) for losses in state["losses"]])
    window = max(1, len(total) // 40)
    axes.plot(total, color="#b8c4d6", lw=0.7)
    smooth = np.convolve(total, np.ones(window) / window, "valid")
    axes.plot(np.arange(len(smooth)) + window / 2, smooth, color="#1f4e8c", lw=2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.05 * np.quantile(total, 0.995)), xlim=(0, len(total)))
    other = axes.twinx()
    points = [(e["step"], e["AP50"] or 0) for e in state["evaluations"]]
    other.plot(*zip(*points), "o-", color="#d1495b", lw=2, clip_on=False)
    other.set(ylim=(0, 1.05))
    other.set_ylabel("AP50 on held-out crops", color="#d1495b")


def draw_by_name(axes: Axes, evaluation: dict[str, Any], names: Sequence[str]) -> None:
    by_name = evaluation["by name"]
    known = [label for label in range(1, len(names)) if by_name[names[label]] is not None][::-1]
    axes.barh(
        [names[label] for label in known],
        [by_name[names[label]] for label in known],
        color=[colour_of(label) for label in known],
    )
    axes.set(xlim=(0, 1), xlabel=f"AP50 by class; {in_words(evaluation)}")


def draw_crop(
    axes: Axes,
    image: Tensor,
    target: photos.Target,
    found: dict[str, Tensor],
    names: Sequence[str],
    least_score: float,
) -> None:
    height, width = image.shape[1:]
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    for box in target["boxes"][~target["crowd"]].tolist():
        outline(axes, box, ec="white", lw=1, ls="--")
    sure = found["scores"] >= least_score
    rows = list(zip(*(found[key][sure].tolist() for key in ("boxes", "labels", "scores"))))
    for box, label, _ in rows:
        outline(axes, box, ec=colour_of(label), lw=2)
    for (x1, y1, _, _), label, score in reversed(rows):  # the best is written last, over the others
        name = {"boxstyle": "square,pad=0.1", "fc": colour_of(label), "ec": "none"}
        axes.text(x1 + 2, max(y1 - 1, 10), f"{names[label]} {score:.2f}", size=8, bbox=name, clip_on=True)


def outline(axes: Axes, box: Sequence[float], **style: Any) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def colour_of(label: int) -> tuple[float, float, float]:
    return plt.get_cmap("Set3").colors[(label - 1) % 12]
