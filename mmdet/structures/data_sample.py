"""The one container that crosses the borders data set -> preprocessor -> model -> metric."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmdet.structures.masks import MaskCrops


@dataclass
class DataSample:
    """What is known about one image besides its pixels.

    Shapes are (height, width). Boxes are continuous xyxy (width = x2 - x1) in pixels of the
    resized image. ``G`` objects, ``I`` ignored regions (crowds).
    """

    img_id: int
    img_path: str
    ori_shape: tuple[int, int]
    """Size of the image file."""
    img_shape: tuple[int, int]
    """Size after resizing, before padding."""
    scale_factor: tuple[float, float] = (1.0, 1.0)
    """(w, h): resized = original * scale_factor."""
    flip: bool = False
    pad_shape: tuple[int, int] = (0, 0)
    """``img_shape`` rounded up to the size divisor; set by the preprocessor."""
    batch_shape: tuple[int, int] = (0, 0)
    """Size of the padded batch; set by the preprocessor."""
    boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    """(G, 4) float32."""
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """(G,) int64, 0 .. num_classes - 1."""
    masks: MaskCrops | None = None
    """Of the G objects, in pixels of the resized image; None where the pipeline loads no masks."""
    ignored_boxes: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    """(I, 4) float32."""

    def to(self, device: torch.device) -> 'DataSample':
        """A copy whose tensors are on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> 'DataSample':
        """A copy whose tensors are in page-locked memory; the data loader asks for it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> 'DataSample':
        mapped: dict[str, Any] = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        if self.masks is not None:
            mapped['masks'] = MaskCrops(*map(function, self.masks))
        return replace(self, **mapped)
