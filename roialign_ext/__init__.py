"""Multi-level RoI Align in one launch: the public names of roialign_ext."""

from .accelerate import accelerate
from .modules import LevelMapper, MultiScaleRoIAlign, RoIAlign
from .ops import assign_levels, multiscale_roi_align, roi_align

__version__ = "0.1.0"

__all__ = [
    "LevelMapper",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "accelerate",
    "assign_levels",
    "multiscale_roi_align",
    "roi_align",
]
