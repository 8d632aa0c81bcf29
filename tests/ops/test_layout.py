"""The layouts that fake kernels promise."""
import pytest
import torch

from mmdet.ops._layout import layout_of


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_of_a_map(layout):
    assert layout_of(torch.empty(2, 3, 4, 5).to(memory_format=layout)) is layout


@pytest.mark.parametrize('size', [(2, 1, 4, 5), (2, 3, 1, 1)])
def test_what_lies_either_way_is_contiguous(size):
    assert layout_of(torch.empty(size).to(memory_format=torch.channels_last)) is torch.contiguous_format


def test_what_lies_neither_way_is_made_contiguous():
    assert layout_of(torch.empty(2, 3, 4, 5).transpose(2, 3)) is torch.contiguous_format
