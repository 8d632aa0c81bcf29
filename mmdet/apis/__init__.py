"""Use a detector from Python: three functions."""

from .inference import inference_detector, init_detector, show_result

__all__ = ['inference_detector', 'init_detector', 'show_result']
