import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdet.models.layers.norm import SyncBatchNorm, build_norm, freeze_norm_statistics

ROOT = Path(__file__).resolve().parents[3]
CHANNELS = 5
STEPS = 2
SHAPES = {
    'equal': [(2, CHANNELS, 6, 7)] * 2,
    'unequal': [(2, CHANNELS, 6, 7), (3, CHANNELS, 9, 4)],
    'empty rank': [(2, CHANNELS, 6, 7), (0, CHANNELS, 3, 3)],
    'one position each': [(1, CHANNELS, 1, 1)] * 2,
    'vectors': [(4, CHANNELS), (7, CHANNELS)],
}


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


@pytest.fixture(scope='module')
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, list[dict]]]:
    """All cases, in two processes: name -> (case, the ranks' results)."""
    torch.manual_seed(0)
    cases = {name: make_case(shapes, torch.float64) for name, shapes in SHAPES.items()}
    cases['float32, far from zero'] = make_case(SHAPES['unequal'], torch.float32, offset=1000)
    results = run_processes(list(cases.values()), 2, tmp_path_factory.mktemp('norm'))
    return {name: (case, [rank[i] for rank in results]) for i, (name, case) in enumerate(cases.items())}


def flat(x: Tensor) -> Tensor:
    """(N, C, ...) to (elements, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


@pytest.mark.parametrize('name', [*SHAPES, 'float32, far from zero'])
def test_two_processes_are_one_batch(computed: dict, name: str) -> None:
    case, ranks = computed[name]
    # Far from zero float32 itself resolves but 1e-4; E[x^2] - E[x]^2 would be wrong in the first digit.
    bound = 1e-12 if case['state']['weight'].dtype == torch.float64 else 1e-3
    norm = nn.BatchNorm1d(CHANNELS).double()
    norm.load_state_dict(case['state'])
    for step in range(STEPS):
        x = torch.cat([flat(rank[step][0].double()) for rank in case['steps']]).requires_grad_()
        out = norm(x)
        (out * torch.cat([flat(rank[step][1].double()) for rank in case['steps']])).sum().backward()
        for what, expected in dict(outputs=out, gradients=x.grad).items():
            found = torch.cat([flat(rank[what][step]) for rank in ranks]).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    for what in ('weight', 'bias'):
        # Each rank's own part: DDP adds them up.
        found = (ranks[0][what] + ranks[1][what]).double()
        torch.testing.assert_close(found, getattr(norm, what).grad, rtol=bound, atol=bound)
    for rank, steps in zip(ranks, case['steps']):
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(rank['state'][key].to(value.dtype), value, rtol=bound, atol=bound)
        x = flat(steps[0][0].double())
        expected = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(flat(rank['eval']).double(), expected.detach(), rtol=0, atol=10 * bound)


def test_one_process_of_a_group_is_plain_batch_norm(tmp_path: Path) -> None:
    case = make_case([(2, CHANNELS, 6, 7)], torch.float64)
    (result,), = run_processes([case], 1, tmp_path)
    norm = nn.BatchNorm2d(CHANNELS).double()
    norm.load_state_dict(case['state'])
    for (x, _), out in zip(case['steps'][0], result['outputs'], strict=True):
        torch.testing.assert_close(out, norm(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(result['state'], norm.state_dict(), rtol=0, atol=1e-12)


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


def test_frozen_statistics_stay() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(SyncBatchNorm(3), nn.Dropout()))
    freeze_norm_statistics(model.train())
    assert [m.training for m in model.modules()] == [True, False, True, False, True]
    model(torch.randn(2, 3, 4, 4) + 5)
    assert (model[0].running_mean == 0).all() and model[0].num_batches_tracked == 0
