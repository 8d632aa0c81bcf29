import pytest
import torch

from mmdet.models.data_preprocessor import DetDataPreprocessor
from mmdet.structures.data_sample import DataSample

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def batch(*shapes: tuple[int, int]) -> dict:
    images = [torch.randint(0, 256, (3, *shape), dtype=torch.uint8) for shape in shapes]
    samples = [DataSample(img_id=i, img_path='', ori_shape=s, img_shape=s) for i, s in enumerate(shapes)]
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('bgr_to_rgb', [True, False])
def test_normalise_then_pad(bgr_to_rgb: bool) -> None:
    data = batch((40, 64), (33, 90))
    out = DetDataPreprocessor(MEAN, STD, bgr_to_rgb).double()(data)
    assert out['inputs'].shape == (2, 3, 64, 96) and out['inputs'].dtype == torch.float64
    assert out['inputs'].is_contiguous()
    for i, (image, (h, w)) in enumerate(zip(data['inputs'], [(40, 64), (33, 90)])):
        for channel in range(3):
            plane = image[2 - channel if bgr_to_rgb else channel].double()
            # The exact decimal values, not what float32 makes of them.
            expected = (plane - MEAN[channel]) / STD[channel]
            assert torch.equal(out['inputs'][i, channel, :h, :w], expected)
        assert (out['inputs'][i, :, h:] == 0).all() and (out['inputs'][i, :, :, w:] == 0).all()
    assert [s.pad_shape for s in out['data_samples']] == [(64, 64), (64, 96)]
    assert [s.batch_shape for s in out['data_samples']] == [(64, 96)] * 2


def test_the_loaders_samples_stay_as_they_are() -> None:
    data = batch((40, 64))
    DetDataPreprocessor(MEAN, STD)(data)
    assert data['data_samples'][0].pad_shape == (0, 0)


def test_other_divisor() -> None:
    out = DetDataPreprocessor(MEAN, STD, pad_size_divisor=1)(batch((40, 64), (33, 90)))
    assert out['inputs'].shape == (2, 3, 40, 90) and out['inputs'].dtype == torch.float32


def test_statistics_are_no_part_of_the_checkpoint() -> None:
    assert DetDataPreprocessor(MEAN, STD).state_dict() == {}
