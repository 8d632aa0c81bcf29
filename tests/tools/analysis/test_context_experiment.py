"""tools/analysis/context_experiment.py: what it measures, what it repeats, and what it writes."""

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest
import torch

from mmdet.datasets.synthetic import CLASSES, generate
from mmdet.engine.launch import run_tool
from mmdet.models.layers.attention import NonLocal, SqueezeExcitation
from mmdet.models.layers.context_block import ContextBlock
from mmdet.registry import MODELS
from mmdet.structures.masks import segmentation_to_rle
from mmdet.utils.config import load_config

TOOL = Path(__file__).parents[3] / 'tools/analysis/context_experiment.py'
spec = importlib.util.spec_from_file_location('context_experiment', TOOL)
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

Run = Callable[..., tuple[object, str, str]]
NUMBERS = dict.fromkeys(tool.COLUMNS, 0.5)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data')
    generate(root, num_train=4, num_val=60, size=96)
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Run]:
    """Runs the tool: its exit status, and what it printed and complained of."""
    def start(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        return end.value.code, *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, before)


def write_predictions(data: Path, prefix: Path, names: dict[str, str | None]) -> None:
    """The truth as result files, in which some classes have another name, or are not found (None)."""
    records: dict[str, list] = dict(bbox=[], segm=[])
    for truth in json.loads((data / 'annotations/instances_val.json').read_text())['annotations']:
        name = CLASSES[truth['category_id'] - 1]
        name = names.get(name, name)
        if truth['iscrowd'] or name is None:
            continue
        rle = segmentation_to_rle(truth['segmentation'], 96, 96)
        head = dict(image_id=truth['image_id'], category_id=CLASSES.index(name) + 1, score=0.9)
        records['bbox'].append(head | dict(bbox=truth['bbox']))
        records['segm'].append(head | dict(segmentation=rle | dict(counts=rle['counts'].decode())))
    for iou_type, lines in records.items():
        Path(f'{prefix}.{iou_type}.json').write_text(json.dumps(lines))


@pytest.mark.parametrize('names, ambiguous, others, named_right', [
    ({}, 1, 1, 1),
    ({'sun': 'ball', 'ball': 'coin', 'coin': 'sun'}, 0, 1, 0),
    ({'sun': None}, 2 / 3, 1, 1),
    ({'star': None, 'brick': None, 'kite': 'flag', 'flag': 'kite'}, 1, 5 / 9, 1),
    ({'sun': None, 'ball': None, 'coin': None}, 0, 1, 0)])
def test_numbers_of_known_predictions(
    data: Path, tmp_path: Path, names: dict, ambiguous: float, others: float, named_right: float
) -> None:
    write_predictions(data, tmp_path / 'val', names)
    assert tool.measure(data / 'annotations/instances_val.json', tmp_path / 'val') == pytest.approx({
        'box AP, ambiguous': ambiguous, 'mask AP, ambiguous': ambiguous,
        'box AP, others': others, 'mask AP, others': others, 'named right': named_right})


def test_the_best_detection_on_an_object_names_it() -> None:
    truth = dict(image_id=1, category_id=10, bbox=[0, 0, 10, 10], iscrowd=0)

    def detection(category: int, score: float, width: int = 10, image: int = 1) -> dict:
        return dict(image_id=image, category_id=category, bbox=[0, 0, width, 10], score=score)

    # Neither another image's, another class's nor one that overlaps by 0.4 counts, nor what is not found.
    beside = [detection(11, 0.9, image=2), detection(1, 0.9), detection(11, 0.9, width=4)]
    truths = [truth, truth | dict(image_id=3), truth | dict(iscrowd=1), truth | dict(category_id=1)]
    share = tool.share_named_right
    assert share(truths, [*beside, detection(10, 0.5), detection(11, 0.4)], {10, 11, 12}) == 1
    assert share(truths, [*beside, detection(10, 0.5), detection(11, 0.6)], {10, 11, 12}) == 0
    assert share([truth, truth], [detection(10, 0.5)], {10, 11, 12}) == 1
    assert share([truth, truth | dict(category_id=11)], [detection(10, 0.5)], {10, 11, 12}) == 0.5
    assert share(truths, beside, {10, 11, 12}) == 0


def test_classes_without_objects_are_an_error(tmp_path: Path) -> None:
    generate(tmp_path, num_train=1, num_val=1, size=96)
    path = tmp_path / 'annotations/instances_val.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(annotations=[
        a for a in content['annotations'] if CLASSES[a['category_id'] - 1] not in tool.CONTEXT_CLASSES])))
    write_predictions(tmp_path, tmp_path / 'val', {})
    with pytest.raises(ValueError, match='has no object of sun, ball, coin: draw more images'):
        tool.measure(path, tmp_path / 'val')


@pytest.mark.parametrize('variant, block, planes', [
    ('none', None, 0), ('SE', SqueezeExcitation, 512 // 16), ('NL', NonLocal, 512 // 2),
    ('GC-r16', ContextBlock, 512 // 16), ('GC-r4', ContextBlock, 512 // 4)])
def test_variants(variant: str, block: type | None, planes: int) -> None:
    with torch.device('meta'):
        model = MODELS.build(load_config(tool.CONFIG, tool.VARIANTS[variant]).model)
    found = [module for name, module in model.named_modules() if name.endswith('.context_block')]
    assert [type(module) for module in found] == [block] * (6 if block else 0)
    if block:
        inside = [p.shape[0] for p in found[-1].parameters()]
        assert planes in inside


def test_table() -> None:
    """Mean and standard deviation, by hand: of 10, 20 and 60 they are 30 and sqrt(700) = 26.5."""
    values = (0.1, 0.2, 0.6)
    runs = {'none': {seed: NUMBERS | {'mask AP, others': value} for seed, value in enumerate(values)},
            'NL': {0: NUMBERS}}
    assert tool.markdown(runs) == (
        '| block | runs | box AP, ambiguous | box AP, others | mask AP, ambiguous | mask AP, others '
        '| named right |\n'
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n'
        '| none | 3 | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 30.0 ± 26.5 | 50.0 ± 0.0 |\n'
        '| NL | 1 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |\n')


def test_a_killed_experiment_goes_on(
    data: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, ...]] = []

    def call(name: str, *arguments: object, log: Path) -> None:
        """Leaves what the tools leave; is interrupted when it trains for the third time."""
        folder = log.parent
        calls.append((name, folder.parent.name, folder.name))
        if len(calls) == 5:
            raise KeyboardInterrupt
        if name == 'train.py':
            (folder / 'epoch_2.pth').touch()
        else:
            write_predictions(data, folder / 'val', {})

    monkeypatch.setattr(tool, 'call', call)
    flags = ['--data', data, '--out', tmp_path / 'out',
             '--variants', 'none', 'NL', '--seeds', 3, 5, '--epochs', 2]
    assert run(*flags)[0] == 130
    assert set(json.loads((tmp_path / 'out/results.json').read_text())) == {'none', 'NL'}
    # What was trained and not tested is only tested.
    (tmp_path / 'out/NL/seed_3/result.json').unlink()
    status, printed, _ = run(*flags)
    assert status == 0 and '[4/4] NL, seed 5' in printed and '| NL | 2 | 100.0 ± 0.0 |' in printed
    assert calls == [
        ('train.py', 'none', 'seed_3'), ('test.py', 'none', 'seed_3'),
        ('train.py', 'NL', 'seed_3'), ('test.py', 'NL', 'seed_3'),
        ('train.py', 'none', 'seed_5'),
        ('test.py', 'NL', 'seed_3'),
        ('train.py', 'none', 'seed_5'), ('test.py', 'none', 'seed_5'),
        ('train.py', 'NL', 'seed_5'), ('test.py', 'NL', 'seed_5')]
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert results['NL']['5'] == pytest.approx(dict.fromkeys(tool.COLUMNS, 1))
    assert (tmp_path / 'out/results.md').read_text() in printed
    assert cv2.imread(str(tmp_path / 'out/results.png')).shape[0] > 200

    status, _, error = run(*flags[:-1], 3)
    assert status == 1 and error == (
        f'error: --out {tmp_path}/out holds runs with epochs=2, not 3: choose another\n')


def test_a_failing_run_names_its_log(data: Path, tmp_path: Path, run: Run) -> None:
    status, _, error = run('--data', data, '--out', tmp_path, '--cfg-options', 'model.bacbone=1')
    log = tmp_path / 'none/seed_0/log.txt'
    assert status == 1
    assert error == f'error: train.py failed with status 1; the end of {log} says why\n'
    assert 'bacbone' in log.read_text()


@pytest.mark.parametrize('flags, message', [
    (['--data', 'nowhere'], 'python tools/make_synthetic.py nowhere'),
    (['--epochs', 0], '--epochs 0'),
    (['--seeds', -1], '--seeds -1'),
    (['--variants', 'CBAM'], "invalid choice: 'CBAM'")])
def test_bad_flags(data: Path, tmp_path: Path, run: Run, flags: list, message: str) -> None:
    status, _, error = run('--data', data, '--out', tmp_path / 'out', *flags)
    assert status in (1, 2) and message in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_a_real_run(data: Path, tmp_path: Path, run: Run) -> None:
    status, printed, error = run(
        '--data', data, '--out', tmp_path, '--variants', 'GC-r4', '--seeds', 0, '--epochs', 1)
    assert status == 0, error
    assert '[1/1] GC-r4, seed 0' in printed
    assert (tmp_path / 'GC-r4/seed_0/epoch_1.pth').exists()
