"""GCNet for object detection: Mask R-CNN with global context blocks on today's PyTorch."""

__version__ = '2.0.0'
