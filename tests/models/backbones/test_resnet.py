from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mmdet.models.backbones.resnet import ARCHITECTURES, BasicBlock, Bottleneck, ResNet, _max_pool
from mmdet.models.layers.context_block import ContextBlock

GCB = dict(gcb=dict(ratio=1 / 4), stage_with_gcb=(False, True, True, True))
NORM = nn.modules.batchnorm._BatchNorm


def torchvision_features(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


@pytest.mark.parametrize('gcb', [{}, GCB], ids=['plain', 'new context blocks'])
@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('gradients', [True, False])
def test_features_are_torchvisions(depth: int, gcb: dict, gradients: bool) -> None:
    reference = getattr(torchvision.models, f'resnet{depth}')(weights=None).eval()
    for norm in reference.modules():
        if isinstance(norm, NORM):
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.0)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor, std=0.1)
    model = ResNet(depth, **gcb).eval()
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert set(unexpected) == {'fc.weight', 'fc.bias'}
    assert all('context_block' in name for name in missing) and bool(missing) == bool(gcb)
    x = torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(gradients):
        for found, expected in zip(model(x), torchvision_features(reference, x), strict=True):
            # Without gradients oneDNN's batch norm rounds otherwise, and is as far from float64.
            bound = 1e-5 if gradients else 3e-6 * expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=bound)


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_parameters_are_torchvisions(depth: int) -> None:
    with torch.device('meta'):
        expected = getattr(torchvision.models, f'resnet{depth}')(weights=None).state_dict()
        found = ResNet(depth).state_dict()
    assert {k: v.shape for k, v in found.items()} == {
        k: v.shape for k, v in expected.items() if not k.startswith('fc.')}


def test_output_levels() -> None:
    features = ResNet(18, out_indices=(1, 3))(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [(1, 128, 8, 12), (1, 512, 2, 3)]


@pytest.mark.parametrize('gradients', [True, False])
def test_hooks_of_stages_get_plain_maps(gradients: bool) -> None:
    model, maps = ResNet(18).eval(), []
    for stage in (model.layer1, model.layer4):
        stage.register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.set_grad_enabled(gradients):
        features = model(torch.randn(1, 3, 64, 96))
    assert len(maps) == 2 and torch.equal(maps[0], features[0]) and torch.equal(maps[1], features[3])
    assert not any(x.is_mkldnn for x in maps)


def test_stages_behind_the_last_level_are_not_trained() -> None:
    """DDP waits for the gradient of each parameter that is."""
    model = ResNet(18, out_indices=(2, 1))
    sum(f.sum() for f in model(torch.randn(1, 3, 64, 96))).backward()
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.grad is None} == {'layer4'}
    assert not any(p.requires_grad for p in model.layer4.parameters())


@pytest.mark.parametrize('indices', [(), (0, 4), (-1,)])
def test_levels_that_do_not_exist(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'backbone\.out_indices'):
        ResNet(18, out_indices=indices)


@pytest.mark.parametrize('norm, norm_eval, training, evaluating', [
    ('BN', True, 0, 53), ('SyncBN', False, 42, 11)])
def test_norms_that_train(norm: str, norm_eval: bool, training: int, evaluating: int) -> None:
    model = ResNet(50, dict(type=norm), norm_eval, frozen_stages=1).eval().train()
    norms = [m for m in model.modules() if isinstance(m, NORM)]
    assert [sum(m.training for m in norms), sum(not m.training for m in norms)] == [training, evaluating]


@pytest.mark.parametrize('stages, frozen', [
    (-1, []), (0, ['conv1', 'bn1']), (1, ['conv1', 'bn1', 'layer1']),
    (3, ['conv1', 'bn1', 'layer1', 'layer2', 'layer3'])])
def test_frozen_stages(stages: int, frozen: list[str]) -> None:
    model = ResNet(18, norm_eval=False, frozen_stages=stages, **GCB).train()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name.split('.')[0] not in frozen), name
    for name, m in model.named_modules():
        if isinstance(m, NORM):
            assert m.training == (name.split('.')[0] not in frozen), name


@pytest.mark.parametrize('depth, blocks', [(18, 6), (50, 13), (101, 30)])
def test_context_blocks_of_the_stages(depth: int, blocks: int) -> None:
    with torch.device('meta'):
        model = ResNet(depth, **GCB)
    assert not any(isinstance(m, ContextBlock) for m in model.layer1.modules())
    found = [m for m in model.modules() if isinstance(m, ContextBlock)]
    assert len(found) == blocks
    width = 64 * 8 * (4 if depth > 34 else 1)
    assert found[-1].channel_add_conv[0].weight.shape == (width // 4, width, 1, 1)


@pytest.mark.parametrize('block_class', [BasicBlock, Bottleneck])
def test_the_context_block_comes_before_the_addition(block_class: type) -> None:
    block = block_class(8 * block_class.expansion, 8, 1, dict(type='BN'), dict(ratio=1 / 2)).eval()
    nn.init.normal_(block.context_block.channel_add_conv[3].weight)
    x = torch.randn(2, 8 * block_class.expansion, 5, 6)
    out = x
    convs = [1, 2] if block_class is BasicBlock else [1, 2, 3]
    for i in convs:
        out = getattr(block, f'bn{i}')(getattr(block, f'conv{i}')(out))
        out = out.relu() if i < convs[-1] else out
    torch.testing.assert_close(block(x), (block.context_block(out) + x).relu())


@pytest.mark.parametrize('style, strides', [('pytorch', (1, 2)), ('caffe', (2, 1))])
def test_style_places_the_stride(style: str, strides: tuple[int, int]) -> None:
    block = ResNet(50, style=style).layer2[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides
    assert ResNet(50, style=style)(torch.randn(1, 3, 64, 64))[3].shape == (1, 2048, 2, 2)


def test_initial_weights() -> None:
    model = ResNet(50, **GCB)
    assert all((m.bn3.weight == 0).all() for m in model.modules() if isinstance(m, Bottleneck))
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    block = model.layer4[2].context_block
    assert (block.channel_add_conv[3].weight == 0).all() and (block.channel_add_conv[3].bias == 0).all()
    assert block.conv_mask.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.1)
    assert all((m.bn3.weight == 1).all() for m in ResNet(50, zero_init_residual=False).modules()
               if isinstance(m, Bottleneck))


@pytest.mark.parametrize('options, message', [
    (dict(depth=51), r'backbone.depth=51: ResNet has the depths \[18, 34, 50, 101, 152\]'),
    (dict(depth=18, gcb=dict(ratio=1 / 4), stage_with_gcb=(True,)), 'give four values, for c2 .. c5'),
    (dict(depth=18, stage_with_gcb=(False, True, True, True)), 'backbone.gcb=None lacks; set both'),
    (dict(depth=18, gcb=dict(ratio=1 / 4)), 'backbone.gcb is given without backbone.stage_with_gcb'),
    (dict(depth=50, dcn=dict(type='DCN')), 'backbone.dcn is given without backbone.stage_with_dcn'),
    (dict(depth=18, gcb={}, stage_with_gcb=(False, (1, 2), False, False)), 'block 2 of c3, which has 2'),
    (dict(depth=18, frozen_stages=5), 'backbone.frozen_stages=5: from -1')])
def test_bad_arguments(options: dict, message: str) -> None:
    assert set(ARCHITECTURES) == {18, 34, 50, 101, 152}
    with pytest.raises(ValueError, match=message):
        ResNet(**options)


@pytest.mark.parametrize('depth, position', [
    (18, 'after_conv1'), (18, 'after_conv2'), (18, 'after_add'),
    (50, 'after_conv1'), (50, 'after_conv2'), (50, 'after_conv3'), (50, 'after_add')])
@pytest.mark.parametrize('kind', ['GC', 'NL', 'SNL', 'SE'])
def test_where_a_context_block_stands(depth: int, position: str, kind: str) -> None:
    """Hooks tell what enters the block, and the output of the residual block what becomes of it."""
    gcb = dict(type=kind, position=position)
    net = ResNet(depth, gcb=gcb, stage_with_gcb=(False, (-1,), False, False)).eval()
    [block] = [block for block in net.layer2 if hasattr(block, 'context_block')]
    assert block is net.layer2[-1]
    entered, left = {}, {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            entered[name], left[name] = inputs[0].clone(), output.clone()
        return hook

    for name in {'conv1', 'conv2', 'conv3', 'context_block'} & dict(block.named_children()).keys():
        block.get_submodule(name).register_forward_hook(keep(name))
    block.register_forward_hook(keep('block'))
    net(torch.randn(1, 3, 64, 64))
    for i in range(1, 4 if depth == 50 else 3):
        left[f'bn{i}'] = block.get_submodule(f'bn{i}')(left[f'conv{i}'])
    last, shortcut = ('bn3' if depth == 50 else 'bn2'), entered['block']
    if position == 'after_add':
        torch.testing.assert_close(entered['context_block'], left[last] + shortcut)
        torch.testing.assert_close(left['block'], left['context_block'].relu())
    elif position[-1] == last[-1]:
        torch.testing.assert_close(entered['context_block'], left[f'conv{last[-1]}'])
        # The block applies the norm and adds the shortcut itself; alone it does not.
        alone = block.context_block(left[last])
        torch.testing.assert_close(left['block'], (alone + shortcut).relu())
    else:
        torch.testing.assert_close(entered['context_block'], left[f'bn{position[-1]}'].relu())
        torch.testing.assert_close(left['block'], (left[last] + shortcut).relu())


def test_positions_and_blocks_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="gcb.position='after_conv3': blocks of ResNet-18 and 34"):
        ResNet(18, gcb=dict(position='after_conv3'), stage_with_gcb=(True, True, True, True))


@pytest.mark.parametrize('height, width', [(12, 16), (13, 15), (1, 2)])
def test_maps_without_gradient_are_pooled_alike(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    expected = torch.nn.functional.max_pool2d(x, 3, stride=2, padding=1)
    assert torch.equal(_max_pool(x), expected)
    found = _max_pool(x.requires_grad_())
    assert torch.equal(found, expected) and found.requires_grad


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = ResNet(18, frozen_stages=1, **GCB).double().train()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found, kept = [], []
    for with_cp in (False, True):
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage.with_cp = with_cp
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            kept.clear()
            out = model(x)
            found.append([sum(t.numel() for t in kept if t.dim() and len(t) == 2)])  # the maps, of two images
        sum(level.square().mean() for level in out).backward()
        found[-1] += [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found[0]) > 40 and found[1][0] < 0.5 * found[0][0]
    for expected, grad in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_running_statistics_and_checkpointed_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match='backbone.with_cp=True needs norm_eval=True'):
        ResNet(18, with_cp=True, norm_eval=False)
    ResNet(18, with_cp=True, norm_eval=False, norm_cfg=dict(type='GN', num_groups=2))
