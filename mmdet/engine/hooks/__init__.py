"""What happens between the steps of training and testing."""

from mmdet.engine.hooks.checkpoint_hook import CheckpointHook
from mmdet.engine.hooks.draw_hook import DrawHook
from mmdet.engine.hooks.encode_hook import EncodeHook
from mmdet.engine.hooks.logger_hook import LoggerHook
from mmdet.engine.hooks.precise_bn_hook import PreciseBNHook
from mmdet.engine.hooks.training_hooks import (
    BatchSizeHook,
    ClassesHook,
    EpochSeedHook,
    LossHook,
    SyncBuffersHook,
)

__all__ = ['BatchSizeHook', 'CheckpointHook', 'ClassesHook', 'DrawHook', 'EncodeHook', 'EpochSeedHook',
           'LoggerHook', 'LossHook', 'PreciseBNHook', 'SyncBuffersHook']
