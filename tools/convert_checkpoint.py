"""Convert a checkpoint from elsewhere (2019 format, mmdetection 2.x or 3.x) to this project's format.

    python tools/convert_checkpoint.py mask_rcnn_r4_gcb_c3-c5_r50_fpn_1x_20190602-18ae2dfd.pth gc.safetensors

Weights and meta are kept, as far as they are tensors and plain types, the state of the optimizer is not. The
meta of what was a file of 2019 says that it wants the numerics of 2019 (``legacy_2019``).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmdet.checkpoint import load_file, save_checkpoint
from mmdet.checkpoint_files import plain
from mmdet.engine.launch import parse_args, run_tool


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Convert a checkpoint to the format of this project.')
    parser.add_argument('source', metavar='IN', help='checkpoint: file or URL, .pth or .safetensors')
    parser.add_argument('target', metavar='OUT', help='file to write, .pth or .safetensors')
    parser.add_argument('--trust_checkpoint', action='store_true',
                        help='load IN even if it holds what could run code')
    return parser


def main(argv: Sequence[str]) -> None:
    args = parse_args(make_parser(), argv)
    target = Path(args.target)
    if target.suffix not in ('.pth', '.safetensors'):
        raise ValueError(f'{target} must end in .pth or .safetensors')
    content = load_file(args.source, trust=args.trust_checkpoint)
    is_address = args.source.startswith('file://')
    source = Path(unquote(urlsplit(args.source).path) if is_address else args.source)
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f'{target} would overwrite the checkpoint that it is made from: give another name')
    if not content['state_dict']:
        raise ValueError(f'{args.source} holds no weights')
    meta, left_out = plain_part(content['meta'])
    target.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(dict(meta=meta, state_dict=content['state_dict']), target)
    legacy = ', which want the numerics of 2019' if meta.get('legacy_2019') else ''
    print(f'{target}: {len(content["state_dict"])} tensors{legacy}')
    if left_out:
        print(f'left out of meta, being no plain types: {", ".join(left_out)}')


def plain_part(meta: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The items of ``meta`` that a checkpoint may hold, and the keys of the others."""
    kept, left_out = {}, []
    for key, value in meta.items():
        try:
            kept[key] = plain(value, key)
        except TypeError:
            left_out.append(key)
    return kept, left_out


if __name__ == '__main__':
    run_tool(main)
