"""Training and testing: the runner, its hooks, mixed precision."""

from mmdet.engine.amp import AmpOptimWrapper
from mmdet.engine.hooks import (
    BatchSizeHook,
    CheckpointHook,
    ClassesHook,
    DrawHook,
    EncodeHook,
    EpochSeedHook,
    LoggerHook,
    LossHook,
    PreciseBNHook,
    SyncBuffersHook,
)
from mmdet.engine.runner import DetectionRunner

__all__ = [
    'AmpOptimWrapper', 'BatchSizeHook', 'CheckpointHook', 'ClassesHook', 'DetectionRunner', 'DrawHook',
    'EncodeHook', 'EpochSeedHook', 'LoggerHook', 'LossHook', 'PreciseBNHook', 'SyncBuffersHook',
]
