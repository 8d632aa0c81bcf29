import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet.models.layers.context_block import ContextBlock, build_context_block
from mmdet.models.layers.conv import blocked, dense
from mmdet.models.layers.norm import build_norm


def eager(block: ContextBlock, x: Tensor) -> Tensor:
    """Section 3.3 of the paper in plain PyTorch, from the block's state dict alone."""
    weights = dict(block.named_parameters())

    def transform(name: str, context: Tensor) -> Tensor:
        hidden = F.linear(context, weights[f'{name}.0.weight'].flatten(1), weights[f'{name}.0.bias'])
        hidden = F.layer_norm(hidden, hidden.shape[1:], weights[f'{name}.1.weight'].flatten(),
                              weights[f'{name}.1.bias'].flatten())
        out = F.linear(hidden.relu(), weights[f'{name}.3.weight'].flatten(1), weights[f'{name}.3.bias'])
        return out[:, :, None, None]

    if 'conv_mask.weight' in weights:
        logits = F.conv2d(x, weights['conv_mask.weight'], weights['conv_mask.bias']).flatten(1)
        context = torch.einsum('np,ncp->nc', logits.softmax(dim=1), x.flatten(2))
    else:
        context = F.adaptive_avg_pool2d(x, 1).flatten(1)
    out = x
    if 'channel_mul_conv.0.weight' in weights:
        out = out * transform('channel_mul_conv', context).sigmoid()
    if 'channel_add_conv.0.weight' in weights:
        out = out + transform('channel_add_conv', context)
    return out


@pytest.mark.parametrize('pooling', ['att', 'avg'])
@pytest.mark.parametrize('fusion', ['channel_add', 'channel_mul', 'channel_mul channel_add'])
def test_values_and_gradients_are_those_of_plain_pytorch(pooling, fusion) -> None:
    block = ContextBlock(16, 1 / 4, pooling, fusion.split()).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    weight = torch.randn_like(x)
    found, expected = block(x), eager(block, x)
    assert not torch.allclose(expected, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight),
        rtol=0, atol=1e-11)
    identity = torch.randn_like(x, requires_grad=True)
    inputs.append(identity)
    found, expected = block(x, identity, relu=True), (eager(block, x) + identity).relu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight),
        rtol=0, atol=1e-11)


@pytest.mark.parametrize('norm', [
    dict(type='BN'), dict(type='SyncBN'), dict(type='BN', requires_grad=False),
    dict(type='GN', num_groups=4)])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('pooling', ['att', 'avg'])
@pytest.mark.parametrize('fusion', ['channel_add', 'channel_mul', 'channel_mul channel_add'])
def test_a_norm_before_it(norm: dict, training: bool, pooling: str, fusion: str) -> None:
    block, layer = ContextBlock(16, 1 / 4, pooling, fusion.split()).double(), build_norm(norm, 16).double()
    for tensor in [*block.parameters(), *layer.parameters(), *layer.buffers()]:
        if tensor.is_floating_point():  # all but a counter
            torch.nn.init.uniform_(tensor.detach(), 0.5, 1.5)
    layer.train(training)
    x, identity, weight = torch.randn(3, 2, 16, 5, 7, dtype=torch.float64)
    inputs = [x.requires_grad_(), identity.requires_grad_(), *block.parameters()]
    inputs += [p for p in layer.parameters() if p.requires_grad]
    found = block(x, identity, relu=True, norm=layer)
    expected = (eager(block, layer(x)) + identity).relu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight),
        rtol=0, atol=1e-11)


@pytest.mark.onednn
@pytest.mark.parametrize('images', [1, 2])
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('pooling', ['att', 'avg'])
@pytest.mark.parametrize('fusion', ['channel_add', 'channel_mul', 'channel_mul channel_add'])
@torch.no_grad()
def test_a_convolution_in_blocks_before_it(images: int, folded: bool, pooling: str, fusion: str) -> None:
    block, conv = ContextBlock(32, 1 / 4, pooling, fusion.split()), nn.Conv2d(8, 32, 1, bias=folded)
    norm = nn.Identity() if folded else build_norm(dict(type='BN'), 32).eval()
    for tensor in [*block.parameters(), *conv.parameters(), *norm.parameters(), *norm.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1)
    x, identity = torch.randn(images, 8, 5, 7), torch.randn(images, 32, 5, 7)
    found = block.after_conv(blocked(x), conv, norm, blocked(identity))
    assert found.is_mkldnn == (images == 1)
    for module in (block, conv, norm):
        module.double()
    expected = (eager(block, norm(conv(x.double()))) + identity).relu()
    assert (expected == 0).any()
    torch.testing.assert_close(dense(found).double(), expected, rtol=0, atol=2e-6 * expected.max().item())


def test_fixed_batch_norm_keeps_no_map_of_its_own() -> None:
    block, norm = ContextBlock(16, 1 / 4), build_norm(dict(type='BN'), 16).eval()
    x, identity = torch.randn(2, 1, 16, 20, 30).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x, identity, relu=True, norm=norm)
    maps = {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert maps == {x.data_ptr(), output.data_ptr()}


def test_a_new_block_adds_nothing_and_multiplies_by_one_half() -> None:
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(ContextBlock(16, 1 / 4)(x), x)
    torch.testing.assert_close(ContextBlock(16, 1 / 4, 'att', ['channel_mul'])(x), x / 2)


def test_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in ContextBlock(32, 1 / 16).named_parameters()}
    assert shapes == {
        'conv_mask.weight': (1, 32, 1, 1), 'conv_mask.bias': (1,),
        'channel_add_conv.0.weight': (2, 32, 1, 1), 'channel_add_conv.0.bias': (2,),
        'channel_add_conv.1.weight': (2, 1, 1), 'channel_add_conv.1.bias': (2, 1, 1),
        'channel_add_conv.3.weight': (32, 2, 1, 1), 'channel_add_conv.3.bias': (32,)}


@pytest.mark.parametrize('options, message', [
    (dict(ratio=1 / 64), r'gcb.ratio=0.015625 leaves none of 16 channels; take at least 0.0625'),
    (dict(ratio=16), 'gcb.ratio=16 is a share of the channels: give one up to 1, such as 1 / 16'),
    (dict(ratio=1 / 4, pooling_type='max'), r"gcb.pooling_type='max' is unknown; take 'att' or 'avg'"),
    (dict(ratio=1 / 4, fusion_types=['add']), r"gcb.fusion_types=\['add'\]: take 'channel_add'"),
    (dict(ratio=1 / 4, fusion_types=[]), r'gcb.fusion_types=\[\]: take'),
    (dict(type='SNL', ratio=1 / 4), 'gcb.ratio is no option of the type SNL; leave it out'),
    (dict(type='SE', pooling_type='avg'), 'gcb.pooling_type is no option of the type SE; leave it out'),
    (dict(ratio=1 / 4, position='after_conv4'),
     "gcb.position='after_conv4' is unknown; take one of after_conv1, after_conv2, after_conv3, after_add"),
    (dict(type='CBAM'), "gcb.type='CBAM' is unknown; take one of GC, NL, SNL, SE")])
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_context_block(options, 16)
