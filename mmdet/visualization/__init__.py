"""Pictures: detections or ground truth drawn on images."""

from .draw import draw_detections, draw_grid, ground_truth, write_image

__all__ = ['draw_detections', 'draw_grid', 'ground_truth', 'write_image']
