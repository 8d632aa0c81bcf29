"""Training and testing: the runner, its hooks, mixed precision."""

from mmdet.engine.amp import AmpOptimWrapper
from mmdet.engine.hooks import (
    CheckpointHook,
    ClassesHook,
    DrawHook,
    EpochSeedHook,
    LoggerHook,
    LossHook,
    SyncBuffersHook,
)
from mmdet.engine.runner import DetectionRunner

__all__ = [
    'AmpOptimWrapper', 'CheckpointHook', 'ClassesHook', 'DetectionRunner', 'DrawHook', 'EpochSeedHook',
    'LoggerHook', 'LossHook', 'SyncBuffersHook',
]
