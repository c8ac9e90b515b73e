"""The inputs of every test and the tolerances by dtype. It knows neither the operation nor its oracles."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Box = tuple[float, float, float, float, float]  # image, x1, y1, x2, y2; every number is exact in float32


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the operation; features are drawn from the name, so that a case is the same in every test."""

    name: str
    boxes: Sequence[Box]
    maps: tuple[tuple[int, int], ...] = ((16, 20),)  # (H, W) per level
    scales: tuple[float | tuple[float, float], ...] = (0.25,)
    images: int = 1
    channels: int = 3
    output_size: tuple[int, int] = (3, 3)
    sampling_ratio: int = 2
    aligned: bool = False
    levels: tuple[int, ...] | None = None
    options: dict[str, float] = field(default_factory=dict)  # canonical_scale, canonical_level

    def features(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        shapes = [(self.images, self.channels, height, width) for height, width in self.maps]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def rows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self.boxes, dtype=dtype).reshape(-1, 5)

    def level_tensor(self) -> Tensor | None:
        return None if self.levels is None else torch.tensor(self.levels)


def ulps(value: float, steps: int) -> float:
    """The float32 that lies `steps` numbers above `value`, below where negative."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32)
    return float((bits + (steps if value >= 0 else -steps)).view(torch.float32))


def proposals(count: int, height: int, width: int, images: int = 1, seed: int = 0, median: float = 90.0) -> list[Box]:
    """Boxes of the sizes and aspects of region proposals: log-normal, centred anywhere, clipped to the image."""
    generator = torch.Generator().manual_seed(seed)
    # Fitted to selective-search proposals on photographs: sqrt(area) = exp(N(4.50, 0.87)), ln(aspect) = N(0.10, 0.85).
    size = median * torch.exp(0.87 * torch.randn(count, generator=generator, dtype=torch.float64))
    stretch = torch.exp(0.5 * (0.10 + 0.85 * torch.randn(count, generator=generator, dtype=torch.float64)))
    x = torch.rand(count, generator=generator, dtype=torch.float64) * width
    y = torch.rand(count, generator=generator, dtype=torch.float64) * height
    image = torch.randint(images, (count,), generator=generator).double()
    half_width, half_height = size * stretch / 2, size / stretch / 2
    corners = [
        (x - half_width).clamp(min=0),
        (y - half_height).clamp(min=0),
        (x + half_width).clamp(max=width),
        (y + half_height).clamp(max=height),
    ]
    return [tuple(row) for row in torch.stack([image, *corners], 1).float().tolist()]


def level_boundaries(sizes: Sequence[float]) -> list[Box]:
    """Squares of the sides where the FPN rule changes level, and of sides a few ulps to either side of them."""
    steps = [-64, -16, -8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8, 16]
    squares = [(0.0, 0.0, 0.0, ulps(size, step), size) for size in sizes for step in steps]
    return squares + [(0.0, 0.0, 0.0, ulps(size, step), ulps(size, step)) for size in sizes for step in steps]


def pyramid(num_levels: int, height: int = 64, width: int = 96) -> dict:
    """Maps and scales of levels of 1, 1/2, 1/4 ... of an image, and a rule that spreads boxes of its size over them."""
    return {
        "maps": tuple((max(height >> level, 1), max(width >> level, 1)) for level in range(num_levels)),
        "scales": tuple(0.5**level for level in range(num_levels)),
        "options": {"canonical_scale": 24, "canonical_level": num_levels // 2},
    }


def product(name: str, **shared) -> list[Case]:
    """One case per sampling (2, adaptive) and alignment of the same boxes."""
    return [
        Case(
            f"{name}-{'adaptive' if ratio <= 0 else 'fixed'}-{'aligned' if aligned else 'legacy'}",
            sampling_ratio=ratio,
            aligned=aligned,
            **shared,
        )
        for ratio in (2, -1)
        for aligned in (False, True)
    ]


# The default map is 16 x 20 cells at scale 1/4: an image of 64 x 80 pixels.

ORDINARY: list[Box] = [
    (0, 8, 8, 40, 36),
    (0, 0, 0, 80, 64),
    (0, 17.25, 3.5, 29.75, 60.125),
    (0, 50.5, 30.25, 55.75, 33.5),
    (0, 3.3125, 41.625, 78.875, 44.0625),
]
ACROSS_THE_BORDER: list[Box] = [
    (0, -20, 10, 20, 40),
    (0, 60, 10, 100, 40),
    (0, 10, -20, 40, 20),
    (0, 10, 50, 40, 90),
    (0, -30, -30, 30, 30),
    (0, 50, 40, 120, 110),
    (0, -40, -40, 140, 120),
]
OUTSIDE: list[Box] = [
    (0, -60, 10, -20, 40),
    (0, 100, 10, 140, 40),
    (0, 10, -60, 40, -20),
    (0, 10, 90, 40, 130),
    (0, -90, -90, -40, -40),
    (0, 8, 8, 40, 36),
]
ZERO_SIZE: list[Box] = [
    (0, 20, 20, 20, 20),
    (0, 21.5, 33.25, 21.5, 33.25),
    (0, 10, 20, 50, 20),
    (0, 10, 20, 10, 44),
    (0, 0, 0, 0, 0),
    (0, 80, 64, 80, 64),
]
INVERTED: list[Box] = [
    (0, 50, 10, 20, 40),
    (0, 20, 40, 50, 10),
    (0, 50, 40, 20, 10),
    (0, 30.5, 20.5, 30.25, 20.25),
    (0, 8, 8, 40, 36),
]
NAN, INF = math.nan, math.inf
NOT_FINITE: list[Box] = [
    (0, NAN, 8, 40, 36),
    (0, 8, NAN, 40, 36),
    (0, 8, 8, NAN, 36),
    (0, 8, 8, 40, NAN),
    (0, INF, 8, 40, 36),
    (0, 8, -INF, 40, 36),
    (0, -INF, 8, INF, 36),
    (0, 8, 8, 40, INF),
    (0, NAN, NAN, NAN, NAN),
    (NAN, 8, 8, 40, 36),
    (0, 8, 8, 40, 36),
]
HUGE: list[Box] = [
    (0, -500000, -500000, 500000, 500000),
    (0, 0, 0, 1000000, 1000000),
    (0, 8, -1000000, 40, 1000000),
    (0, -1000000, 8, 1000000, 36),
    (0, 1000000, 1000000, 2000000, 2000000),
    (0, 8, 8, 40, 36),
]
# One sample per bin, one bin, scale 1: the sample is the middle of the box, at -1, at H = 8 or at W = 10 exactly,
# and one float32 to either side.
ON_THE_EDGE: list[Box] = [
    (0, 2, y - 1, 4, y + 1) for y in (-1.0, 8.0, 0.0, 7.0, ulps(-1.0, 2), ulps(-1.0, -2), ulps(8.0, 2), ulps(8.0, -2))
] + [
    (0, x - 1, 2, x + 1, 4)
    for x in (-1.0, 10.0, 0.0, 9.0, ulps(-1.0, 2), ulps(-1.0, -2), ulps(10.0, 2), ulps(10.0, -2))
]
SHIFTED_EDGE: list[Box] = [(image, x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5) for image, x1, y1, x2, y2 in ON_THE_EDGE[:4]]
SPREAD: list[Box] = proposals(24, 64, 96, seed=3, median=24.0)

CASES: list[Case] = [
    *product("ordinary", boxes=ORDINARY),
    *product("across-the-border", boxes=ACROSS_THE_BORDER),
    *product("outside", boxes=OUTSIDE),
    *product("zero-size", boxes=ZERO_SIZE),
    *product("inverted", boxes=INVERTED),
    *product("not-finite", boxes=NOT_FINITE),
    *product("huge", boxes=HUGE),
    # Samples
    Case("one-sample", ORDINARY, sampling_ratio=1),
    Case("zero-means-adaptive", ORDINARY, sampling_ratio=0),
    Case("three-samples", ORDINARY, sampling_ratio=3, aligned=True),
    Case("seventeen-samples", ORDINARY[:2], sampling_ratio=17),
    Case("samples-on-the-edge", ON_THE_EDGE, ((8, 10),), (1.0,), output_size=(1, 1), sampling_ratio=1),
    Case(
        "samples-on-the-edge-aligned",
        SHIFTED_EDGE,
        ((8, 10),),
        (1.0,),
        output_size=(1, 1),
        sampling_ratio=1,
        aligned=True,
    ),
    Case("samples-on-grid-lines", [(0, 2, 2, 10, 10), (0, -2, -2, 10, 10)], ((8, 10),), (1.0,), output_size=(2, 2)),
    Case("bins-far-larger-than-samples", [(0, 3, 2, 93, 92), (0, -50, 1, 130, 61)], ((100, 120),), (1.0,)),
    # Output sizes
    Case("output-7x7", ORDINARY, output_size=(7, 7)),
    Case("output-14x14", ORDINARY, output_size=(14, 14)),
    Case("output-3x5", ORDINARY, output_size=(3, 5), sampling_ratio=-1, aligned=True),
    Case("output-1x1", ORDINARY, output_size=(1, 1), sampling_ratio=-1),
    Case("output-17x2", ORDINARY, output_size=(17, 2)),
    Case("output-3x33", ORDINARY[:3], output_size=(3, 33), sampling_ratio=-1),
    # Channels
    Case("channels-1", ORDINARY, channels=1),
    Case("channels-5", ORDINARY, channels=5, sampling_ratio=-1),
    Case("channels-8", ORDINARY, channels=8, output_size=(7, 7)),
    Case("channels-64", ORDINARY[:3], channels=64, sampling_ratio=-1),
    Case("channels-257", ORDINARY[:2], channels=257),
    # Images
    Case("images-uneven", [(2, *box[1:]) for box in ORDINARY] + [(0, *ORDINARY[0][1:])], images=4),
    Case("images-interleaved", [(i % 3, *box[1:]) for i, box in enumerate(ORDINARY * 3)], images=3, sampling_ratio=-1),
    Case("images-fractional", [(image, 8, 8, 40, 36) for image in (0.0, 0.5, 1.75, -0.5, 1.0)], images=2),
    Case("padding", [(-1, 8, 8, 40, 36), (0, 8, 8, 40, 36), (-1, NAN, 0, 0, 0), (1, 3, 3, 9, 9)], images=2),
    Case("padding-only", [(-1, 8, 8, 40, 36)] * 3),
    Case("no-boxes", [], images=2),
    # Maps
    Case("map-of-one-cell", [(0, 0, 0, 4, 4), (0, -2, -2, 9, 9), (0, 1, 1, 2, 2)], ((1, 1),), (0.5,)),
    Case("map-one-row", [(0, 3, 0, 60, 1), (0, -9, -9, 90, 9)], ((1, 70),), (1.0,), sampling_ratio=-1),
    Case("map-one-column", [(0, 0, 3, 1, 60), (0, -9, -9, 9, 90)], ((70, 1),), (1.0,), sampling_ratio=-1),
    Case("map-wide", [(0, 1, 0, 299, 4), (0, 100, 1, 180, 3)], ((4, 300),), (1.0,), output_size=(7, 7)),
    Case("map-tall", [(0, 0, 1, 4, 299), (0, 1, 100, 3, 180)], ((300, 4),), (1.0,), output_size=(7, 7)),
    Case("scale-of-a-pair", ORDINARY, ((16, 40),), ((0.25, 0.5),), sampling_ratio=-1, aligned=True),
    Case("scale-not-a-power-of-two", ORDINARY, ((19, 24),), (0.3,), aligned=True),
    # Levels
    *[
        Case(f"levels-{count}", SPREAD, sampling_ratio=-1 if count % 2 else 2, aligned=count > 4, **pyramid(count))
        for count in range(1, 9)
    ],
    Case("levels-boundaries", level_boundaries([12, 24, 48, 96]), **pyramid(4, 96, 96), output_size=(1, 1)),
    Case(
        "levels-boundaries-canonical",
        level_boundaries([56, 112, 224, 448]),
        ((64, 64), (32, 32), (16, 16), (8, 8)),
        (0.25, 0.125, 0.0625, 0.03125),
        channels=1,
        output_size=(1, 1),
    ),
    Case(
        "levels-not-finite",
        NOT_FINITE + INVERTED + ZERO_SIZE,
        ((16, 20), (8, 10)),
        (0.25, 0.125),
        options={"canonical_scale": 16, "canonical_level": 3},
    ),
    Case(
        "levels-given",
        ORDINARY + ORDINARY,
        ((16, 20), (8, 10), (7, 9)),
        (0.25, 0.125, 0.11),
        levels=(2, 1, 0, -1, 2, 0, 0, -1, 1, 1),
    ),
    Case(
        "levels-given-with-pairs",
        ORDINARY,
        ((16, 40), (8, 10)),
        ((0.25, 0.5), (0.125, 0.13)),
        levels=(0, 1, 1, 0, -1),
        sampling_ratio=-1,
        aligned=True,
    ),
    Case(
        "levels-of-which-one-is-empty",
        [(0, 4, 4, 8, 8), (1, 2, 3, 7, 9), (1, 10, 10, 90, 60)],
        images=2,
        **pyramid(5),
    ),
    # Many boxes: a public kernel was wrong beyond 512 of them.
    Case(
        "many-boxes",
        proposals(1100, 64, 96, images=2, seed=5, median=24.0),
        images=2,
        channels=4,
        output_size=(2, 3),
        **pyramid(4),
    ),
    Case("many-boxes-on-one-map", proposals(1030, 64, 80, seed=6, median=12.0), channels=1, sampling_ratio=-1),
]
CASE = {case.name: case for case in CASES}

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Tolerance:
    """|actual - exact| <= stored * |exact| + computed * sum(|weight| * |value|) + smallest."""

    stored: float  # twice the rounding of the dtype of the result; 0 where the result is as precise as the sums
    computed: float  # relative to the sum of magnitudes, so that cancellation excuses nothing and small rows count
    smallest: float  # twice the rounding of the smallest numbers of the dtype


# The arithmetic is float64 for float64 and float32 for the rest.
VALUES = {
    torch.float64: Tolerance(0.0, 4e-15, 1e-300),
    torch.float32: Tolerance(0.0, 1e-6, 1e-37),
    torch.float16: Tolerance(2.0**-10, 1e-6, 2.0**-24),
    torch.bfloat16: Tolerance(2.0**-7, 1e-6, 1e-37),
}
# A cell sums hundreds of boxes where a bin sums a few cells.
GRADIENTS = {
    torch.float64: Tolerance(0.0, 1e-14, 1e-300),
    torch.float32: Tolerance(0.0, 4e-6, 1e-37),
    torch.float16: Tolerance(2.0**-10, 4e-6, 2.0**-24),
    torch.bfloat16: Tolerance(2.0**-7, 4e-6, 1e-37),
}


def _sliced(features: list[Tensor]) -> list[Tensor]:
    """Every other cell of a larger map, NaN between: a read beside the view shows."""
    views = []
    for feature in features:
        images, channels, height, width = feature.shape
        larger = feature.new_full((images + 1, channels + 2, height + 3, 2 * width + 1), math.nan)
        view = larger[1:, 1:-1, 2:-1, 1::2]
        views.append(view.copy_(feature))
    return views


def _first_channels_last(features: list[Tensor]) -> list[Tensor]:
    return [features[0].contiguous(memory_format=torch.channels_last), *features[1:]]


# Same values, other memory; "expanded" alone changes them: one channel, seen as many.
LAYOUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "contiguous": lambda features: features,
    "channels_last": lambda features: [f.contiguous(memory_format=torch.channels_last) for f in features],
    "sliced": _sliced,
    "transposed": lambda features: [f.transpose(2, 3).contiguous().transpose(2, 3) for f in features],
    "mixed": _first_channels_last,
    "expanded": lambda features: [f[:, :1].expand(f.shape) for f in features],
}

# (dtype, layout). Every dtype has both native layouts; the rest is read through the same strides or copied, which
# takes no other path for another dtype.
FORMS = [
    (dtype, layout)
    for dtype in DTYPES
    for layout in LAYOUTS
    if dtype == "float32" or layout in ("contiguous", "channels_last")
]
