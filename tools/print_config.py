"""Print a config with its bases and options merged, as a config file that loads again."""

import argparse
import sys

from mmdet.utils.config import CfgOptions, ConfigError, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--cfg-options', '--cfg_options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help='override keys: model.backbone.depth=101')
    args = parser.parse_args()
    try:
        print(load_config(args.config, args.cfg_options).pretty_text)
    except (ConfigError, FileNotFoundError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
