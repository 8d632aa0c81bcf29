"""A model and a data set of a few numbers, to test the loop around them; toy_config.py imports it."""

import os
import signal

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmdet.models.layers.norm import build_norm
from mmdet.registry import DATASETS, METRICS, MODELS


@MODELS.register_module()
class ToyModel(BaseModel):
    """Convolution, batch norm, and a loss with a random mask, so that random state matters."""

    def __init__(self, nan_from: int = -1, norm: str = 'BN') -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = build_norm(dict(type=norm), 4)
        self.fc = nn.Linear(4, 1)
        self.steps = 0
        self.nan_from = nan_from

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'loss'):
        score = self.fc(self.bn(self.conv(inputs)).relu().mean((2, 3)))[:, 0]
        if mode == 'predict':
            return [dict(score=s) for s in score]
        kept = torch.rand(len(score)) < 0.7
        loss = ((score - targets).square() * kept).mean()
        self.steps += 1
        if 0 <= self.nan_from < self.steps:
            loss = loss * float('nan')
        return dict(loss_toy=loss, loss_size=self.fc.weight.square().sum() * 1e-3)


@DATASETS.register_module()
class ToyDataset(Dataset):
    """``size`` images of noise, that differ from epoch to epoch by nothing."""

    def __init__(self, size: int = 12, missing: int = -1, names: tuple[str, ...] = ('a', 'b')) -> None:
        self.metainfo = dict(classes=names)
        self.size = size
        self.missing = missing

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if index == self.missing:
            raise FileNotFoundError(f'image {index} does not exist')
        if os.environ.get('TOY_KILL_RANK') == os.environ.get('RANK', '0') and index < 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get('TOY_EXIT_RANK') == os.environ.get('RANK', '0') and index < 4:
            os._exit(3)
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(3, 8, 8, generator=generator), targets=torch.tensor(float(index % 3)))


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Mean score; takes, and keeps, the arguments that tools/test.py sets."""

    default_prefix = 'toy'

    def __init__(self, metric=(), out=None, outfile_prefix=None, eval_backend='hotcoco',
                 prefix=None) -> None:
        super().__init__(prefix=prefix)
        self.out = out

    def process(self, data_batch, data_samples) -> None:
        self.results += [sample['score'].item() for sample in data_samples]

    def compute_metrics(self, results) -> dict:
        if self.out:
            with open(self.out, 'w') as file:
                file.write(repr(results))
        return dict(mean=sum(results) / len(results))
