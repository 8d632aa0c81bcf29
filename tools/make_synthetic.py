"""Draw the synthetic data set: COCO-format annotations and JPEGs, for a quick start without any download.

    python tools/make_synthetic.py data/synthetic
"""

import argparse
import inspect
from collections.abc import Sequence

from mmdet.datasets.synthetic import generate
from mmdet.engine.launch import parse_args, run_tool


def main(argv: Sequence[str]) -> None:
    default = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    parser = argparse.ArgumentParser(description='Draw the synthetic data set.',
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', help='folder to write to')
    parser.add_argument('--num_train', type=int, default=default['num_train'], help='training images')
    parser.add_argument('--num_val', type=int, default=default['num_val'], help='validation images')
    parser.add_argument('--size', type=int, default=default['size'], help='height and width in pixels')
    parser.add_argument('--seed', type=int, default=default['seed'], help='another seed gives other images')
    args = parse_args(parser, argv)
    generate(**vars(args))
    print(f'Wrote {args.num_train} training and {args.num_val} validation images to {args.root}')


if __name__ == '__main__':
    run_tool(main)
