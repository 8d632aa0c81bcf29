"""Draw boxes, masks and labels on images with OpenCV.

Images are uint8 arrays (H, W, 3) in BGR order, as ``cv2.imread`` gives them; colours are RGB.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mmdet.structures.masks import segmentation_to_rle

Colour = tuple[int, int, int]

# Told apart on photographs and, one by one, from their neighbours in the list.
PALETTE: tuple[Colour, ...] = (
    (230, 57, 70), (29, 133, 255), (46, 196, 100), (255, 183, 3), (157, 78, 221), (0, 187, 190),
    (255, 111, 30), (240, 84, 180), (130, 190, 30), (100, 110, 240), (170, 115, 60), (120, 135, 155))
# How far small images are enlarged, in pixels, and how many times at most.
SHORT_SIDE, LONG_SIDE, MAX_FACTOR = 400, 4000, 16
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_detections(image: np.ndarray, detections: Mapping[str, Any], classes: Sequence[str],
                    score_thr: float = 0.3, palette: Sequence[Colour] | None = None) -> np.ndarray:
    """A copy of ``image`` with the objects drawn on it.

    An image whose short side is below 400 pixels is enlarged by a whole factor, so that its labels
    can be read: at most 16 times, and not beyond a long side of 4000 pixels.

    Args:
        image: (H, W, 3) uint8, BGR.
        detections: ``boxes`` (n, 4) xyxy in pixels, ``labels`` (n,) and, if present, ``scores``
            (n,) and ``masks`` (n COCO RLE dicts); tensors or arrays. Without scores, as in ground
            truth, all objects are drawn.
        classes: name of each label.
        score_thr: objects with a lower score are left out.
        palette: RGB colour of each label, used in turn.

    Raises:
        ValueError: ``image`` is not (H, W, 3) uint8, a label has no name, or a mask is not of the
            image's size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}')
    boxes, labels = (_array(detections[key]) for key in ('boxes', 'labels'))
    scores = _array(detections['scores']) if 'scores' in detections else None
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f'labels from {labels.min()} to {labels.max()}, but {len(classes)} class names')

    short, long = sorted(image.shape[:2])
    factor = max(1, min(math.ceil(SHORT_SIDE / short), LONG_SIDE // long, MAX_FACTOR))
    picture = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    thickness = max(1, round(min(picture.shape[:2]) / 300))
    colours = [_bgr((palette or PALETTE)[label % len(palette or PALETTE)]) for label in labels]
    # Large objects first: what they hide is drawn over them.
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) if len(boxes) else np.zeros(0)
    shown = [i for i in np.argsort(-areas, kind='stable') if scores is None or scores[i] >= score_thr]

    if 'masks' in detections:
        for i in shown:
            mask = coco_mask.decode(detections['masks'][i])
            if mask.shape != image.shape[:2]:
                raise ValueError(f'a mask is {mask.shape}, but the image {image.shape[:2]}')
            _draw_mask(picture, mask, colours[i], thickness)
    for i in shown:
        start, end = (np.rint(boxes[i] * factor).astype(int).reshape(2, 2)).tolist()
        cv2.rectangle(picture, start, end, colours[i], thickness)
    for i in shown:
        text = classes[labels[i]] if scores is None else f'{classes[labels[i]]} {scores[i]:.2f}'
        _draw_label(picture, text, boxes[i] * factor, colours[i], thickness)
    return picture


def draw_grid(images: Sequence[np.ndarray], columns: int, titles: Sequence[str] = (),
              width: int = 480) -> np.ndarray:
    """Images side by side, row by row, on white, each scaled to a longer side of at most ``width`` pixels.

    ``titles``, if given, are written above the columns.
    """
    if not images or columns < 1:
        raise ValueError(f'a grid needs images and columns, not {len(images)} images in {columns} columns')
    gap, head = 8, 36 if titles else 0
    scaled = []
    for image in images:
        scale = width / max(image.shape[:2])
        size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        scaled.append(cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC))
    rows = [scaled[i:i + columns] for i in range(0, len(scaled), columns)]
    heights = [max(len(image) for image in row) for row in rows]
    shape = (head + sum(heights) + gap * (len(rows) + 1), columns * (width + gap) + gap, 3)
    grid = np.full(shape, 255, np.uint8)
    for column, title in enumerate(titles):
        corner = (gap + column * (width + gap), head - 8)
        cv2.putText(grid, title, corner, FONT, 0.8, (40, 40, 40), 2, cv2.LINE_AA)
    top = head + gap
    for row, height in zip(rows, heights):
        for column, image in enumerate(row):
            left = gap + column * (width + gap) + (width - image.shape[1]) // 2
            middle = top + (height - len(image)) // 2
            grid[middle:middle + len(image), left:left + image.shape[1]] = image
        top += height + gap
    return grid


def ground_truth(data_info: Mapping[str, Any]) -> dict[str, Any]:
    """What ``draw_detections`` takes, from ``CocoDataset.get_data_info(i)``; crowd regions are left out."""
    objects = [instance for instance in data_info['instances'] if not instance['ignore_flag']]
    drawn: dict[str, Any] = dict(
        boxes=np.array([instance['bbox'] for instance in objects], np.float32).reshape(-1, 4),
        labels=np.array([instance['bbox_label'] for instance in objects], np.int64))
    if all('mask' in instance for instance in objects):
        size = data_info['height'], data_info['width']
        drawn['masks'] = [segmentation_to_rle(instance['mask'], *size) for instance in objects]
    return drawn


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write a BGR image; folders are made as needed, the suffix chooses the format.

    Raises:
        ValueError: the format is not known to OpenCV, or holds no such picture (PGM, or a WebP of 20,000
            pixels).
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not cv2.haveImageWriter(str(path)):
        raise ValueError(f'{path}: not an image format that can be written; take .jpg or .png')
    encoded, data = cv2.imencode(path.suffix, image)
    if not encoded:
        raise ValueError(f'{path}: a colour picture of {image.shape[1]} x {image.shape[0]} pixels cannot be '
                         'written in this format; take .jpg or .png')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, 'detach') else np.asarray(values)


def _bgr(colour: Sequence[int]) -> Colour:
    red, green, blue = colour
    return int(blue), int(green), int(red)


def _draw_mask(picture: np.ndarray, mask: np.ndarray, colour: Colour, thickness: int) -> None:
    """Tint the mask's pixels and draw its outline."""
    height, width = picture.shape[:2]
    if mask.shape != (height, width):  # rounds off the steps between enlarged pixels
        enlarged = cv2.resize(mask * 255, (width, height), interpolation=cv2.INTER_LINEAR)
        mask = cv2.GaussianBlur(enlarged, (0, 0), height / mask.shape[0] / 2) // 128
    inside = mask.astype(bool)
    picture[inside] = (0.55 * picture[inside] + 0.45 * np.array(colour)).astype(np.uint8)
    outline, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outline, -1, colour, thickness, cv2.LINE_AA)


def _draw_label(picture: np.ndarray, text: str, box: np.ndarray, colour: Colour, thickness: int) -> None:
    """Text on a patch of the object's colour, above the box where there is room, else inside it."""
    size = 0.4 * (1 + min(picture.shape[:2]) / 1200)
    (width, height), baseline = cv2.getTextSize(text, FONT, size, 1)
    pad = thickness + 1
    patch_width, patch_height = width + 2 * pad, height + baseline + pad
    left = int(np.clip(box[0], 0, max(0, picture.shape[1] - patch_width)))
    top = int(box[1]) - patch_height if box[1] >= patch_height else int(max(box[1], 0))
    cv2.rectangle(picture, (left, top), (left + patch_width, top + patch_height), colour, cv2.FILLED)
    # Rec. 601 luma decides between black and white text.
    luma = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2]
    ink = (0, 0, 0) if luma > 140 else (255, 255, 255)
    cv2.putText(picture, text, (left + pad, top + height + pad // 2 + 1), FONT, size, ink, 1, cv2.LINE_AA)
