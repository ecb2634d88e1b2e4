"""Quantize a language model as a recipe says: `python train.py recipe=NAME key=value ...`, or `--help`."""

import sys

from slimplus.cli.train import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
