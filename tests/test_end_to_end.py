"""A small detector, from annotation file to AP, through the command-line tools."""
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate

from mmdet.checkpoint import load_file
from mmdet.registry import DATASETS, MODELS
from mmdet.utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'quickstart' / 'mask_rcnn_r4_gcb_c3-c5_r18_fpn_synthetic.py'
SIZE = 96
CLASSES = ('square', 'disc')


def draw_folder(root: Path, number: int) -> None:
    """COCO-format images with a square and a disc; the third has no object, the fourth but a crowd."""
    rng = np.random.default_rng(0)
    (root / 'images').mkdir(parents=True)
    images, annotations = [], []
    for i in range(number):
        image = np.full((SIZE, SIZE, 3), 40, np.uint8)
        x, y = rng.integers(4, 20, 2).tolist()
        objects = [(0, x, y, 32, 0), (1, x + 36, y + 36, 28, 0)]
        if i == 2:
            objects = []
        elif i == 3:
            objects = [(0, x, y, 32, 1)]
        for label, left, top, side, crowd in objects:
            mask = np.zeros((SIZE, SIZE), np.uint8)
            if label == 0:
                mask[top:top + side, left:left + side] = 1
            else:
                cv2.circle(mask, (left + side // 2, top + side // 2), side // 2 - 1, 1, -1)
            image[mask == 1] = (60, 60, 230) if label == 0 else (60, 230, 60)
            # Runs down the columns; the margin makes the first and the last one zeros.
            ends = np.flatnonzero(np.diff(mask.ravel(order='F').astype(int))) + 1
            counts = np.diff([0, *ends, mask.size]).tolist()
            annotations.append(dict(
                id=len(annotations) + 1, image_id=i + 1, category_id=label + 1, iscrowd=crowd,
                bbox=[left, top, side, side], area=int(mask.sum()),
                segmentation=dict(size=[SIZE, SIZE], counts=counts)))
        cv2.imwrite(str(root / 'images' / f'{i}.png'), image)
        images.append(dict(id=i + 1, file_name=f'{i}.png', height=SIZE, width=SIZE))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    (root / 'ann.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def options(data: Path) -> dict[str, object]:
    """What makes the quick start's config a training of seconds on another data set."""
    found: dict[str, object] = {
        'model.neck.out_channels': 16, 'model.rpn_head.in_channels': 16, 'model.rpn_head.feat_channels': 16,
        'model.roi_head.bbox_head.in_channels': 16, 'model.roi_head.bbox_head.fc_out_channels': 64,
        'model.roi_head.mask_head.in_channels': 16, 'model.roi_head.mask_head.conv_out_channels': 16,
        'train_dataloader.batch_size': 2, 'val_dataloader.batch_size': 2, 'test_dataloader.batch_size': 2,
        'train_cfg.max_epochs': 2, 'default_hooks.logger.interval': 1}
    for head in ('bbox', 'mask'):
        found[f'model.roi_head.{head}_head.num_classes'] = len(CLASSES)
        found[f'model.roi_head.{head}_roi_extractor.out_channels'] = 16
    for part in ('train', 'val', 'test'):
        dataset = f'{part}_dataloader.dataset'
        found |= {f'{dataset}.data_root': str(data), f'{dataset}.ann_file': 'ann.json',
                  f'{dataset}.data_prefix.img': 'images', f'{dataset}.metainfo.classes': CLASSES}
    return found


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data')
    draw_folder(folder / 'set', 12)
    return folder / 'set'


def run(folder: Path, tool: str, data: Path, *words: object, fails: bool = False, **more: object) -> str:
    """What a tool prints; it has to succeed, or fail. ``more``: further settings, __ for a dot."""
    def text(value: object) -> str:
        return f'({",".join(value)})' if isinstance(value, tuple) else str(value)

    settings = options(data) | {key.replace('__', '.'): value for key, value in more.items()}
    flags = [f'{key}={text(value)}' for key, value in settings.items()]
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / tool), str(CONFIG), *map(str, words), '--cfg-options', *flags],
        cwd=folder, env=env, text=True, capture_output=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout + done.stderr


def read_without_torch(path: Path) -> list[dict]:
    """The pickle's content, as a process sees it that can import neither torch nor this package."""
    program = f"""
import json, pickle, sys
sys.modules.update(torch=None, mmdet=None, mmengine=None)
results = pickle.load(open({str(path)!r}, 'rb'))
for r in results:
    r['types'] = [type(r[k]).__module__ + ' ' + str(r[k].dtype) for k in ('boxes', 'scores', 'labels')]
    r.update(boxes=r['boxes'].tolist(), scores=r['scores'].tolist(), labels=r['labels'].tolist())
    r['masks'] = [dict(size=m['size'], counts=m['counts'].decode()) for m in r['masks']]
print(json.dumps(results))
"""
    return json.loads(subprocess.run([sys.executable, '-c', program], text=True, check=True,
                                     capture_output=True).stdout)


def test_train_resume_and_test(data: Path, tmp_path: Path) -> None:
    parts = ('backbone', 'neck', 'roi_head__mask_head')
    model: dict = {f'model__{part}__norm_cfg__type': 'SyncBN' for part in parts}
    model['model__test_cfg__rcnn__score_thr'] = 0
    out = run(tmp_path, 'train.py', data, '--validate', '--seed', 1, '--work_dir', 'w', **model,
              default_hooks__checkpoint__max_keep_ckpts=5)
    for epoch in (1, 2):
        assert load_file(tmp_path / 'w' / f'epoch_{epoch}.pth')['meta']['epoch'] == epoch
    assert 'bbox_mAP' in out and 'segm_mAP' in out
    logs = list((tmp_path / 'w').glob('*/vis_data/scalars.json'))
    assert len(logs) == 1
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert len(losses) == 12 and np.isfinite(losses).all()

    out = run(tmp_path, 'train.py', data, '--resume_from', 'w/epoch_2.pth', '--work_dir', 'w', '--validate',
              **model, train_cfg__max_epochs=3, val_evaluator__outfile_prefix='val')
    assert 'Resumed from' in out
    assert load_file(tmp_path / 'w' / 'epoch_3.pth')['meta']['epoch'] == 3

    out = run(tmp_path, 'test.py', data, 'w/epoch_3.pth', '--out', 'r.pkl', '--eval', 'bbox', 'segm',
              '--json_prefix', 'test', **model)
    for kind in ('bbox', 'segm'):
        # What training evaluated is what the checkpoint gives, to the bit.
        assert (tmp_path / f'val.{kind}.json').read_bytes() == (tmp_path / f'test.{kind}.json').read_bytes()
    assert all(name in out for name in CLASSES) and 'Average Precision' in out
    results = read_without_torch(tmp_path / 'r.pkl')
    assert [r['img_id'] for r in results] == list(range(1, 13))
    assert [Path(r['img_path']).name for r in results] == [f'{i}.png' for i in range(12)]
    for r in results:
        assert r['types'] == ['numpy float32', 'numpy float32', 'numpy int64']
        assert len(r['boxes']) == len(r['scores']) == len(r['labels']) == len(r['masks']) > 0
        assert r['ori_shape'] == [SIZE, SIZE] and all(m['size'] == [SIZE, SIZE] for m in r['masks'])
        assert r['scores'] == sorted(r['scores'], reverse=True)


def test_annotations_without_masks_show_before_the_test(data: Path, tmp_path: Path) -> None:
    content = json.loads((data / 'ann.json').read_text())
    content['annotations'][-1]['segmentation'] = []
    (tmp_path / 'bad.json').write_text(json.dumps(content))
    settings: dict = dict(test_dataloader__dataset__ann_file=tmp_path / 'bad.json')
    cfg = load_config(CONFIG, options(data))
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'e.pth')
    out = run(tmp_path, 'test.py', data, 'e.pth', '--eval', 'bbox', 'segm', fails=True, **settings)
    assert 'error: the annotation of image id 12 with bbox' in out and 'Epoch(test)' not in out
    assert 'bbox_mAP' in run(tmp_path, 'test.py', data, 'e.pth', '--eval', 'bbox', **settings)


def test_two_images_are_learnt(data: Path) -> None:
    cfg = load_config(CONFIG, options(data))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch = pseudo_collate([dataset[0], dataset[1]])
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses on a busy machine
    model = MODELS.build(cfg.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    history = []
    # So many that the losses have fallen from every random state: their sum rises while boxes are found.
    for _ in range(80):
        losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
        optimizer.zero_grad()
        total = sum(loss for name, loss in losses.items() if 'loss' in name)
        total.backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()} | dict(total=total.item()))
    first = {name: np.mean([step[name] for step in history[:3]]) for name in history[0]}
    last = {name: np.mean([step[name] for step in history[-3:]]) for name in history[0]}
    assert last['total'] < 0.5 * first['total'], (first, last)
    assert last['loss_rpn_cls'] < 0.5 * first['loss_rpn_cls'] and last['loss_mask'] < 0.7 * first['loss_mask']
