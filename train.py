"""Quantize a language model as a recipe says: `python train.py recipe=NAME key=value ...`, or `--help`."""

import sys

from slimplus.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
