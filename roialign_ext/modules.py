"""The operators as modules, with the constructors and values of their torchvision counterparts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .ops import Boxes, Scale, _assign_levels, _pair, multiscale_roi_align, roi_align


class RoIAlign(nn.Module):
    """`roi_align` with its options fixed. Takes the place of `torchvision.ops.RoIAlign`.

    Args:
        output_size: bins `(P, Q)`, or one number for both.
        spatial_scale: map cells per image pixel.
        sampling_ratio: samples per bin side; `<= 0` is adaptive.
        aligned: shift coordinates by half a cell.

    Example:
        >>> pool = RoIAlign(7, spatial_scale=1 / 16, sampling_ratio=2)
        >>> pool(torch.rand(1, 8, 32, 32), [torch.tensor([[0.0, 0.0, 256.0, 128.0]])]).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: Scale,
        sampling_ratio: int,
        aligned: bool = False,
    ):
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Boxes) -> Tensor:
        """Pool `rois` from `input` `(N, C, H, W)`: `(K, C, P, Q)`. Errors: see `roi_align`."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


class LevelMapper:
    """The FPN rule for lists of boxes. Takes the place of `torchvision.ops.poolers.LevelMapper`.

    Args:
        k_min, k_max: levels of the finest and coarsest map, `-log2` of their scales.
        canonical_scale: side in pixels of a box that belongs to `canonical_level`.
        canonical_level: the level k0 of such a box.
        eps: added to the level before it is rounded down.

    Example:
        >>> LevelMapper(2, 5)([torch.tensor([[0.0, 0.0, 448.0, 448.0]])])
        tensor([3])
    """

    def __init__(
        self,
        k_min: int,
        k_max: int,
        canonical_scale: float = 224,
        canonical_level: int = 4,
        eps: float = 1e-6,
    ):
        self.k_min = k_min
        self.k_max = k_max
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.eps = eps

    def __call__(self, boxlists: Sequence[Tensor]) -> Tensor:
        """Index into the pyramid of every box of the `(K_i, 4)` lists: `(K,)` int64, -1 for a box without a level."""
        return _assign_levels(
            boxlists,
            int(self.k_max) - int(self.k_min) + 1,
            int(self.k_min),
            self.canonical_scale,
            self.canonical_level,
            self.eps,
        )


class MultiScaleRoIAlign(nn.Module):
    """`multiscale_roi_align` over a dict of feature maps. Takes the place of `torchvision.ops.MultiScaleRoIAlign`.

    Args:
        featmap_names: keys of the maps to pool from, finest first. Keys that a dict of maps lacks are passed over.
        output_size: bins `(P, Q)`, or one number for both.
        sampling_ratio: samples per bin side; `<= 0` is adaptive.
        canonical_scale: side in pixels of a box that belongs to `canonical_level`.
        canonical_level: the level k0 of such a box.
        aligned: shift coordinates by half a cell.
        spatial_scales: map cells per image pixel of every level. By default they are inferred on every call, from
            the sizes of maps and images, as the nearest powers of two.

    Example:
        >>> pool = MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2)
        >>> maps = {"0": torch.rand(1, 8, 64, 64), "1": torch.rand(1, 8, 32, 32)}
        >>> pool(maps, [torch.tensor([[0.0, 0.0, 200.0, 100.0]])], [(256, 256)]).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | tuple[int, int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        spatial_scales: Sequence[Scale] | None = None,
    ):
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = _pair("MultiScaleRoIAlign", "output_size", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.aligned = aligned
        self.spatial_scales = spatial_scales

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool the boxes of every image.

        Args:
            x: maps `(N, C, H_l, W_l)` by name.
            boxes: for every image `(K_i, 4)` boxes `[x1, y1, x2, y2]` in pixels.
            image_shapes: `(height, width)` of every image, before padding.

        Returns:
            `(K, C, P, Q)`, see `multiscale_roi_align`.

        Raises:
            ValueError: none of `featmap_names` is in `x`, or no image shape is given to infer scales from; and what
                `multiscale_roi_align` raises.
        """
        maps = [x[name] for name in self.featmap_names if name in x]
        if not maps:
            raise ValueError(f"MultiScaleRoIAlign: `x` must hold some of the maps {self.featmap_names}, got {list(x)}")
        scales = self.spatial_scales or infer_scales([m.shape[-2:] for m in maps], image_shapes)
        return multiscale_roi_align(
            maps,
            boxes,
            self.output_size,
            scales,
            self.sampling_ratio,
            self.aligned,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            levels=self._levels_of_crowded_scales(scales, boxes),
        )

    def _levels_of_crowded_scales(self, scales: Sequence[Scale], boxes: Sequence[Tensor]) -> Tensor | None:
        """Levels as torchvision assigns them where two maps share a scale, else None.

        Maps of a few cells round to the same power of two as their neighbour. The pyramid then spans fewer levels
        than it has maps, and the last of them stay unused.
        """
        exponents = [-math.log2(_pair("MultiScaleRoIAlign", "spatial_scales", scale)[0]) for scale in scales]
        span = exponents[-1] - exponents[0]
        if span >= len(scales) - 1 or span < 0:
            return None
        mapper = LevelMapper(round(exponents[0]), round(exponents[-1]), self.canonical_scale, self.canonical_level)
        return mapper(boxes)

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio}, canonical_scale={self.canonical_scale}, "
            f"canonical_level={self.canonical_level}, aligned={self.aligned}, spatial_scales={self.spatial_scales}"
        )


def infer_scales(map_sizes: Sequence[Sequence[int]], image_shapes: Sequence[Sequence[int]]) -> Sequence[Scale]:
    """Map cells per image pixel of every map, as the nearest power of two.

    Images are padded before they reach the backbone, so the ratio of map to image can only come out too large. The
    smaller of the ratios along both axes is the less mistaken.
    """
    if len(image_shapes) == 0:
        raise ValueError("MultiScaleRoIAlign: `image_shapes` must hold the shape of an image to infer scales from")
    image = [max(shape[axis] for shape in image_shapes) for axis in (0, 1)]
    return [min(_power_of_two(size[axis] / image[axis]) for axis in (0, 1)) for size in map_sizes]


def _power_of_two(ratio: float) -> float:
    """The nearest, as exponents count. By comparisons, which torch.export keeps as bounds of sizes it does not know."""
    exponent = 0
    while ratio < 2.0 ** (exponent - 0.5):
        exponent -= 1
    while ratio >= 2.0 ** (exponent + 0.5):
        exponent += 1
    return 2.0**exponent
