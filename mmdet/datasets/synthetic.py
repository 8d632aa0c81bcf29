"""A small instance segmentation data set in COCO format, drawn by a seeded generator.

Coloured shapes lie in front of one of three scenes (sky, meadow, table) and may hide each other.
Nine classes have a look of their own. The three of ``CONTEXT_CLASSES`` look the same, a yellow
disc on a grey plate: only the scene around the plate says whether it is a sun, a ball or a coin.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]
Points = NDArray[np.float64]
Colour = tuple[int, int, int]
"""Blue, green, red."""

CONTEXT_CLASSES = {'sun': 'sky', 'ball': 'meadow', 'coin': 'table'}
"""What a disc is -> the scene that makes it so."""


@dataclass(frozen=True)
class Shape:
    """How a class looks, in the square -1 .. 1."""

    texture: NDArray[np.uint8]
    """(S, S, 3) BGR, covers the square."""
    outlines: tuple[Points, ...]
    """(N, 2) vertices of the outside, then of a hole."""


def _circle(radius: float) -> Points:
    angles = np.arange(32) * (2 * np.pi / 32)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _rectangle(half_width: float, half_height: float) -> Points:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (half_width, half_height)


def _star() -> Points:
    angles = np.arange(10) * (np.pi / 5) - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.48, 1)[:, None]
    return radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> Points:
    t = np.arange(32) * (2 * np.pi / 32)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, (-y - 2.5) / 16], axis=1)


def _cross(w: float) -> Points:
    return np.array([[-w, -1], [w, -1], [w, -w], [1, -w], [1, w], [w, w],
                     [w, 1], [-w, 1], [-w, w], [-1, w], [-1, -w], [-w, -w]])


def _two_colours(where: Mask, colour: Colour, other: Colour) -> NDArray[np.uint8]:
    return np.where(where[..., None], colour, other).astype(np.uint8)


def _shapes() -> dict[str, Shape]:
    """The classes that have a look of their own, and the disc."""
    v, u = np.mgrid[-1:1:64j, -1:1:64j]
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    row = np.floor(v * 5)
    mortar = (v * 5 - row < 0.25) | ((u * 2.5 + row % 2 / 2) % 1 < 0.13)
    checks = (np.floor(u * 2.4) + np.floor(v * 2.4)) % 2 == 0
    red, white, black, yellow = (50, 50, 215), (245, 245, 245), (35, 30, 30), (60, 215, 250)
    return {
        'brick': Shape(_two_colours(mortar, (190, 205, 215), (45, 65, 165)), (_rectangle(1, 0.6),)),
        'star': Shape(_two_colours(radius < 0.36, (40, 140, 250), yellow), (_star(),)),
        'lifebuoy': Shape(_two_colours(angle % (np.pi / 2) < np.pi / 4, red, white),
                          (_circle(1), _circle(0.45))),
        'chessboard': Shape(_two_colours(checks, black, white), (_rectangle(0.85, 0.85),)),
        'warning': Shape(_two_colours((v < 0.5) & (np.abs(u) < (v + 0.4) * 0.55), white, red),
                         (np.array([[0, -0.95], [1, 0.8], [-1, 0.8]]),)),
        'heart': Shape(_two_colours(np.hypot(u + 0.4, v + 0.35) < 0.22, (235, 205, 255), (165, 70, 235)),
                       (_heart(),)),
        'cross': Shape(_two_colours(np.maximum(np.abs(u), np.abs(v)) < 0.36, (230, 215, 120), (190, 60, 30)),
                       (_cross(0.36),)),
        'kite': Shape(_two_colours(u * (v + 0.2) > 0, (40, 130, 245), (130, 35, 110)),
                      (np.array([[0, -1], [0.72, -0.2], [0, 1], [-0.72, -0.2]]),)),
        'flag': Shape(_two_colours(np.abs(v) < 0.22, white, (110, 130, 10)), (_rectangle(1, 0.66),)),
        'disc': Shape(_two_colours(radius < 0.7, (110, 225, 250), (60, 180, 235)), (_circle(1),)),
    }


_SHAPES = _shapes()
_OWN_LOOK = tuple(name for name in _SHAPES if name != 'disc')
CLASSES = (*_OWN_LOOK, *CONTEXT_CLASSES)


def _noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> Pixels:
    """(size, size) in 0 .. 1, smooth between ``rows`` x ``columns`` random numbers."""
    grid = rng.random((rows, columns), dtype=np.float32)
    return np.clip(cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def _blend(colour: Colour, other: Colour, share: Pixels) -> Pixels:
    start, end = np.array([colour, other], np.float32)
    return start + (end - start) * share[..., None]


def _sky(rng: np.random.Generator, size: int) -> Pixels:
    height = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    clouds = np.clip(_noise(rng, size, 6, 4) * 2.4 - 1.2, 0, 0.85)[..., None]
    return _blend((225, 160, 85), (240, 205, 160), height) * (1 - clouds) + 250 * clouds


def _meadow(rng: np.random.Generator, size: int) -> Pixels:
    return _blend((35, 105, 60), (80, 180, 110), _noise(rng, size, size // 8, size))


def _table(rng: np.random.Generator, size: int) -> Pixels:
    table = _blend((55, 90, 140), (100, 145, 190), _noise(rng, size, size // 2, 4))
    plank = size // 5
    table[rng.integers(plank)::plank] *= 0.55
    return table


SCENES: dict[str, Callable[[np.random.Generator, int], Pixels]] = {
    'sky': _sky, 'meadow': _meadow, 'table': _table}


@dataclass
class _Canvas:
    """An image being drawn, and which object each of its pixels shows."""

    image: Pixels
    """(S, S, 3) BGR."""
    owner: NDArray[np.int64]
    """(S, S): 0 where no object is, else the number of the object, from 1."""
    reserved: Mask
    """(S, S): where no other object may lie."""
    objects: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, class_name: str, shape: Shape, to_pixels: Points) -> bool:
        """Draw an object: ``shape``, moved by the affine map ``to_pixels`` (2, 3); False if there is no room.

        There is room off what is reserved, and where 60% of every other object stays visible.
        """
        size = len(self.image)
        outlines = [np.round(points @ to_pixels[:, :2].T + to_pixels[:, 2], 2) for points in shape.outlines]
        mask, *hole = (_rasterise(points, size) for points in outlines)
        if hole:
            mask &= ~hole[0]
        left = np.bincount(self.owner[~mask], minlength=len(self.objects) + 1)[1:]
        if (mask & self.reserved).any() or any(n < 0.6 * o['area'] for n, o in zip(left, self.objects)):
            return False
        self._paint(shape, outlines, to_pixels)
        self.objects.append(dict(
            class_name=class_name, polygon=None if hole else outlines[0], area=int(mask.sum()), iscrowd=0))
        self.owner[mask] = len(self.objects)
        return True

    def _paint(self, shape: Shape, outlines: list[Points], to_pixels: Points) -> None:
        low = np.maximum(np.floor(outlines[0].min(0)).astype(int) - 2, 0)
        high = np.ceil(outlines[0].max(0)).astype(int) + 2
        window = self.image[low[1]:high[1], low[0]:high[0]]
        step = 2 / (len(shape.texture) - 1)
        from_texture = to_pixels @ [[step, 0, -1], [0, step, -1], [0, 0, 1]]
        # Pixel centres are at .5 in COCO's coordinates and at .0 in OpenCV's.
        from_texture[:, 2] -= low + 0.5
        texture = cv2.warpAffine(
            shape.texture, from_texture, window.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
        fixed_point = [np.round((outline - low - 0.5) * 16).astype(np.int32) for outline in outlines]
        cover, edge = np.zeros((2, *window.shape[:2]), np.uint8)
        cv2.fillPoly(cover, fixed_point, 255, cv2.LINE_AA, shift=4)
        cv2.polylines(edge, fixed_point, True, 140, 1, cv2.LINE_AA, shift=4)
        share = np.maximum(cover, edge)[..., None] / np.float32(255)
        window += share * (texture * (1 - edge[..., None] / np.float32(255)) - window)


def _rasterise(points: Points, size: int) -> Mask:
    return coco_mask.decode(coco_mask.frPyObjects([points.ravel().tolist()], size, size))[..., 0].astype(bool)


def draw_image(scene: str, size: int, seed: list[int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One image and its objects in COCO's form (without ids).

    Args:
        scene: a name of ``SCENES``.
        size: height and width in pixels.
        seed: numbers that determine everything but the scene: the same ones give the same objects
            at the same places on each scene.
    """
    layout, scenery = np.random.default_rng(seed).spawn(2)
    canvas = _Canvas(
        SCENES[scene](scenery, size), np.zeros((size, size), np.int64), np.zeros((size, size), bool))
    brightness = layout.uniform(0.85, 1.1)
    noise = layout.normal(0, 4, (size, size, 1)).astype(np.float32)
    if layout.random() > 0.04:
        _draw_discs(canvas, layout, next(name for name in CONTEXT_CLASSES if CONTEXT_CLASSES[name] == scene))
        if layout.random() < 0.08:
            _draw_crowd(canvas, layout)
        _draw_shapes(canvas, layout)
    image = np.clip(canvas.image * brightness + noise, 0, 255).astype(np.uint8)
    return image, [_annotation(o, canvas.owner == number) for number, o in enumerate(canvas.objects, 1)]


def _place(rng: np.random.Generator, size: int, radius: float, max_angle: float) -> Points:
    """The affine map of a shape to a random place inside the image, turned by up to ``max_angle``."""
    angle = rng.uniform(-max_angle, max_angle)
    cos, sin = radius * np.cos(angle), radius * np.sin(angle)
    reach = radius * (abs(np.cos(angle)) + abs(np.sin(angle)))
    x, y = rng.uniform(reach, size - reach, 2)
    return np.array([[cos, -sin, x], [sin, cos, y]])


def _draw_discs(canvas: _Canvas, rng: np.random.Generator, class_name: str) -> None:
    """None to two discs, each on a plate that keeps the scene away from it."""
    size = len(canvas.image)
    for radius in size * rng.uniform(0.065, 0.13, rng.choice(3, p=[0.3, 0.45, 0.25])):
        half = int(1.8 * radius)
        x, y = rng.integers(half, size - half, 2)
        plate = (slice(y - half, y + half), slice(x - half, x + half))
        if canvas.reserved[plate].any():
            continue
        canvas.image[plate] = 165
        canvas.draw(class_name, _SHAPES['disc'], np.array([[radius, 0, x], [0, radius, y]]))
        canvas.reserved[plate] = True


def _draw_crowd(canvas: _Canvas, rng: np.random.Generator) -> None:
    """A heap of small shapes of one class, annotated as one region."""
    size, first = len(canvas.image), len(canvas.objects)
    name = rng.choice(_OWN_LOOK)
    x, y = rng.uniform(0.2 * size, 0.8 * size, 2)
    for shift in rng.uniform(-0.14 * size, 0.14 * size, (14, 2)):
        to_pixels = _place(rng, size, 0.05 * size, np.pi)
        to_pixels[:, 2] = shift + (x, y)
        canvas.draw(name, _SHAPES[name], to_pixels)
    if len(canvas.objects) > first:
        canvas.owner[canvas.owner > first] = first + 1
        area = int((canvas.owner == first + 1).sum())
        canvas.objects[first:] = [dict(class_name=name, area=area, polygon=None, iscrowd=1)]


def _draw_shapes(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Large ones first, so that small ones are not hidden."""
    size = len(canvas.image)
    radii = np.clip(rng.lognormal(np.log(0.16), 0.45, rng.integers(1, 7)), 0.07, 0.37) * size
    for radius in sorted(radii, reverse=True):
        name = rng.choice(_OWN_LOOK)
        for _ in range(20):
            if canvas.draw(name, _SHAPES[name], _place(rng, size, radius, np.pi / 8)):
                break


def _annotation(drawn: dict[str, Any], visible: Mask) -> dict[str, Any]:
    """Polygon of an object that is whole, else RLE of what is visible of it."""
    rle = coco_mask.encode(np.asfortranarray(visible, np.uint8))
    whole = drawn['polygon'] is not None and coco_mask.area(rle) == drawn['area']
    return dict(
        category_id=CLASSES.index(drawn['class_name']) + 1,
        segmentation=[drawn['polygon'].ravel().tolist()] if whole else _uncompressed(visible),
        bbox=coco_mask.toBbox(rle).tolist(),
        area=int(coco_mask.area(rle)),
        iscrowd=drawn['iscrowd'])


def _uncompressed(mask: Mask) -> dict[str, list[int]]:
    """RLE as COCO's files have it: lengths of runs, column by column, from a run of zeros on."""
    columns = np.concatenate([[0], mask.ravel(order='F'), [0]])
    ends = np.append(np.flatnonzero(np.diff(columns)), mask.size)
    return dict(size=list(mask.shape), counts=np.diff(ends, prepend=0).tolist())


def generate(
    root: str | Path, num_train: int = 1080, num_val: int = 160, size: int = 160, seed: int = 0
) -> None:
    """Write ``train/`` and ``val/`` with JPEGs and ``annotations/instances_{train,val}.json``.

    The files depend on nothing but the arguments (and the versions of NumPy and OpenCV); an
    image is the same however many there are. Files of the same names are overwritten.

    Args:
        root: folder, made if it does not exist.
        num_train, num_val: images of each part.
        size: height and width of every image in pixels, at least 96.
        seed: not negative; another seed gives other images.
    """
    if min(num_train, num_val) < 1:
        raise ValueError(f'num_train={num_train}, num_val={num_val}: each part needs at least one image')
    if size < 96:
        raise ValueError(f'size={size} is too small to draw the shapes clearly; take at least 96')
    if seed < 0:
        raise ValueError(f'seed={seed} is negative; take 0 or more')
    root = Path(root)
    for part, (name, count) in enumerate([('train', num_train), ('val', num_val)]):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / 'annotations').mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image_id in range(1, count + 1):
            scene = tuple(SCENES)[image_id % len(SCENES)]
            image, objects = draw_image(scene, size, [seed, part, image_id])
            file_name = f'{image_id:06d}.jpg'
            if not cv2.imwrite(str(root / name / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 92]):
                raise OSError(f'{root / name / file_name} could not be written')
            images.append(dict(id=image_id, file_name=file_name, width=size, height=size))
            for annotation in objects:
                annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **annotation))
        categories = [dict(id=i, name=class_name) for i, class_name in enumerate(CLASSES, 1)]
        contents = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{name}.json').write_text(json.dumps(contents))
