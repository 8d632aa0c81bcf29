"""From the loader's images to one normalised batch on the model's device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet.registry import MODELS
from mmdet.structures.data_sample import DataSample


@MODELS.register_module()
class DetDataPreprocessor(nn.Module):
    """Normalise images, pad them on the right and at the bottom, and stack them.

    Args:
        mean, std: of each channel, in the order that the model sees, on the scale 0 .. 255.
        bgr_to_rgb: swap the channels of the (BGR) images first.
        pad_size_divisor: height and width of the batch are multiples of it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        bgr_to_rgb: bool = True,
        pad_size_divisor: int = 32,
    ) -> None:
        super().__init__()
        self.statistics = (tuple(mean), tuple(std))
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1), persistent=False)
        self.bgr_to_rgb = bgr_to_rgb
        self.pad_size_divisor = pad_size_divisor

    def _apply(self, *args: Any, **kwargs: Any) -> 'DetDataPreprocessor':
        # Moved to float64, the values have to be exact, not those that float32 had rounded.
        super()._apply(*args, **kwargs)
        self.mean = self.mean.new_tensor(self.statistics[0]).view(3, 1, 1)
        self.std = self.std.new_tensor(self.statistics[1]).view(3, 1, 1)
        return self

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Images (3, H_i, W_i) uint8 BGR and their samples to ``inputs`` (N, 3, H, W) and samples.

        Zeros are padded after normalisation. The samples come back on the model's device with
        ``pad_shape`` and ``batch_shape`` set.
        """
        images: list[Tensor] = data['inputs']
        samples: list[DataSample] = [s.to(self.mean.device) for s in data['data_samples']]
        for image, sample in zip(images, samples, strict=True):
            height, width = image.shape[1:]
            sample.pad_shape = (self._round_up(height), self._round_up(width))
        batch_shape = (max(s.pad_shape[0] for s in samples), max(s.pad_shape[1] for s in samples))
        # GPUs are made for channels last; on the CPU 3x3 convolutions then round several times more.
        layout = torch.channels_last if self.mean.is_cuda else torch.contiguous_format
        batch = torch.empty(
            len(images), 3, *batch_shape, dtype=self.mean.dtype, device=self.mean.device,
            memory_format=layout).zero_()
        for padded, image, sample in zip(batch, images, samples):
            sample.batch_shape = batch_shape
            image = image.to(self.mean.device, non_blocking=True).to(self.mean.dtype)
            if self.bgr_to_rgb:
                image = image.flip(0)
            padded[:, :image.shape[1], :image.shape[2]] = (image - self.mean) / self.std
        return dict(inputs=batch, data_samples=samples)

    def _round_up(self, size: int) -> int:
        return -(-size // self.pad_size_divisor) * self.pad_size_divisor
