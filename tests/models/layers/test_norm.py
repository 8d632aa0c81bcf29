import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdet.models.backbones.resnet import ResNet
from mmdet.models.layers.norm import (
    SyncBatchNorm,
    build_norm,
    fold_batch_norms,
    freeze_norm_statistics,
    norm_relu,
)

ROOT = Path(__file__).resolve().parents[3]
CHANNELS = 5
STEPS = 2
SHAPES = {  # of the ranks; two processes take the first two
    'equal': [(2, CHANNELS, 6, 7)] * 3,
    'unequal': [(2, CHANNELS, 6, 7), (3, CHANNELS, 9, 4), (1, CHANNELS, 5, 11)],
    'empty rank': [(2, CHANNELS, 6, 7), (0, CHANNELS, 3, 3), (3, CHANNELS, 9, 4)],
    'one position': [(4, CHANNELS, 1, 1), (1, CHANNELS, 1, 1), (2, CHANNELS, 1, 1)],
    'vectors': [(4, CHANNELS), (7, CHANNELS), (2, CHANNELS)],
}
# Of the tensor's maximum. Far from zero float32 itself resolves but 1e-4 of the deviation, and
# E[x^2] - E[x]^2 would be wrong in the first digit.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, 'far': 2e-4}
NAMES = [f'{name}, {dtype}' for name in SHAPES for dtype in ('float64', 'float32')]


def make_case(shapes: list[tuple[int, ...]], dtype: torch.dtype, offset: float = 0) -> dict:
    norm = nn.BatchNorm1d(CHANNELS).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    steps = [[(torch.randn(s, dtype=dtype) * 2 + 1 + offset, torch.randn(s, dtype=dtype))
              for _ in range(STEPS)] for s in shapes]
    return dict(state=norm.state_dict(), steps=steps)


def run_processes(cases: list[dict], world: int, folder: Path) -> list[list[dict]]:
    """What each of ``world`` gloo processes computes: [rank][case]."""
    torch.save(cases, folder / 'cases.pt')
    script = Path(__file__).with_name('norm_distributed.py')
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    processes = [subprocess.Popen([sys.executable, script, str(rank), str(world), folder], env=env,
                                  stderr=subprocess.PIPE) for rank in range(world)]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    return [torch.load(folder / f'result_{rank}.pt') for rank in range(world)]


@pytest.fixture(scope='module', params=[2, 3])
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """All cases, in two or three processes: name -> (case, the ranks' results)."""
    world = request.param
    torch.manual_seed(0)
    cases = {f'{name}, {dtype}': make_case(shapes[:world], getattr(torch, dtype))
             for name, shapes in SHAPES.items() for dtype in ('float64', 'float32')}
    cases['far from zero'] = make_case(SHAPES['unequal'][:world], torch.float32, offset=1000)
    cases['all empty'] = make_case([(0, CHANNELS, 3, 3)] * world, torch.float32)
    half = cases['half'] = make_case(SHAPES['unequal'][:world], torch.float32)
    half['steps'] = [[(x.bfloat16(), weight) for x, weight in rank] for rank in half['steps']]
    results = run_processes(list(cases.values()), world, tmp_path_factory.mktemp('norm'))
    return {name: (case, [rank[i] for rank in results]) for i, (name, case) in enumerate(cases.items())}


def flat(x: Tensor) -> Tensor:
    """(N, C, ...) to (elements, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def assert_near(found: Tensor, expected: Tensor, bound: float) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.to(expected.dtype), expected.detach(), rtol=0, atol=bound * scale)


@pytest.mark.parametrize('name', [*NAMES, 'far from zero'])
def test_processes_are_one_batch(computed: dict, name: str) -> None:
    case, ranks = computed[name]
    bound = BOUNDS['far' if name == 'far from zero' else case['state']['weight'].dtype]
    norm = nn.BatchNorm1d(CHANNELS).double()
    norm.load_state_dict(case['state'])
    for step in range(STEPS):
        x = torch.cat([flat(rank[step][0].double()) for rank in case['steps']]).requires_grad_()
        out = norm(x)
        (out * torch.cat([flat(rank[step][1].double()) for rank in case['steps']])).sum().backward()
        for what, expected in dict(outputs=out, gradients=x.grad).items():
            assert_near(torch.cat([flat(rank[what][step]) for rank in ranks]), expected, bound)
    for what in ('weight', 'bias'):
        # Each rank's own part: DDP adds them up.
        assert_near(sum(rank[what].double() for rank in ranks), getattr(norm, what).grad, bound)
    for rank, steps in zip(ranks, case['steps']):
        assert rank['state']['num_batches_tracked'] == STEPS
        for key in ('running_mean', 'running_var'):
            assert_near(rank['state'][key], getattr(norm, key), bound)
        x = flat(steps[0][0].double())
        expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        assert_near(flat(rank['eval']), expected, 10 * bound)


def test_half_precision_has_float32_statistics(computed: dict) -> None:
    case, ranks = computed['half']
    norm = nn.BatchNorm1d(CHANNELS).double()
    norm.load_state_dict(case['state'])
    for step in range(STEPS):
        norm(torch.cat([flat(rank[step][0].double()) for rank in case['steps']]))
    for rank in ranks:
        assert rank['outputs'][0].dtype == rank['gradients'][0].dtype == torch.bfloat16
        assert_near(rank['state']['running_mean'], norm.running_mean, 1e-5)
        assert_near(rank['state']['running_var'], norm.running_var, 1e-5)


def test_nothing_is_learnt_where_all_are_empty(computed: dict) -> None:
    case, ranks = computed['all empty']
    for rank in ranks:
        assert rank['outputs'][0].shape == rank['gradients'][0].shape == (0, CHANNELS, 3, 3)
        assert not rank['weight'].any() and not rank['bias'].any()
        for key in ('running_mean', 'running_var'):
            assert torch.equal(rank['state'][key], case['state'][key])


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures('group_of_one')
def test_one_process_of_a_group_is_plain_batch_norm() -> None:
    norm, plain = SyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    x = torch.randn(2, CHANNELS, 6, 7)
    assert torch.equal(norm(x), plain(x))
    torch.testing.assert_close(norm.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_no_positives_in_the_only_process(device: torch.device) -> None:
    """Plain batch norm refuses an empty batch."""
    norm = SyncBatchNorm(CHANNELS).to(device)
    x = torch.randn(0, CHANNELS, 6, 7, device=device, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and not norm.weight.grad.any()
    assert (norm.running_mean == 0).all() and (norm.running_var == 1).all()


def test_without_a_group_it_is_plain_batch_norm() -> None:
    norm, plain = SyncBatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    x = torch.randn(2, CHANNELS, 6, 7)
    assert torch.equal(norm(x), plain(x))
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())


def test_build() -> None:
    layer = build_norm(dict(type='BN', requires_grad=False, momentum=0.2, eps=1e-3), 6)
    assert type(layer) is nn.BatchNorm2d and (layer.momentum, layer.eps) == (0.2, 1e-3)
    assert not any(p.requires_grad for p in layer.parameters())
    layer = build_norm(dict(type='GN', num_groups=3), 6)
    assert isinstance(layer, nn.GroupNorm) and (layer.num_groups, layer.num_channels) == (3, 6)
    assert isinstance(build_norm(dict(type='SyncBN'), 6), SyncBatchNorm)


@pytest.mark.parametrize('cfg, message', [
    (dict(type='GN'), "norm_cfg.type='GN' needs norm_cfg.num_groups"),
    (dict(type='GN', num_groups=3, momentum=0.1), 'norm_cfg.momentum: GN has eps and num_groups alone'),
    (dict(type='SyncBN', num_groups=3), 'norm_cfg.num_groups: SyncBN has eps and momentum alone'),
    (dict(type='GN', num_groups=4), 'norm_cfg.num_groups: 4 does not divide 6 channels')])
def test_settings_of_another_norm(cfg: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_norm(cfg, 6)


STAND_IN = '''
from torch import nn
class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    pass
'''


@pytest.fixture
def make_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Puts an ``apex`` of these files on the path; returns its folder."""
    def make(**files: str) -> Path:
        folder = tmp_path / 'apex'
        folder.mkdir()
        for name, text in files.items():
            (folder / f'{name}.py').write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    def forget() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split('.')[0] == 'apex'}

    before = forget()
    yield make
    forget()
    sys.modules.update(before)


def test_apex_where_it_is_installed(make_apex: Callable[..., Path]) -> None:
    make_apex(__init__='', parallel=STAND_IN)
    layer = build_norm(dict(type='ApexSyncBN', eps=1e-3, requires_grad=False), 6)
    assert type(layer).__module__ == 'apex.parallel' and (layer.num_features, layer.eps) == (6, 1e-3)
    assert not layer.weight.requires_grad
    freeze_norm_statistics(layer.train())
    assert not layer.training


def test_apex_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError) as error:
        build_norm(dict(type='ApexSyncBN'), 6)
    message = str(error.value)
    assert 'is not installed (and not on PyPI): APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install' in message
    assert 'git+https://github.com/NVIDIA/apex' in message and '\n' not in message


@pytest.mark.parametrize('content, reason', [
    ('from pyramid.session import Unencrypted', 'pyramid'), ('', 'apex.parallel'), ('1 / 0', 'division')])
def test_apex_of_pypi_is_another_project(make_apex: Callable[..., Path], content: str, reason: str) -> None:
    folder = make_apex(__init__=content)
    with pytest.raises(ValueError, match=f'{folder}/__init__.py has no apex.parallel.SyncBatchNorm .*{reason}'
                       '.*pip uninstall apex, then .*git.https://github.com/NVIDIA/apex'):
        build_norm(dict(type='ApexSyncBN'), 6)


def test_frozen_statistics_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(SyncBatchNorm(3), nn.Dropout()))
    freeze_norm_statistics(model.train())
    assert [m.training for m in model.modules()] == [True, False, True, False, True]
    model(torch.randn(2, 3, 4, 4) + 5)
    assert (model[0].running_mean == 0).all() and model[0].num_batches_tracked == 0


@pytest.mark.parametrize('images', [2, 0])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('kind, training', [('BN', False), ('SyncBN', False), ('BN', True), ('GN', True)])
def test_norm_and_relu_together(kind: str, training: bool, residual: bool, images: int) -> None:
    norm = build_norm(dict(type=kind) | (dict(num_groups=2) if kind == 'GN' else {}), 6).double()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    norm.train(training and images > 0)  # PyTorch knows no statistics of nothing
    x, identity = (torch.randn(images, 6, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = (norm(x) + identity if residual else norm(x)).relu()
    found = norm_relu(norm, x, identity if residual else None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *norm.parameters(), *([identity] if residual else [])]
    grad = torch.randn_like(expected)
    grads = [torch.autograd.grad(output, inputs, grad) for output in (found, expected)]
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('norm', [dict(type='BN'), dict(type='SyncBN'), dict(type='GN', num_groups=4)])
def test_folded_into_convolutions(norm: dict, trained: Callable[[nn.Module], nn.Module]) -> None:
    """All but that of the deformable convolution; group norm has nothing to fold."""
    gcb, dcn = dict(ratio=1 / 4), dict(type='DCN')
    net = ResNet(50, norm_cfg=norm, gcb=gcb, stage_with_gcb=(False, (-1,), False, False),
                 dcn=dcn, stage_with_dcn=(False, False, False, True))
    net = trained(net).double().eval()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = net(x)
        assert fold_batch_norms(net) == (0 if norm['type'] == 'GN' else 53 - 3)
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    assert fold_batch_norms(net) == 0


def test_norms_in_training_are_not_folded() -> None:
    assert fold_batch_norms(ResNet(18, norm_eval=False).train()) == 0
    assert fold_batch_norms(ResNet(18).train()) == 0
