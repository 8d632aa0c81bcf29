"""Print a config with its bases and options merged, as a config file that loads again."""

import argparse
from collections.abc import Sequence

from mmdet.engine.launch import add_cfg_options, parse_args, run_tool
from mmdet.utils.config import load_config


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    add_cfg_options(parser)
    args = parse_args(parser, argv)
    print(load_config(args.config, args.cfg_options).pretty_text)


if __name__ == '__main__':
    run_tool(main)
