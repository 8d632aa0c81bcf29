"""Data sets in COCO's format, checked as a whole before training starts."""

import colorsys
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import mmengine.dataset
import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmdet.datasets.annotation_file import (
    abbreviated,
    category_ids,
    check_files,
    check_segmentation,
    index_images,
    malformed,
    pack_polygons,
    unusable,
)
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.utils.coco_file import read_annotation_file
from mmdet.utils.env import paused_gc

COCO_CLASSES = (
    'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck', 'boat',
    'traffic light', 'fire hydrant', 'stop sign', 'parking meter', 'bench', 'bird', 'cat', 'dog',
    'horse', 'sheep', 'cow', 'elephant', 'bear', 'zebra', 'giraffe', 'backpack', 'umbrella',
    'handbag', 'tie', 'suitcase', 'frisbee', 'skis', 'snowboard', 'sports ball', 'kite',
    'baseball bat', 'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle',
    'wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple', 'sandwich', 'orange',
    'broccoli', 'carrot', 'hot dog', 'pizza', 'donut', 'cake', 'chair', 'couch', 'potted plant',
    'bed', 'dining table', 'toilet', 'tv', 'laptop', 'mouse', 'remote', 'keyboard', 'cell phone',
    'microwave', 'oven', 'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase', 'scissors',
    'teddy bear', 'hair drier', 'toothbrush')  # fmt: skip


class MetaInfo(TypedDict, total=False):
    """``metainfo``: the class names, and an RGB colour for each."""

    classes: Sequence[str]
    palette: Sequence[Sequence[int]]


class DataPrefix(TypedDict, total=False):
    """``data_prefix``: the folder of the images."""

    img: str


class FilterConfig(TypedDict, total=False):
    """``filter_cfg``: which images to leave out."""

    filter_empty_gt: bool
    min_size: int


@DATASETS.register_module()
class CocoDataset(BaseDataset):
    """Images with boxes, labels and masks from a JSON file in COCO's format.

    An item is what ``pipeline`` makes of a dict with ``img_id``, ``img_path``, ``height``, ``width``,
    ``instances`` (dicts with ``bbox`` xyxy in pixels, ``bbox_label``, ``ignore_flag`` (1: crowd) and
    ``mask``: RLE or list of polygons, which are ``array('d')``) and ``rng``, a NumPy Generator seeded by
    (seed, epoch, index of the item), from which transforms draw. So augmentation depends neither on the
    number of workers or processes nor on the order of loading. Copies of an image in one epoch
    (RepeatDataset) are alike, and the same is drawn for images at the same place of several data sets
    (ConcatDataset).

    ``metainfo`` has ``classes``, ``palette`` (an RGB colour per class), ``cat_ids`` (the file's category
    id per class) and ``ann_file`` (absolute path). A label is a position in ``classes``.

    Args:
        ann_file: annotation file, relative to ``data_root``.
        metainfo: ``classes`` (default: COCO's 80) and ``palette``. Annotations of other categories
            are left out.
        data_root: folder that ``ann_file`` and ``data_prefix`` are relative to.
        data_prefix: ``img``: folder of the images.
        filter_cfg: which images to leave out, unless ``test_mode``: ``filter_empty_gt=True``: those
            without any annotation of ``classes``; ``min_size``: those with a shorter side in pixels.
        indices: use the first n (last n if negative) images only, or those at these positions.
        serialize_data: keep the annotations as bytes, which worker processes share.
        pipeline: transforms, as configs or callables.
        test_mode: keep all images; the file may lack ``annotations``, as COCO's test sets do.
        lazy_init: read no file until ``full_init()``.

    Raises:
        FileNotFoundError: the annotation file, the image folder or an image is missing.
        ValueError: the file is not in COCO's format, lacks a class, or no image is left.
    """

    METAINFO = dict(classes=COCO_CLASSES)
    _fully_initialized: bool = False

    def __init__(
        self,
        ann_file: str,
        metainfo: MetaInfo | None = None,
        data_root: str = '',
        data_prefix: DataPrefix | None = None,
        filter_cfg: FilterConfig | None = None,
        indices: int | Sequence[int] | None = None,
        serialize_data: bool = True,
        pipeline: Sequence[dict | Callable] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        _check_keys('metainfo', metainfo or {}, MetaInfo.__annotations__)
        _check_keys('filter_cfg', filter_cfg or {}, FilterConfig.__annotations__)
        _check_keys('data_prefix', data_prefix or {}, DataPrefix.__annotations__)
        # Shared memory: worker processes that live on through epochs see what the main process sets.
        self._random_state = torch.zeros(2, dtype=torch.int64).share_memory_()
        super().__init__(
            ann_file=ann_file,
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=dict(data_prefix or dict(img='')),
            filter_cfg=filter_cfg,
            indices=indices,
            serialize_data=serialize_data,
            # Built here: mmengine would find mmcv's transforms of the same names in the root registry.
            pipeline=[TRANSFORMS.build(t) if isinstance(t, Mapping) else t for t in pipeline],
            test_mode=test_mode,
            lazy_init=True,
            max_refetch=0)
        self._metainfo['classes'] = _checked_classes(self._metainfo['classes'])
        self._metainfo.setdefault('palette', _palette(len(self._metainfo['classes'])))
        if not lazy_init:
            self.full_init()

    def set_seed(self, seed: int) -> None:
        """Sets the seed of all random draws of the pipeline."""
        self._random_state[0] = seed

    def set_epoch(self, epoch: int | None) -> None:
        """Sets the epoch, which changes the random draws; reaches running worker processes.

        None: they are seeded by NumPy's global random numbers, for training that counts no epochs.
        """
        self._random_state[1] = -1 if epoch is None else epoch

    def prepare_data(self, idx: int) -> Any:
        """Item ``idx`` after the pipeline."""
        data_info = self.get_data_info(idx)
        seed, epoch = self._random_state.tolist()
        drawn = (seed, epoch, data_info['sample_idx']) if epoch >= 0 else np.random.randint(2**32, size=4)
        data_info['rng'] = np.random.default_rng(drawn)
        return self.pipeline(data_info)

    def full_init(self) -> None:
        """Reads and checks the annotation file; does nothing the second time."""
        if self._fully_initialized:
            return
        with paused_gc():
            self.data_list = self.load_data_list()
            self.data_list = self.filter_data()
            if self._indices is not None:
                positions = self._indices if isinstance(self._indices, Sequence) else []
                if max(positions, default=-1) >= len(self.data_list):
                    raise ValueError(f'{self.ann_file}: indices has {max(positions)}, but there are '
                                     f'{len(self.data_list)} images')
                self.data_list = self._get_unserialized_subset(self._indices)
            if not self.data_list:
                raise ValueError(f'{self.ann_file}: indices={self._indices} leaves no image')
            check_files([data_info['img_path'] for data_info in self.data_list], self.ann_file)
            if self.serialize_data:
                self.data_bytes, self.data_address = self._serialize_data()
        self._fully_initialized = True

    def _serialize_data(self) -> tuple[np.ndarray, np.ndarray]:
        """All items pickled one after the other, and where each ends; empties ``data_list``.

        mmengine's holds the items, their pickles and the concatenation of these at the same time.
        """
        pickles, ends = bytearray(), []
        self.data_list.reverse()
        while self.data_list:
            pickles += pickle.dumps(self.data_list.pop(), protocol=4)
            ends.append(len(pickles))
        return np.frombuffer(pickles, np.uint8), np.array(ends)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict an image, in the order of the file.

        Left out, as in mmdetection 3.3: annotations marked ``ignore``, of no area, with a side below
        1 pixel or wholly outside the image. How many is logged.
        """
        content = read_annotation_file(self.ann_file, pack_polygons, annotated=not self.test_mode)
        cat_ids = category_ids(content['categories'], self._metainfo['classes'], self.ann_file)
        self._metainfo.update(cat_ids=cat_ids, ann_file=os.path.abspath(self.ann_file))
        labels: dict[int, int | None] = {category['id']: None for category in content['categories']}
        labels.update({cat_id: label for label, cat_id in enumerate(cat_ids)})
        images = index_images(content['images'], self.data_prefix['img'], self.ann_file)
        needs_masks = any(getattr(transform, 'with_mask', False) for transform in self.pipeline.transforms)

        dropped: Counter[str] = Counter()
        annotation_ids = set()
        annotations = content['annotations']
        for i, annotation in enumerate(annotations):
            annotations[i] = None  # so that memory is freed on the way
            problem = malformed(annotation, images, labels)
            if problem:
                raise ValueError(f'{self.ann_file}: {problem}')
            if annotation['id'] in annotation_ids:
                raise ValueError(f'{self.ann_file}: annotation id {annotation["id"]} is not unique')
            annotation_ids.add(annotation['id'])
            image, label = images[annotation['image_id']], labels[annotation['category_id']]
            if label is None:
                dropped['of other categories'] += 1
                continue
            image['annotated'] = True
            reason = unusable(annotation, image)
            if reason:
                dropped[reason] += 1
                continue
            x, y, w, h = annotation['bbox']
            instance = dict(
                bbox=[x, y, x + w, y + h], bbox_label=label, ignore_flag=int(bool(annotation.get('iscrowd'))))
            if segmentation := annotation.get('segmentation'):
                instance['mask'] = segmentation
            if needs_masks and not instance['ignore_flag']:
                check_segmentation(annotation, image, self.ann_file)
            image['instances'].append(instance)

        crowds = sum(instance['ignore_flag'] for image in images.values() for instance in image['instances'])
        objects = sum(len(image['instances']) for image in images.values()) - crowds
        left_out = ', '.join(f'{count} {reason}' for reason, count in sorted(dropped.items())) or 'none'
        print_log(
            f'{self.ann_file}: {len(images)} images, {objects} objects, {crowds} crowd regions; '
            f'annotations left out: {left_out}', 'current')
        return list(images.values())

    def filter_data(self) -> list[dict[str, Any]]:
        """The images that ``filter_cfg`` leaves.

        As in mmdetection 3.3, an image all of whose annotations are crowds or unusable stays.
        """
        cfg = {} if self.test_mode else self.filter_cfg or {}
        needs_objects, min_size = cfg.get('filter_empty_gt'), cfg.get('min_size', 0)
        kept = [d for d in self.data_list if d['annotated'] or not needs_objects]
        empty = len(self.data_list) - len(kept)
        kept = [d for d in kept if min(d['width'], d['height']) >= min_size]
        small = len(self.data_list) - empty - len(kept)
        dropped = f'{empty} without annotations of its classes (filter_empty_gt), {small} below min_size'
        if not kept:
            raise ValueError(f'{self.ann_file}: none of {len(self.data_list)} images is left: {dropped}')
        if needs_objects and all(instance['ignore_flag'] for d in kept for instance in d['instances']):
            raise ValueError(f'{self.ann_file}: no object to train on is left in {len(kept)} images: their '
                             'annotations are crowds or ignored, or have no area, a side below 1 pixel, or '
                             'no pixel in the image')
        if empty or small:
            print_log(f'{self.ann_file}: {len(kept)} images used; left out: {dropped}', 'current')
        return kept


@DATASETS.register_module()
class ConcatDataset(mmengine.dataset.ConcatDataset):
    """mmengine's; to train on several annotation files with the same classes.

    Args:
        ignore_keys: what else may differ in the ``metainfo`` of the data sets.

    Raises:
        ValueError: data sets for a test are of several files, while an evaluation is of one.
    """

    def __init__(self, datasets: Sequence[BaseDataset | dict], lazy_init: bool = False,
                 ignore_keys: str | Sequence[str] = ()) -> None:
        others = [ignore_keys] if isinstance(ignore_keys, str) else ignore_keys
        super().__init__(datasets, lazy_init, ['ann_file', 'cat_ids', *others])
        files = {dataset.ann_file for dataset in self.datasets if getattr(dataset, 'test_mode', False)}
        if len(files) > 1:
            names = ', '.join(sorted(files))
            raise ValueError(f'ConcatDataset: a test is of one annotation file, not of {names}')


def _check_keys(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f'{name} has the unknown key {unknown[0]!r}; known: {", ".join(known)}')


def _checked_classes(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"metainfo.classes must be a list of names such as ('person', ), not {classes!r}")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f'metainfo.classes is empty or names a class twice: {abbreviated(classes)}')
    return tuple(classes)


def _palette(num_classes: int) -> list[tuple[int, int, int]]:
    """RGB colours whose hues are spread by the golden ratio, so that neighbours differ."""
    colours = []
    for i in range(num_classes):
        r, g, b = colorsys.hsv_to_rgb(i * 0.618034 % 1, 1 - 0.15 * (i % 3), 1 - 0.2 * (i // 3 % 3))
        colours.append((round(r * 255), round(g * 255), round(b * 255)))
    return colours
