"""What is drawn where: pixels inside masks, on box edges and under labels."""

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mmdet.visualization import draw_detections, draw_grid, ground_truth, write_image

RED = (255, 0, 0)
GREEN = (0, 255, 0)


@pytest.fixture
def image():
    return np.full((400, 600, 3), 100, np.uint8)


def square(x, y, side, shape=(400, 600)):
    mask = np.zeros(shape, np.uint8, order='F')
    mask[y:y + side, x:x + side] = 1
    return coco_mask.encode(mask)


@pytest.fixture
def detections():
    return dict(boxes=torch.tensor([[50., 100, 150, 200], [300, 100, 500, 300]]), labels=torch.tensor([0, 1]),
                scores=torch.tensor([0.9, 0.2]), masks=[square(60, 110, 80), square(310, 110, 180)])


def test_masks_are_blended_and_boxes_drawn_in_the_class_colour(image, detections):
    picture = draw_detections(image, detections, ('cat', 'dog'), score_thr=0.1, palette=(RED, GREEN))
    assert picture.shape == image.shape and (image == 100).all()
    # 0.55 * 100 + 0.45 * (0, 0, 255) in BGR
    assert picture[150, 100].tolist() == [55, 55, 169]
    assert picture[200, 400].tolist() == [55, 169, 55]
    assert picture[105, 100].tolist() == [100, 100, 100]  # inside the box, outside the mask
    assert picture[150, 50].tolist() == [0, 0, 255] and picture[300, 400].tolist() == [0, 255, 0]
    label = picture[80:99, 50:120].reshape(-1, 3)
    assert (label == (0, 0, 255)).all(axis=1).mean() > 0.3
    assert (label.min(axis=1) > 120).any()  # white text on red; thinner in OpenCV 4
    assert (picture[80:99, 300:360].reshape(-1, 3).max(axis=1) < 80).any()


def test_low_scores_are_left_out(image, detections):
    picture = draw_detections(image, detections, ('cat', 'dog'))
    assert (picture[60:, 280:] == 100).all() and (picture[:, :200] != 100).any()


def test_ground_truth_needs_no_scores_and_no_masks(image, detections):
    picture = draw_detections(image, dict(boxes=detections['boxes'].numpy(), labels=np.array([0, 1])),
                              ('cat', 'dog'))
    assert (picture[150, 100] == 100).all() and (picture[200, 300] != 100).any()


def test_nothing_detected_is_the_image(image):
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0), scores=torch.zeros(0), masks=[])
    assert (draw_detections(image, nothing, ('cat',)) == image).all()


def test_labels_stay_inside_the_picture(image):
    corners = dict(boxes=np.array([[580., 0, 600, 20], [0, 380, 10, 400]]), labels=np.array([0, 0]))
    picture = draw_detections(image, corners, ('a long name',), palette=(RED,))
    top_right, bottom_left = picture[:20, 500:], picture[360:380, :70]
    assert all((part == (0, 0, 255)).all(axis=2).mean() > 0.3 for part in (top_right, bottom_left))


def test_small_images_are_enlarged_so_that_labels_can_be_read():
    image = np.full((100, 160, 3), 100, np.uint8)
    found = dict(boxes=np.array([[40., 40, 80, 80]]), labels=np.array([0]),
                 masks=[square(40, 40, 40, (100, 160))])
    picture = draw_detections(image, found, ('cat',), palette=(RED,))
    assert picture.shape == (400, 640, 3)
    assert picture[240, 240].tolist() == [55, 55, 169]
    assert picture[240, 320].tolist() == [0, 0, 255] and (picture[240, 330] == 100).all()


@pytest.mark.parametrize('size, expected', [
    ((50, 1000), (200, 4000)), ((20, 4000), (20, 4000)), ((5000, 20), (5000, 20)), ((1, 1), (16, 16))])
def test_thin_and_tiny_images_are_enlarged_within_bounds(size, expected):
    found = dict(boxes=np.array([[0., 0, 1, 1]]), labels=np.array([0]), masks=[square(0, 0, 1, size)])
    picture = draw_detections(np.zeros((*size, 3), np.uint8), found, ('cat',))
    assert picture.shape == (*expected, 3) and picture.any()


@pytest.mark.parametrize('bad, message', [
    (dict(labels=np.array([0, 2])), 'labels from 0 to 2, but 2 class names'),
    (dict(masks=[square(0, 0, 9, (10, 10))] * 2), r'a mask is \(10, 10\), but the image \(400, 600\)'),
])
def test_what_does_not_fit_the_image_is_an_error(image, detections, bad, message):
    with pytest.raises(ValueError, match=message):
        draw_detections(image, detections | bad, ('cat', 'dog'))


def test_an_image_of_another_form_is_an_error(detections):
    with pytest.raises(ValueError, match=r'must be \(H, W, 3\) uint8, not \(4, 4\) float64'):
        draw_detections(np.zeros((4, 4)), detections, ('cat', 'dog'))


def test_grid_places_images_row_by_row():
    sizes = [(50, 100, 10), (100, 100, 20), (30, 100, 30)]
    images = [np.full((h, w, 3), value, np.uint8) for h, w, value in sizes]
    grid = draw_grid(images, 2, width=200)
    assert grid.shape == (200 + 60 + 3 * 8, 2 * 200 + 3 * 8, 3)
    middles = [(108, 100), (108, 320), (246, 100), (246, 320)]
    assert [int(grid[middle][0]) for middle in middles] == [10, 20, 30, 255]
    assert (grid[:50, 8:208] == 255).all()  # the flat image is centred in the row of the square one
    titled = draw_grid(images, 2, ('left', 'seen'), width=200)
    assert (titled[36:] == grid).all() and (titled[:36] < 100).any()


@pytest.mark.parametrize('images, columns', [([], 2), ([np.zeros((2, 2, 3), np.uint8)], 0)])
def test_an_empty_grid_is_an_error(images, columns):
    with pytest.raises(ValueError, match='a grid needs images and columns'):
        draw_grid(images, columns)


def test_ground_truth_of_a_data_set_leaves_crowds_out():
    polygon = [[1, 1, 5, 1, 5, 5, 1, 5]]
    drawn = ground_truth(dict(height=10, width=12, instances=[
        dict(bbox=[1, 1, 5, 5], bbox_label=3, ignore_flag=0, mask=polygon),
        dict(bbox=[0, 0, 9, 9], bbox_label=1, ignore_flag=1, mask=dict(size=[10, 12], counts=[120]))]))
    assert drawn['boxes'].tolist() == [[1, 1, 5, 5]] and drawn['labels'].tolist() == [3]
    assert [coco_mask.area(mask) for mask in drawn['masks']] == [16]
    assert ground_truth(dict(height=10, width=12, instances=[]))['boxes'].shape == (0, 4)


def test_write_image_makes_folders_and_refuses_unknown_formats(tmp_path, image):
    write_image(tmp_path / 'a/b/c.png', image)
    assert (cv2.imread(str(tmp_path / 'a/b/c.png')) == image).all()
    with pytest.raises(ValueError, match='c.xyz: not an image format'):
        write_image(tmp_path / 'c.xyz', image)
    with pytest.raises(ValueError, match='c.pgm: a colour picture of 600 x 400 pixels cannot be written'):
        write_image(tmp_path / 'd/c.pgm', image)
    assert not (tmp_path / 'd').exists()
