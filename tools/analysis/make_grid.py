"""Put some of a folder's pictures into one, such as those of `tools/test.py --show_dir FOLDER`.

    python tools/analysis/make_grid.py FOLDER --out grid.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdet.engine.launch import parse_args, run_tool
from mmdet.visualization import draw_grid, write_image


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Put some of a folder's pictures into one.")
    parser.add_argument('folder', type=Path, help='folder of pictures, which may be in sub-folders')
    parser.add_argument('--out', required=True, help='picture to write')
    parser.add_argument('--num', type=int, default=12, help='how many, evenly spread (default 12)')
    parser.add_argument('--columns', type=int, default=4, help='how many side by side (default 4)')
    args = parse_args(parser, argv)
    if args.num < 1:
        raise ValueError(f'--num {args.num}: at least one picture is needed')
    if not args.folder.is_dir():
        raise FileNotFoundError(f'{args.folder}: no such folder')
    paths = sorted(path for path in args.folder.rglob('*') if cv2.haveImageWriter(str(path)))
    if not paths:
        raise FileNotFoundError(f'{args.folder} holds no picture, such as a .jpg or .png file')
    chosen = np.linspace(0, len(paths) - 1, min(args.num, len(paths))).round().astype(int)
    pictures = []
    for path in (paths[i] for i in chosen):
        picture = cv2.imread(str(path))
        if picture is None:
            raise ValueError(f'{path} cannot be decoded')
        pictures.append(picture)
    write_image(args.out, draw_grid(pictures, args.columns))
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
