from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision

from mmdet.models.roi_heads.mask_head import FCNMaskHead
from mmdet.structures.masks import crop_masks


def make_head(**options: object) -> FCNMaskHead:
    return FCNMaskHead(**dict(num_convs=2, in_channels=4, conv_out_channels=6, num_classes=5,
                              loss_mask=dict(type='CrossEntropyLoss', use_sigmoid=True)) | options)


def test_forward_written_out() -> None:
    head, x = make_head(), torch.randn(3, 4, 14, 14)
    hidden = x
    for module in head.convs:
        hidden = F.conv2d(hidden, module.conv.weight, module.conv.bias, padding=1).relu()
    hidden = F.conv_transpose2d(hidden, head.upsample.weight, head.upsample.bias, stride=2).relu()
    expected = F.conv2d(hidden, head.conv_logits.weight, head.conv_logits.bias)
    assert expected.shape == (3, 5, 28, 28)
    torch.testing.assert_close(head(x), expected)
    labels = torch.tensor([4, 0, 4])
    torch.testing.assert_close(head(x, labels), expected[torch.arange(3), labels][:, None])


def test_gradients_written_out() -> None:
    head, x, labels = make_head().double(), torch.randn(3, 4, 14, 14).double(), torch.tensor([4, 0, 4])
    torch.nn.init.normal_(head.upsample.bias)
    targets = torch.rand(3, 28, 28) < 0.3
    parameters = list(head.parameters())
    found = torch.autograd.grad(head.loss(head(x, labels), targets)['loss_mask'], parameters)
    hidden = x
    for module in head.convs:
        hidden = F.conv2d(hidden, module.conv.weight, module.conv.bias, padding=1).relu()
    hidden = F.conv_transpose2d(hidden, head.upsample.weight, head.upsample.bias, stride=2).relu()
    logits = F.conv2d(hidden, head.conv_logits.weight, head.conv_logits.bias)[torch.arange(3), labels]
    loss = F.binary_cross_entropy_with_logits(logits, targets.double())
    for ours, expected in zip(found, torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_loss_and_probabilities() -> None:
    logits, targets = torch.randn(3, 1, 28, 28), torch.rand(3, 28, 28) < 0.3
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
    torch.testing.assert_close(make_head().loss(logits, targets)['loss_mask'], expected)
    torch.testing.assert_close(make_head().predict(logits), logits[:, 0].sigmoid())
    half = logits.bfloat16()  # as under autocast
    torch.testing.assert_close(make_head().predict(half), half[:, 0].float().sigmoid())


def test_no_objects() -> None:
    head = make_head(norm_cfg=dict(type='GN', num_groups=3))
    logits = head(torch.zeros(0, 4, 14, 14), torch.zeros(0, dtype=torch.int64))
    loss = head.loss(logits, torch.zeros(0, 28, 28))
    assert loss['loss_mask'] == 0
    loss['loss_mask'].backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_initial_weights() -> None:
    head = make_head(conv_out_channels=256)
    # fan_out of a transposed convolution is the first dimension's: 256 inputs x 4 taps.
    assert head.upsample.weight.std().item() == pytest.approx((2 / (256 * 4)) ** 0.5, rel=0.05)
    assert (head.conv_logits.bias == 0).all() and (head.upsample.bias == 0).all()


def test_mask_targets_are_the_masks_inside_the_boxes(make_sample: Callable) -> None:
    sample = make_sample([[10., 10., 38., 38.], [40., 10., 60., 50.]])
    whole = make_head().targets(sample.boxes, torch.tensor([0, 1]), sample, 28)
    assert whole.shape == (2, 28, 28) and whole.all()
    # Half of the box lies on the object; then the other object's mask, which is elsewhere.
    boxes = torch.tensor([[24., 10., 52., 38.], [10., 10., 38., 38.]])
    half, none = make_head().targets(boxes, torch.tensor([0, 1]), sample, 28)
    assert half[:, :14].all() and not half[:, 14:].any() and not none.any()


def test_mask_targets_are_torchvisions(make_sample: Callable) -> None:
    sample = make_sample([[10., 10., 38., 38.], [40., 10., 60., 50.]])
    bitmaps = (torch.rand(2, 64, 96) < 0.5).to(torch.uint8)
    sample.masks = crop_masks(bitmaps)
    corner = torch.rand(20, 2) * 40
    boxes, matched = torch.cat([corner, corner + torch.rand(20, 2) * 40 + 1], 1), torch.randint(0, 2, (20,))
    rois = torch.cat([matched[:, None], boxes], 1)
    expected = torchvision.ops.roi_align(bitmaps[:, None].float(), rois, 14, 1.0, aligned=True)[:, 0]
    found = make_head().targets(boxes, matched, sample, 14)
    # Samples of 0 and 1 may average to the threshold up to rounding.
    clear = (expected - 0.5).abs() > 1e-5
    assert torch.equal(found[clear], (expected >= 0.5)[clear]) and clear.float().mean() > 0.9


def test_missing_masks(make_sample: Callable) -> None:
    sample = make_sample([[10., 10., 30., 30.]])
    sample.masks = None
    with pytest.raises(ValueError, match='image 7: no masks to train the mask head with; set with_mask=True'):
        make_head().targets(sample.boxes, torch.tensor([0]), sample, 28)
