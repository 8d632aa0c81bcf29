"""The generated data set, checked through pycocotools, pixels and CocoDataset."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools.coco import COCO

from mmdet.datasets.coco import CocoDataset
from mmdet.datasets.synthetic import CLASSES, CONTEXT_CLASSES, SCENES, draw_image, generate

CONFIGS = Path(__file__).parents[2] / 'configs'


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('synthetic')
    generate(root, num_train=240, num_val=6)
    return root


@pytest.fixture(scope='module')
def coco(root: Path) -> COCO:
    return COCO(str(root / 'annotations/instances_train.json'))


def hashes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob('*.*')}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in [('a', 3), ('b', 3), ('c', 4)]:
        generate(tmp_path / name, num_train=5, num_val=2, seed=seed)
    generate(tmp_path / 'b', num_train=5, num_val=2, seed=3)  # Over what is there.
    a, b, c = (hashes(tmp_path / name) for name in 'abc')
    assert len(a) == 9 and a == b
    assert a.keys() == c.keys() and not set(a.values()) & set(c.values())


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path, root: Path) -> None:
    generate(tmp_path, num_train=2, num_val=1)
    few, many = hashes(tmp_path), hashes(root)
    for name in ('train/000001.jpg', 'train/000002.jpg', 'val/000001.jpg'):
        assert few[name] == many[name]
    assert few['train/000001.jpg'] != few['val/000001.jpg']


def test_boxes_and_areas_are_those_of_the_masks(coco: COCO) -> None:
    assert len(coco.anns) > 700
    polygons = 0
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        assert annotation['area'] == mask.sum() >= 30
        assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        polygons += isinstance(annotation['segmentation'], list)
    assert 0.4 < polygons / len(coco.anns) < 0.9


def test_masks_hold_only_what_is_visible(coco: COCO) -> None:
    for image_id in coco.imgs:
        annotations = coco.imgToAnns[image_id]
        if annotations:
            assert np.sum([coco.annToMask(a) for a in annotations], axis=0).max() == 1


def test_what_it_holds(coco: COCO) -> None:
    assert [c['name'] for c in coco.loadCats(sorted(coco.cats))] == list(CLASSES)
    assert len(CLASSES) == 12 and len(CONTEXT_CLASSES) == 3
    annotations = list(coco.anns.values())
    assert np.bincount([a['category_id'] for a in annotations], minlength=13)[1:].min() > 30
    assert 5 < sum(a['iscrowd'] for a in annotations) < 40
    assert all(isinstance(a['segmentation'], dict) for a in annotations if a['iscrowd'])
    assert 3 < sum(not coco.imgToAnns[i] for i in coco.imgs) < 30
    areas = [a['area'] for a in annotations]
    assert min(areas) < 16**2 and max(areas) > 70**2


def plate(bbox: list[float]) -> tuple[slice, slice]:
    """A disc and what surrounds it, well inside its plate."""
    x, y, width, height = map(int, bbox)
    margin = int(0.3 * width)
    return slice(y - margin, y + height + margin), slice(x - margin, x + width + margin)


def plates(coco: COCO, root: Path) -> tuple[list[int], list[np.ndarray], list[np.ndarray]]:
    """Of each disc: class (0 .. 2), (32, 32, 3) crop of its plate, and mean colour of the image's rim."""
    classes, crops, rims = [], [], []
    for annotation in coco.loadAnns(coco.getAnnIds(catIds=coco.getCatIds(list(CONTEXT_CLASSES)))):
        file_name = coco.imgs[annotation['image_id']]['file_name']
        image = cv2.imread(str(root / 'train' / file_name)).astype(np.float32)
        crop = image[plate(annotation['bbox'])]
        crops.append(cv2.resize(crop / crop.mean(), (32, 32), interpolation=cv2.INTER_AREA))
        rims.append(np.concatenate([image[:4].mean((0, 1)), image[-4:].mean((0, 1))]))
        classes.append(annotation['category_id'] - 10)
    return classes, crops, rims


def nearest_mean_accuracy(features: list[np.ndarray], classes: list[int]) -> float:
    """Share of the second half that lies nearest to the mean of its own class in the first half."""
    half = len(classes) // 2
    data, labels = np.stack([f.ravel() for f in features]), np.array(classes)
    means = np.stack([data[:half][labels[:half] == k].mean(0) for k in range(3)])
    nearest = ((data[half:, None] - means) ** 2).sum(-1).argmin(1)
    return float((nearest == labels[half:]).mean())


def test_only_the_scene_tells_discs_apart(coco: COCO, root: Path) -> None:
    classes, crops, rims = plates(coco, root)
    assert np.bincount(classes).min() > 30
    # A crop of the plate says nothing, to chance and three standard errors; the rim of the image says all.
    assert nearest_mean_accuracy(crops, classes) < 1 / 3 + 3 * np.sqrt(2 / 9 / (len(classes) // 2))
    assert nearest_mean_accuracy(rims, classes) > 0.9


def test_scenes_show_the_same_discs() -> None:
    """With one seed, objects and the plates of discs are the same on each scene, to the bit."""
    num_discs = 0
    for seed in range(30):
        drawn = {scene: draw_image(scene, 160, [seed]) for scene in SCENES}
        images = [image for image, _ in drawn.values()]
        objects = [annotations for _, annotations in drawn.values()]
        for first, *others in zip(*objects):
            if CLASSES[first['category_id'] - 1] in CONTEXT_CLASSES:
                names = [CLASSES[o['category_id'] - 1] for o in (first, *others)]
                assert [CONTEXT_CLASSES[name] for name in names] == list(SCENES)
                where = plate(first['bbox'])
                assert all((image[where] == images[0][where]).all() for image in images)
                num_discs += 1
            assert all(o['bbox'] == first['bbox'] for o in others)
        assert not any((image[0] == images[0][0]).all() for image in images[1:])
    assert num_discs > 10


def test_goes_through_coco_dataset(root: Path, coco: COCO) -> None:
    cfg = Config.fromfile(CONFIGS / '_base_/datasets/synthetic_instance.py')
    assert cfg.metainfo.classes == CLASSES
    dataset = CocoDataset(**{
        k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'} | dict(data_root=str(root)))
    assert len(dataset) == 240
    for index in range(0, 60, 7):
        item = dataset[index]
        sample = item['data_samples']
        annotations = coco.imgToAnns[sample.img_id]
        assert item['inputs'].shape == (3, 160, 160)
        assert len(sample.boxes) == len(sample.labels) == sum(not a['iscrowd'] for a in annotations)
        assert len(sample.ignored_boxes) == sum(a['iscrowd'] for a in annotations)
        assert sample.masks.pixels.sum() == sum(a['area'] for a in annotations if not a['iscrowd'])


@pytest.mark.parametrize('options, message', [
    (dict(num_train=0), 'num_train=0, num_val=160: each part needs at least one image'),
    (dict(size=64), 'size=64 is too small'),
    (dict(seed=-1), 'seed=-1 is negative'),
])
def test_bad_input(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'new', **options)
    assert not (tmp_path / 'new').exists()
