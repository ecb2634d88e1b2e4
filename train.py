"""Quantize a language model as a recipe says: `python train.py recipe=NAME key=value ...`, or `--help`."""

import sys

try:
    from slimplus.cli.main import main
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed: run `make install` and `source .venv/bin/activate`, or `pip install .`")

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
