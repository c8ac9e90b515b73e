"""Photographs with boxes in COCO's format, and the crops that a detector trains on and is judged by.

The sample is `photographs.json`: objects on photographs that scikit-image brings along. Two keys of its
images are additions to the format. `region`, a bbox, says that the image is only this part of its file.
`use` says what the image is for:

    train      for training only
    held out   for evaluation only
    both       for training, and for evaluation at sizes between those of training

In a file without `use`, a fifth of the images, drawn by the seed, is held out. Knows no model.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Target = dict[str, Tensor]
Window = tuple[float, float, float]  # x, y and side of a square in pixels of the file

SAMPLE = Path(__file__).with_name("photographs.json")
USES = ("train", "held out", "both")
# The side of a window, as a share of that of a square of the photograph's area. Between the ranges of training
# lies that of evaluation, so that no training crop shows an object at a size at which it is evaluated.
TRAINING_SHARES = ((0.50, 0.75), (0.85, 1.20))
HELD_OUT_SHARES = (0.77, 0.83)
VIEWS = 8  # held-out crops of a photograph that is there for both
VISIBLE = 0.4  # an object of which less is left in a window is not asked for
SMALLEST = 4  # pixels of a crop; narrower objects are not asked for either
TRIES = 5  # windows that are drawn in search of an object
GREY = (124, 116, 104)  # around a photograph: the mean colour of photographs, see train.py


class DataError(Exception):
    """The images or their annotations cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Photo:
    path: Path
    size: tuple[int, int]  # width and height of the file
    region: tuple[float, float, float, float]  # x1, y1, x2, y2: nothing outside of it is ever shown
    boxes: Tensor  # (G, 4) x1, y1, x2, y2 in pixels of the file, inside the region
    labels: Tensor  # (G,) from 1, background being 0
    crowd: Tensor  # (G,) bool: a region of many objects that are not told apart
    use: str = "both"


View = tuple[Photo, Window, bool]  # what is seen through a window, mirrored or not


@dataclass(frozen=True)
class Data:
    names: list[str]  # of a label; names[0] is the background's
    train: list[Photo]
    held_out: list[Photo]
    dropped: int  # annotations without width or height, or outside of their image


def load(images: Path | str | None = None, annotations: Path | str | None = None, seed: int = 0) -> Data:
    """Read a COCO file; without arguments the sample.

    Raises:
        DataError: the file is not COCO's format or contradicts itself, or images are missing.
    """
    if annotations is None:
        images, annotations = sample_folder(), SAMPLE
    assert images is not None
    document = _read(annotations)
    try:
        labels, names = _categories(document, annotations)
        photos, dropped = _photos(document, annotations, Path(images), labels)
    except KeyError as error:
        raise DataError(f"{annotations}: not in COCO's format: the key {error} is missing") from None
    except (AttributeError, TypeError) as error:
        raise DataError(f"{annotations}: not in COCO's format: {error}") from None

    if any(photo.use == "" for photo in photos):
        drawn = random.Random(f"split {seed}").sample(range(len(photos)), max(1, len(photos) // 5))
        train = [photo for i, photo in enumerate(photos) if i not in set(drawn)]
        held_out = [photos[i] for i in sorted(drawn)]
    else:
        train = [photo for photo in photos if photo.use != "held out"]
        held_out = [photo for photo in photos if photo.use != "train"]
    if not train or not held_out:
        raise DataError(f"{annotations}: there must be images to train on and images to hold out")
    if not any((~photo.crowd).any() for photo in train):
        raise DataError(f"{annotations}: there must be objects on the images to train on")
    return Data(names, train, held_out, dropped)


def sample_folder() -> Path:
    """Where scikit-image keeps its photographs."""
    try:
        import skimage
    except ImportError:
        raise DataError(
            "the sample photographs come with scikit-image: pip install scikit-image, "
            "or train on your own with --images and --annotations"
        ) from None
    return Path(skimage.__file__).parent / "data"


def _read(path: Path | str) -> dict[str, list[dict[str, Any]]]:
    try:
        document = json.loads(Path(path).read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(f"{path}: not in COCO's format: a list {key!r} is missing")
    return document


def _categories(document: dict[str, Any], path: Path | str) -> tuple[dict[int, int], list[str]]:
    """Labels 1, 2, ... by category id, in the order of the ids, which may have gaps; and their names."""
    names = {category["id"]: str(category["name"]) for category in document["categories"]}
    if not names:
        raise DataError(f"{path}: there are no categories")
    return {key: label for label, key in enumerate(sorted(names), 1)}, [
        "background",
        *(names[k] for k in sorted(names)),
    ]


def _photos(
    document: dict[str, Any], path: Path | str, folder: Path, labels: dict[int, int]
) -> tuple[list[Photo], int]:
    entries = document["images"]
    repeated = [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: more than one image has the id {repeated[0]}")
    missing = [entry["file_name"] for entry in entries if not (folder / entry["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of the {len(entries)} images that {path} names are missing, first {missing[0]}"
        )
    objects: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in entries}
    for annotation in document["annotations"]:
        for key, known in (("image_id", objects), ("category_id", labels)):
            if annotation.get(key) not in known:
                raise DataError(
                    f"{path}: annotation {annotation.get('id')} has an unknown {key}, {annotation.get(key)}"
                )
        objects[annotation["image_id"]].append(annotation)

    photos, dropped = [], 0
    for entry in entries:
        x, y, width, height = entry.get("region", (0, 0, entry["width"], entry["height"]))
        region = (float(x), float(y), float(x + width), float(y + height))
        use = entry.get("use", "")
        if use not in ("", *USES):
            raise DataError(f"{path}: image {entry['id']}: `use` must be one of {', '.join(USES)}, got {use!r}")
        if not (width > 0 and height > 0):
            raise DataError(f"{path}: image {entry['id']}: width and height must be positive, got {width} x {height}")
        found = objects[entry["id"]]
        for a in found:
            if len(a["bbox"]) != 4:
                raise DataError(
                    f"{path}: annotation {a.get('id')}: `bbox` must be x, y, width, height, got {a['bbox']}"
                )
        boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = _clipped(boxes, region)
        whole = boxes.isfinite().all(1) & ((boxes[:, 2:] - boxes[:, :2]).amin(1) > 0)
        dropped += int((~whole).sum())
        label = torch.tensor([labels[a["category_id"]] for a in found], dtype=torch.int64)
        crowd = torch.tensor([bool(a.get("iscrowd", 0)) for a in found], dtype=torch.bool)
        size = (entry["width"], entry["height"])
        photos.append(
            Photo(folder / entry["file_name"], size, region, boxes[whole].float(), label[whole], crowd[whole], use)
        )
    return photos, dropped


def _clipped(boxes: Tensor, region: tuple[float, float, float, float]) -> Tensor:
    x1, y1, x2, y2 = region
    low, high = boxes.new_tensor([x1, y1, x1, y1]), boxes.new_tensor([x2, y2, x2, y2])
    return torch.minimum(torch.maximum(boxes, low), high)


@lru_cache(maxsize=64)
def _pixels(path: Path, size: tuple[int, int]) -> Image.Image:
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"{path}: {error}") from None
    if image.size != size:
        has, expected = (" x ".join(map(str, pair)) for pair in (image.size, size))
        raise DataError(f"{path}: the file has {has} pixels, its annotations say {expected}")
    return image


def crop(photo: Photo, window: Window, mirrored: bool, size: int) -> tuple[Tensor, Target]:
    """What is seen through a window.

    Args:
        photo: with G objects.
        window: may reach beyond the photograph.
        mirrored: swap left and right.
        size: pixels to a side of the crop.

    Returns:
        The crop `(3, size, size)` in 0..1, and its objects: `boxes` `(K, 4)` clipped to what is seen, `labels` `(K,)`
        and `crowd` `(K,)`, true also for an object that is too small or too much of which is cut off to be asked for.
    """
    x, y, side = window
    scale = size / side
    x1, y1, x2, y2 = photo.region
    seen = (max(x, x1), max(y, y1), min(x + side, x2), min(y + side, y2))
    canvas = Image.new("RGB", (size, size), GREY)
    left, top, right, bottom = (round((edge - origin) * scale) for edge, origin in zip(seen, (x, y, x, y)))
    if right > left and bottom > top:
        patch = _pixels(photo.path, photo.size).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR, box=seen
        )
        canvas.paste(patch, (left, top))
    image = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255

    boxes = _clipped(photo.boxes, seen)
    visible = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (photo.boxes[:, 2:] - photo.boxes[:, :2]).prod(1)
    boxes = ((boxes - boxes.new_tensor([x, y, x, y])) * scale).clamp(0, size)  # rounding may leave it
    if mirrored:
        image = image.flip(2)
        boxes = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], 1)
    narrow = (boxes[:, 2:] - boxes[:, :2]).amin(1) < SMALLEST
    target = {"boxes": boxes, "labels": photo.labels, "crowd": photo.crowd | (visible < VISIBLE) | narrow}
    return image, {key: value[visible > 0] for key, value in target.items()}


def _window(photo: Photo, share: float, draw: random.Random) -> Window:
    """A square, see TRAINING_SHARES: within the photograph where it fits, else around it."""
    x1, y1, x2, y2 = photo.region
    side = share * math.sqrt((x2 - x1) * (y2 - y1))
    return draw.uniform(x1, x2 - side), draw.uniform(y1, y2 - side), side


def training_crop(data: Data, seed: int, step: int, sample: int, size: int) -> tuple[Tensor, Target]:
    """The crop of a sample of a step: a function of its arguments, so that a run can start at any step.

    Crops without an object are rare: up to TRIES windows are drawn until one holds any.
    """
    draw = random.Random(f"crop {seed} {step} {sample}")
    photo = draw.choice(data.train)
    mirrored = draw.random() < 0.5
    for _ in range(TRIES):
        ranges = TRAINING_SHARES
        low, high = draw.choices(ranges, [high - low for low, high in ranges])[0]
        image, target = crop(photo, _window(photo, draw.uniform(low, high), draw), mirrored, size)
        kept = ~target["crowd"]  # what is too small or cut off is left out, as are crowds
        if kept.any():
            break
    return image, {key: target[key][kept] for key in ("boxes", "labels")}


def held_out_views(data: Data) -> list[View]:
    """What evaluation looks at, the same in every run: of the sample VIEWS windows of a photograph, every other
    one mirrored; of a data set whose images are held out by the seed, each image as a whole."""
    views: list[View] = []
    for index, photo in enumerate(data.held_out):
        if photo.use == "":
            x1, y1, x2, y2 = photo.region
            side = max(x2 - x1, y2 - y1)
            views.append((photo, ((x1 + x2 - side) / 2, (y1 + y2 - side) / 2, side), False))
            continue
        for view in range(VIEWS):
            draw = random.Random(f"held out {index} {view}")
            views.append((photo, _window(photo, draw.uniform(*HELD_OUT_SHARES), draw), view % 2 == 1))
    return views
