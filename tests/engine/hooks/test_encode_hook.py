"""Masks are encoded in another thread while a data set is tested, and then only."""
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmdet.engine.hooks import EncodeHook
from mmdet.models.roi_heads.mask_head import FCNMaskHead
from mmdet.models.roi_heads.stage import Detections, results_of
from mmdet.structures.data_sample import DataSample
from mmdet.structures.masks import RLE, finished


class Head(FCNMaskHead):
    def paste(self, masks: torch.Tensor, boxes: torch.Tensor, *args: Any) -> list[RLE]:
        self.thread = threading.current_thread()
        if len(boxes) == 0:
            raise RuntimeError('nothing to paste')
        return super().paste(masks, boxes, *args)


@torch.no_grad()
@pytest.mark.parametrize('when', ['val', 'test'])
def test_beside_the_network(when: str) -> None:
    head = Head(1, 4, 4, 5, dict(type='CrossEntropyLoss', use_sigmoid=True))
    runner = SimpleNamespace(bare_model=nn.ModuleDict(dict(mask_head=head)))
    boxes = torch.tensor([[2., 3., 30., 20.], [8., 8., 24., 28.]])
    sample = DataSample(img_id=1, img_path='', ori_shape=(32, 40), img_shape=(32, 40))
    features = torch.randn(2, 4, 14, 14)

    def predict(number: int) -> Any:
        labels = torch.zeros(number, dtype=torch.int64)
        found = Detections(boxes[:number], boxes[:number], torch.ones(number), labels)
        return results_of([], [found], [sample], lambda *_: features[:number], [head], {})[0]

    expected = predict(2)
    assert head.thread is threading.main_thread() and len(expected['masks']) == 2
    hook = EncodeHook()
    getattr(hook, f'before_{when}')(runner)
    result = predict(2)
    assert isinstance(result['masks'], Future)
    assert finished(result)['masks'] == expected['masks'] and head.thread is not threading.main_thread()
    with pytest.raises(RuntimeError, match='nothing to paste'):
        finished(predict(0))
    getattr(hook, f'after_{when}')(runner)
    assert not head.thread.is_alive()
    assert predict(2)['masks'] == expected['masks'] and head.thread is threading.main_thread()


def test_finished_without_masks() -> None:
    assert finished(dict(img_id=3)) == dict(img_id=3)
