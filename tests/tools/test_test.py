from pathlib import Path

import pytest
import torch

from mmdet.checkpoint import save_checkpoint

TOY = Path(__file__).resolve().parents[1] / 'engine' / 'toy_config.py'
ON_CPU = dict(CUDA_VISIBLE_DEVICES='')


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of the toy model, of classes a and b."""
    conv, bn, fc = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 1)
    state = {
        f'{name}.{key}': value
        for name, layer in dict(conv=conv, bn=bn, fc=fc).items()
        for key, value in layer.state_dict().items()
    }
    save_checkpoint(
        dict(meta=dict(dataset_meta=dict(classes=('a', 'b'))), state_dict=state), tmp_path / 'e.pth'
    )
    return tmp_path / 'e.pth'


def test_one_and_two_processes_write_the_same_file(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    one = run_toy('tools/test.py', TOY, checkpoint, '--out', 'a/b/one.pkl', OMP_NUM_THREADS='1', **ON_CPU)
    two = run_toy('tools/dist_test.sh', TOY, checkpoint, 2, '--out', 'two.pkl', OMP_NUM_THREADS='1', **ON_CPU)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert 'eta: ' in one.stdout
    written = (tmp_path / 'a' / 'b' / 'one.pkl').read_bytes()
    assert written == (tmp_path / 'two.pkl').read_bytes()
    assert len(eval(written)) == 5


def test_half_precision_comes_near(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    for name, flags in (('single', ()), ('half', ('--amp', 'bf16'))):
        done = run_toy('tools/test.py', TOY, checkpoint, '--out', f'{name}.pkl', *flags, **ON_CPU)
        assert done.returncode == 0, done.stderr
    single, half = (
        torch.tensor(eval((tmp_path / f'{name}.pkl').read_bytes())) for name in ('single', 'half'))
    assert not torch.equal(single, half)
    torch.testing.assert_close(single, half, rtol=0.05, atol=0.02)


def test_several_metrics_and_averaged_weights(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    """The flags are for the first metric; hooks that are for training, as averaging, do nothing."""
    plain = run_toy('tools/test.py', TOY, checkpoint, '--out', 'plain.pkl', **ON_CPU)
    config = tmp_path / 'list.py'
    config.write_text(f"_base_ = '{TOY}'\ncustom_hooks = [dict(type='EMAHook'), "
                      "dict(type='EarlyStoppingHook', monitor='toy/mean')]\n"
                      "test_evaluator = [dict(type='ToyMetric'), dict(type='ToyMetric', prefix='second')]\n")
    done = run_toy('tools/test.py', config, checkpoint, '--out', 'r.pkl', **ON_CPU)
    assert (plain.returncode, done.returncode) == (0, 0), plain.stderr + done.stderr
    assert 'toy/mean: ' in done.stdout and 'second/mean: ' in done.stdout
    assert (tmp_path / 'r.pkl').read_bytes() == (tmp_path / 'plain.pkl').read_bytes()


def test_an_evaluator_keeps_what_no_flag_changes(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / 'own.py'
    config.write_text(f"_base_ = '{TOY}'\ntest_evaluator = dict(_delete_=True, type='Evaluator', "
                      "metrics=dict(type='ToyMetric', out='own.pkl'))\n")
    done = run_toy('tools/test.py', config, checkpoint, '--eval', 'bbox', **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert len(eval((tmp_path / 'own.pkl').read_bytes())) == 5
    done = run_toy('tools/test.py', config, checkpoint, '--out', 'r.pkl', **ON_CPU)
    assert (tmp_path / 'r.pkl').read_bytes() == (tmp_path / 'own.pkl').read_bytes()


def test_folded_batch_norms_give_the_same_up_to_rounding(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for flags in ([], ['--fuse-conv-bn']):
        done = run_toy('tools/test.py', TOY, checkpoint, '--out', 'r.pkl', *flags, **ON_CPU)
        assert done.returncode == 0, done.stderr
        assert ('1 batch norms folded into convolutions' in done.stdout + done.stderr) == bool(flags)
        found.append(torch.tensor(eval((tmp_path / 'r.pkl').read_bytes())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'nothing to do with the predictions: give --eval, --out, --json_prefix or --show_dir'),
        (['--out', 'r.pkl', '--amp', 'fp16'], 'float16 needs a GPU; on the CPU use bfloat16 (--amp bf16)'),
        (['--out', 'r.json'], '--out r.json must end in .pkl or .pickle'),
        (['--out', 'e.pth/r.pkl'], "[Errno 17] File exists: 'e.pth'"),
        (
            ['--out', 'r.pkl', '--cfg-options', "test_dataloader.dataset.names=('a','c')"],
            'e.pth was trained on the classes a, b, but the data set of the config has a, c',
        ),
    ],
)
def test_errors_before_the_test_are_one_line(
    error_of_toy, checkpoint: Path, arguments: list, message: str
) -> None:
    error = error_of_toy('tools/test.py', TOY, 'e.pth', *arguments)
    assert error.startswith(f'error: {message}')
    assert error.count('\n') == 1


def test_a_checkpoint_of_another_model_is_refused(error_of_toy, tmp_path: Path) -> None:
    save_checkpoint(dict(state_dict={'fc.weight': torch.zeros(2, 4)}), tmp_path / 'e.pth')
    error = error_of_toy('tools/test.py', TOY, 'e.pth', '--out', 'r.pkl')
    assert error.startswith(
        'error: e.pth does not fit the model: 8 of 9 names missing, 0 unknown, 1 of another shape\n'
    )
    assert '    fc.weight: (2, 4) in the file, (1, 4) in the model\n' in error
    assert not (tmp_path / 'r.pkl').exists()


def test_a_test_leaves_the_config_of_the_training_alone(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w' / 'toy_config.py').write_text('of the training')
    done = run_toy('tools/test.py', TOY, checkpoint, '--out', 'r.pkl', '--work-dir', 'w', **ON_CPU)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'w' / 'toy_config.py').read_text() == 'of the training'


def test_weights_that_lack_are_named_and_allowed_on_demand(run_toy, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content['state_dict']['fc.bias']
    torch.save(content | dict(other=range(3)), checkpoint)
    done = run_toy('tools/test.py', TOY, 'e.pth', '--out', 'r.pkl', '--allow-partial', '--trust-checkpoint',
                   **ON_CPU)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count('e.pth does not fit the model: 1 of 9 names missing, 0 unknown, 0 of another') == 1
    assert 'missing in the file:\n    fc.bias\n' in said
    assert (tmp_path / 'r.pkl').exists()


def test_a_checkpoint_may_be_a_url(error_of_toy, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_HOME', str(checkpoint.parent / 'cache'))
    checkpoint.rename(checkpoint.with_name('e-01234567.pth'))
    url = checkpoint.with_name('e-01234567.pth').as_uri()
    error = error_of_toy('tools/test.py', TOY, url, '--out', 'r.pkl')
    assert error.startswith(f'error: {url} is not the file that its name promises: invalid hash value')
    assert '"01234567"' in error
