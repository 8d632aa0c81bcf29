import io
import os
import pickle
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from mmengine.logging import HistoryBuffer
from torch import nn

from mmdet import checkpoint as ckpt


def small_net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 1), bn=nn.BatchNorm2d(2)))


def test_a_file_written_by_mmengine_is_read(tmp_path: Path) -> None:
    hub = dict(log_scalars={'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}, scalar=np.float64(0.25))
    hub['method'] = HistoryBuffer.mean  # pickled as getattr(HistoryBuffer, 'mean')
    state = small_net().state_dict()
    torch.save(dict(meta=dict(epoch=3), state_dict=state, message_hub=hub), tmp_path / 'e.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'e.pth', weights_only=True)

    loaded = ckpt.load_file(tmp_path / 'e.pth')

    assert loaded['meta'] == dict(epoch=3)
    assert loaded['message_hub']['scalar'] == 0.25
    assert all(torch.equal(loaded['state_dict'][name], value) for name, value in state.items())


class Planted:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'planted', [os.system, eval, subprocess.check_call], ids=['os', 'eval', 'subprocess']
)
def test_a_file_that_would_run_code_is_refused(tmp_path: Path, planted) -> None:
    victim = tmp_path / 'victim'
    code = f'open({str(victim)!r}, "w")' if planted is eval else f'touch {victim}'
    torch.save(dict(state_dict=small_net().state_dict(), x=Planted(planted, code)), tmp_path / 'e.pth')
    with pytest.raises(
        ValueError, match=r'e\.pth was refused: it holds \S*(system|eval|check_call), which could'
    ):
        ckpt.load_file(tmp_path / 'e.pth')
    assert not victim.exists()


def test_getattr_in_a_file_reaches_nothing(tmp_path: Path) -> None:
    stolen = Planted(getattr, torch.nn.Parameter, '__subclasses__')
    torch.save(dict(state_dict=small_net().state_dict(), x=stolen), tmp_path / 'e.pth')
    assert ckpt.load_file(tmp_path / 'e.pth')['x'] is None


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'the file is empty'),
        (b'not a checkpoint' * 99, 'is not a checkpoint, or is damaged'),
        (None, 'is not a checkpoint, or is damaged'),
        ([1, 2], 'it holds a list without a state_dict'),
        (dict(a=1), 'it holds a dict without a state_dict'),
    ],
)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / 'e.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        torch.save(dict(state_dict=small_net().state_dict()), path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        ckpt.load_file(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_a_pickle_of_results_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / 'r.pkl').write_bytes(pickle.dumps([dict(boxes=np.zeros((1, 4)))]))
    with pytest.raises(ValueError, match='not a checkpoint'):
        ckpt.load_file(tmp_path / 'r.pkl')


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no.pth does not exist'):
        ckpt.load_file(tmp_path / 'no.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        ckpt.load_file(tmp_path)


def test_saved_and_loaded_weights_are_equal(tmp_path: Path) -> None:
    source, target = small_net(), small_net()
    meta = dict(epoch=np.int64(2), seed=7, classes=('a', 'b'), lr=np.float32(0.5))
    ckpt.save_checkpoint(dict(meta=meta, state_dict=source.state_dict()), tmp_path / 'e.pth')
    content = ckpt.load_file(tmp_path / 'e.pth')
    ckpt.load_weights(target, content['state_dict'], 'e.pth')
    assert content['meta'] == dict(epoch=2, seed=7, classes=('a', 'b'), lr=0.5)
    assert torch.equal(source.conv.weight, target.conv.weight)
    torch.load(tmp_path / 'e.pth', weights_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ['e.pth']


def test_a_bare_state_dict_with_the_wrapper_prefix_is_loaded(tmp_path: Path) -> None:
    source, target = small_net(), small_net()
    torch.save({f'module.{name}': value for name, value in source.state_dict().items()}, tmp_path / 'e.pth')
    content = ckpt.load_file(tmp_path / 'e.pth')
    ckpt.load_weights(target, content['state_dict'], 'e.pth')
    assert content['meta'] == {}
    assert torch.equal(source.conv.weight, target.conv.weight)


def test_only_plain_types_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match='meta.path is a PosixPath'):
        ckpt.save_checkpoint(dict(meta=dict(path=tmp_path)), tmp_path / 'e.pth')
    assert not list(tmp_path.iterdir())


def test_another_model_is_an_error_that_lists_what_differs(tmp_path: Path) -> None:
    other = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 5, 1), fc=nn.Linear(2, 2)))
    ckpt.save_checkpoint(dict(state_dict=other.state_dict()), tmp_path / 'e.pth')
    target = small_net()
    before = target.conv.weight.clone()
    with pytest.raises(ValueError) as error:
        ckpt.load_weights(target, ckpt.load_file(tmp_path / 'e.pth')['state_dict'], f'{tmp_path}/e.pth')
    assert str(error.value).splitlines() == [
        f'{tmp_path}/e.pth does not fit the model: 5 of 7 names missing, 2 unknown, 2 of another shape',
        '  missing in the file:',
        '    bn.{weight, bias, running_mean, running_var, num_batches_tracked}',
        '  unknown to the model:',
        '    fc.{weight, bias}',
        '  of another shape:',
        '    conv.weight: (5, 3, 1, 1) in the file, (2, 3, 1, 1) in the model',
        '    conv.bias: (5,) in the file, (2,) in the model',
    ]
    assert torch.equal(target.conv.weight, before)


def test_a_process_killed_while_writing_leaves_the_checkpoint_of_before(tmp_path: Path) -> None:
    path = tmp_path / 'e.pth'
    ckpt.save_checkpoint(dict(state_dict=dict(x=torch.ones(3))), path)
    script = f"""
import os, signal, torch
from mmdet import checkpoint
write = torch.save
def save(content, file):
    write(content, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.torch.save = save
checkpoint.save_checkpoint(dict(state_dict=dict(x=torch.zeros(3))), {str(path)!r})
"""
    assert subprocess.run([sys.executable, '-c', script]).returncode == -signal.SIGKILL
    assert (tmp_path / 'e.pth.tmp').exists()
    assert ckpt.load_file(path)['state_dict']['x'].tolist() == [1, 1, 1]
    ckpt.save_checkpoint(dict(state_dict=dict(x=torch.zeros(3))), path)
    assert [p.name for p in tmp_path.iterdir()] == ['e.pth']


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'e.pth'
    ckpt.save_checkpoint(dict(state_dict=dict(x=torch.ones(3))), path)

    def fail(content: object, file: io.IOBase) -> None:
        file.write(b'half')
        raise RuntimeError('PytorchStreamWriter failed writing file\n at somewhere')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match=r'cannot write .*e\.pth'):
        ckpt.save_checkpoint(dict(state_dict=dict(x=torch.zeros(3))), path)
    monkeypatch.undo()
    assert ckpt.load_file(path)['state_dict']['x'].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ['e.pth']


def test_the_last_checkpoint_has_the_highest_number(tmp_path: Path) -> None:
    assert ckpt.find_checkpoint(tmp_path) is None
    for name in ('epoch_9.pth', 'epoch_10.pth', 'epoch_11.pth.tmp', 'best_toy_epoch_12.pth'):
        (tmp_path / name).touch()
    assert ckpt.find_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')


def test_the_last_checkpoint_is_the_one_that_is_noted(tmp_path: Path) -> None:
    for name in ('epoch_9.pth', 'epoch_3.pth', 'elsewhere.pth'):
        (tmp_path / name).touch()
    note = tmp_path / 'last_checkpoint'
    note.write_text('folder/that/moved/epoch_3.pth')
    assert ckpt.find_checkpoint(tmp_path) == str(tmp_path / 'epoch_3.pth')
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'last_checkpoint').write_text(str(tmp_path / 'elsewhere.pth'))
    assert ckpt.find_checkpoint(tmp_path / 'w') == str(tmp_path / 'elsewhere.pth')
    note.write_text('gone.pth')
    assert ckpt.find_checkpoint(tmp_path) == str(tmp_path / 'epoch_9.pth')


class Backbone(torchvision.models.ResNet):
    """torchvision's ResNet-18 as a backbone: no fc, one context block."""

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
        del self.fc
        self.layer2[0].context_block = nn.Conv2d(128, 1, 1)


def test_pretrained_backbone_comes_from_a_file_without_fc(tmp_path: Path) -> None:
    source, backbone = torchvision.models.resnet18(), Backbone()
    torch.save(source.state_dict(), tmp_path / 'r18.pth')
    own = backbone.layer2[0].context_block.weight.clone()
    ckpt.load_pretrained_backbone(backbone, str(tmp_path / 'r18.pth'))
    assert torch.equal(backbone.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(backbone.layer2[0].context_block.weight, own)


@pytest.mark.parametrize('bias', [0.0, 1.0])
def test_pretrained_weights_of_openmmlab_and_of_caffe(tmp_path: Path, bias: float) -> None:
    source, backbone = torchvision.models.resnet18(), Backbone()
    weights = {f'backbone.{name}': value for name, value in source.state_dict().items() if 'fc.' not in name}
    weights |= {'backbone.conv1.bias': torch.full((64,), bias), 'head.fc.weight': torch.ones(2, 512)}
    torch.save(dict(state_dict=weights), tmp_path / 'r18.pth')
    if bias:
        with pytest.raises(ValueError, match=r'1 unknown.*\n.*\n    conv1\.bias'):
            ckpt.load_pretrained_backbone(backbone, str(tmp_path / 'r18.pth'))
    else:
        ckpt.load_pretrained_backbone(backbone, str(tmp_path / 'r18.pth'))
        assert torch.equal(backbone.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_pretrained_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / 'r34.pth')
    with pytest.raises(
        ValueError, match=r'r34\.pth does not fit the model: 0 of \d+ names missing, \d+ unknown'
    ):
        ckpt.load_pretrained_backbone(Backbone(), str(tmp_path / 'r34.pth'))


def test_pretrained_offline_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(FileNotFoundError) as error:
        ckpt.load_pretrained_backbone(Backbone(), 'torchvision://resnet18')
    message = str(error.value)
    assert '\n' not in message
    assert f'put the file at {tmp_path}/hub/checkpoints/resnet18-f37072fd.pth' in message
    assert 'model.backbone.pretrained=None' in message

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'hub/checkpoints/resnet18-f37072fd.pth')
    ckpt.load_pretrained_backbone(Backbone(), 'torchvision://resnet18')


def test_an_unknown_torchvision_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match='torchvision has no such network; it has resnet101, resnet152, resnet18'
    ):
        ckpt.load_pretrained_backbone(Backbone(), 'torchvision://resnet55')
