"""What a training keeps in memory for context blocks: maps for the backward pass, and parameters.

Of the backbone and two images at 800 x 1344. A parameter counts three times: with its gradient and momentum.
"""

import torch
from common import device, out_parser, write_json
from detectors import CONFIGS
from torch import Tensor

from mmdet.registry import MODELS
from mmdet.utils.config import load_config

NAMES = [f'mask_rcnn_{context}r50_fpn_{norm}1x' for norm in ('', 'syncbn_')
         for context in ('', 'r16_gcb_c3-c5_', 'r4_gcb_c3-c5_')]


def measure(name: str, device: str) -> tuple[int, int]:
    """Bytes of the maps that the backward pass needs, and of parameters, gradients and momentum."""
    cfg = load_config(CONFIGS / f'{name}.py', {'model.backbone.pretrained': None})
    model = MODELS.build(cfg.model.backbone).train().to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # what is held here keeps its address

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(2, 3, 800, 1344, device=device))
    maps = sum(tensor.untyped_storage().nbytes() for start, tensor in kept.items() if start not in own)
    return maps, 3 * sum(p.nbytes for p in trained)


def main() -> None:
    parser = out_parser(__doc__)
    parser.add_argument('--device', type=device, default='cpu')
    args = parser.parse_args()
    records = []
    for name in NAMES:
        maps, parameters = measure(name, args.device)
        if '_gcb_' not in name:
            base = maps, parameters
        records.append(dict(name=name, maps=maps, parameters=parameters))
        print(f'{name:46} maps {maps / 1e6:7.1f} MB ({(maps - base[0]) / 1e6:+.1f}), '
              f'parameters {parameters / 1e6:6.1f} MB ({(parameters - base[1]) / 1e6:+.1f})', flush=True)
    write_json(args, records)


if __name__ == '__main__':
    main()
